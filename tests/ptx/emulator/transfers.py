"""ld and st: parameters, global and shared memory."""

import re
from typing import Any

import numpy as np

from emulator.conversions import braced
from emulator.memory import note_read, note_write
from emulator.program import Fault, Instruction, Program
from emulator.races import Release
from emulator.values import ALL, NUMBERS, SIGNED, SIZES, UNSIGNED, Array, Lanes
from emulator.warp import Warp

SHARED = {"shared", "shared::cta"}
ATOMIC = {"relaxed", "acquire", "release", "volatile"}


def resize(size: int, kind: str) -> Any:
    """Return what fits a value of type `kind` into a register of `size` bytes; None where it does."""
    if size == SIZES[kind]:
        return None
    if kind in SIGNED:
        return lambda value: value.view(NUMBERS[kind]).astype(NUMBERS[f"s{8 * size}"]).view(UNSIGNED[size])
    return lambda value: value.astype(UNSIGNED[size])


def decode_ld(program: Program, instruction: Instruction) -> Any:
    parts, (targets, source) = instruction.parts, instruction.operands[:2]  # a third one is a cache policy
    kind = parts[-1]
    size = SIZES[kind]
    registers = [program.register(name, size) for name in braced(targets)]
    fit = [resize(program.sizes[register], kind) for register in registers]
    if "param" in parts:
        return load_parameter(program, source, registers[0], fit[0], size)
    count, width = len(registers), len(registers) * size
    within = np.arange(count)[:, None]
    shift = size.bit_length() - 1

    def deliver(warp: Warp, lanes: Lanes, elements: Array, offsets: Array) -> None:
        index = offsets >> shift if lanes is ALL else np.where(lanes, offsets, 0) >> shift
        for register, change, value in zip(registers, fit, elements[index + within], strict=True):
            warp.write(lanes, register, value if change is None else change(value))

    if SHARED & set(parts):
        base, offset = program.address(source, 4)

        def load_shared(warp: Warp, lanes: Lanes) -> None:
            addresses = warp.registers[base].astype(np.int64) + offset
            warp.shared.read(warp, addresses if lanes is ALL else addresses[lanes], width)
            deliver(warp, lanes, warp.shared.elements[size], addresses)

        return load_shared
    if {"local", "cta"} & set(parts):
        return None
    base, offset = program.address(source, 8)
    atomic, acquire = bool(ATOMIC & set(parts)), "acquire" in parts

    def load_global(warp: Warp, lanes: Lanes) -> None:
        addresses = warp.registers[base].view(np.int64) + offset
        for buffer, here, offsets in warp.memory.spans(warp, lanes, addresses, width):
            starts = offsets if here is ALL else offsets[here]
            note_read(warp, buffer, starts, width, atomic=atomic)
            deliver(warp, here, buffer.elements[size], offsets)
            if acquire:
                for start in starts:
                    if int(start) in buffer.releases:
                        buffer.releases[int(start)].teach(warp)

    return load_global


def load_parameter(program: Program, source: str, target: int, fit: Any, size: int) -> Any:
    found = re.fullmatch(r"\[\s*[\w$]+_param_(\d+)\s*\]", source)
    if not found:
        raise Fault(f"{source} is no parameter that is known here")
    register = program.parameter_registers[int(found[1])]

    def load(warp: Warp, lanes: Lanes) -> None:
        value = warp.registers[register].astype(UNSIGNED[size])
        warp.write(lanes, target, value if fit is None else fit(value))

    return load


def decode_st(program: Program, instruction: Instruction) -> Any:
    parts, (target, sources) = instruction.parts, instruction.operands[:2]
    size = SIZES[parts[-1]]
    registers = [program.register(name, size) for name in braced(sources)]
    count, width, kind = len(registers), len(registers) * size, UNSIGNED[size]

    def data_of(warp: Warp, lanes: Lanes) -> Array:
        """Elements [lanes, count]."""
        values = [warp.registers[r].astype(kind, copy=False) for r in registers]
        stacked = values[0][:, None] if count == 1 else np.stack(values, axis=1)
        return stacked if lanes is ALL else stacked[lanes]

    within = np.arange(count)
    shift = size.bit_length() - 1
    if SHARED & set(parts):
        base, offset = program.address(target, 4)

        def store_shared(warp: Warp, lanes: Lanes) -> None:
            addresses = warp.registers[base].astype(np.int64) + offset
            starts = addresses if lanes is ALL else addresses[lanes]
            data = np.ascontiguousarray(data_of(warp, lanes))
            warp.shared.write(warp, starts, data.view(np.uint8).reshape(-1, width))

        return store_shared
    if {"local", "cta"} & set(parts):
        return None
    base, offset = program.address(target, 8)
    atomic, release = bool(ATOMIC & set(parts)), "release" in parts

    def store_global(warp: Warp, lanes: Lanes) -> None:
        addresses = warp.registers[base].view(np.int64) + offset
        for buffer, here, offsets in warp.memory.spans(warp, lanes, addresses, width):
            starts = offsets if here is ALL else offsets[here]
            note_write(warp, buffer, starts, width, atomic=atomic)
            buffer.elements[size][(starts >> shift)[:, None] + within] = data_of(warp, here)
            for start in starts if release or buffer.releases else ():
                buffer.releases.pop(int(start), None)  # a plain store ends what an acquire would find
                if release:
                    buffer.releases[int(start)] = Release.by(warp)
        if release:
            warp.tick()

    return store_global


DECODERS = {"ld": decode_ld, "st": decode_st}
