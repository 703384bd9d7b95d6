"""The rules of a chain: each names the agent and the field at fault, and Chain raises the first."""

import re
from dataclasses import replace

import pytest
from latentmas.chain.agent import Agent
from latentmas.chain.memory_policy import MemoryPolicy
from latentmas.chain.stages import check_chain, split_contexts

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
