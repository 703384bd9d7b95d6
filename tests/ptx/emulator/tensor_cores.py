"""mma and wgmma: products of bfloat16 or float16 matrices, summed up in float32.

Here the sums are exact and rounded once; the device rounds more often, in an order that it does not tell.
"""

import re
from typing import Any

import numpy as np

from emulator.conversions import braced
from emulator.program import Fault, Instruction, Program
from emulator.values import FROM_HALF, LANES, Array, Lanes
from emulator.warp import Warp

GROUP, MEMBER = LANES // 4, LANES % 4


def pairs_of(kind: str, warp: Warp, registers: list[int]) -> Array:
    """Return the halves of registers as float32 [registers, lanes, 2]."""
    bits = np.stack([warp.registers[register] for register in registers])
    return FROM_HALF[kind](bits.view(np.uint16).reshape(len(registers), 32, 2))


def matrix_a(pairs: Array) -> Array:
    """The 16 x 16 of A: register i holds rows group + 8 (i % 2), columns 2 member + 8 (i // 2) and the next."""
    a = np.empty((2, 8, 2, 4, 2), np.float32)  # row half, group, column half, member, of the pair
    for i in range(4):
        a[i % 2, GROUP, i // 2, MEMBER] = pairs[i]
    return a.reshape(16, 16)


def matrix_b(pairs: Array) -> Array:
    """The 16 x 8 of B: register i holds rows 2 member + 8 i and the next, column group."""
    b = np.empty((8, 2, 4, 2), np.float32)  # group, row half, member, of the pair
    for i in range(2):
        b[GROUP, i, MEMBER] = pairs[i]
    return b.reshape(8, 16).T


def accumulators(width: int) -> tuple[Array, Array]:
    """Return rows and columns [registers, lanes] of the accumulators of a 16 x `width` result."""
    i = np.arange(width // 2)[:, None]
    return GROUP + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * MEMBER + i % 2


def multiply(warp: Warp, a: Array, b: Array, targets: list[int], addends: list[int] | None, width: int) -> None:
    rows, columns = accumulators(width)
    total = a.astype(np.float64) @ b.astype(np.float64)
    if addends is not None:
        c = np.empty((16, width), np.float32)
        c[rows, columns] = np.stack([warp.registers[r] for r in addends]).view(np.float32)
        total += c
    result = total.astype(np.float32)[rows, columns].view(np.uint32)
    for register, value in zip(targets, result, strict=True):
        warp.registers[register] = value


def decode_mma(program: Program, instruction: Instruction) -> Any:
    found = re.fullmatch(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16|f16)\.\1\.f32", instruction.opcode)
    if not found:
        return None
    kind = found[1]
    d, a, b, c = ([program.register(name, 4) for name in braced(text)] for text in instruction.operands)

    def execute(warp: Warp, lanes: Lanes) -> None:
        warp.whole()
        multiply(warp, matrix_a(pairs_of(kind, warp, a)), matrix_b(pairs_of(kind, warp, b)), d, c, 8)

    return execute


# ---- wgmma: asynchronous, B in shared memory -----------------------------------------------------------------------

ROW_BYTES = {1: 128, 2: 64, 3: 32}
"""Of a row of a swizzled tile, by the descriptor's swizzle mode."""


def tile_addresses(descriptor: int, rows: int) -> Array:
    """Return the address of every 16 bytes of a K-major tile [rows, 2], by its descriptor (PTX ISA, wgmma)."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    mode = descriptor >> 62 & 3
    if descriptor >> 49 & 7:
        raise Fault("wgmma: a tile that does not begin where its swizzle does is not known here")
    row, half = np.arange(rows)[:, None], np.arange(2)
    if mode == 0:
        return start + row // 8 * stride + half * leading + row % 8 * 16
    width = ROW_BYTES[mode]
    plain = start + row // 8 * stride + row % 8 * width + half * 16
    return plain ^ (plain >> 3 & (width - 16))


def decode_wgmma(program: Program, instruction: Instruction) -> Any:
    parts = instruction.parts
    if parts[1] == "fence":
        return lambda warp, lanes: None
    if parts[1] == "commit_group":

        def commit(warp: Warp, lanes: Lanes) -> None:
            warp.product_groups.append(warp.products)
            warp.products = []

        return commit
    if parts[1] == "wait_group":
        left = int(instruction.operands[0])

        def wait(warp: Warp, lanes: Lanes) -> None:
            while len(warp.product_groups) > left:
                for product in warp.product_groups.pop(0):
                    product()

        return wait
    shape = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2", instruction.opcode)
    result, left, right, adds, *scales = instruction.operands
    in_registers = left.startswith("{")
    if not shape or scales != (["1", "1", "0"] if in_registers else ["1", "1", "0", "0"]):
        return None  # scales other than 1, or a matrix that is not K-major
    width, kind = int(shape[1]), shape[2]
    d = [program.register(name, 4) for name in braced(result)]
    a = [program.register(name, 4) for name in braced(left)] if in_registers else []
    a_descriptor = None if in_registers else program.register(left, 8)
    b_descriptor, adds_up = program.register(right, 8), program.register(adds, 1)

    def execute(warp: Warp, lanes: Lanes) -> None:
        """Of the four warps that issue it each has 16 rows; all read the same B."""
        warp.whole()
        tiles = [tile_addresses(int(warp.registers[b_descriptor][0]), width)]
        if a_descriptor is not None:
            mine = slice(16 * (warp.index % 4), 16 * (warp.index % 4) + 16)
            tiles.append(tile_addresses(int(warp.registers[a_descriptor][0]), 64)[mine])
        addends = d if warp.registers[adds_up][0] else None
        text = warp.instruction

        def read(addresses: Array) -> Array:
            warp.shared.read(warp, addresses.reshape(-1), 16)
            elements = warp.shared.elements[2][(addresses >> 1)[:, :, None] + np.arange(8)]
            return FROM_HALF[kind](elements.reshape(-1, 16))

        def product() -> None:
            """Registers and shared memory are read when it is waited for, the latest that a device may."""
            running, warp.instruction = warp.instruction, text
            b, *from_shared = map(read, tiles)
            warp.instruction = running
            rows = matrix_a(pairs_of(kind, warp, a)) if in_registers else from_shared[0]
            multiply(warp, rows, b.T, d, addends, width)

        for tile in tiles:
            warp.shared.read(warp, tile.reshape(-1), 16)
        warp.products.append(product)

    return execute


DECODERS = {"mma": decode_mma, "wgmma": decode_wgmma}
