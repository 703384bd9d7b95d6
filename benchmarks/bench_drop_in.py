"""model.generate() of an accelerated model beside plain model.generate(): what the drop-in saves, option by option.

    python benchmarks/bench_drop_in.py --out results.json

A chat of the default model on the CPU, whole calls with the prompt in them, as a program sees them. Before anything is
timed both sides are checked: in float32 they must give the same greedy tokens for every option; in another dtype the error
of the next token's logits against float32, behind the same text, may be twice that of plain transformers in that dtype.

Medians of rounds in which the sides take turns.
"""

import argparse
import copy
import statistics
import sys
import time
from typing import Any

import torch
from bandwidth import conditions, merge_json, read_bandwidth
from latentmas.default_model import default_model_folder
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from latentmas_kernels import accelerate

QUESTION = "Write a short story about a robot who learns to paint."


class Same(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + 0.0


class Never(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Nobody(BaseStreamer):
    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


def options() -> dict[str, dict[str, Any]]:
    """By name, what a call gets besides prompt and lengths."""
    return {
        "greedy": {},
        "sampled, temperature 0.7, top-p 0.9": {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
        "repetition penalty 1.1": {"repetition_penalty": 1.1},
        "streamed": {"streamer": Nobody()},
        "no repeated 3-grams": {"no_repeat_ngram_size": 3},
        "a processor of the caller's": {"logits_processor": [Same()]},
        "a criterion of the caller's": {"stopping_criteria": [Never()]},
        "with scores": {"output_scores": True, "return_dict_in_generate": True},
        "sampled, and a processor": {"do_sample": True, "logits_processor": [Same()]},
    }


def call(model: Any, prompt: dict[str, Tensor], new: int, **kwargs: Any) -> Any:
    return model.generate(**prompt, max_new_tokens=new, min_new_tokens=new, **kwargs)


def ids_of(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.sequences


def logits_of(model: Any, ids: Tensor) -> Tensor:
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, output_logits=True, return_dict_in_generate=True
    )
    return out.logits[0].float()


def check(folder: Any, prompt: dict[str, Tensor], dtype: torch.dtype, sides: tuple[Any, Any]) -> str | None:
    """Why the two sides must not be timed against each other, or None."""
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    fast = accelerate(copy.deepcopy(exact), engine="native")
    for name, given in options().items():
        if not given.get("do_sample") and "streamer" not in given:
            want, got = (ids_of(call(m, prompt, 32, **given)) for m in (exact, fast))
            if not torch.equal(want, got):
                return f"{name}: other tokens than plain generate() in float32"
    ids = ids_of(call(exact, prompt, 32))
    reference = logits_of(exact, ids)
    plain, ours = ((logits_of(m, ids) - reference).norm() / reference.norm() for m in sides)
    if dtype != torch.float32 and ours > 2 * plain:
        return f"logits are {ours:.1e} off float32, plain transformers' are {plain:.1e} off"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", metavar="JSON")
    args = parser.parse_args()
    folder, dtype = default_model_folder(), getattr(torch, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ours = accelerate(copy.deepcopy(plain), engine="native")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    prompt = {name: tensor.repeat(args.batch, 1) for name, tensor in chat.items()}
    refused = check(folder, prompt, dtype, (plain, ours))
    if refused:
        sys.exit(f"refused: {refused}")
    print(
        f"default model, {args.dtype}, batch {args.batch}, {prompt['input_ids'].shape[1]} prompt tokens, {args.new_tokens} new "
        f"tokens; median of {args.rounds} rounds; ms per new token, the prompt included\n"
    )
    print(f"{'':<38} {'plain':>8} {'accelerated':>12} {'times':>6}   GB/s there is")
    results = {}
    for name, given in options().items():
        times: dict[str, list[float]] = {"plain": [], "accelerated": []}
        bandwidths = []
        for turn in range(args.rounds + 1):
            bandwidths.append(read_bandwidth("cpu", repeats=3))
            for side, model in list({"plain": plain, "accelerated": ours}.items())[:: 1 if turn % 2 else -1]:
                begin = time.perf_counter()
                call(model, prompt, args.new_tokens, **given)
                if turn:  # the first is to warm up
                    times[side].append((time.perf_counter() - begin) * 1e3 / args.new_tokens)
        median = {side: statistics.median(ms) for side, ms in times.items()}
        ratio = statistics.median(p / a for p, a in zip(times["plain"], times["accelerated"], strict=True))
        results[f"{name}, {args.dtype}, batch {args.batch}"] = {
            **conditions("cpu"), **median, "times": ratio, "gb_s": statistics.median(bandwidths),
        }  # fmt: skip
        row = f"{name:<38} {median['plain']:8.2f} {median['accelerated']:12.2f} {ratio:6.2f}"
        print(f"{row}   {statistics.median(bandwidths):.0f}", flush=True)
        if args.out:
            merge_json(args.out, "drop-in", results)


if __name__ == "__main__":
    main()
