"""Latent and token step of the CUDA engine beside its peers, on random weights of real shapes.

    python benchmarks/bench_engine.py --shape qwen3-0.6b --batch 1 16 --kv 256 --out results.json

A cell is a shape, a batch and the tokens that its memory holds. All sides go on from the same random keys and values and
run STEPS latent steps, then as many greedy token steps, per round; what is appended is forgotten between the rounds. The
peers (peers.py) come one after the other, so that only one of them is in memory beside the engine; each takes turns with
it, and the ratio is that of the medians of these rounds.

No time without a check: two latent steps and a token step are compared with float32, computed layer by layer from the same
weights (reference.py). A side's error may be twice that of transformers' own computation in the same dtype, which is the
`eager` peer.

Bytes are those of the weights that a step reads (with W_a, where the model is not tied; without the rows of the embedding
that are looked up) and of the keys and values that it attends to. GB/s stands beside the read bandwidth measured in the
same process and, for GPUs that are known here, beside the datasheet's.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product as pairs
from typing import Any

import torch
import triton
from bandwidth import OUT_OF_TIME, conditions, datasheet, load_json, median_ms, merge_json, read_bandwidth
from peers import PEERS, Ours, Side, Start
from reference import LATENT_STEPS, errors, reference, refused
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, build_model, parameter_bytes, sizes_of

from latentmas_kernels import build_aligner
from latentmas_kernels.alignment import Aligner
from latentmas_kernels.engines.cuda_graphs import CudaGraphs
from latentmas_kernels.ops.triton.launch import LaunchTarget, target_of
from latentmas_kernels.ops.triton.skinny_gemm import pdl_wait

PHASES = ("latent", "token")
STEPS, ROUNDS = 20, 7
DRY = (1, 1)  # the same on the CPU, where a step in Triton's interpreter takes a second or more
Cell = tuple[str, int, int]  # shape, batch, KV
ALL_SHAPES = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-14b", "llama-3.2-1b")
FIRST: list[Cell] = [
    *((shape, 1, 256) for shape in ALL_SHAPES),
    ("qwen3-8b", 16, 2048), ("qwen3-8b", 1, 2048), ("qwen3-0.6b", 16, 256), ("qwen3-0.6b", 64, 256),
    ("qwen3-0.6b", 1, 16384), ("qwen3-4b", 4, 2048),
]  # fmt: skip
ALL_CELLS = [*FIRST, *(c for c in pairs(ALL_SHAPES, (1, 4, 16, 64), (256, 2048, 16384)) if c not in FIRST)]


def prepare(shape: str, dtype: torch.dtype, device: str, layers: int | None = None) -> tuple[Any, Aligner]:
    """The model and its feedback: the identity where it is tied, else a random W_a, whose time is that of any other."""
    model = build_model(shape, dtype, device, layers)
    aligner = build_aligner(model, "identity")
    if not SHAPES[shape][2]:
        width = model.config.hidden_size
        aligner = Aligner("ridge", aligner.target_norm, weight=torch.randn(width, width, device=device) / width**0.5)
    return model, aligner


def room_needed(cell: Cell, itemsize: int) -> int:
    """Bytes that a cell needs beside the weights: the memory, that of one peer, and what is in passing."""
    shape, batch, kv = cell
    s = sizes_of(shape)
    slots = capacity_for(kv) * batch * s["num_key_value_heads"] * s["head_dim"] * 2 * itemsize
    # The dynamic cache makes every layer anew; the reference takes float32, of rows for all query heads, twice.
    rows = min(batch, 8) * kv * s["num_attention_heads"] * s["head_dim"] * 2 * 4 * 3
    logits = 6 * batch * s["vocab_size"] * 4
    return slots * (2 * s["num_hidden_layers"] + 3) + rows + logits + 2 * s["vocab_size"] * s["hidden_size"] * 4


def capacity_for(kv: int) -> int:
    """Slots per row: room for the steps of a round, a multiple of 64 for the sake of masks."""
    return -(-(kv + 2 * STEPS + LATENT_STEPS) // 64) * 64


def free_bytes(device: str) -> int:
    if device == "cpu":
        return 1 << 62
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + unused


def empty_caches() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def rounds_of(sides: dict[str, Side], device: str, steps: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds per step, a list over the rounds per side and phase; the sides take turns at going first."""
    times: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in PHASES} for name in sides}
    for turn in range(-1, rounds):  # the first one warms up
        for name, side in list(sides.items())[:: 1 if turn % 2 else -1]:
            side.rewind()
            for phase in PHASES:
                ms = median_ms(partial(getattr(side, phase), steps), device, repeats=1, warmup=0) / steps
                if turn >= 0:
                    times[name][phase].append(ms)
    return times


