"""What concerns more than one step of the CUDA engine: capacity, rows of a batch, and a chain of agents end to end.

    python benchmarks/bench_chain.py capacity rows chain --shape qwen3-0.6b --out results.json

capacity: steps behind the same memory in buffers of 1024 and of 16384 slots; the ratio should be within 3 %.
rows: float32, ragged prompts, two latent steps, then greedy tokens: each row of the batch against the same row alone.
chain: three latent agents of 10 steps and a judger of 128 tokens here, the memory handed on, against one agent that
    generates 128 tokens in plain model.generate() of transformers. Prompts are 150 random tokens each. Before that, the
    latents of the first agent are checked against the eager engine in float32: their error may be twice that of the
    eager engine in the same dtype.

Medians of rounds in which the sides take turns.
"""

import argparse
import copy
import statistics
import sys
import time
from typing import Any

import torch
from bandwidth import OUT_OF_TIME, conditions, load_json, merge_json, synchronize
from bench_engine import PHASES, empty_caches, free_bytes, prepare, rounds_of
from peers import Eager, Ours, Start, without_hooks
from reference import errors, reference, refused
from shapes import SHAPES, parameter_bytes
from torch import Tensor

from latentmas_kernels import generate, latent_generate
from latentmas_kernels.alignment import Aligner

# On CUDA, and in a dry run on the CPU, where a step in Triton's interpreter takes a second or more.
CAPACITIES = {"cuda": (1024, 16384), "cpu": (64, 1024)}
STEPS, ROUNDS = {"cuda": 20, "cpu": 1}, {"cuda": 7, "cpu": 1}
AGENTS, PROMPT = 3, {"cuda": 150, "cpu": 12}
LATENT_STEPS, NEW_TOKENS = {"cuda": 10, "cpu": 1}, {"cuda": 128, "cpu": 2}
ROWS, ROW_TOKENS = {"cuda": 8, "cpu": 2}, {"cuda": 32, "cpu": 2}
SAME = 0.03


def prompts(model: Any, device: str, count: int, length: int) -> list[Tensor]:
    draw = torch.Generator(device).manual_seed(2)
    return list(torch.randint(3, model.config.vocab_size, (count, 1, length), generator=draw, device=device))


@torch.no_grad()
def capacity(model: Any, aligner: Aligner, device: str) -> dict[str, Any]:
    """The same steps in a small and in a large buffer."""
    kv = CAPACITIES[device][0] // 2
    sides = {}
    for slots in CAPACITIES[device]:
        start = Start.random(model, aligner, 1, kv, slots)
        exact, side = reference(start), Ours(start)
        plain = errors(Eager(start), exact)
        for phase, error in errors(side, exact).items():
            if why := refused(error, plain[phase]):
                return {"refused": f"capacity {slots}, {phase}: {why}"}
        sides[str(slots)] = side
    seen = rounds_of(sides, device, STEPS[device], ROUNDS[device])
    small, large = ({p: statistics.median(seen[name][p]) for p in PHASES} for name in sides)
    ratios = {phase: large[phase] / small[phase] for phase in PHASES}
    return {
        "capacities": CAPACITIES[device], "kv": kv, "small_ms": small, "large_ms": large, "ratio": ratios,
        "within_3_percent": all(abs(ratio - 1) <= SAME for ratio in ratios.values()),
    }  # fmt: skip


def rows(model: Any, aligner: Aligner, device: str) -> dict[str, Any]:
    """Tokens of a ragged batch against those of its rows alone."""
    count, steps = ROWS[device], min(2, LATENT_STEPS[device])
    draw = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, PROMPT[device], (count,), generator=draw).tolist()
    ids = torch.randint(3, model.config.vocab_size, (count, max(lengths)), generator=draw).to(device)
    mask = torch.arange(max(lengths), device=device) >= max(lengths) - torch.tensor(lengths, device=device)[:, None]

    def tokens(ids: Tensor, mask: Tensor) -> Tensor:
        past = latent_generate(model, ids, mask, latent_steps=steps, aligner=aligner, engine="cuda").past_key_values
        new = ROW_TOKENS[device]
        out = generate(
            model, ids, mask, past_key_values=past, max_new_tokens=new, eos_token_id=None, engine="cuda"
        )  # fmt: skip
        return out.sequences[:, -new:].cpu()

    together = tokens(ids, mask.long())
    same = [
        torch.equal(together[row], tokens(ids[row : row + 1, -length:], mask[row : row + 1, -length:].long())[0])
        for row, length in enumerate(lengths)
    ]
    return {"rows": count, "lengths": lengths, "new_tokens": ROW_TOKENS[device], "identical_rows": sum(same)}


