"""Chains from YAML: faults of prompts and of the chain as a whole, and the lines that they are in."""

import pytest
from latentmas.chain.memory_policy import KEEP_ALL, MemoryPolicy
from yaml_texts import JUDGER, LAST, LAST_AGENT, THINKER

from latentmas_kernels.errors import LatentMASError


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        ("|-\n      {question}\n\n      and {foo} and {foo}", 7),
        (">-\n      {question}\n      and\n\n      {foo}", 8),
        ('"{question}\n\n      {foo}"', 6),
        ("'{{foo}}\n      {foo}'", 5),
        ("it is\n      {foo}", 5),
        ('"\\n{foo}"', 4),
        ('"\\x7bfoo}\n      x"', 4),
    ],
)
def test_a_place_that_nothing_fills_in_is_named_by_its_own_line(faults, prompt, line):
    text = f"agents:\n  - name: a\n    output: text\n    prompt: {prompt}\n"
    message = (
        "agent 'a' has {foo} in its prompt; allowed are {question}, {notes} and fields; {{foo}} writes it literally"
    )
    assert faults(text) == [(line, message)]


def test_a_place_that_is_nearly_a_field(faults):
    text = "fields: {domain: x}\nagents:\n  - {name: a, output: text, prompt: '{domian}'}\n"
    assert faults(text) == [
        (3, "agent 'a' has {domian} in its prompt; did you mean domain? allowed are {question}, {notes}, {domain} and "
            "fields; {{domian}} writes it literally"),
    ]  # fmt: skip


def test_round_is_a_place_inside_a_repeat_only(faults, read):
    inside = "{name: a, output: text, prompt: '{round} {question}'}"
    assert read(f"agents:\n  - {{repeat: 1, agents: [{inside}]}}\n").agents[0].text("?") == "1 ?"
    [(line, message)] = faults(f"agents:\n  - {inside}\n")
    assert line == 2
    assert message.startswith("agent 'a' has {round} in its prompt; allowed are {question}, {notes} and fields")


def test_fields_of_one_agent_are_no_places_of_another(faults):
    text = """\
agents:
  - {name: a, output: latent, prompt: "{mine}", fields: {mine: x}}
  - {name: b, output: text, prompt: "{mine}"}
"""
    assert [line for line, _ in faults(text)] == [3]


def test_braces_that_are_no_places(read):
    chain = read("agents:\n  - {name: a, output: text, prompt: '{{foo}} { foo } {} {a b} }{ {question}'}\n")
    assert chain.agents[0].text("?") == "{foo} { foo } {} {a b} }{ ?"


def test_the_chain_ends_with_text(faults):
    assert faults(THINKER) == [
        (3, "a chain ends with an agent that writes (max_new_tokens); got 'planner', which thinks")
    ]
    group = "  - parallel:\n      - {name: a, output: text, prompt: x}\n      - {name: b, output: text, prompt: y}\n"
    assert faults(THINKER + group) == [
        (9, "a chain ends with an agent that writes (max_new_tokens); got 'a + b', side by side")
    ]


def test_names_are_unique_after_expansion(faults):
    text = """\
agents:
  - {name: a 2, output: latent, prompt: "{question}"}
  - repeat: 2
    agents:
      - parallel:
          - {name: a, output: latent, prompt: x}
          - {name: b, output: latent, prompt: x}
  - name: b 1
    output: text
    prompt: x
"""
    assert faults(text) == [
        (6, "every agent needs a name of its own, by which its memory is found; got more than one 'a 2'"),
        (8, "every agent needs a name of its own, by which its memory is found; got more than one 'b 1'"),
    ]


def test_notes_that_nobody_wrote(faults):
    reader = "  - name: reader\n    output: text\n    prompt: |-\n      {{notes}}\n      {notes}\n"
    fault = "agent 'reader' reads {notes}, but nobody wrote any before it; put an agent that writes before it"
    assert (6, fault) in faults("agents:\n" + reader)
    [(line, message)] = faults(THINKER + reader)
    assert line == 12
    assert message.startswith(
        "agent 'reader' reads {notes} and so begins a new memory, in which the thoughts of 'planner' "
    )