@torch.no_grad()
def measure(cell: Cell, model: Any, aligner: Aligner, device: str) -> dict[str, Any]:
    """One cell: checks, then rounds with each peer in turn."""
    shape, batch, kv = cell
    steps, rounds = (STEPS, ROUNDS) if device == "cuda" else DRY
    start = Start.random(model, aligner, batch, kv, capacity_for(kv))
    before = read_bandwidth(device, repeats=3)
    exact = reference(start)
    ours = Ours(start)
    weights = ours.runner.weights
    plain = errors(PEERS["eager"][0](start), exact)
    found = errors(ours, exact)
    result: dict[str, Any] = {
        **conditions(device), "shape": shape, "batch": batch, "kv": kv, "capacity": start.memory.capacity,
        "dtype": str(start.architecture.dtype).removeprefix("torch."), "steps": steps, "rounds": rounds,
        "error": found, "transformers_error": plain, "peers": {},
    }  # fmt: skip
    wrong = [f"{phase}: {why}" for phase in PHASES if (why := refused(found[phase], plain[phase]))]
    if wrong:
        return {**result, "refused": "; ".join(wrong)}

    times: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for name, (peer, _) in PEERS.items():
        side = None
        try:
            side = peer(start)
            error = plain if name == "eager" else errors(side, exact)
            wrong = [f"{phase}: {why}" for phase in PHASES if (why := refused(error[phase], plain[phase]))]
            if wrong:
                result["peers"][name] = {"refused": "; ".join(wrong)}
                continue
            seen = rounds_of({"ours": ours, name: side}, device, steps, rounds)
        except Exception as fault:  # a peer that does not run here is no reason to lose the others
            result["peers"][name] = {"refused": f"{type(fault).__name__}: {str(fault).splitlines()[0][:200]}"}
            continue
        finally:
            del side
            empty_caches()
        result["peers"][name] = {"error": error}
        for phase in PHASES:
            times[phase] += seen["ours"][phase]
            ms, beside = (statistics.median(seen[who][phase]) for who in (name, "ours"))
            result["peers"][name][phase] = {"ms": ms, "ours_faster": ms / beside}

    bandwidth = statistics.median([before, read_bandwidth(device, repeats=3)])
    sheet = datasheet(device)
    extra = {"latent": 0 if aligner.weight is None else aligner.weight.nbytes, "token": weights.lm_head.nbytes}
    for index, phase in enumerate(PHASES):
        if not times[phase]:  # no peer ran, so the engine takes its rounds alone
            times = rounds_of({"ours": ours}, device, steps, rounds)["ours"]
        ms = statistics.median(times[phase])
        # In the middle of a round; the token steps come behind the latent ones.
        length = kv + index * steps + (steps + 1) / 2
        moved = weights.decoder_bytes + extra[phase] + start.kv_bytes * length / kv
        gb_s = moved / ms / 1e6
        quartiles = statistics.quantiles(times[phase], n=4) if len(times[phase]) > 1 else [ms] * 3
        result[phase] = {
            "ms": ms, "iqr_ms": quartiles[2] - quartiles[0], "kv": length, "mb": moved / 1e6, "gb_s": gb_s,
            "percent_of_bandwidth": 100 * gb_s / bandwidth,
            "percent_of_datasheet": None if sheet is None else 100 * gb_s / sheet,
        }  # fmt: skip
    return {**result, "bandwidth_gb_s": bandwidth, "datasheet_gb_s": sheet}


@triton.jit
def empty_kernel(USE_PDL: triton.language.constexpr):
    if USE_PDL:
        pdl_wait()


def launch_cost(device: str, launches: int = 1000) -> dict[str, Any]:
    """Microseconds of a launch in a CUDA graph of empty kernels, serial and with programmatic dependent launch."""
    target = target_of(torch.device(device), captured=True)
    said: dict[str, Any] = {**conditions(device), "launches": launches}
    for name, enable_pdl in {"serial": False, "pdl": True}.items():
        if enable_pdl and not target.enable_pdl:
            continue
        with_pdl = replace(target, enable_pdl=enable_pdl)

        def body(target: LaunchTarget = with_pdl) -> None:
            for _ in range(launches):
                target.launch(empty_kernel, (1,), USE_PDL=target.enable_pdl, num_warps=1)

        said[f"{name}_us"] = median_ms(CudaGraphs(torch.device(device))(body), device) * 1e3 / launches
    return said


