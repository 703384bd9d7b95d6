"""Runs: any chain takes the memory that it said, and answers each question of a batch as alone."""

from contextlib import suppress

import latentmas.chain.planner
import latentmas.chain.setup
import pytest
from buffers import count_buffers
from example_chains import JUDGER, SENTENCES, TEMPLATE, endless, texts_of
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from latentmas.chain.agent import Agent
from latentmas.chain.chain import Chain
from latentmas.chain.memory_policy import Budget, MemoryPolicy
from tiny_models import VOCAB
from tokenizers_offline import character_tokenizer

pytestmark = pytest.mark.usefixtures("keys_are_moved_by_torch")

MODEL = endless()

STOPS = endless()

STOPS.generation_config.eos_token_id = list(range(0, VOCAB, 5))

NESTED = ["What is 12 times 7?", "What is 12 times 7? And 8 times 9?", "What", "What is it, and why is it so? Say it."]

LONG = "Read all of this with care, and more than once, before you say anything about it. "

HANDED = st.builds(
    MemoryPolicy, st.sampled_from(["all", "all", "last"]), st.sampled_from(["all", "all", "latent"]),
    st.none() | st.integers(1, 60),
)  # fmt: skip


@st.composite
def chains(draw):
    """Agents in any arrangement that makes a chain, with memory policies of any kind."""
    entries, number = [], 0
    last_thinks, written = False, False
    for _ in range(draw(st.integers(1, 3))):
        reads = written and not last_thinks and draw(st.booleans())
        memory = draw(HANDED)
        members = []
        for _ in range(draw(st.integers(1, 3))):
            number += 1
            prompt = draw(
                st.sampled_from(
                    ["Q: {question} Go on.", "Q: {question} Say!", "Go.", "{question}", LONG + "{question}"]
                )
            )
            if reads:
                prompt = draw(
                    st.sampled_from(["{notes} " + prompt, prompt + "{notes}", "{notes}" + prompt + "{notes}"])
                )
            thinks = draw(st.booleans())
            options = (
                {"latent_steps": draw(st.integers(0, 4))} if thinks else {"max_new_tokens": draw(st.integers(1, 4))}
            )
            settle = draw(st.sampled_from([None, -1.0, 0.5])) if thinks else None
            members.append(Agent(f"a{number}", prompt, **options, memory=memory, settle=settle))
        last_thinks = any(a.thinks for a in members)
        written = written or any(not a.thinks for a in members)
        entries.append(members if len(members) > 1 else members[0])
    judger = Agent("judger", "Answer: {question}", max_new_tokens=3, memory=draw(HANDED))
    return [*entries, judger]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_chain_takes_what_it_said_and_answers_each_question_as_alone(data):
    """KV buffers never take more than the chain said, or than the budget; rows of a batch are what they are alone."""
    model = data.draw(st.sampled_from([MODEL, STOPS]))
    tokenizer = character_tokenizer(data.draw(st.sampled_from([TEMPLATE, None])))
    agents = data.draw(chains())
    questions = data.draw(st.sampled_from([SENTENCES, NESTED]))[: data.draw(st.integers(1, 4))]
    slots = data.draw(st.none() | st.integers(250, 600))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latentmas.chain.planner, "SHARE_FROM", data.draw(st.sampled_from([1, 10**9])))
        held = count_buffers(patch)
        budget = None if slots is None else Budget(slots=slots)
        chain = Chain(model, tokenizer, agents, aligner="ridge", budget=budget)
        try:
            need = chain.kv_bytes(questions)
        except ValueError as refused:  # before any work
            event("refused")
            assert held[0] == 0
            assert f"the budget leaves {slots}" in str(refused)  # noqa: PT017
            return
        result = chain.run(questions)
        assert held[0] <= need
        for row, question in enumerate(questions):
            alone = chain.run([question]).answers[0]
            assert alone.text == result.answers[row].text
            assert alone.turns == result.answers[row].turns
        tight = Budget(bytes=int(need * 0.8))
        bounded = Chain(model, tokenizer, agents, aligner="ridge", budget=tight)
        held[0] = 0
        del result
        with suppress(ValueError):  # it says that this is too little, before any work
            bounded.kv_bytes(questions)
            bounded.run(questions)
        assert held[0] <= tight.bytes


