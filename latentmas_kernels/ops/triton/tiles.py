"""Tiles of the skinny GEMM: those that were measured on a device, and a rule for all other shapes."""

import functools
import itertools
import json
from importlib import resources
from typing import NamedTuple

import triton

from latentmas_kernels.ops.triton.launch import INTERPRETER, LaunchTarget


class GemmConfig(NamedTuple):
    """How a product y[M, N] = x[M, K] w[N, K]^T is tiled: programs of block_m x block_n outputs and K / split terms."""

    block_m: int
    block_n: int
    block_k: int
    split: int
    dot: bool
    num_warps: int
    num_stages: int


EXACT_ROWS = 4
"""Rows per program in float32, whatever the batch: one kernel for all, so that a row's bits do not depend on its batch."""
TENSOR_CORE_ROWS = 5
"""From here on two-byte dtypes go to tensor cores: 16 rows there take no longer than 5, and plain sums of 4 are the most
whose registers leave room for BYTES_IN_FLIGHT."""
MOST_PARTS, MOST_PARTS_OF_DOT = 16, 8
"""Of K. The last program of a tile to finish adds the sums of all parts: 36 bytes of each for one row and 8 columns, on tensor
cores 1 KB and more."""
VECTORS_AHEAD = 8
"""16-byte loads of weights per thread and turn of `gemv_tile`, all issued before the inputs are ready."""
BYTES_IN_FLIGHT = 48_000
"""Per multiprocessor. 4.8 TB/s times a latency of 1 us are 36 KB for each of 132, and not all programs load all the time."""
GEMV_REGISTERS = {(1, 1): 80, (1, 2): 128, (1, 4): 128, (2, 1): 128, (4, 1): 144}
"""Per thread at most, by rows and by vectors of a row of x per thread, as ptxas of Triton 3.6 and 3.9 allocates for sm_90
(tests/engines/test_cuda_step.py reads them). With two vectors of two rows it spills, of four rows it takes 187."""
DOT_REGISTERS = {16: 96, 32: 128, 64: 144}
"""The same by rows, with 64 terms of K per turn."""
REGISTERS_OF_MULTIPROCESSOR = 1 << 16
SHARED_OF_MULTIPROCESSOR = 160 << 10
"""Of sm_80, the least of sm_80, sm_90 and sm_100."""


@functools.cache
def tuned_tiles(name: str) -> dict[str, GemmConfig]:
    """Return the tiles that were measured on a device, by `tile_key`; `scripts/gpu_verify.sh tune` writes the files."""
    file = resources.files("latentmas_kernels.ops.triton") / "tuned" / f"{slug(name)}.json"
    if not file.is_file():
        return {}
    return {key: GemmConfig(**tile) for key, tile in json.loads(file.read_text())["tiles"].items()}


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def tile_key(m: int, n: int, k: int, itemsize: int, gated: bool) -> str:
    """Return the key of a product in a file of tuned tiles, which are on disk: "pair" stands for a gated product."""
    return f"m{m} n{n} k{k} b{itemsize}" + (" pair" if gated else "")


def tile_for(target: LaunchTarget, m: int, n: int, k: int, itemsize: int, *, gated: bool = False) -> GemmConfig:
    """Return the tile that was tuned for this product on this device, or the default."""
    if target is INTERPRETER:  # there a program costs a millisecond, whatever it does: few large ones, K in two parts
        return GemmConfig(EXACT_ROWS, 64, 32, 2, dot=False, num_warps=4, num_stages=1)
    key = tile_key(m, n, k, itemsize, gated)
    return tuned_tiles(target.name).get(key) or default_tile(target, m, n, k, itemsize, gated=gated)


@functools.cache
def default_tile(target: LaunchTarget, m: int, n: int, k: int, itemsize: int, *, gated: bool = False) -> GemmConfig:
    """Return the tile with BYTES_IN_FLIGHT, or all bytes of a smaller weight, and with a program for each multiprocessor.

    A product of few rows waits for its weights only, so these decide, to a twentieth of what is wanted. Among tiles that have
    both, K is split only where it must be (a launch that splits it waits for an atomic and for the partial sums), and the
    bytes that are read beside the weights are the fewest: each program reads all of its rows of x.
    """
    if itemsize == 4:
        m = EXACT_ROWS  # a row's bits must not depend on the batch, so neither may the tile
    wanted = min(BYTES_IN_FLIGHT, weight_bytes(n, k, itemsize, gated) / target.multiprocessors)

    def rank(config: GemmConfig) -> tuple[float, int, bool, int]:
        blocks = triton.cdiv(n, config.block_n) * triton.cdiv(m, config.block_m)
        in_flight = min(bytes_in_flight(target, config, m, n, k, itemsize, gated=gated), wanted)
        programs = min(blocks * config.split, target.multiprocessors)
        beside = blocks * config.block_m * k * itemsize
        if config.split > 1:  # partial sums, stored and loaded
            beside += 2 * blocks * config.split * config.block_m * config.block_n * (2 if gated else 1) * 4
        return -round(20 * in_flight / wanted), -programs, config.split > 1, beside

    return min(tiles(m, k, itemsize, gated=gated), key=rank)