def show(key: str, result: dict[str, Any]) -> None:
    if "bandwidth_gb_s" not in result:
        print(f"{key}: no time, {result.get('refused') or result['skipped']}", flush=True)
        return
    print(f"{key}, capacity {result['capacity']}; bandwidth {result['bandwidth_gb_s']:.0f} GB/s")
    table = Table(box=None)
    for column in ("phase", "ms", "GB/s", "% bw", "% sheet", "error", "hf error", *(f"{p} ms (x)" for p in PEERS)):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase in PHASES:
        row = result[phase]
        sheet = "-" if row["percent_of_datasheet"] is None else f"{row['percent_of_datasheet']:.0f}%"
        cells = [f"{row['ms']:.3f}", f"{row['gb_s']:.0f}", f"{row['percent_of_bandwidth']:.0f}%", sheet]
        cells += [f"{result[which][phase]:.1e}" for which in ("error", "transformers_error")]
        for name in PEERS:
            peer = result["peers"][name].get(phase)
            cells.append(f"{peer['ms']:.3f} ({peer['ours_faster']:.2f})" if peer else "-")
        table.add_row(phase, *cells)
    Console(width=120).print(table)
    for name, peer in result["peers"].items():
        if "refused" in peer:
            print(f"{name}: no time, {peer['refused']}")
    print(end="", flush=True)


def run(cells: list[Cell], args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key and result of each cell that is not in the results yet, until the seconds are spent."""
    began, longest = time.monotonic(), 0.0
    done = {} if args.force else load_json(args.out, "engine")
    dtype = getattr(torch, args.dtype)
    model: Any = None
    aligner: Any = None
    built = None
    for number, cell in enumerate(cells):
        shape, batch, kv = cell
        key = f"{shape} {args.dtype} batch {batch} kv {kv}"
        if key in done and "refused" not in done[key]:
            continue
        left = args.seconds - (time.monotonic() - began)
        if left < longest:
            print(
                f"{args.seconds:.0f} s are spent: {len(cells) - number} cells from {key} on are left for the next run"
            )
            sys.exit(OUT_OF_TIME)
        lap = time.monotonic()
        if built != shape:
            model = aligner = None
            empty_caches()
            need = parameter_bytes(shape, dtype.itemsize) * 1.05
            if need > free_bytes(args.device):
                yield (
                    key,
                    {"skipped": f"{need / 1e9:.0f} GB of weights, {free_bytes(args.device) / 1e9:.0f} GB are free"},
                )
                built = None
                continue
            model, aligner = prepare(shape, dtype, args.device)
            built = shape
        need, free = room_needed(cell, dtype.itemsize), free_bytes(args.device)
        if need > free:
            yield key, {"skipped": f"needs {need / 1e9:.0f} GB beside the weights, {free / 1e9:.0f} GB are free"}
            continue
        try:
            result = measure(cell, model, aligner, args.device)
        except torch.OutOfMemoryError as fault:
            result = {"skipped": f"out of memory: {str(fault).splitlines()[0][:200]}"}
        yield key, result
        empty_caches()
        longest = max(longest, time.monotonic() - lap)


def main() -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", default=default, choices=["cpu", "cuda"], help="cpu: a dry run (TRITON_INTERPRET=1)"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--shape", nargs="+", choices=SHAPES, help="with --batch and --kv: these cells instead of the list"
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--kv", nargs="+", type=int, default=[256])
    parser.add_argument("--cells", type=int, default=len(FIRST), help="of the list, the most important ones first")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no cell that would take longer")
    parser.add_argument("--out", metavar="JSON", help="merge the numbers into this file; cells that it has are skipped")
    parser.add_argument("--force", action="store_true", help="measure cells again")
    args = parser.parse_args()
    if args.device == "cuda" and (args.force or not load_json(args.out, "launch")):
        cost = launch_cost(args.device)
        print(
            "empty kernels in a CUDA graph:", {k: f"{v:.2f}" for k, v in cost.items() if k.endswith("_us")}, flush=True
        )
        if args.out:
            merge_json(args.out, "launch", cost)
    cells = list(pairs(args.shape, args.batch, args.kv)) if args.shape else ALL_CELLS[: args.cells]
    for key, result in run(cells, args):
        show(key, result)
        if args.out:
            merge_json(args.out, "engine", {key: result})


if __name__ == "__main__":
    main()
