"""Plans: positions, notes and memory that a chain may need are known, and refused, before any work."""

import warnings
from bisect import bisect_left
from types import SimpleNamespace

import psutil
import pytest
from example_chains import AGENTS, CHAINS, PER_SLOT, QUESTIONS, READERS, TEMPLATE, endless, prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from latentmas.chain.agent import Agent
from latentmas.chain.chain import Chain
from latentmas.chain.planner import RESPLIT
from tokenizers_offline import character_tokenizer

pytestmark = pytest.mark.usefixtures("keys_are_moved_by_torch")


def positions_of(tokenizer, agents, question):
    """Of agents in one memory: all but the last new token take one."""
    return sum(map(len, prompts(tokenizer, agents, question))) + sum(agent.steps for agent in agents) - 1


def test_too_long_chain_is_refused_before_any_work(tokenizer):
    """The message names the positions needed and those there are; no token goes through the model."""
    model = endless(120)
    chain = Chain(model, tokenizer, AGENTS, aligner="ridge", engine="eager")
    forwards, began = [], []
    model.get_decoder().register_forward_hook(lambda *args: forwards.append(args))
    need = positions_of(tokenizer, AGENTS, QUESTIONS[1])
    words = (
        rf"up to {need} positions \({need - 15} of prompts, 15 of latent steps and new tokens\), but LlamaForCausalLM was "
        r"made for 120; shorten the question or lower latent_steps and max_new_tokens$"
    )
    assert need > 120
    with pytest.raises(ValueError, match=words):
        chain.run(QUESTIONS, on_progress=began.append)
    with pytest.raises(ValueError, match=words):
        chain.check(QUESTIONS[1])
    assert forwards == began == []
    chain.run([QUESTIONS[0]])
    assert len(forwards) > 0, "the short one fits"


@pytest.mark.parametrize("chain", ["alone", "thinkers", "mixed"])
def test_check_accepts_up_to_the_last_position(tokenizer, chain):
    """One that is filled to its last position runs; with one position less it is refused, by check() and run() alike."""
    agents = CHAINS[chain]
    need = positions_of(tokenizer, agents, "How many?")
    fits, short = (Chain(endless(limit), tokenizer, agents, aligner="ridge") for limit in (need, need - 1))
    fits.check("How many?")
    assert fits.run(["How many?"]).memory.lengths.tolist() == [need]
    for door in (short.check, lambda question: short.run([question])):
        with pytest.raises(ValueError, match=f"up to {need} positions .* made for {need - 1}"):
            door("How many?")


@pytest.mark.parametrize("handover", [3, 5])
def test_check_counts_notes_as_long_as_they_may_become(model, tokenizer, script, handover):
    """Texts that are handed on up to the limit, all of them cut, need what check() counts, but for what a text that is not cut
    may be split into on top."""
    agents = [
        Agent("scout", "Look: {question}", max_new_tokens=8),
        Agent("critic", "{notes} Criticise.", max_new_tokens=6),
        Agent("judger", "{notes} Answer: {question}", max_new_tokens=4),
    ]
    script(["abcdefgh"], ["abcdefgh"], ["abcdefgh"])
    with pytest.warns(UserWarning, match="max_note_tokens"):
        result = Chain(model, tokenizer, agents, max_note_tokens=handover).run(["Why?"])
    need = result.answers[0].turns[-1].prompt_tokens + 4 - 1
    assert need == int(result.memory.lengths[0]) > max(t.prompt_tokens + 8 for t in result.answers[0].turns[:-1])
    need += 2 * RESPLIT
    Chain(endless(need), tokenizer, agents, max_note_tokens=handover).check("Why?")
    with pytest.raises(
        ValueError, match=f"up to {need} positions .* made for {need - 1}; .*, or max_note_tokens .--handover-tokens.$"
    ):
        Chain(endless(need - 1), tokenizer, agents, max_note_tokens=handover).check("Why?")


def test_short_texts_are_not_counted_up_to_the_handover_limit(tokenizer):
    """An agent that may write little leaves little: a higher limit changes nothing."""
    chains = [Chain(endless(130), tokenizer, READERS, max_note_tokens=tokens) for tokens in (6, 10**6)]
    for chain in chains:
        chain.check("Why?")
    messages = []
    for chain in chains:
        with pytest.raises(ValueError, match="positions") as caught:
            chain.check("Why?" * 30)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@st.composite
def chains_of_agents(draw):
    """Agents that make a chain, with room for few or many tokens."""
    agents, last = [], None
    for number in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["think", "write", *(["read"] if last in ("write", "read") else [])]))
        prompts = ["{question}", "Look: {question}!", *(["Go on."] if number else [])]
        prompt = draw(st.sampled_from(prompts)) + " {notes}" * (kind == "read")
        steps = draw(st.integers(3, 8))
        options = {"latent_steps": steps} if kind == "think" else {"max_new_tokens": steps}
        agents.append(Agent(f"agent{number}", prompt, **options))
        last = kind
    if last == "think":
        agents.append(Agent("last", "Answer.", max_new_tokens=4))
    return agents


@settings(max_examples=25, deadline=None)
@given(
    agents=chains_of_agents(),
    handover=st.integers(3, 9),
    question=st.text("ab {}?", min_size=1, max_size=12).filter(str.strip),
    template=st.sampled_from([TEMPLATE, None]),
)
def test_what_check_accepts_runs_to_its_end(agents, handover, question, template):
    """With not one position more than check() asks for, and texts that are as long as they may be."""
    tokenizer = character_tokenizer(template)

    model = endless(1)

    def chain_for(positions):
        model.config.max_position_embeddings = positions  # each chain reads it anew
        return Chain(model, tokenizer, agents, aligner="identity", max_note_tokens=handover)

    def accepts(positions):
        try:
            chain_for(positions).check(question)
        except ValueError:
            return False
        return True

    least = bisect_left(range(4096), True, key=accepts)
    assert not accepts(least - 1)
    assert accepts(least)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = chain_for(least).run([question])
    assert [turn.agent for turn in result.answers[0].turns] == [agent.name for agent in agents]
    assert int(result.memory.lengths[0]) <= least


def test_memory_that_is_not_there_is_refused_before_the_model_runs(model, tokenizer, monkeypatch):
    """With what is needed for all rows and what is free."""
    chain = Chain(model, tokenizer, AGENTS, aligner="ridge", engine="eager")
    need = 200 * positions_of(tokenizer, AGENTS, QUESTIONS[1]) * PER_SLOT
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=need - 1))
    model.get_decoder().register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=rf"200 rows .* needs {need / 2**20:,.0f} MB.* free on cpu .* smaller batch"):
        chain.run([QUESTIONS[1]] * 200)


def test_agents_that_nothing_goes_on_from_need_positions_for_each_alone(tokenizer):
    group = [Agent(f"w{n}", "Q: {question} Say.", max_new_tokens=40) for n in range(4)]
    reader = Agent("judger", "{notes}", max_new_tokens=2)
    chain = Chain(endless(128), tokenizer, [group, reader], max_note_tokens=5)
    chain.check("x")
    with pytest.warns(UserWarning, match=r"wrote \d+ tokens"):
        assert len(chain.run(["x"]).answers[0].turns) == 5
