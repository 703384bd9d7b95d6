"""From hand-over to the first token of vLLM: keys and values against embeddings, for memories of several lengths.

    python benchmarks/bench_kv_transfer.py [--dtype bfloat16] [--rounds 9]

In an environment with vLLM (docs/vllm.md). One engine takes both, in turns; every round has a memory of its own, so that
nothing is found in vLLM's prefix cache. Before a time is printed, both ways give the same token, and that of our own engine,
in float32 (in bfloat16 near ties may flip it: they are counted).
"""

import argparse
import os
import statistics
import time
from typing import Any

# The engine in this process: a second one would share the cores with it.
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
from bandwidth import conditions, read_bandwidth
from latentmas import load_model
from latentmas.backends.base import GenerationRequest
from latentmas.backends.kv_file import KVFile
from latentmas.backends.vllm import Vllm
from latentmas.default_model import default_model_folder
from rich.progress import track

from latentmas_kernels import LatentCache, build_aligner, generate, latent_generate

LENGTHS = (100, 500, 1500)
PROMPT, STEPS = 40, 10


def memory_of(model: Any, aligner: Any, length: int, seed: int) -> tuple[LatentCache, list[Any]]:
    """Random tokens and latent steps behind them, so many slots together; and what they were fed."""
    tokens = torch.randint(5, 40_000, (1, length - STEPS), generator=torch.Generator().manual_seed(seed))
    out = latent_generate(model, tokens, latent_steps=STEPS, aligner=aligner)
    return out.past_key_values, [*tokens[0].tolist(), *out.latents[0]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    model, _ = load_model(dtype=options.dtype)
    aligner = build_aligner(model, "soft")
    settings = {
        "max_model_len": 2048, "max_num_seqs": 4, "max_num_batched_tokens": 2048, "enable_prompt_embeds": True,
    }  # fmt: skip
    lines = []
    with Vllm(str(default_model_folder()), model, settings=settings) as vllm:
        for length in track(LENGTHS, "lengths"):
            seconds: dict[str, list[float]] = {"kv": [], "embeds": [], "of it: the file": []}
            differ = 0
            for turn in range(-1, options.rounds):
                memory, fed = memory_of(model, aligner, length, 1000 * length + turn)
                prompt = torch.randint(5, 40_000, (PROMPT,)).tolist()
                request = GenerationRequest(prompt, 1, (), row=0, slot_inputs=fed)
                own = generate(model, torch.tensor([prompt]), past_key_values=memory, max_new_tokens=1).sequences[0, -1]
                took, wrote = {}, {}
                for way in ("kv", "embeds")[:: 1 if turn % 2 else -1]:
                    vllm.kv_transfer = way
                    began = time.perf_counter()
                    (wrote[way],) = vllm.write(memory, [request])
                    took[way] = time.perf_counter() - began
                assert wrote["kv"].computed_tokens == PROMPT, "keys and values were computed again"
                assert wrote["embeds"].computed_tokens == PROMPT + length, (
                    "the prefix cache had embeddings of this memory"
                )
                same = wrote["kv"].ids == wrote["embeds"].ids == [int(own)]
                assert same or options.dtype == "bfloat16", (wrote, own)
                began = time.perf_counter()
                with KVFile(memory, vllm.stamp, vllm.folder):
                    took["of it: the file"] = time.perf_counter() - began
                if turn >= 0:
                    differ += not same
                    for name, value in took.items():
                        seconds[name].append(1000 * value)
            kv, embeds, file = (statistics.median(of) for of in seconds.values())
            mb = memory.kv_bytes / 2**20
            lines.append(
                f"| {length} | {mb:.1f} | {kv:.1f} | {file:.1f} | {embeds:.1f} | {embeds / kv:.1f} | {differ} |"
            )
    print(conditions("cpu"))
    print(f"{read_bandwidth('cpu'):.0f} GB/s of read bandwidth")
    print(
        f"SmolLM2-135M, {options.dtype}, a prompt of {PROMPT} tokens behind the memory; medians of {options.rounds} rounds, ms"
    )
    print("| slots | MB | kv | of it: the file | embeds | embeds / kv | rounds with other tokens |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
