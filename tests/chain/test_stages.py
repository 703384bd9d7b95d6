"""The rules of a chain: each names the agent and the field at fault, and Chain raises the first."""

import re
from dataclasses import replace

import pytest
from example_chains import AGENTS, READERS, endless
from latentmas.chain.agent import Agent
from latentmas.chain.chain import Chain
from latentmas.chain.memory_policy import MemoryPolicy
from latentmas.chain.stages import check_chain, split_contexts
from tokenizers_offline import character_tokenizer

THINKER = Agent("thinker", "Plan: {question}", latent_steps=4)
WRITER = Agent("writer", "Draft: {question}", max_new_tokens=6)
READER = Agent("reader", "{notes} Answer.", max_new_tokens=9)
JUDGER = Agent("judger", "Answer: {question}", max_new_tokens=9)


def found(agents):
    return [(fault.agent, fault.field) for fault in check_chain(agents)]


@pytest.mark.parametrize(
    ("agents", "faults"),
    [
        ([], [(None, None)]),
        ([THINKER, [], JUDGER], [(None, None)]),
        ([THINKER], [(0, "latent_steps")]),
        ([THINKER, [WRITER, JUDGER]], [(2, None)]),
        ([WRITER, [THINKER, WRITER], JUDGER, WRITER], [(2, "name"), (4, "name")]),
        ([[THINKER, replace(WRITER, model="big")], JUDGER], [(1, "model")]),
        ([[THINKER, WRITER, replace(JUDGER, memory=MemoryPolicy("last"))], READER], [(2, "memory"), (3, "prompt")]),
        ([WRITER, [JUDGER, READER], replace(JUDGER, name="end")], [(2, "prompt")]),
        ([READER, JUDGER], [(0, "prompt")]),
        ([WRITER, THINKER, READER], [(2, "prompt")]),
        ([[THINKER, WRITER], replace(JUDGER, name="thinker + writer")], [(2, "name")]),
        ([replace(WRITER, prompt="Draft."), replace(JUDGER, prompt="Answer {{question}}.")], [(1, "prompt")]),
        ([replace(WRITER, prompt="Draft."), READER], [(0, "prompt")]),
        ([THINKER, THINKER], [(1, "name"), (1, "latent_steps")]),
    ],
)
def test_every_fault_names_its_agent_and_field(agents, faults):
    assert found(agents) == faults
    with pytest.raises(ValueError, match="^" + re.escape(check_chain(agents)[0].message)):
        split_contexts(agents)


def test_a_stage_that_reads_notes_starts_a_context():
    agents = [THINKER, WRITER, [READER, replace(READER, name="other")], JUDGER, replace(READER, name="last")]
    assert check_chain(agents) == []
    contexts = split_contexts(agents)
    assert [[stage.names for stage in context] for context in contexts] == [
        ["thinker", "writer"], ["reader + other", "judger"], ["last"],
    ]  # fmt: skip


BAD_CHAINS = {
    "none": ([], r"ends with an agent that writes \(max_new_tokens\); got no agents"),
    "no writer": (AGENTS[:2], "ends with an agent that writes .*; got 'critic', which thinks"),
    "one name twice": ([*AGENTS, AGENTS[2]], "a name of its own.*more than one 'judger'"),
    "thinker last": (
        [*AGENTS, replace(AGENTS[0], name="late")],
        "ends with an agent that writes .*; got 'late', which thinks",
    ),
    "notes first": (READERS[1:], r"agent 'critic' reads \{notes\}, but nobody wrote any before it"),
    "notes alone": (READERS[2:], r"agent 'judger' reads \{notes\}, but nobody wrote any before it"),
    "notes behind a thinker": (
        [AGENTS[0], READERS[2]],
        r"'judger' reads \{notes\} .* the thoughts of 'planner' .* lost; take \{notes\} out of its prompt",
    ),
    "notes behind a writer and a thinker": (
        [READERS[0], AGENTS[1], READERS[2]],
        r"'judger' reads \{notes\} .* the thoughts of 'critic' .* let an agent that writes come between",
    ),
}


@pytest.mark.parametrize("what", BAD_CHAINS)
def test_agents_that_make_no_chain_are_refused(model, tokenizer, what):
    agents, words = BAD_CHAINS[what]
    with pytest.raises(ValueError, match=words):
        Chain(model, tokenizer, agents, aligner="ridge")


@pytest.mark.parametrize("name", ["a + b"])
def test_no_agent_is_called_like_a_group(model, tokenizer, name):
    agents = [
        Agent(name, "x", latent_steps=1),
        [Agent("a", "x", latent_steps=1), Agent("b", "y", latent_steps=1)],
        JUDGER,
    ]
    with pytest.raises(ValueError, match=r"no agent may be called 'a \+ b'"):
        Chain(model, tokenizer, agents, aligner="ridge")


@pytest.mark.parametrize("prompts", [["Answer."], ["{{question}}"], ["Plan.", "{notes}"]])
def test_a_chain_in_which_nobody_gets_the_question_is_refused(prompts):
    agents = [Agent(f"agent{number}", prompt, max_new_tokens=2) for number, prompt in enumerate(prompts)]
    with pytest.raises(
        ValueError, match=r"nobody gets the question: no agent of 'agent0'.* has \{question\} in its prompt"
    ):
        Chain(endless(), character_tokenizer(None), agents)
    Chain(endless(), character_tokenizer(None), [Agent("first", "{question}", max_new_tokens=2), *agents])