def test_a_question_that_begins_another_is_read_as_alone(model, tokenizer):
    """One has nothing to read for all agents, the others do; what all have in common was read before."""
    agents = [
        [
            Agent("pro", LONG + "{question} Argue for it.", latent_steps=3),
            Agent("con", LONG + "{question} See both.", latent_steps=2),
        ],
        JUDGER,
    ]
    chain = Chain(model, tokenizer, agents, aligner="ridge")
    result = chain.run(NESTED)
    for row, question in enumerate(NESTED):
        alone = chain.run([question])
        assert texts_of(alone) == [texts_of(result)[row]]
        assert alone.memory.lengths.tolist() == [int(result.memory.lengths[row])]
        assert alone.memory.segments == result.memory.select([row]).segments


def test_one_question_without_a_common_beginning_changes_nothing_for_the_others(model):
    plain = character_tokenizer(None)
    agents = [
        [Agent("a", "What {question}", latent_steps=2), Agent("b", "{question}, against", latent_steps=2)],
        JUDGER,
    ]
    questions = ["What is red, and what is blue", "Name a fruit"]
    chain = Chain(model, plain, agents, aligner="ridge")
    result = chain.run(questions)
    for row, question in enumerate(questions):
        assert chain.run([question]).memory.lengths.tolist() == [int(result.memory.lengths[row])]


def test_what_ends_early_leaves_more_of_others_behind_a_cut(tokenizer):
    """A text that ends at once: more latent steps are among the last slots, and go on to the next agent."""
    agents = [
        Agent("thinker", "Think: {question}", latent_steps=40),
        Agent("writer", "Write.", max_new_tokens=60),
        Agent("cutter", "Go on.", latent_steps=1, memory=MemoryPolicy(slots=100)),
        Agent("judger", "Answer: {question}", max_new_tokens=6, memory=MemoryPolicy(kinds="latent")),
    ]
    STOPS.generation_config.eos_token_id = list(range(VOCAB))
    try:
        chain = Chain(STOPS, tokenizer, agents, aligner="ridge")
        need = chain.kv_bytes(SENTENCES)
        result = chain.run(SENTENCES)
    finally:
        STOPS.generation_config.eos_token_id = list(range(0, VOCAB, 5))
    assert result.answers[0].turns[1].new_tokens == 1
    assert result.memory.buffer.nbytes <= need


@pytest.mark.parametrize("engine", ["eager", "native"])
def test_each_question_stops_thinking_by_itself(model, tokenizer, engine):
    """Between the least and the greatest cosine of a first run, some questions stop and others go on."""
    free = [Agent("planner", "Plan: {question}", latent_steps=6), JUDGER]
    traced = Chain(model, tokenizer, free, aligner="ridge", engine=engine).run(SENTENCES, trace=1)
    cosines = traced.traces[0].trace.cosines[:, 1:]
    between = cosines.max(dim=1).values.sort().values
    settle = float(between[1] + between[2]) / 2
    agents = [Agent("planner", "Plan: {question}", latent_steps=6, settle=settle), JUDGER]
    result = Chain(model, tokenizer, agents, aligner="ridge", engine=engine).run(SENTENCES)
    steps = [answer.turns[0].latent_steps for answer in result.answers]
    stops = [next((n + 2 for n, c in enumerate(row) if c >= settle), 6) for row in cosines.tolist()]
    assert steps == stops
    assert len(set(steps)) > 1
    assert result.agents[0].latent_steps == sum(steps)
    assert result.agents[0].steps == max(steps)
    for row, question in enumerate(SENTENCES):
        alone = Chain(model, tokenizer, agents, aligner="ridge", engine=engine).run([question])
        assert alone.answers[0].text == result.answers[row].text
