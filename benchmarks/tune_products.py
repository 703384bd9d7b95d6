"""Finds the tiles of a decode step's products on this GPU and stores them where the engine looks them up.

    python benchmarks/tune_products.py --seconds 400

Per shape the five products of a step as the engine launches them: QKV (with the norm), output and down (with the
residual), gate_up (norm, a pair) and lm_head (norm, float32 out), in bfloat16, for every batch bucket. Each candidate is
checked on the first and on the last copy of the weight, its output poisoned before: the error against float32 may be twice
that of torch in the same dtype. Then it is timed cold: a captured CUDA graph sweeps over as many copies of the weight as
no L2 holds, so that kernels overlap as they do in a step. Medians of rounds in which all candidates take turns.

The winner is stored only where it beats `default_tile` by more than 2 %; what was measured is stored for every product, so
that a run that was cut off goes on behind it. Kernels are compiled ahead by several processes: that takes longer than all
measurements.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from bandwidth import OUT_OF_TIME, conditions, median_ms, read_bandwidth
from shapes import SHAPES, sizes_of
from torch import Tensor

import latentmas_kernels
from latentmas_kernels.engines.cuda import GRAPH_BATCH_SIZES
from latentmas_kernels.engines.cuda_graphs import CudaGraphs
from latentmas_kernels.ops.gate_up_swiglu import gate_up_swiglu_reference
from latentmas_kernels.ops.linear_residual import linear_residual_reference
from latentmas_kernels.ops.rmsnorm_linear import rmsnorm_linear_reference
from latentmas_kernels.ops.triton.launch import LaunchTarget, target_of
from latentmas_kernels.ops.triton.skinny_gemm import Workspace, skinny_gemm
from latentmas_kernels.ops.triton.tiles import EXACT_ROWS, TENSOR_CORE_ROWS, GemmConfig, default_tile, slug, tile_key

TUNED = Path(latentmas_kernels.__file__).parent / "ops" / "triton" / "tuned"
REAL = [name for name in SHAPES if name != "tiny"]
SWEEP_BYTES = {"cuda": 1 << 29, "cpu": 1 << 16}  # ten times the L2 of an H100
ROUNDS = {"cuda": 15, "cpu": 1}
MARGIN = 0.02
COMPILERS = max(1, min(12, (os.cpu_count() or 2) - 2))  # processes; each has a CUDA context
CALLS = 8  # in a sweep at least: a graph takes some microseconds to start
EPS = 1e-6
SPLITS = (1, 2, 3, 4, 6, 8)


class Product(NamedTuple):
    """y[M, n] = x[M, k] w[n, k]^T of one kind: "norm", "residual", "pair" (w has 2 n rows) or "logits"."""

    name: str
    kind: str
    n: int
    k: int


def products_of(shape: str) -> list[Product]:
    s = sizes_of(shape)
    width, inner, head = s["hidden_size"], s["intermediate_size"], s["head_dim"]
    queries, keys = s["num_attention_heads"] * head, s["num_key_value_heads"] * head
    return [
        Product("QKV", "norm", queries + 2 * keys, width),
        Product("output", "residual", width, queries),
        Product("gate_up", "pair", inner, width),
        Product("down", "residual", width, inner),
        Product("lm_head", "logits", s["vocab_size"], width),
    ]


def candidates(target: LaunchTarget, m: int, n: int, k: int, itemsize: int, *, gated: bool) -> list[GemmConfig]:
    """The default first, then what may be better. At 3 and 4 rows with tensor cores and without."""
    default = default_tile(target, m, n, k, itemsize, gated=gated)
    matrices = 2 if gated else 1
    found: list[GemmConfig] = []
    if m < TENSOR_CORE_ROWS or itemsize == 4:
        rows = EXACT_ROWS if itemsize == 4 else triton.next_power_of_2(m)
        # Vectors of weights per thread, of block_n rows of w; all threads lie along K. More of them and four rows do not fit
        # into the registers.
        for loads, block_n, warps, split in itertools.product((4, 8, 16), (2, 4, 8, 16), (1, 2, 4, 8), SPLITS):
            if matrices <= block_n <= loads and loads * rows <= 32:
                block_k = loads // block_n * 16 // itemsize * 32 * warps
                found.append(GemmConfig(rows, block_n // matrices, block_k, split, False, warps, 1))
    if m >= 3 and itemsize == 2:
        rows = max(16, min(64, triton.next_power_of_2(m)))
        for block_n, block_k, warps, stages, split in itertools.product(
            (16, 32, 64, 128), (64, 128, 256), (4, 8), (3, 4, 6), SPLITS
        ):
            outs = block_n // matrices
            staged = (block_n + rows) * block_k * itemsize * stages
            if outs >= 16 and staged <= 192 << 10 and block_n * block_k * itemsize >= 4096:
                found.append(GemmConfig(rows, outs, block_k, split, True, warps, stages))
    return [default, *sorted(set(filter(lambda tile: _sensible(target, tile, n, k), found)) - {default})]


def _sensible(target: LaunchTarget, tile: GemmConfig, n: int, k: int) -> bool:
    """Enough programs, but not many times more than needed for a split; on tensor cores each with at least two turns."""
    programs = triton.cdiv(n, tile.block_n) * tile.split
    return (
        k >= (2 if tile.dot else 1) * tile.block_k * tile.split
        and programs >= target.multiprocessors
        and (tile.split == 1 or programs <= 8 * target.multiprocessors)
    )


def few(tiles: list[GemmConfig], most: int) -> list[GemmConfig]:
    """The default and an even choice of the others: neighbours differ little."""
    others = tiles[1:]
    stride = max(1, -(-len(others) // (most - 1)))
    return [tiles[0], *others[stride // 2 :: stride]]


class Bench:
    """Inputs of one product at one batch, over weights that are views of one random buffer."""

    def __init__(self, item: Product, m: int, buffer: Tensor, target: LaunchTarget) -> None:
        self.item, self.m, self.target = item, m, target
        device, dtype = buffer.device, buffer.dtype
        rows = item.n * (2 if item.kind == "pair" else 1)
        elements = rows * item.k
        copies = min(64, buffer.numel() // elements, max(1, SWEEP_BYTES[device.type] // (elements * dtype.itemsize)))
        self.weights = buffer[: copies * elements].view(copies, rows, item.k)
        self.calls = max(copies, CALLS) if device.type == "cuda" else 1
        self.x = torch.randn(m, item.k, device=device).to(dtype)
        self.gain = (1 + torch.randn(item.k, device=device) / 8).to(dtype) if item.kind != "residual" else None
        self.residual = torch.randn(m, item.n, device=device).to(dtype) if item.kind == "residual" else None
        out_dtype = torch.float32 if item.kind == "logits" else dtype
        self.out = torch.empty(m, item.n, dtype=out_dtype, device=device)
        self.workspace = Workspace(self.x)
        self.limits = [self._limit(weight) for weight in (self.weights[0], self.weights[-1])]

    def _plain(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        gain, residual = (None if t is None else t.to(dtype) for t in (self.gain, self.residual))
        if residual is not None:
            return linear_residual_reference(x, weight, residual)
        assert gain is not None
        if self.item.kind == "pair":
            return gate_up_swiglu_reference(x, gain, EPS, weight)
        return rmsnorm_linear_reference(x, gain, EPS, weight)

    def _limit(self, weight: Tensor) -> tuple[Tensor, float]:
        """The result in float32, and the error that is allowed: twice that of torch, and the last bits of float32."""
        exact = self._plain(self.x.float(), weight.float(), torch.float32)
        error = (self._plain(self.x, weight, weight.dtype).float() - exact).norm().item()
        return exact, 2 * error + 8 * torch.finfo(torch.float32).eps * exact.norm().item()

    def launch(self, weight: Tensor, tile: GemmConfig) -> None:
        skinny_gemm(
            self.x, weight, self.out, norm_weight=self.gain, eps=EPS, residual=self.residual,
            gated=self.item.kind == "pair", target=self.target, workspace=self.workspace, config=tile,
        )  # fmt: skip

    def reserve(self, tile: GemmConfig) -> None:
        self.workspace.reserve(tile, self.m, self.item.n, gated=self.item.kind == "pair")

    def wrong(self, tile: GemmConfig) -> str | None:
        """Why the tile is no candidate; None where it computes the product."""
        try:
            self.workspace.tile_counters.zero_()  # a kernel that failed may have left them
            for weight, (exact, allowed) in zip((self.weights[0], self.weights[-1]), self.limits, strict=True):
                self.out.fill_(float("nan"))
                self.launch(weight, tile)
                error = (self.out.float() - exact).norm().item()
                if not error <= allowed:
                    return f"error {error:.2e}, allowed are {allowed:.2e}"
        except Exception as fault:  # too much shared memory, or what this Triton does not compile
            return f"{type(fault).__name__}: {str(fault).splitlines()[0][:200]}"
        return None

    def sweep(self, tile: GemmConfig) -> Callable[[], None]:
        def body() -> None:
            for index in range(self.calls):
                self.launch(self.weights[index % len(self.weights)], tile)

        return CudaGraphs(self.x.device)(body) if self.x.is_cuda else body

    @property
    def bytes(self) -> int:
        """Of one call."""
        once = [self.x, self.out, *(t for t in (self.gain, self.residual) if t is not None)]
        return self.weights[0].nbytes + sum(t.nbytes for t in once)


def measure(bench: Bench, tiles: list[GemmConfig]) -> tuple[dict[GemmConfig, float], list[str]]:
    """Microseconds per call of the tiles that are right; the default, which is the first, has to be."""
    device, faults, right = bench.x.device, [], []
    for tile in tiles:
        bench.reserve(tile)  # once for all, before a graph holds the addresses
    for tile in tiles:
        if why := bench.wrong(tile):
            faults.append(f"{tuple(tile)}: {why}")
        else:
            right.append(tile)
    if tiles[0] not in right:
        return {}, faults
    sweeps = {tile: bench.sweep(tile) for tile in right}
    times: dict[GemmConfig, list[float]] = {tile: [] for tile in right}
    for turn in range(-1, ROUNDS[device.type]):  # the first one warms up
        for tile, sweep in list(sweeps.items())[:: 1 if turn % 2 else -1]:
            ms = median_ms(sweep, device, repeats=1, warmup=0) / bench.calls
            if turn >= 0:
                times[tile].append(ms * 1e3)
    return {tile: statistics.median(us) for tile, us in times.items()}, faults


def compile_ahead(device: str, dtype: torch.dtype, jobs: list[tuple[str, int, GemmConfig]]) -> None:
    """In a process of its own: launch each kind of product once, on a size of the same divisibility by 16, which fills
    Triton's cache on the disk. What fails here fails again, and is reported, where it is measured."""
    target = target_of(torch.device(device))
    buffer = torch.zeros(2 * 128 * 256, dtype=dtype, device=device)
    for kind, m, tile in jobs:
        bench = Bench(Product("", kind, 128, 256), m, buffer, target)
        bench.reserve(tile)
        with contextlib.suppress(Exception):
            bench.launch(bench.weights[0], tile)


