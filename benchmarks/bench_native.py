"""The native engine on the CPU beside its peers: steps, prompts, int8, a whole chain, and what memory they take.

    python benchmarks/bench_native.py steps chain memory --out results.json

steps: prompt, latent steps and token steps of the native engine, in the model's weights and in int8, and behind the same
    memory in a buffer of 16,384 slots; beside the published loop (transformers eager with the lm_head in every step) and,
    where it is installed, llama.cpp at batch 1. Random weights of real shapes; all sides are checked against float32 before
    anything is timed.
chain: three latent agents of 10 steps and a judger of 128 tokens on the default model, native and eager, against a single
    agent of 128 tokens in plain transformers.
memory: the most that the engine takes above the model, from the kernel's own account of this process.
drift: int8 against the model's own weights: cosine over 40 latent steps, and how many of 128 greedy tokens change.

Medians of rounds in which the sides take turns; GB/s are weight bytes over time, beside the bandwidth of the same minute.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bandwidth import conditions, median_ms, merge_json, read_bandwidth
from bench_steps import weight_bytes
from latentmas.chain_files.reader import latent_agents, single_agent
from latentmas.default_model import default_model_folder
from peers import Published
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, build_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from latentmas_kernels import LatentCache, build_aligner, generate, latent_generate
from latentmas_kernels.engines import LatentParams, NativeEngine, SamplingParams
from latentmas_kernels.extension import extension, extension_state
from latentmas_kernels.inputs import Prompt
from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.ops.realign import realign_reference

PHASES = ("prefill", "latent", "token")
LARGE = 16384
QUESTION = "A shop sells pens at 3 for 2 euros. How many pens can Ana buy with 14 euros, and what is left?"


class Native:
    """The engine as latent_generate() and generate() drive it, without their checks."""

    def __init__(self, model: Any, slots: int, *, int8: bool = False) -> None:
        self.architecture, self.slots = Architecture.of(model), slots
        self.runner, self.aligner = NativeEngine(model, self.architecture, int8=int8), build_aligner(model, "identity")

    def prefill(self, ids: Tensor) -> None:
        if not hasattr(self, "cache"):  # kept: a buffer of this size is not made for every prompt
            self.cache = LatentCache.for_model(self.architecture, len(ids), self.slots)
        self.cache.lengths = self.cache.next_position = torch.zeros(len(ids), dtype=torch.int64)
        counts = torch.full((len(ids),), ids.shape[1])
        self.hidden = self.runner.extend(self.cache, Prompt(counts, ids), logits=False)

    def latent(self, steps: int) -> Tensor:
        latent_params = LatentParams(torch.full((len(self.hidden),), steps))
        thought = self.runner.run_latent(self.cache, self.hidden, self.aligner, latent_params, None)
        self.hidden = thought.last_hidden
        return thought.latents

    def token(self, token: Tensor, steps: int) -> Tensor:
        """Greedy; the tokens that were chosen on the way."""
        first = torch.zeros(len(token), self.architecture.vocab_size).scatter_(1, token[:, None], 1.0)
        sampling_params = SamplingParams(steps + 1, 0, False, 1.0, 0, 1.0, eos_token_ids=[], pad_token_id=0)
        return self.runner.decode(self.cache, first, sampling_params, None)

    def sampled(self, token: Tensor, steps: int) -> Tensor:
        """With temperature, top-k and top-p."""
        first = torch.zeros(len(token), self.architecture.vocab_size).scatter_(1, token[:, None], 1.0)
        return self.runner.decode(self.cache, first, SamplingParams(steps + 1, 0, True, 0.8, 50, 0.95, [], 0), None)

    def logits(self, token: Tensor) -> Tensor:
        one_each = torch.ones(len(token), dtype=torch.int64)
        return self.runner.extend(self.cache, Prompt(one_each, token[:, None]), logits=True)


@dataclass(frozen=True)
class Exact:
    """transformers in float32, which follows a side: at each step it is given the embedding that the side fed, and says what
    the next one should be. Errors of single steps show, and none of them is blown up by the loop."""

    model: Any
    target_norm: float

    @classmethod
    def of(cls, model: Any, target_norm: float) -> "Exact":
        return cls(copy.deepcopy(model).float(), target_norm)

    def follow(self, ids: Tensor, latents: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """The embeddings to feed, [B, steps, D], and the logits of the token behind them, [B, V]."""
        cache, decoder, wanted = DynamicCache(config=self.model.config), self.model.model, []
        hidden = decoder(input_ids=ids, past_key_values=cache).last_hidden_state[:, -1]
        for step in range(latents.shape[1]):
            wanted.append(realign_reference(hidden, None, self.target_norm))
            fed = latents[:, step : step + 1].float()
            hidden = decoder(inputs_embeds=fed, past_key_values=cache).last_hidden_state[:, -1]
        return torch.stack(wanted, 1), self.model(input_ids=token[:, None], past_key_values=cache).logits[:, -1]


def check(name: str, side: Any, exact: Exact, ids: Tensor, steps: int, dtype: torch.dtype) -> float:
    """The least cosine to float32; exits where a side is not close to it."""
    side.prefill(ids)
    latents = side.latent(steps)
    logits = side.logits(ids[:, 0]) if isinstance(side, Native) else side.token(ids[:, 0], 1)
    wanted, wanted_logits = exact.follow(ids, latents, ids[:, 0])
    least = 0.98 if "int8" in name else 0.99999 if dtype == torch.float32 else 0.999
    worst = 1.0
    for got, want in ((latents, wanted), (logits, wanted_logits)):
        cosine = torch.nn.functional.cosine_similarity(got.double(), want.double(), dim=-1).min().item()
        if not cosine > least:
            sys.exit(f"{name} is at cosine {cosine:.5f} to float32, so no times")
        worst = min(worst, cosine)
    return worst


@torch.no_grad()
def steps(args: argparse.Namespace, shape: str, batch: int, folder: Path) -> dict[str, Any]:
    dtype = getattr(torch, args.dtype)
    model = build_model(shape, dtype, "cpu")
    slots = args.kv + 3 * args.steps + 2
    sides: dict[str, Any] = {"native": Native(model, slots), "native int8": Native(model, slots, int8=True)}
    published = Published(model, sides["native"].aligner.target_norm)
    if batch == 1:
        sides[f"native, {LARGE} slots"] = Native(model, LARGE)
        try:
            from llama_cpp_peer import LlamaCpp

            sides["llama.cpp"] = LlamaCpp(model, published.target_norm, slots, folder)
        except ImportError as error:
            print(f"without llama.cpp: {error}")
    ids = torch.randint(3, model.config.vocab_size, (batch, args.kv))
    sides["transformers"] = published
    exact = Exact.of(model, published.target_norm)
    cosines = {name: check(name, side, exact, ids, args.steps, dtype) for name, side in sides.items()}
    del exact
    times: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
    bandwidths = []
    for turn in range(args.rounds):
        bandwidths.append(read_bandwidth("cpu", repeats=3))
        for name, side in list(sides.items())[:: 1 if turn % 2 else -1]:
            calls: dict[str, tuple[Callable[[], Any], int]] = {
                "prefill": (lambda side=side: side.prefill(ids), 1),
                "latent": (lambda side=side: side.latent(args.steps), args.steps),
                "token": (lambda side=side: side.token(ids[:, 0], args.steps), args.steps),
            }
            if isinstance(side, Native):
                calls["sampled"] = (lambda side=side: side.sampled(ids[:, 0], args.steps), args.steps)
            for phase, (call, count) in calls.items():
                ms = median_ms(call, "cpu", repeats=1, warmup=0) / count
                times[name].setdefault(phase, []).append(ms)
    medians = {name: {phase: statistics.median(v) for phase, v in rows.items()} for name, rows in times.items()}
    return {
        **about(args),
        "shape": shape,
        "batch": batch,
        "bandwidth_gb_s": statistics.median(bandwidths),
        "weight_bytes": weight_bytes(model),
        "least_cosine": cosines,
        "ms": medians,
    }


def about(args: argparse.Namespace) -> dict[str, Any]:
    threads = extension().threads()
    return {
        **conditions("cpu"),
        "native": extension_state(),
        "threads": threads,
        "dtype": args.dtype,
        "kv": args.kv,
    }


def show_steps(result: dict[str, Any]) -> None:
    bandwidth, ms = result["bandwidth_gb_s"], result["ms"]
    print(
        f"\n{result['date']}  {result['device']}, {result['native']}\n{result['shape']} {result['dtype']}, batch "
        f"{result['batch']}, KV {result['kv']}; bandwidth {bandwidth:.1f} GB/s"
    )
    table = Table(box=None)
    for column in (
        "side",
        "prefill ms",
        "native is",
        "latent ms",
        "% bw",
        "native is",
        "token ms",
        "native is",
        "sampled ms",
    ):
        table.add_column(column, justify="left" if column == "side" else "right")
    for name, row in ms.items():
        share = result["weight_bytes"]["latent"] / row["latent"] / 1e4 / bandwidth
        cells = [name]
        for phase in PHASES:
            cells.append(f"{row[phase]:.2f}")
            if phase == "latent":
                cells.append("" if "int8" in name else f"{share:.0f}%")
            cells.append(f"{row[phase] / ms['native'][phase]:.2f}x")
        table.add_row(*cells, f"{row['sampled']:.2f}" if "sampled" in row else "")
    Console(width=120).print(table)


@torch.no_grad()
def chain(args: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = default_model(args)
    agents = latent_agents(10, 128)

    def ids_of(text: str) -> Tensor:
        message = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )

    prompts = [ids_of(agent.text(QUESTION)) for agent in agents]
    alone = ids_of(single_agent(128)[0].text(QUESTION))
    aligners = {kind: build_aligner(model, kind) for kind in ("auto", "identity")}
    slots = sum(p.shape[1] for p in prompts) + 30 + 128

    def run(engine: str, aligner: str) -> Tensor:
        memory = None
        for ids, agent in zip(prompts, agents, strict=True):
            if agent.latent_steps is not None:
                memory = latent_generate(
                    model, ids, latent_steps=10, aligner=aligners[aligner], past_key_values=memory, engine=engine,
                    max_cache_len=slots,
                ).past_key_values.donate()  # fmt: skip
        return generate(
            model, prompts[-1], past_key_values=memory, max_new_tokens=128, eos_token_id=None, engine=engine
        ).sequences

    calls = {
        "native chain": lambda: run("native", "auto"),
        "native chain, identity": lambda: run("native", "identity"),
        "eager chain": lambda: run("eager", "auto"),
        "single agent, transformers": lambda: model.generate(
            alone, max_new_tokens=128, min_new_tokens=128, do_sample=False, pad_token_id=0
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for turn in range(args.rounds):
        for name, call in list(calls.items())[:: 1 if turn % 2 else -1]:
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    seconds = {name: statistics.median(v) for name, v in times.items()}
    prompt_tokens = sum(p.shape[1] for p in prompts)
    return {**about(args), "seconds": seconds, "prompt_tokens": prompt_tokens, "auto_is": aligners["auto"].kind}


def show_chain(result: dict[str, Any]) -> None:
    seconds = result["seconds"]
    print(
        f"\nchain on the default model, {result['dtype']}: {result['prompt_tokens']} prompt tokens, 3 x 10 latent steps "
        f"(auto is {result['auto_is']}), 128 new tokens"
    )
    for name, value in seconds.items():
        print(f"  {name:<28} {value:6.2f} s   the native chain takes {seconds['native chain'] / value:.2f} of it")


@torch.no_grad()
def memory(args: argparse.Namespace) -> dict[str, Any]:
    model = build_model(args.shape[0], getattr(torch, args.dtype), "cpu")
    weights = sum(p.nbytes for p in model.parameters())
    ids = torch.randint(3, model.config.vocab_size, (1, args.kv))
    side = Native(build_model("tiny", torch.float32, "cpu"), 80)  # what the first call of all brings in with it
    side.prefill(ids[:, :32] % 500)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    side = Native(model, args.kv + args.steps + 2)
    side.prefill(ids)
    side.latent(args.steps)
    side.token(ids[:, 0], 1)
    over = status("VmHWM") - before
    return {**about(args), "weights": weights, "over": over, "kv_bytes": side.cache.keys.nbytes * 2}


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def show_memory(result: dict[str, Any]) -> None:
    over, weights = result["over"], result["weights"]
    print(
        f"\npeak over the model: {over / 1e6:.1f} MB, {100 * over / weights:.1f} % of its {weights / 1e6:.0f} MB of weights, "
        f"{result['kv_bytes'] / 1e6:.1f} MB of it the KV memory"
    )


@torch.no_grad()
def drift(args: argparse.Namespace) -> dict[str, Any]:
    """Each its own loop, on the default model: errors add up as they would in use."""
    model, tokenizer = default_model(args)
    ids = tokenizer(QUESTION, return_tensors="pt").input_ids
    aligner = build_aligner(model, "auto")
    latents, texts = [], []
    for weights in ("model", "int8"):
        out = latent_generate(model, ids, latent_steps=40, aligner=aligner, weights=weights)
        latents.append(out.latents[0].float())
        said = generate(model, ids, max_new_tokens=128, eos_token_id=None, weights=weights)
        texts.append(said.sequences[0, ids.shape[1] :])
    cosines = torch.nn.functional.cosine_similarity(*latents, dim=-1)
    # The first token that differs changes all behind it: how often the choice changes on the same text is the fairer count.
    text = torch.cat([ids[0], texts[0]])[None]
    choices = []
    for weights in ("model", "int8"):
        engine = NativeEngine(model, Architecture.of(model), int8=weights == "int8")
        cache = LatentCache.for_model(engine.architecture, 1, text.shape[1])
        picked = [
            engine.extend(cache, Prompt(torch.tensor([1]), text[:, i : i + 1]), logits=True).argmax(-1)
            for i in range(text.shape[1] - 1)
        ]
        choices.append(torch.cat(picked))
    return {
        **about(args),
        "aligner": aligner.kind,
        "cosines": cosines.tolist(),
        "first_change": int((texts[0] != texts[1]).int().argmax()) if bool((texts[0] != texts[1]).any()) else None,
        "changed_choices": int((choices[0] != choices[1]).sum()),
        "choices": len(choices[0]),
    }


def show_drift(result: dict[str, Any]) -> None:
    cosines = result["cosines"]
    print(
        f"\nint8 against {result['dtype']} on the default model ({result['aligner']} feedback): cosine of the latents "
        f"{cosines[0]:.4f} at step 1, {cosines[9]:.4f} at 10, {cosines[39]:.4f} at 40, least {min(cosines):.4f};\n"
        f"greedy text parts at token {result['first_change']} of 128; on one and the same text {result['changed_choices']} of "
        f"{result['choices']} choices change"
    )


def default_model(args: argparse.Namespace) -> tuple[Any, Any]:
    folder = default_model_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["steps", "chain", "memory", "drift"])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--shape", nargs="+", default=["smollm2-135m", "qwen2.5-0.5b"], choices=SHAPES)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--kv", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20, help="latent, then token, then sampled steps per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", metavar="JSON", help="merge the numbers into this file")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    if "memory" in args.what:  # first, while nothing else has left its pages behind
        results["memory"] = memory(args)
        show_memory(results["memory"])
    if "steps" in args.what:
        for shape in args.shape:
            for batch in args.batch:
                with tempfile.TemporaryDirectory() as folder:
                    results[f"{shape} batch {batch}"] = steps(args, shape, batch, Path(folder))
                show_steps(results[f"{shape} batch {batch}"])
    for name, part, show in (("chain", chain, show_chain), ("drift", drift, show_drift)):
        if name in args.what:
            results[name] = part(args)
            show(results[name])
    if args.out:
        merge_json(args.out, "native", results)


if __name__ == "__main__":
    main()
