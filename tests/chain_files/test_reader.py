"""Chains from YAML: what is read."""

import pytest
from latentmas.chain.agent import Agent
from latentmas.chain.memory_policy import Budget, MemoryPolicy
from latentmas.chain_files.reader import ChainFile, read_chain, serial
from yaml_texts import JUDGER, THINKER


def test_a_small_chain(read, file):
    assert read(THINKER + JUDGER) == ChainFile(
        "chain",
        [
            Agent("planner", "Question: {question}\n\nPlan.", latent_steps=10),
            Agent("judger", "Answer.", max_new_tokens=256),
        ],
        None,
        "",
        str(file),
    )


def test_every_key(read):
    chain = read("""\
name: everything
description: |
  Two lines
  of text.
latent_steps: 3
max_new_tokens: 5
system: Be brief.
settle: 0.999
memory: last
budget: 64 MB
fields: {domain: algebra, grade: 7, share: 0.50}
agents:
  - {name: a, output: latent, prompt: "{question} {domain} {grade} {share}"}
  - name: b
    output: latent
    prompt: "{domain} {own}"
    latent_steps: 20
    system: Take your time.
    settle: -1
    memory: {agents: last, kinds: latent, slots: 64}
    model: large
    think: true
    fields: {domain: geometry, own: "yes"}
  - {name: c, output: text, prompt: "{{notes}}", max_new_tokens: 64, system: "", memory: latent}
  - {name: d, output: text, prompt: x, think: false}
""")
    fields = {"domain": "algebra", "grade": "7", "share": "0.50"}
    last = MemoryPolicy(agents="last")
    assert (chain.name, chain.description, chain.budget) == ("everything", "Two lines\nof text.", Budget(bytes=2**26))
    assert chain.agents == [
        Agent(
            "a", "{question} {domain} {grade} {share}", latent_steps=3, system="Be brief.", settle=0.999, memory=last,
            fields=fields,
        ),
        Agent(
            "b", "{domain} {own}", latent_steps=20, system="Take your time.", settle=-1.0,
            memory=MemoryPolicy("last", "latent", 64), model="large", enable_thinking=True,
            fields={**fields, "domain": "geometry", "own": "yes"},
        ),
        Agent("c", "{{notes}}", max_new_tokens=64, memory=MemoryPolicy(kinds="latent"), fields=fields),
        Agent("d", "x", max_new_tokens=5, system="Be brief.", memory=last, fields=fields),
    ]  # fmt: skip
    assert chain.agents[1].text("?") == "geometry yes"
    assert chain.agents[2].text("?") == "{notes}"


def test_a_repeat_is_expanded_and_its_round_is_a_name_and_a_field(read):
    chain = read("""\
agents:
  - repeat: 2
    agents:
      - parallel:
          - {name: pro, output: latent, prompt: "Round {round}, for {side}.", fields: {side: it}}
          - {name: con, output: latent, prompt: "Against {question}."}
      - {name: writer, output: text, prompt: "{round}"}
""")
    pro, con, writer = "Round {round}, for {side}.", "Against {question}.", "{round}"
    assert chain.agents == [
        entry
        for n in "12"
        for entry in (
            [
                Agent(f"pro {n}", pro, latent_steps=10, fields={"side": "it", "round": n}),
                Agent(f"con {n}", con, latent_steps=10, fields={"round": n}),
            ],
            Agent(f"writer {n}", writer, max_new_tokens=256, fields={"round": n}),
        )
    ]
    assert [agent.text("it") for agent in serial(chain.agents)] == [
        "Round 1, for it.", "Against it.", "1", "Round 2, for it.", "Against it.", "2",
    ]  # fmt: skip


def test_serial_puts_groups_in_a_row():
    a, b, c, d = (Agent(name, "-", max_new_tokens=1) for name in "abcd")
    assert serial([a, [b, c], d]) == [a, b, c, d]
    assert serial([]) == []


def test_arguments_replace_the_files_defaults_but_not_an_agents_own(read):
    text = """\
latent_steps: 3
max_new_tokens: 5
agents:
  - {name: a, output: latent, prompt: "{question}"}
  - {name: b, output: latent, prompt: x, latent_steps: 20, think: false}
  - {name: c, output: text, prompt: x, max_new_tokens: 7}
  - {name: d, output: text, prompt: x}
"""
    assert [(agent.steps, agent.enable_thinking) for agent in serial(read(text).agents)] == [
        (3, False), (20, False), (7, False), (5, False),
    ]  # fmt: skip
    chain = read(text, latent_steps=0, max_new_tokens=9, enable_thinking=True)
    assert [(agent.steps, agent.enable_thinking) for agent in serial(chain.agents)] == [
        (0, True), (20, True), (7, True), (9, True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_steps": -1}, "latent_steps must be an integer of 0 or more; got -1"),
        ({"latent_steps": True}, "latent_steps must be an integer of 0 or more; got True"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of 1 or more; got 0"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be an integer of 1 or more; got 2.0"),
    ],
)
def test_arguments_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        read_chain("single", **options)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_files_of_other_systems(read, end):
    text = (THINKER + JUDGER).replace("\n", end)
    assert read(b"\xef\xbb\xbf" + text.encode()).agents == read(THINKER + JUDGER).agents


def test_aliases_stand_for_what_they_name(read):
    chain = read("""\
agents:
  - {name: a, output: latent, prompt: &p "Think of {question}", memory: &m {slots: 3}}
  - {name: b, output: text, prompt: *p, memory: *m}
""")
    assert [(agent.prompt, agent.memory) for agent in chain.agents] == [
        ("Think of {question}", MemoryPolicy(slots=3))
    ] * 2


def test_notes_after_a_step_that_writes(read):
    """The text may be of a group, and latent steps may lie before it."""
    group = (
        "  - parallel:\n"
        "      - {name: a, output: text, prompt: x}\n"
        "      - {name: b, output: text, prompt: y}\n"
        "  - {name: reader, output: text, prompt: '{notes}'}\n"
    )
    assert [agent.name for agent in serial(read(THINKER + group).agents)] == ["planner", "a", "b", "reader"]
