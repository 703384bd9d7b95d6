"""mov, cvt, cvta and createpolicy: from register to register."""

from typing import Any

import numpy as np

from emulator.arithmetic import on_registers
from emulator.program import Instruction, Program
from emulator.values import FROM_HALF, NUMBERS, SIZES, TO_HALF, UNSIGNED, Array

ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def braced(text: str) -> list[str]:
    """Return the registers of {a, b}; of a single one as well."""
    return [name.strip() for name in text.strip("{} ").split(",")]


def decode_mov(program: Program, instruction: Instruction) -> Any:
    target, source = instruction.operands
    size = SIZES[instruction.parts[-1]]
    if target.startswith("{"):
        names = braced(target)
        part = size // len(names)
        source_register = program.register(source, size)
        targets = [program.register(name, part) for name in names]

        def unpack(warp: Any, lanes: Any) -> None:
            parts = warp.registers[source_register].view(UNSIGNED[part]).reshape(32, -1)
            for i, register in enumerate(targets):
                warp.write(lanes, register, np.ascontiguousarray(parts[:, i]))

        return unpack
    if source.startswith("{"):
        names = braced(source)
        sources = [program.register(name, size // len(names)) for name in names]
        register = program.register(target, size)

        def pack(warp: Any, lanes: Any) -> None:
            stacked = np.stack([warp.registers[s] for s in sources], axis=1)
            warp.write(lanes, register, stacked.view(UNSIGNED[size])[:, 0])

        return pack
    return on_registers(program, instruction, lambda a: a, [size, size])


def decode_cvt(program: Program, instruction: Instruction) -> Any:
    *modifiers, to, of = instruction.parts[1:]
    if not set(modifiers) <= {*ROUNDINGS, "rn", "ftz"}:
        return None
    if to.endswith("x2"):  # the first source is the upper half
        half = TO_HALF.get(to.removesuffix("x2"))
        if half is None or of != "f32":
            return None

        def pair(high: Array, low: Array) -> Array:
            halves = np.stack([half(low.view(np.float32)), half(high.view(np.float32))], axis=1)
            return halves.view(np.uint32)[:, 0]

        return on_registers(program, instruction, pair, [4, 4, 4])
    if to not in SIZES or of not in SIZES:
        return None
    rounding = next((ROUNDINGS[m] for m in modifiers if m in ROUNDINGS), None)
    of_size = SIZES[of]

    def convert(bits: Array) -> Array:
        if bits.dtype.itemsize > of_size:  # the lower part of a wider register
            bits = bits.astype(UNSIGNED[of_size])
        value = FROM_HALF[of](bits) if of in FROM_HALF else bits.view(NUMBERS[of])
        if rounding is not None and value.dtype.kind == "f":
            value = rounding(value)
        if to in TO_HALF:
            return TO_HALF[to](value.astype(np.float32))
        if value.dtype.kind == "f" and NUMBERS[to] not in (np.float32, np.float64):
            value = saturated(value, NUMBERS[to])
        return value.astype(NUMBERS[to]).view(UNSIGNED[SIZES[to]])

    return on_registers(program, instruction, convert, [SIZES[to], of_size])


def saturated(value: Array, kind: type) -> Array:
    """Integers that a float is too large for become the last one; NaN becomes 0."""
    wide, limits = np.nan_to_num(value.astype(np.longdouble), nan=0.0, posinf=np.inf, neginf=-np.inf), np.iinfo(kind)
    return np.clip(wide, np.longdouble(limits.min), np.longdouble(limits.max))


def decode_cvta(program: Program, instruction: Instruction) -> Any:
    return on_registers(program, instruction, lambda a: a, [8, 8])


def decode_createpolicy(program: Program, instruction: Instruction) -> Any:
    """A cache policy changes no value."""
    register = program.register(instruction.operands[0], 8)
    return lambda warp, lanes: warp.write(lanes, register, np.zeros(32, np.uint64))


DECODERS = {"mov": decode_mov, "cvt": decode_cvt, "cvta": decode_cvta, "createpolicy": decode_createpolicy}