def cases(
    shapes: list[str], batches: list[int], target: LaunchTarget, itemsize: int
) -> Iterator[tuple[str, Product, int]]:
    """Key, product and batch, each key once: shapes share products."""
    seen = set()
    for m, shape in itertools.product(batches, shapes):  # the small batches first, for all shapes
        for item in products_of(shape):
            key = tile_key(m, item.n, item.k, itemsize, item.kind == "pair")
            if key not in seen:
                seen.add(key)
                yield key, item, m


def store(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: the engine reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)


@torch.no_grad()
def main() -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", default=default, choices=["cpu", "cuda"], help="cpu: a dry run (TRITON_INTERPRET=1)"
    )
    parser.add_argument("--shape", nargs="+", default=REAL, choices=SHAPES)
    parser.add_argument("--batch", nargs="+", type=int, default=list(GRAPH_BATCH_SIZES))
    parser.add_argument("--most", type=int, default=16, help="candidates per product, the default among them")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop before the product that would be too late"
    )
    parser.add_argument(
        "--folder", type=Path, default=TUNED, help="where the tiles go: the package, where they are used"
    )
    args = parser.parse_args()
    began = time.monotonic()
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    # In float32 the engine uses one tile for all batches, and the interpreter's dot takes no bfloat16.
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    target = target_of(device)
    path = args.folder / f"{slug(target.name)}.json"
    content = json.loads(path.read_text()) if path.exists() else {"tiles": {}, "measured": {}}

    todo = [
        (key, item, m, few(candidates(target, m, item.n, item.k, dtype.itemsize, gated=item.kind == "pair"), args.most))
        for key, item, m in cases(args.shape, args.batch, target, dtype.itemsize)
        if key not in content["measured"]
    ]
    print(f"{len(todo)} products to measure, {len(content['measured'])} known in {path}", flush=True)
    if not todo:
        return
    largest = max(item.n * item.k * (2 if item.kind == "pair" else 1) for _, item, _, _ in todo)
    elements = max(largest, SWEEP_BYTES[args.device] // dtype.itemsize)
    buffer = torch.empty(elements, dtype=dtype, device=device).normal_(std=0.02)
    content["conditions"] = {**conditions(device), "bandwidth_gb_s": read_bandwidth(device, repeats=5)}
    print(f"read bandwidth {content['conditions']['bandwidth_gb_s']:.0f} GB/s")
    print(f"{'product':<9} {'key':<28} {'default us':>10} {'best us':>8} {'GB/s':>6}  tile")

    # A batch of them at a time, so that a run that stops has measured what it compiled.
    longest = 0.0
    pool = ProcessPoolExecutor(COMPILERS, multiprocessing.get_context("spawn")) if device.type == "cuda" else None
    compiled: set[tuple[str, int, GemmConfig]] = set()
    for start in range(0, len(todo), 5):
        lap = time.monotonic()
        if args.seconds - (lap - began) < longest:
            print(f"{args.seconds:.0f} s are spent: {len(todo) - start} products are left for the next run")
            sys.exit(OUT_OF_TIME)
        part = todo[start : start + 5]
        if pool is not None:
            jobs = sorted({(item.kind, m, tile) for _, item, m, tiles in part for tile in tiles} - compiled)
            list(pool.map(partial(compile_ahead, str(device), dtype), [jobs[i::COMPILERS] for i in range(COMPILERS)]))
            compiled |= set(jobs)
        for key, item, m, tiles in part:
            bench = Bench(item, m, buffer, target)
            times, faults = measure(bench, tiles)
            for fault in faults:
                print(f"{item.name:<9} {key:<28} left out: {fault}")
            if not times:
                print(f"{item.name:<9} {key:<28} no time: the default tile is wrong", flush=True)
                continue
            best = min(times, key=lambda tile: times[tile])
            us, before = times[best], times[tiles[0]]
            content["measured"][key] = {
                "default_us": before, "best_us": us, "gb_s": bench.bytes / us / 1e3, "candidates": len(times),
            }  # fmt: skip
            if us < (1 - MARGIN) * before:
                content["tiles"][key] = best._asdict()
            print(
                f"{item.name:<9} {key:<28} {before:10.2f} {us:8.2f} {bench.bytes / us / 1e3:6.0f}  "
                f"{tuple(best) if key in content['tiles'] else 'default'}",
                flush=True,
            )
        store(path, content)
        longest = max(longest, time.monotonic() - lap)


if __name__ == "__main__":
    main()
