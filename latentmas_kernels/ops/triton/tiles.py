"""Tiles of the skinny GEMM: those that were measured on a device, and a rule for all other shapes."""

import functools
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
TENSOR_CORE_ROWS = 8


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
    """Return the tile that was tuned for this product on this device, or the default.

    A product of few rows waits for its weights only: bytes in flight on every multiprocessor decide. So the rows of w in a
    program shrink until there is a program for each multiprocessor, and then K is split.
    """
    if target is INTERPRETER:  # there a program costs a millisecond, whatever it does: few large ones, K in two parts
        return GemmConfig(EXACT_ROWS, 64, 32, 2, dot=False, num_warps=4, num_stages=1)
    key = tile_key(m, n, k, itemsize, gated)
    return tuned_tiles(target.name).get(key) or default_tile(target, m, n, k, itemsize, gated=gated)


def default_tile(target: LaunchTarget, m: int, n: int, k: int, itemsize: int, *, gated: bool = False) -> GemmConfig:
    dot = itemsize == 2 and m >= TENSOR_CORE_ROWS
    if dot:
        block_m = max(16, min(64, triton.next_power_of_2(m)))
        block_n, block_k, warps, stages = (32 if gated else 64), 64, 4, 4
        smallest = 16
    else:
        block_m = EXACT_ROWS if itemsize == 4 else triton.next_power_of_2(m)
        # 16 KB of weights per turn in 128 threads are 8 loads of 16 bytes in each.
        block_k = min(max(16, triton.next_power_of_2(k)), 1024 // (itemsize // 2) // block_m)
        block_n, warps, stages = (4 if gated else 8), 4, 1
        smallest = 2 if gated else 4
    while block_n > smallest and triton.cdiv(n, block_n) < target.multiprocessors:
        block_n //= 2
    split = 1
    while triton.cdiv(n, block_n) * split < target.multiprocessors and k // (2 * split) >= 2 * block_k and split < 8:
        split *= 2
    return GemmConfig(block_m, block_n, block_k, split, dot, warps, stages)
