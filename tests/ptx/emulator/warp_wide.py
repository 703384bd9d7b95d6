"""Instructions in which the lanes of a warp exchange values: shuffles, reductions, matrices in shared memory."""

import re
from typing import Any

import numpy as np

from emulator.conversions import braced
from emulator.program import Instruction, Program
from emulator.values import ALL, LANES, NUMBERS, Array, Lanes
from emulator.warp import Warp


def decode_shfl(program: Program, instruction: Instruction) -> Any:
    mode = instruction.parts[2]
    if instruction.parts[1] != "sync" or "|" in instruction.operands[0]:
        return None
    target, source, step, clamp, _members = (program.register(text, 4) for text in instruction.operands)

    def execute(warp: Warp, lanes: Lanes) -> None:
        warp.whole()
        by, packed = (warp.registers[r].astype(np.int64) for r in (step, clamp))
        segment = packed >> 8 & 31
        first = LANES & segment
        last = first | (packed & 31 & ~segment)
        other = {"bfly": LANES ^ by, "idx": first | (by & ~segment), "down": LANES + by, "up": LANES - by}[mode]
        inside = other >= last if mode == "up" else other <= last
        warp.write(lanes, target, warp.registers[source][np.where(inside, other, LANES) & 31])

    return execute


REDUCTIONS = {
    "add": np.add.reduce, "min": np.minimum.reduce, "max": np.maximum.reduce, "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce, "xor": np.bitwise_xor.reduce,
}  # fmt: skip


def decode_redux(program: Program, instruction: Instruction) -> Any:
    reduce, kind = REDUCTIONS.get(instruction.parts[2]), NUMBERS[instruction.parts[-1]]
    if reduce is None:
        return None
    target, source, _members = (program.register(text, 4) for text in instruction.operands)

    def execute(warp: Warp, lanes: Lanes) -> None:
        warp.whole()
        result = reduce(warp.registers[source].view(kind))
        warp.write(lanes, target, np.full(32, result, kind).view(np.uint32))

    return execute


ROW, COLUMN = LANES // 4, LANES % 4
"""Of the pair of 16-bit elements that a lane holds of an 8 x 8 matrix."""


def decode_matrix(program: Program, instruction: Instruction) -> Any:
    """ldmatrix and stmatrix: up to four 8 x 8 matrices of 16 bits; lane i holds the address of row i % 8 of matrix i / 8."""
    parts = instruction.parts
    stores = parts[0] == "stmatrix"
    count = next((int(part[1]) for part in parts if re.fullmatch(r"x[124]", part)), 0)
    if not count or "m8n8" not in parts or parts[-1] != "b16":
        return None
    place, names = instruction.operands if stores else reversed(instruction.operands)
    base, offset = program.address(place, 4)
    registers = [program.register(name, 4) for name in braced(names)]
    transposed = "trans" in parts
    rows = 8 * count > LANES

    def addresses_of(warp: Warp) -> Array:
        return (warp.registers[base].astype(np.int64) + offset)[rows]

    def load(warp: Warp, lanes: Lanes) -> None:
        warp.whole()
        starts = addresses_of(warp)
        warp.shared.read(warp, starts, 16)
        matrices = warp.shared.elements[2][(starts >> 1)[:, None] + np.arange(8)].reshape(count, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 2, 1)
        pairs = np.ascontiguousarray(matrices).view(np.uint32)  # [count, row, pair]
        for register, matrix in zip(registers, pairs, strict=True):
            warp.write(ALL, register, matrix[ROW, COLUMN])

    def store(warp: Warp, lanes: Lanes) -> None:
        warp.whole()
        pairs = np.empty((count, 8, 4), np.uint32)
        for matrix, register in zip(pairs, registers, strict=True):
            matrix[ROW, COLUMN] = warp.registers[register]
        elements = pairs.view(np.uint16)
        if transposed:
            elements = np.ascontiguousarray(elements.transpose(0, 2, 1))
        warp.shared.write(warp, addresses_of(warp), elements.view(np.uint8).reshape(-1, 16))

    return store if stores else load


DECODERS = {"shfl": decode_shfl, "redux": decode_redux, "ldmatrix": decode_matrix, "stmatrix": decode_matrix}
