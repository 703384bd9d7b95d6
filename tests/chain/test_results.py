"""Results: turns, metrics, seconds and traces of what was done."""

import itertools
import json
import time
from types import SimpleNamespace

import latentmas.chain.planner
import latentmas.chain.setup
import pytest
import torch
from example_chains import (
    AGENTS,
    CHAINS,
    CODE,
    JUDGER,
    MATH,
    MIXED,
    PER_SLOT,
    QUESTIONS,
    SENTENCES,
    WORDS,
    prompts,
    texts_of,
)
from latentmas.chain import stage_run
from latentmas.chain.chain import Chain
from latentmas.chain.results import AgentMetrics, AgentTurn, Answer
from latentmas.chain_files.reader import METHODS, serial

from latentmas_kernels import LatentCache, generation
from latentmas_kernels.engines import EagerEngine

pytestmark = pytest.mark.usefixtures("keys_are_moved_by_torch")


def test_turns_and_metrics_report_what_was_done(model, tokenizer):
    """Turns per question; metrics summed over the questions, without padding."""
    result = Chain(model, tokenizer, MIXED, aligner="ridge").run(QUESTIONS)
    rows = [prompts(tokenizer, MIXED, question) for question in QUESTIONS]
    read = [[len(row[0]), len(row[1]), 1 + len(row[2]), len(row[3])] for row in rows]
    for question, answer, lengths in zip(QUESTIONS, result.answers, read, strict=True):
        turns = answer.turns
        assert answer.question == question
        assert [turn.agent for turn in turns] == ["planner", "critic", "refiner", "judger"]
        assert [turn.prompt_tokens for turn in turns] == lengths
        assert [turn.latent_steps for turn in turns] == [4, 0, 3, 0]
        assert [turn.new_tokens for turn in turns] == [0, 6, 0, 9]
        assert [turn.finish_reason for turn in turns] == [None, "length", None, "length"]
        assert turns[0].text is turns[2].text is None
        assert turns[3].text == answer.text
    assert [agent.agent for agent in result.agents] == ["planner", "critic", "refiner", "judger"]
    assert [agent.prompt_tokens for agent in result.agents] == [sum(column) for column in zip(*read, strict=True)]
    assert [agent.latent_steps for agent in result.agents] == [4 * 4, 0, 4 * 3, 0]
    assert [agent.new_tokens for agent in result.agents] == [0, 4 * 6, 0, 4 * 9]
    assert [agent.steps for agent in result.agents] == [4, 6, 3, 9]
    held = [sum(segment.stop) for segment in result.memory.segments if segment.kind != "prompt"]
    assert [agent.kv_bytes for agent in result.agents] == [slots * PER_SLOT for slots in held]


def test_a_batch_takes_as_many_steps_as_its_longest_text(model, tokenizer, script):
    script(["ab<eos>", "abcdef<eos>", "<eos>"])
    metrics = Chain(model, tokenizer, AGENTS[-1:]).run(["Why?", "x", "y"]).agents[0]
    assert (metrics.steps, metrics.new_tokens) == (7, 3 + 7 + 1)