def tiles(m: int, k: int, itemsize: int, *, gated: bool) -> list[GemmConfig]:
    """Return the tiles that `default_tile` chooses from, those of a float32 product whatever m."""
    matrices = 2 if gated else 1
    whole: list[GemmConfig] = []
    if itemsize == 2 and m >= TENSOR_CORE_ROWS:
        block_m = max(16, min(64, triton.next_power_of_2(m)))
        for block_n in (64, 32, 16):
            # 24 KB of weights per program, in as many stages as that takes, and room for two programs with the rows of x.
            row = 64 * itemsize
            stages = 1 + max(3, min(6, (24 << 10) // (block_n * row), (64 << 10) // ((block_n + block_m) * row)))
            whole.append(GemmConfig(block_m, max(16, block_n // matrices), 64, 1, True, 4, stages))
    else:
        block_m = EXACT_ROWS if itemsize == 4 else triton.next_power_of_2(m)
        # Two warps where there are more rows: five programs and more on a multiprocessor all the same.
        for warps, block_n in itertools.product((4, 2) if block_m == 1 else (2,), (8, 4, 2)):
            if (block_m, VECTORS_AHEAD // block_n) in GEMV_REGISTERS:
                block_k = VECTORS_AHEAD * 16 // itemsize * 32 * warps // block_n
                whole.append(GemmConfig(block_m, block_n // matrices, block_k, 1, False, warps, 1))
    return [config._replace(split=parts) for config in whole for parts in splits(config, k)]


def splits(config: GemmConfig, k: int) -> list[int]:
    """Return the numbers of parts into which whole blocks of K can be split, none of them empty."""
    turns = triton.cdiv(k, config.block_k)
    counts = {triton.cdiv(turns, turns_of_part) for turns_of_part in range(1, turns + 1)}
    most = MOST_PARTS_OF_DOT if config.dot else MOST_PARTS
    return sorted(parts for parts in counts if parts <= most)


def part_of_k(config: GemmConfig, k: int) -> int:
    """Return the terms of all parts of K but the last, whole blocks."""
    return triton.cdiv(triton.cdiv(k, config.split), config.block_k) * config.block_k


def weight_bytes(n: int, k: int, itemsize: int, gated: bool) -> int:
    return n * k * itemsize * (2 if gated else 1)


def programs_per_multiprocessor(config: GemmConfig, itemsize: int, *, gated: bool) -> int:
    """Return how many programs run side by side: their registers, their shared memory and the limits of the hardware."""
    threads = 32 * config.num_warps
    if config.dot:
        registers = DOT_REGISTERS[config.block_m]
    else:
        registers = GEMV_REGISTERS[config.block_m, config.block_k * itemsize // (16 * threads)]
    limits = [REGISTERS_OF_MULTIPROCESSOR // (registers * threads), 2048 // threads, 32]
    if config.dot:
        columns = config.block_n * (2 if gated else 1) + config.block_m
        limits.append(
            SHARED_OF_MULTIPROCESSOR // (columns * config.block_k * itemsize * (config.num_stages - 1) + 1024)
        )
    return min(limits)


def bytes_in_flight(
    target: LaunchTarget, config: GemmConfig, m: int, n: int, k: int, itemsize: int, *, gated: bool = False
) -> float:
    """Return the bytes of weights that the running programs have asked for when they begin, per multiprocessor."""
    part = part_of_k(config, k)
    ahead = config.block_k * (config.num_stages - 1 if config.dot else 1)
    terms = sum(min(ahead, part, k - start) for start in range(0, k, part))
    programs = triton.cdiv(n, config.block_n) * triton.cdiv(m, config.block_m) * triton.cdiv(k, part)
    running = programs_per_multiprocessor(config, itemsize, gated=gated) * target.multiprocessors
    share = min(1.0, running / programs)
    return share * weight_bytes(n, terms, itemsize, gated) / target.multiprocessors
