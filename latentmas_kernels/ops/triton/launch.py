"""What a launch is shaped for: the device, whether kernels may overlap, and the tile of a product."""

import functools
import json
import os
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def runs_on(tensor: Tensor) -> bool:
    """Whether the Triton kernels run on this tensor: CUDA, or anything in the interpreter."""
    return tensor.is_cuda or (interpreted() and tensor.device.type == "cpu")


@dataclass(frozen=True)
class Target:
    """A device as the launchers see it.

    Attributes:
        name: of the device, which tuned tiles are stored under.
        multiprocessors: programs wanted at least, so that each has one.
        overlap: programmatic dependent launch (sm_90 and later): a kernel starts while the one before it ends, loads
            its first weights and waits with everything that the other one writes.
    """

    name: str
    multiprocessors: int
    overlap: bool

    @property
    def options(self) -> dict[str, bool]:
        """What a launch passes to Triton. Only there: the option is unknown where the hardware has no such launch."""
        return {"launch_pdl": True} if self.overlap else {}


INTERPRETER = Target("interpreter", 2, overlap=False)


@functools.cache
def target_of(device: torch.device) -> Target:
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    overlap = properties.major >= 9 and hasattr(tl.extra.cuda, "gdc_wait")
    return Target(properties.name, properties.multi_processor_count, overlap)


class Tile(NamedTuple):
    """How a product y[M, N] = x[M, K] w[N, K]^T is cut: programs of block_m x block_n outputs and K / split terms."""

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
def tuned_tiles(name: str) -> dict[str, Tile]:
    """Tiles that were measured on a device, by `tile_key`; `scripts/gpu_verify.sh tune` writes the files."""
    file = resources.files("latentmas_kernels.ops.triton") / "tuned" / f"{slug(name)}.json"
    if not file.is_file():
        return {}
    return {key: Tile(**tile) for key, tile in json.loads(file.read_text())["tiles"].items()}


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def tile_key(m: int, n: int, k: int, itemsize: int, pair: bool) -> str:
    return f"m{m} n{n} k{k} b{itemsize}" + (" pair" if pair else "")


def tile_for(target: Target, m: int, n: int, k: int, itemsize: int, *, pair: bool = False) -> Tile:
    """The tile that was tuned for this product on this device, or one that should do.

    A product of few rows waits for its weights only: what counts is bytes in flight on every multiprocessor. So the rows
    of w that a program takes shrink until there is a program for each, and then K is split.
    """
    if target is INTERPRETER:  # there a program costs a millisecond, whatever it does: few large ones, K in two parts
        return Tile(EXACT_ROWS, 64, 32, 2, dot=False, num_warps=4, num_stages=1)
    key = tile_key(m, n, k, itemsize, pair)
    return tuned_tiles(target.name).get(key) or default_tile(target, m, n, k, itemsize, pair=pair)


def default_tile(target: Target, m: int, n: int, k: int, itemsize: int, *, pair: bool = False) -> Tile:
    dot = itemsize == 2 and m >= TENSOR_CORE_ROWS
    if dot:
        block_m = max(16, min(64, triton.next_power_of_2(m)))
        block_n, block_k, warps, stages = (32 if pair else 64), 64, 4, 4
        smallest = 16
    else:
        block_m = EXACT_ROWS if itemsize == 4 else triton.next_power_of_2(m)
        # 16 KB of weights per turn in 128 threads are 8 loads of 16 bytes in each.
        block_k = min(max(16, triton.next_power_of_2(k)), 1024 // (itemsize // 2) // block_m)
        block_n, warps, stages = (4 if pair else 8), 4, 1
        smallest = 2 if pair else 4
    while block_n > smallest and triton.cdiv(n, block_n) < target.multiprocessors:
        block_n //= 2
    split = 1
    while triton.cdiv(n, block_n) * split < target.multiprocessors and k // (2 * split) >= 2 * block_k and split < 8:
        split *= 2
    return Tile(block_m, block_n, block_k, split, dot, warps, stages)
