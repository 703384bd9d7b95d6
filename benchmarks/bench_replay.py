"""Microseconds of one latent and one token step on the device alone: replays of a captured step, with and without
programmatic dependent launch (PDL).

    python benchmarks/bench_replay.py --shape qwen3-0.6b --batch 1 --out results.json

The steps that predict.py predicts, without the host's part of a call: STEPS replays between two events, the KV length in
the middle of them `--kv`. Medians of rounds in which both kinds of step take turns.

No time without a check: two latent steps and a token step against float32 (reference.py), whose error may be twice that of
transformers in the same dtype. Every cell (shape, batch, PDL) is written as soon as it is measured, and one that the file
has is skipped.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product as pairs
from typing import Any

import torch
from bandwidth import OUT_OF_TIME, conditions, datasheet, load_json, median_ms, merge_json, read_bandwidth
from bench_engine import capacity_for, empty_caches, free_bytes, prepare
from peers import Eager, Start
from predict import BATCHES, KV, MODELS, bytes_of
from reference import errors, reference, refused
from replays import LOG_STEPS, Replays, pdl_target
from shapes import SHAPES, parameter_bytes
from table import PHASES

from latentmas_kernels.engines.cuda_graphs import EagerReplay

STEPS, ROUNDS = {"cuda": 64, "cpu": 1}, {"cuda": 7, "cpu": 1}
Cell = tuple[str, int, bool]  # shape, batch, PDL
assert max(STEPS.values()) <= LOG_STEPS


def key_of(cell: Cell, dtype: str, kv: int) -> str:
    shape, batch, pdl = cell
    return f"{shape} {dtype} batch {batch} kv {kv} {'pdl' if pdl else 'no pdl'}"


def start_of(shape: str, dtype: torch.dtype, device: str, batch: int, kv: int, layers: int | None = None) -> Start:
    model, aligner = prepare(shape, dtype, device, layers)
    return Start.random(model, aligner, batch, kv, capacity_for(kv + STEPS[device]))


def times(side: Replays, device: str) -> dict[str, list[float]]:
    """Microseconds a step by phase, a number for each round."""
    steps = STEPS[device]
    seen: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for turn in range(-1, ROUNDS[device]):  # the first one warms up
        for phase in PHASES:
            side.begin(phase)
            ms = median_ms(partial(side.replay, phase, steps), device, repeats=1, warmup=0)
            if turn >= 0:
                seen[phase].append(ms * 1e3 / steps)
    return seen


@torch.no_grad()
def measure(start: Start, exact: Any, plain: dict[str, float], cell: Cell, device: str) -> dict[str, Any]:
    """A cell: the check, then the times."""
    shape, batch, pdl = cell
    side = Replays(start, pdl_target(start.hidden.device, enable_pdl=pdl))
    found = errors(side, exact)
    result: dict[str, Any] = {
        **conditions(device), "shape": shape, "batch": batch, "pdl": side.step.target.enable_pdl, "steps": STEPS[device],
        "dtype": str(start.hidden.dtype).removeprefix("torch."), "error": found, "transformers_error": plain,
    }  # fmt: skip
    if wrong := [f"{phase}: {why}" for phase in PHASES if (why := refused(found[phase], plain[phase]))]:
        return {**result, "refused": "; ".join(wrong)}
    sheet = datasheet(device)
    length = start.kv + (STEPS[device] + 1) / 2  # in the middle of the replays, the step's own slot included
    for phase, us in times(side, device).items():
        middle = statistics.median(us)
        moved = bytes_of(shape, phase, batch, length, start.hidden.element_size()).moved
        quartiles = statistics.quantiles(us, n=4) if len(us) > 1 else [middle] * 3
        result[phase] = {
            "us": middle, "iqr_us": quartiles[2] - quartiles[0], "kv": length, "mb": moved / 1e6,
            "gb_s": moved / middle / 1e3, "percent_of_datasheet": sheet and 100 * moved / middle / 1e3 / sheet,
        }  # fmt: skip
    return {**result, "bandwidth_gb_s": read_bandwidth(device, repeats=3), "datasheet_gb_s": sheet}


def compile_ahead(dtype: torch.dtype, device: str, kv: int, cell: tuple[str, int]) -> None:
    """In a process of its own: launch every kernel of a shape and batch once, over one layer, which fills Triton's cache on
    the disk. One after the other, the kernels of five shapes take longer to compile than to measure."""
    shape, batch = cell
    start = start_of(shape, dtype, device, batch, kv, layers=1)
    for enable_pdl in (True, False):
        Replays(start, pdl_target(start.hidden.device, enable_pdl=enable_pdl), EagerReplay())


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """Of a shape, PDL first: that is what the predictions are about."""
    pdl = [pdl_target(torch.device(args.device), enable_pdl=True).enable_pdl, False]
    return [(shape, batch, on) for batch, shape, on in pairs(args.batch, args.shape, dict.fromkeys(pdl))]


def run(cells: list[Cell], args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key and result of each cell that the results do not have, until the seconds are spent."""
    began, longest, dtype = time.monotonic(), 0.0, getattr(torch, args.dtype)
    done = {} if args.force else load_json(args.out, "replay")
    left = [cell for cell in cells if "latent" not in done.get(key_of(cell, args.dtype, args.kv), {})]
    if args.device == "cuda" and left:
        jobs = list(dict.fromkeys(cell[:2] for cell in left))
        workers = min(len(jobs), max(1, (os.cpu_count() or 2) // 2))
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(partial(compile_ahead, dtype, args.device, args.kv), jobs))
    start, about = None, None
    for number, cell in enumerate(left):
        shape, batch, _ = cell
        if args.seconds - (time.monotonic() - began) < longest:
            print(f"{args.seconds:.0f} s are spent: {len(left) - number} cells are left for the next run")
            sys.exit(OUT_OF_TIME)
        lap = time.monotonic()
        if about != (shape, batch):
            start, about = None, (shape, batch)
            empty_caches()
            if parameter_bytes(shape, dtype.itemsize) * 1.2 > free_bytes(args.device):
                yield key_of(cell, args.dtype, args.kv), {"skipped": "the weights do not fit"}
                continue
            start = start_of(shape, dtype, args.device, batch, args.kv - STEPS[args.device] // 2)
            exact = reference(start)
            plain = errors(Eager(start), exact)
        if start is not None:
            yield key_of(cell, args.dtype, args.kv), measure(start, exact, plain, cell, args.device)
        longest = max(longest, time.monotonic() - lap)


def show(key: str, result: dict[str, Any]) -> None:
    said = [
        f"{phase} {row['us']:.1f} us, {row['gb_s']:.0f} GB/s"
        + (f", {row['percent_of_datasheet']:.1f} % of the datasheet" if row["percent_of_datasheet"] else "")
        for phase in PHASES
        if (row := result.get(phase))
    ]
    print(f"{key}: {'; '.join(said) or 'no time, ' + (result.get('refused') or result['skipped'])}", flush=True)


def main() -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", default=default, choices=["cpu", "cuda"], help="cpu: a dry run (TRITON_INTERPRET=1)"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=MODELS)
    parser.add_argument("--batch", nargs="+", type=int, default=[BATCHES[0]])
    parser.add_argument("--kv", type=int, default=KV, help="slots in the middle of the replays")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no cell that would take longer")
    parser.add_argument("--out", metavar="JSON", help="merge the numbers into this file; cells that it has are skipped")
    parser.add_argument("--force", action="store_true", help="measure cells again")
    args = parser.parse_args()
    wrong = []
    for key, result in run(cells_of(args), args):
        show(key, result)
        if args.out:
            merge_json(args.out, "replay", {key: result})
        wrong += [key] if "refused" in result else []
    if wrong:
        sys.exit(f"wrong results, so no times: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