def chain(model: Any, aligner: Aligner, device: str) -> dict[str, Any]:
    """Seconds of the chain here, of its phases, and of one agent in transformers."""
    ids = prompts(model, device, AGENTS + 1, PROMPT[device])
    steps, new = LATENT_STEPS[device], NEW_TOKENS[device]
    if why := wrong_latents(model, aligner, ids[0], steps):
        return {"refused": why}
    room = (AGENTS + 1) * PROMPT[device] + AGENTS * steps + new

    def ours() -> dict[str, float]:
        past, seconds = None, dict.fromkeys(("setup", "prefill", "latent", "decode"), 0.0)
        outputs = []
        for prompt in ids[:AGENTS]:
            size = room if past is None else None
            out = latent_generate(
                model,
                prompt,
                latent_steps=steps,
                past_key_values=past,
                aligner=aligner,
                engine="cuda",
                max_cache_len=size,
            )
            past = out.past_key_values.donate()
            outputs.append(out)
        outputs.append(
            generate(model, ids[-1], past_key_values=past, max_new_tokens=new, eos_token_id=None, engine="cuda")
        )
        for out in outputs:
            for phase in seconds:
                seconds[phase] += getattr(out.metrics, f"{phase}_seconds")
        return seconds

    def theirs() -> dict[str, float]:
        model.generate(
            ids[0], attention_mask=torch.ones_like(ids[0]), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
        return {}

    without_hooks(model)
    totals: dict[str, list[float]] = {"ours": [], "single": []}
    phases: list[dict[str, float]] = []
    for turn in range(-1, ROUNDS[device]):  # the first one warms up
        for name, call in list({"ours": ours, "single": theirs}.items())[:: 1 if turn % 2 else -1]:
            synchronize(device)
            begin = time.perf_counter()
            said = call()
            synchronize(device)
            if turn >= 0:
                totals[name].append(time.perf_counter() - begin)
                phases += [said] if said else []
    seconds = {name: statistics.median(times) for name, times in totals.items()}
    return {
        "agents": AGENTS, "latent_steps": steps, "new_tokens": new, "prompt": PROMPT[device],
        "chain_seconds": seconds["ours"], "single_seconds": seconds["single"],
        "single_over_chain": seconds["single"] / seconds["ours"],
        "phases": {name: statistics.median(p[name] for p in phases) for name in phases[0]},
    }  # fmt: skip


def wrong_latents(model: Any, aligner: Aligner, ids: Tensor, steps: int) -> str | None:
    """Why the chain gets no time; None where its first agent is right, up to where rounding alone leads elsewhere."""
    if sum(p.numel() for p in model.parameters()) * 4 > free_bytes(ids.device.type):
        return "the model does not fit in float32 beside itself, so nothing tells whether the chain is right"
    exact_model = copy.deepcopy(model).float()
    runs = {"exact": (exact_model, "eager"), "plain": (model, "eager"), "ours": (model, "cuda")}
    got = {}
    for name, (which, engine) in runs.items():
        out = latent_generate(which, ids, latent_steps=steps, aligner=aligner, engine=engine)
        got[name] = torch.cat([out.latents, out.last_hidden[:, None]], dim=1)[0].double()
    size = got["exact"].norm(dim=-1)
    plain, ours = (((got[name] - got["exact"]).norm(dim=-1) / size).tolist() for name in ("plain", "ours"))
    known = next((i for i, error in enumerate(plain) if error > 0.3), len(plain))
    if known == 0:
        return f"transformers' own error against float32 is {plain[0]:.2f} at the first latent, which tells nothing"
    return refused(statistics.mean(ours[:known]), statistics.mean(plain[:known]))


WHAT = {"capacity": capacity, "rows": rows, "chain": chain}


def main() -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=f"of {', '.join(WHAT)}; all of them by default")
    parser.add_argument(
        "--device", default=default, choices=["cpu", "cuda"], help="cpu: a dry run (TRITON_INTERPRET=1)"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="rows is always float32")
    parser.add_argument("--shape", nargs="+", default=["qwen3-0.6b"], choices=SHAPES)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing after this long")
    parser.add_argument("--out", metavar="JSON", help="merge the numbers into this file; what it has is skipped")
    parser.add_argument("--force", action="store_true", help="measure again")
    args = parser.parse_args()
    if unknown := set(args.what) - set(WHAT):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(WHAT)}")
    began, failed = time.monotonic(), False
    done = {} if args.force else load_json(args.out, "chain")
    for shape in args.shape:
        for what in args.what or WHAT:
            dtype = "float32" if what == "rows" else args.dtype
            key = f"{what} {shape} {dtype}"
            if key in done and "refused" not in done[key]:
                continue
            if time.monotonic() - began > args.seconds:
                print(f"{args.seconds:.0f} s are spent: {key} and what comes behind it are left for the next run")
                sys.exit(OUT_OF_TIME)
            itemsize = getattr(torch, dtype).itemsize
            empty_caches()
            if parameter_bytes(shape, itemsize) * 1.1 > free_bytes(args.device):
                result: dict[str, Any] = {"refused": "the weights do not fit"}
            else:
                result = WHAT[what](*prepare(shape, getattr(torch, dtype), args.device), args.device)
            print(f"{key}: {result}", flush=True)
            failed |= what == "rows" and result.get("identical_rows") != result.get("rows")
            if args.out:
                merge_json(args.out, "chain", {key: {**conditions(args.device), **result}})
    if failed:
        sys.exit("rows of a batch differ from the same rows alone")


if __name__ == "__main__":
    main()