@pytest.mark.parametrize(("prompt", "line"), [("Answer.", 5), ("{{question}} {{notes}}", 5), ("{ question }", 5)])
def test_a_chain_in_which_nobody_gets_the_question(faults, read, prompt, line):
    """As soon as one agent gets it, the others may go without."""
    text = f"""\
agents:
  - name: judger
    output: text
    system: "{{question}} is no place here"
    prompt: "{prompt}"
"""
    assert faults(text) == [
        (line, "nobody gets the question: no agent of 'judger' has {question} in its prompt; put it into one or more "
               "({{question}} is the text {question})"),
    ]  # fmt: skip
    assert [agent.name for agent in read(THINKER + text.removeprefix("agents:\n")).agents] == ["planner", "judger"]


def test_what_has_faults_may_be_what_gets_the_question(faults):
    text = "agents:\n  - {name: a, output: latent, prompt: '{question}', latent_steps: ten}\n" + LAST
    assert [line for line, _ in faults(text)] == [2]


def test_agents_of_a_group_do_not_read_each_other(faults):
    group = """\
agents:
  - parallel:
      - {name: a, output: text, prompt: "{notes}"}
      - {name: b, output: text, prompt: "{notes}"}
"""
    assert [line for line, message in faults(group + LAST) if "nobody wrote any" in message] == [3]


def test_notes_behind_latent_steps(faults):
    """A reader begins a new cache, in which the latent steps before it would be lost."""
    text = """\
agents:
  - {name: writer, output: text, prompt: "{question}"}
  - parallel:
      - {name: scribe, output: text, prompt: x}
      - {name: thinker, output: latent, prompt: x}
  - name: reader
    output: text
    prompt:
      "{notes}"
"""
    assert faults(text) == [
        (9, "agent 'reader' reads {notes} and so begins a new memory, in which the thoughts of 'thinker' before it would "
            "be lost; take {notes} out of its prompt to go on from them, or let an agent that writes come between"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "more", "prompt", "rule"),
    [
        ("model", "model: large", "x", "run on the same model; got None for 'a' and 'large' for 'c'"),
        ("memory", "memory: last", "x", f"get the same memory; got {KEEP_ALL!r} for 'a' and {LAST_AGENT!r} for 'c'"),
        ("prompt", "think: false", "{notes}", "all read {notes}, or none of them; got False for 'a' and True for 'c'"),
    ],
)
def test_what_agents_of_a_group_must_have_in_common(faults, key, more, prompt, rule):
    text = f"""\
agents:
  - {{name: w, output: text, prompt: "{{question}}"}}
  - parallel:
      - {{name: a, output: latent, prompt: x}}
      - {{name: b, output: latent, prompt: x}}
      - name: c
        output: latent
        {more}
        prompt: "{prompt}"
{LAST}"""
    line = 9 if key == "prompt" else 8
    assert faults(text) == [(line, f"agents side by side {rule}")]


def test_groups_may_share_what_they_must_have_in_common(read):
    text = """\
memory: last
agents:
  - parallel:
      - {name: a, output: latent, prompt: "{question}", model: large}
      - {name: b, output: latent, prompt: x, model: large, memory: {agents: last}}
"""
    [[a, b], _] = read(text + LAST).agents
    assert (a.model, a.memory) == (b.model, b.memory) == ("large", MemoryPolicy(agents="last"))


def test_all_faults_are_told_in_the_order_of_their_lines(faults):
    text = """\
max_new_tokens: none
agents:
  - {name: a, output: latent, prompt: "{foo}", latent_steps: ten}
  - {name: b, output: latent, prompt: x}
  - {name: b, output: latent, prompt: x}
  - {name: c, output: latent, prompt: x}
colour: red
"""
    assert [line for line, _ in faults(text)] == [1, 3, 3, 5, 6, 7]


def test_a_fault_does_not_bring_faults_of_other_rules(faults):
    """An agent with a fault may be the one that writes, that ends the chain, or agrees with its group."""
    text = """\
fields: {x: yes}
agents:
  - {name: a, output: speech, prompt: "{x}"}
  - {name: b, output: text, prompt: "{notes}"}
  - parallel:
      - {name: c, output: text, prompt: "{notes}"}
      - {name: d, output: latent, prompt: "x", memory: none}
  - {name: e, output: latent, think: 3, prompt: x}
"""
    assert [line for line, _ in faults(text)] == [1, 3, 7, 8]


def test_what_agents_refuse_has_a_line(faults, monkeypatch):
    """Rules that an agent has beyond those of the file."""

    def refuse(*args, **kwargs):
        raise LatentMASError("no such agent")

    monkeypatch.setattr("latentmas.chain_files.parser.Agent", refuse)
    assert faults("agents:\n" + JUDGER) == [(2, "no such agent")]
