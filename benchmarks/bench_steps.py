"""Prefill, latent step and token step of this package beside the published loop, on random weights of real shapes.

    python benchmarks/bench_steps.py --shape smollm2-135m --dtype bfloat16 --batch 1 --kv 256

The published loop is that of the LatentMAS code: transformers' forward on its own cache, with the lm_head on every
position, output_hidden_states=True and an attention mask of ones; in its favour, the identity map is applied without the
product that the code does, and its token steps collect no hidden states, as in transformers' generate(). Both sides do
prefill, latent steps and token steps on a new cache in each round, and take turns at going first.

The floor is the weights that a step must read at the bandwidth measured between the rounds: the decoder's, and for a
token step the lm_head's. Rows of the input embedding that are looked up, and the KV cache, are not counted.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from bandwidth import conditions, median_ms, merge_json, read_bandwidth
from peers import Published
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, build_model
from torch import Tensor

from latentmas_kernels import LatentCache, build_aligner
from latentmas_kernels.engines import LatentParams, engine_names, open_engine
from latentmas_kernels.inputs import Prompt
from latentmas_kernels.models.architecture import Architecture, decoder_of

PHASES = ("prefill", "latent", "token")


def weight_bytes(model: Any) -> dict[str, int]:
    """What each phase must read. The input embedding is a lookup; tied, the same matrix is read whole as the lm_head."""
    embedding = model.get_input_embeddings().weight
    decoder = sum(p.nbytes for p in decoder_of(model).parameters() if p is not embedding)
    return {"prefill": decoder, "latent": decoder, "token": decoder + model.lm_head.weight.nbytes}


class Ours:
    """An engine of this package, driven as latent_generate() and generate() drive it, without their checks."""

    def __init__(self, model: Any, engine: str, slots: int) -> None:
        self.architecture = Architecture.of(model)
        self.runner, self.slots = open_engine(engine, model, self.architecture), slots
        self.aligner = build_aligner(model, "identity")

    def prefill(self, ids: Tensor) -> None:
        self.cache = LatentCache.for_model(self.architecture, len(ids), self.slots)
        self.one_each = torch.ones(len(ids), dtype=torch.int64)
        self.hidden = self.runner.extend(self.cache, Prompt(self.one_each * ids.shape[1], ids), logits=False)

    def latent(self, steps: int) -> Tensor:
        thought = self.runner.run_latent(
            self.cache, self.hidden, self.aligner, LatentParams(self.one_each * steps), None
        )
        self.hidden = thought.last_hidden
        return thought.latents

    def token(self, token: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            logits = self.runner.extend(self.cache, Prompt(self.one_each, token[:, None]), logits=True)
            token = logits.argmax(-1)
        return logits


def agreement(ours: Any, published: Any, ids: Tensor, steps: int, dtype: torch.dtype) -> str:
    """How close both sides come in all latents and in the logits behind them. Exits where that is not close enough."""
    said = []
    for side in (ours, published):
        side.prefill(ids)
    pairs = {"latents": [side.latent(steps).double() for side in (ours, published)]}
    pairs["logits"] = [side.token(ids[:, 0], 1).double() for side in (ours, published)]
    for name, (got, want) in pairs.items():
        # Relative to each vector: latents of random models are small, and an absolute tolerance would pass anything.
        error = ((got - want).norm(dim=-1) / want.norm(dim=-1)).max().item()
        cosine = torch.nn.functional.cosine_similarity(got, want, dim=-1).min().item()
        said.append(f"{name}: relative error {error:.1e}, cosine {cosine:.5f}")
        if not (error < 1e-3 if dtype == torch.float32 else cosine > 0.999):
            sys.exit(f"the two sides disagree, so no times: {'; '.join(said)}")
    return "; ".join(said)


@torch.no_grad()
def measure(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds, with what they depend on."""
    device, dtype, steps = args.device, getattr(torch, args.dtype), args.steps
    ours = Ours(model, args.engine, args.kv + 2 * steps)
    sides = {"ours": ours, "published": Published(model, ours.aligner.target_norm)}
    ids = torch.randint(3, model.config.vocab_size, (args.batch, args.kv), device=device)
    close = agreement(*sides.values(), ids, steps, dtype)  # and the warm-up of both

    times: dict[tuple[str, str], list[float]] = {(name, phase): [] for name in sides for phase in PHASES}
    bandwidths = []
    for turn in range(args.rounds):
        bandwidths.append(read_bandwidth(device, repeats=3))
        for name, side in list(sides.items())[:: 1 if turn % 2 else -1]:
            calls: dict[str, tuple[Callable[[], Any], int]] = {
                "prefill": (lambda side=side: side.prefill(ids), 1),
                "latent": (lambda side=side: side.latent(steps), steps),
                "token": (lambda side=side: side.token(ids[:, 0], steps), steps),
            }
            for phase, (call, count) in calls.items():
                times[name, phase].append(median_ms(call, device, repeats=1, warmup=0) / count)

    bandwidth, sizes = statistics.median(bandwidths), weight_bytes(model)
    phases: dict[str, Any] = {}
    for phase in PHASES:
        row: dict[str, Any] = {"weight_mb": sizes[phase] / 1e6, "floor_ms": sizes[phase] / bandwidth / 1e6}
        for name in sides:
            ms = statistics.median(times[name, phase])
            gb_s = sizes[phase] / ms / 1e6
            row[name] = {"ms": ms, "gb_s": gb_s, "percent_of_bandwidth": 100 * gb_s / bandwidth}
        row["faster_than_published"] = row["published"]["ms"] / row["ours"]["ms"]
        phases[phase] = row
    kept = ("shape", "dtype", "batch", "kv", "steps", "rounds")
    about = {**conditions(device), **{key: getattr(args, key) for key in kept}, "engine": ours.runner.name}
    return {**about, "bandwidth_gb_s": bandwidth, "agreement": close, "phases": phases}


