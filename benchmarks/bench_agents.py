"""What arranging agents costs and saves on the CPU: side by side, common beginnings, cuts, looking inside.

    python benchmarks/bench_agents.py

The default model in its own dtype. Before a time is printed, the same chains run in float32 against themselves without what
is measured: side by side as a batch of questions, shared beginnings, and cuts change no answer there.

Medians of rounds in which the sides take turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import latentmas.chain.planner
import torch
from bandwidth import conditions, read_bandwidth
from latentmas import Agent, Chain, load_model
from latentmas.chain_files.reader import hierarchical_agents

from latentmas_kernels import latent_generate

QUESTION = "Anna is taller than Ben, and Ben is taller than Carl. Who is the shortest?"
COMMON = (
    "Read what you are told with care, take nothing for granted, and say what you know and what you do not know. " * 13
)
STEPS, NEW_TOKENS, ROUNDS = 20, 16, 9


def side_by_side() -> dict[str, list]:
    """One specialist; three at the same time; three one after the other. A judger behind each."""
    group, judger = hierarchical_agents(STEPS, NEW_TOKENS)
    assert isinstance(group, list)
    return {"one": [group[0], judger], "three": [group, judger], "three, serial": [*group, judger]}


def with_common_part() -> list[Agent]:
    """A thinker with some 300 tokens before the question, and a judger."""
    return [
        Agent("planner", COMMON + "Question: {question}\n\nPlan.", latent_steps=4),
        Agent("judger", "{question}\n\nAnswer.", max_new_tokens=4),
    ]


def in_turns(sides: dict[str, Callable[[], dict[str, float]]], rounds: int) -> dict[str, dict[str, float]]:
    """Medians of what each side tells, after one round to warm up."""
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for turn in range(-1, rounds):
        for name, call in list(sides.items())[:: 1 if turn % 2 else -1]:
            told = call()
            if turn >= 0:
                seen[name].append(told)
    return {name: {key: statistics.median(t[key] for t in told) for key in told[0]} for name, told in seen.items()}


def phases(chain: Chain, questions: list[str], **options: Any) -> dict[str, float]:
    """Milliseconds of all thinking agents, and of the run."""
    result = chain.run(questions, **options)
    thinkers = [m for m, agent in zip(result.agents, chain.agents, strict=True) if agent.thinks]
    return {
        "latent": 1000 * sum(m.latent_seconds for m in thinkers),
        "prefill": 1000 * sum(m.prefill_seconds for m in thinkers),
        "other": 1000 * sum(m.other_seconds for m in thinkers),
        "run": 1000 * result.seconds,
    }


def texts(chain: Chain, questions: list[str]) -> list[str]:
    return [answer.text for answer in chain.run(questions).answers]


def without_sharing(call: Callable[[], Any]) -> Any:
    before, latentmas.chain.planner.SHARE_FROM = latentmas.chain.planner.SHARE_FROM, 10**9
    try:
        return call()
    finally:
        latentmas.chain.planner.SHARE_FROM = before


def check(questions: list[str]) -> None:
    """In float32: an arrangement gives each question of a batch what it gets alone, shared beginnings or not."""
    model, tokenizer = load_model(dtype="float32")
    chain = Chain(model, tokenizer, hierarchical_agents(4, NEW_TOKENS))
    if texts(chain, questions[:3]) != [texts(chain, [question])[0] for question in questions[:3]]:
        raise SystemExit("three specialists answer a batch otherwise than its questions alone: no times")
    chain = Chain(model, tokenizer, with_common_part())
    if texts(chain, questions) != without_sharing(lambda: texts(chain, questions)):
        raise SystemExit("a common beginning that is read once changes an answer: no times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    questions = [f"A box holds {n} pens and {n + 3} pencils. How many things are in it?" for n in range(2, 10)]
    check(questions)
    model, tokenizer = load_model()
    told = conditions("cpu")
    print(f"{told}\nread bandwidth {read_bandwidth('cpu'):.0f} GB/s\n")

    chains = {name: Chain(model, tokenizer, agents) for name, agents in side_by_side().items()}
    seen = in_turns({name: lambda c=chain: phases(c, [QUESTION]) for name, chain in chains.items()}, rounds)
    print(f"side by side, {STEPS} latent steps, batch 1 (ms: latent, prefill, other; latent over that of one)")
    for name, ms in seen.items():
        ratio = ms["latent"] / seen["one"]["latent"]
        print(f"  {name:14s} {ms['latent']:8.1f} {ms['prefill']:8.1f} {ms['other']:8.1f} {ratio:8.2f}")

    chain = Chain(model, tokenizer, with_common_part())
    seen = in_turns(
        {
            "shared": lambda: phases(chain, questions),
            "not shared": lambda: without_sharing(lambda: phases(chain, questions)),
        },
        max(rounds // 3, 1),
    )
    print("\nbatch 8, some 300 tokens in common (ms: prefill, run)")
    for name, ms in seen.items():
        print(f"  {name:14s} {ms['prefill']:8.1f} {ms['run']:8.1f}")

    memory = latent_generate(
        model, tokenizer([COMMON * 3], return_tensors="pt").input_ids, latent_steps=0, aligner="identity"
    ).past_key_values
    slots = int(memory.lengths[0])

    def cut() -> dict[str, float]:
        kept = torch.ones(1, slots, dtype=torch.bool)
        kept[0, 1 : slots // 2] = False
        copy = memory.fork()
        began = time.perf_counter()
        copy.keep(kept)
        middle = time.perf_counter()
        copy.rebase(model)
        return {"keep": 1000 * (middle - began), "rebase": 1000 * (time.perf_counter() - middle)}

    ms = in_turns({"cut": cut}, rounds)["cut"]
    print(f"\nhalf of {slots} slots cut out (ms): keep {ms['keep']:.1f}, rebase {ms['rebase']:.1f}")

    chain = chains["one"]
    seen = in_turns(
        {"off": lambda: phases(chain, [QUESTION]), "on": lambda: phases(chain, [QUESTION], trace=5)}, rounds
    )
    print(f"\ntrace of {STEPS} steps (ms: latent, other)")
    for name, ms in seen.items():
        print(f"  {name:14s} {ms['latent']:8.1f} {ms['other']:8.1f}")


if __name__ == "__main__":
    main()