@pytest.mark.parametrize("chain", CHAINS)
def test_every_second_is_counted_once_and_where_it_belongs(model, tokenizer, monkeypatch, chain):
    """On a clock that only moves where work is done: each phase lasts a power of ten, so none can hide in another."""
    agents = CHAINS[chain]
    clock = SimpleNamespace(now=0.0)

    def takes(owner, name, seconds):
        function = getattr(owner, name)

        def call(*arguments, **options):
            clock.now += seconds(*arguments) if callable(seconds) else seconds
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    def forward(engine, cache, prompt):
        if prompt.inputs_embeds is not None:
            return 100.0
        return 10_000.0 if prompt.columns == 1 else 1_000_000.0

    chain = Chain(model, tokenizer, agents, aligner="ridge", engine="eager")
    takes(EagerEngine, "extend", forward)
    takes(latentmas.chain.setup, "turn_ids", 1.0)
    takes(tokenizer, "decode", 1.0)
    takes(generation, "check_finite_weights", 1.0)
    takes(LatentCache, "name_segments", 1.0)
    takes(stage_run, "padded", 1.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    result = chain.run(QUESTIONS)
    for agent, metrics in zip(agents, result.agents, strict=True):
        assert metrics.prefill_seconds == 1_000_000
        assert metrics.latent_seconds == 100 * (agent.latent_steps or 0)
        assert metrics.decode_seconds == 10_000 * ((agent.max_new_tokens or 1) - 1)
        parts = metrics.prefill_seconds + metrics.latent_seconds + metrics.decode_seconds + metrics.other_seconds
        assert metrics.seconds == parts
    prompts_read, texts_read = len(agents) * 4, 4 * sum(agent.latent_steps is None for agent in agents)
    others = sum(metrics.other_seconds for metrics in result.agents)
    assert others == prompts_read + texts_read + 3 * len(agents), (
        "and the check, the segments and the padding of each call"
    )
    assert sum(metrics.seconds for metrics in result.agents) == result.seconds == clock.now


def test_metrics_add_up_over_batches():
    one = AgentMetrics("planner", 1, 2, 3, 4, 1.0, 2.0, 4.0, 8.0, 100)
    two = AgentMetrics("planner", 10, 20, 30, 40, 16.0, 32.0, 64.0, 128.0, 70)
    assert one + two == two + one == AgentMetrics("planner", 11, 22, 33, 44, 17.0, 34.0, 68.0, 136.0, 100)
    assert (one + two).seconds == one.seconds + two.seconds == 255
    assert (one, two) == (
        AgentMetrics("planner", 1, 2, 3, 4, 1.0, 2.0, 4.0, 8.0, 100),
        AgentMetrics("planner", 10, 20, 30, 40, 16.0, 32.0, 64.0, 128.0, 70),
    )
    with pytest.raises(AssertionError, match="per agent"):
        one + AgentMetrics("critic")


def test_milliseconds_per_step_are_those_of_the_steps():
    """Reading the prompt and the rest are no steps; without steps there is no such number."""
    metrics = AgentMetrics(
        "judger", steps=8, prefill_seconds=64.0, latent_seconds=0.5, decode_seconds=1.5, other_seconds=9
    )
    assert metrics.ms_per_step == 250
    assert AgentMetrics("reader", prefill_seconds=1.0).ms_per_step is None
    assert metrics.to_dict()["ms_per_step"] == 250
    assert metrics.to_dict()["seconds"] == 75
    assert {"agent", "prompt_tokens", "steps", "kv_bytes", "prefill_seconds"} <= metrics.to_dict().keys()


@pytest.mark.parametrize("method", METHODS)
def test_results_turn_into_json_and_back(model, tokenizer, method):
    """All but the memory."""
    result = Chain(model, tokenizer, METHODS[method](2, 5), aligner="ridge").run(QUESTIONS)
    document = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    thinks = any(agent.thinks for agent in serial(METHODS[method](2, 5)))
    assert document == result.to_dict()
    assert [(answer["question"], answer["text"]) for answer in document["answers"]] == list(
        zip(QUESTIONS, texts_of(result), strict=True)
    )
    assert [turn["text"] for turn in document["answers"][0]["turns"]] == [turn.text for turn in result.answers[0].turns]
    assert document["seconds"] == result.seconds > 0
    assert [agent["seconds"] for agent in document["agents"]] == [agent.seconds for agent in result.agents]
    assert document["aligner"] == ({"kind": "ridge", "reason": "asked for"} if thinks else None)
    assert "memory" not in document


def test_agents_in_several_calls_have_seconds_and_numbers_of_their_own(model, tokenizer, monkeypatch):
    """A thinker beside a writer: its steps are not charged with the text, and each is reported by its number. On a clock that
    ticks when it is looked at, all seconds but the first and the last are somebody's."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    agents = [[MATH, WORDS, CODE], JUDGER]
    reported = []
    chain = Chain(model, tokenizer, agents, aligner="ridge")
    result = chain.run(SENTENCES, on_progress=lambda p: reported.append((p.names, p.number, p.others)))
    math, words, code, _ = result.agents
    assert (math.decode_seconds, code.decode_seconds, words.latent_seconds) == (0, 0, 0)
    assert math.latent_seconds == code.latent_seconds > 0 < words.decode_seconds
    assert list(dict.fromkeys(reported)) == [("math + code", 1, (3,)), ("words", 2, ()), ("judger", 4, ())]
    assert sum(agent.seconds for agent in result.agents) == pytest.approx(result.seconds - 2)


def test_traces_are_those_of_each_agent_and_only_where_asked_for(model, tokenizer):
    chain = Chain(model, tokenizer, [[MATH, WORDS, CODE], JUDGER], aligner="ridge")
    result, plain = chain.run(SENTENCES, trace=3), chain.run(SENTENCES)
    assert plain.traces == []
    assert texts_of(result) == texts_of(plain)
    assert [(t.agent, t.trace.steps) for t in result.traces] == [("math", [4] * 4), ("code", [2] * 4)]
    assert result.traces[0].trace.tokens.shape == (4, 4, 3)
    for row, question in enumerate(SENTENCES):
        alone = Chain(model, tokenizer, [CODE, JUDGER], aligner="ridge").run([question], trace=3).traces[0].trace
        assert torch.equal(alone.tokens[0], result.traces[1].trace.tokens[row, :2])
        torch.testing.assert_close(alone.norms[0], result.traces[1].trace.norms[row, :2], rtol=1e-5, atol=1e-5)


def test_answers_keep_the_keys_that_files_of_results_have():
    turn = AgentTurn("scout", 5, new_tokens=9, text="abc", finish_reason="length", truncated_to=7)
    (record,) = Answer("Why?", "abc", "length", [turn]).to_dict()["turns"]
    assert record == {
        "agent": "scout", "prompt_tokens": 5, "latent_steps": 0, "new_tokens": 9, "text": "abc", "finish_reason": "length",
        "handed_over": 7,
    }  # fmt: skip