def show(result: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    print(f"\n{result['date']}  {result['device']}, {result['torch_threads']} torch threads  {versions}")
    print(
        f"{result['shape']} {result['dtype']}, batch {result['batch']}, KV {result['kv']}, {result['steps']} latent and "
        f"as many token steps, {result['rounds']} rounds; bandwidth {result['bandwidth_gb_s']:.1f} GB/s"
    )
    print(f"both sides against each other, worst of all vectors: {result['agreement']}")
    table = Table(box=None)
    columns = ("phase", "floor ms", f"{result['engine']} ms", "GB/s", "% bw", "published ms", "GB/s", "% bw", "faster")
    for column in columns:
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase, row in result["phases"].items():
        cells = [phase, f"{row['floor_ms']:.2f}"]
        for name in ("ours", "published"):
            side = row[name]
            cells += [f"{side['ms']:.2f}", f"{side['gb_s']:.1f}", f"{side['percent_of_bandwidth']:.0f}%"]
        table.add_row(*cells, f"{row['faster_than_published']:.2f}x")
    Console(width=110).print(table)


def main() -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default, choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--shape", nargs="+", default=["smollm2-135m"], choices=SHAPES, help="one after the other")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="one after the other")
    parser.add_argument("--kv", type=int, default=256, help="tokens of the prompt, which the steps start behind")
    parser.add_argument("--steps", type=int, default=20, help="latent steps, and then token steps, per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--engine", default="eager", choices=engine_names())
    parser.add_argument("--out", metavar="JSON", help="merge the numbers into this file")
    args = parser.parse_args()
    for shape in args.shape:
        model = build_model(shape, getattr(torch, args.dtype), args.device)
        for batch in args.batch:
            result = measure(model, argparse.Namespace(**{**vars(args), "shape": shape, "batch": batch}))
            show(result)
            if args.out:
                key = f"{shape} {args.dtype} batch {batch} kv {args.kv} {result['engine']}"
                merge_json(args.out, "steps", {key: result})


if __name__ == "__main__":
    main()
