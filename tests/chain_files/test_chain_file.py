"""Chains from YAML: what is read, and what is said of a file that is no chain and of which line."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latentmas.chain.agent import Agent
from latentmas.chain.memory_policy import KEEP_ALL, Budget, MemoryPolicy
from latentmas.chain_files import parser
from latentmas.chain_files.parser import LIMIT
from latentmas.chain_files.reader import ChainFile, builtin_chains, read_chain, serial

from latentmas_kernels.errors import LatentMASError

CHAINS = Path(__file__).parents[2] / "python" / "latentmas" / "chain_files"

THINKER = """\
agents:
  - name: planner
    output: latent
    prompt: |-
      Question: {question}

      Plan.
"""
JUDGER = """\
  - name: judger
    output: text
    prompt: Answer.
"""
LAST_AGENT = MemoryPolicy(agents="last")
LAST = "  - {name: judger, output: text, prompt: Answer.}\n"


@pytest.fixture
def file(tmp_path):
    return tmp_path / "chain.yaml"


@pytest.fixture
def read(file):
    """What read_chain makes of a text."""

    def read(text, **options):
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_chain(file, **options)

    return read


@pytest.fixture
def faults(file, read):
    """The lines of the refusal of a text: (number, message) of each."""

    def faults(text):
        with pytest.raises(ValueError, match=re.escape(f"{file}:")) as error:
            read(text)
        lines = [line.removeprefix(f"{file}:").split(": ", 1) for line in str(error.value).splitlines()]
        return [(int(number), message) for number, message in lines]

    return faults


# ---- what is read ----------------------------------------------------------------------------------------------------


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
    """The text may be of a group, and thoughts may lie before it."""
    group = (
        "  - parallel:\n"
        "      - {name: a, output: text, prompt: x}\n"
        "      - {name: b, output: text, prompt: y}\n"
        "  - {name: reader, output: text, prompt: '{notes}'}\n"
    )
    assert [agent.name for agent in serial(read(THINKER + group).agents)] == ["planner", "a", "b", "reader"]


# ---- faults, with their lines ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (b"", 1, "the file is empty; allowed is a mapping"),
        (b"\n# nothing\n", 1, "the file is empty"),
        (b"name: x\n\xff\n", 2, "byte 0xff is not UTF-8; allowed is text saved as UTF-8"),
        (b"\xff\xfea\0", 1, "byte 0xff is not UTF-8"),
        (b"a: 1\n---\nb: 1\n", 2, "another document); allowed is one document"),
        (b"a:\n\tb: 1\n", 2, "; indent with spaces, not with tabs"),
        (b"a: 1\nb: 'x\n\n\n", 2, "this is not YAML that can be read (while scanning a quoted scalar"),
        (b"a: 1\nb: [x,\n", 2, "this is not YAML that can be read (while parsing a flow"),
        (b"a: 1\nprompt: Question: x\n", 2, '; put text with ": " in it into quotes'),
        (b"a: *x\n", 1, "undefined alias 'x'); allowed are anchors (&name) that come before"),
        (b"a: 1\nb: \x01\n", 2, "character U+0001 is not allowed in YAML; take it out"),
        (b'a: 1\nb: "\\U00110000"\n', 2, "an escape is no character of Unicode; allowed is up to"),
        (b'a: 1\nb: "\\ud800"\n', 2, "half a surrogate pair is no character"),
        (b"a: 1\nb: " + b"[" * 30 + b"]" * 30, 2, "more than 20 lists and mappings inside each other"),
        (b"a: 1\nb: " + b"{a: " * 3000, 2, "more than 20 lists and mappings inside each other"),
        (
            b"a: 1\nb: !!python/object/apply:os.system [ls]\n",
            2,
            'the tag "!!python/object/apply:os.system" is not read',
        ),
        (b"a: 1\nb: !mine x\n", 2, 'the tag "!mine" is not read; allowed is plain data'),
        (b"a: 1\nb: !!binary aGk=\n", 2, 'the tag "!!binary" is not read'),
        (b"a: 1\nb: !!set {a}\n", 2, 'the tag "!!set" is not read'),
        (b"a: 1\nagents: &a\n  - *a\n", 2, "what begins here holds itself by an alias"),
        (b"- name: x\n", 1, "the chain is - name: x; allowed is a mapping"),
    ],
)
def test_what_is_no_yaml_of_a_chain(faults, text, line, message):
    [(number, said)] = faults(text)
    assert number == line
    assert message in said


KEYS = "latent_steps, max_new_tokens, system, settle, memory, fields, name, description, budget, agents"
AGENT_KEYS = "latent_steps, max_new_tokens, system, settle, memory, fields, name, prompt, output, model, think"
TEXT = "allowed is text (in quotes, where YAML takes it for something else)"
DIGITS = "(plain digits, at most 9, no quotes)"
INTEGER = f"allowed is an integer of 0 or more {DIGITS}"
POSITIVE = f"allowed is an integer of 1 or more {DIGITS}"
COSINE = f"allowed is a number from -1 to 1 {DIGITS}"
SIZES = 'allowed is a size like "64 MB" (KB, MB, GB), or a number like "512 slots"'
MEMORY = "allowed is all, last, latent or {agents: all|last, kinds: all|latent, slots: N}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour: red", f'the unknown key "colour"; allowed are {KEYS}'),
        ("latent_step: 3", f'the unknown key "latent_step"; did you mean latent_steps? allowed are {KEYS}'),
        ("<<: {name: x}", f'the unknown key "<<"; allowed are {KEYS}'),
        ("? [a]\n: 1", "the key [a]; allowed are words as keys"),
        ("name: yes", f"name yes; {TEXT}"),
        ("name: 7", f"name 7; {TEXT}"),
        ("name: 2026-01-02", f"name 2026-01-02; {TEXT}"),
        ("name: [a]", f"name [a]; {TEXT}"),
        ("name:", f"name (empty); {TEXT}"),
        ('name: "a\\nb"', 'name "a\\nb"; allowed is one line of text'),
        ("system: no", f"system no; {TEXT}"),
        ("latent_steps: ten", f'latent_steps "ten"; {INTEGER}'),
        ("latent_steps: -1", f"latent_steps -1; {INTEGER}"),
        ("latent_steps: 2.5", f"latent_steps 2.5; {INTEGER}"),
        ("latent_steps: on", f"latent_steps on; {INTEGER}"),
        ("latent_steps: '10'", f'latent_steps "10"; {INTEGER}'),
        ("latent_steps: 1_000", f"latent_steps 1_000; {INTEGER}"),
        ("latent_steps: 1e3", f'latent_steps "1e3"; {INTEGER}'),
        ("latent_steps: 010", f"latent_steps 010; {INTEGER}"),
        ("latent_steps: 0x10", f"latent_steps 0x10; {INTEGER}"),
        ("latent_steps: 1:30", f"latent_steps 1:30; {INTEGER}"),
        (f"latent_steps: {'9' * 5000}", f"latent_steps {'9' * 37}...; {INTEGER}"),
        ("max_new_tokens: 0", f"max_new_tokens 0; {POSITIVE}"),
        ("settle: 1.5", f"settle 1.5; {COSINE}"),
        ("settle: .nan", f"settle .nan; {COSINE}"),
        ("settle: 1e-1", f'settle "1e-1"; {COSINE}'),
        ("memory: some", f'memory "some"; {MEMORY}'),
        ("memory: 5", f"memory 5; {MEMORY}"),
        ("memory: {agent: all}", 'memory with the unknown key "agent"; did you mean agents? '
         "allowed are agents, kinds, slots"),
        ("memory: {agents: some}", 'memory with agents "some"; allowed is all or last'),
        ("memory: {kinds: last}", 'memory with kinds "last"; allowed is all or latent'),
        ("memory: {slots: 0}", f"memory with slots 0; {POSITIVE}"),
        ("budget: 64", f"budget 64; {SIZES}"),
        ("budget: 64 mb", f'budget "64 mb"; {SIZES}'),
        ("budget: [64 MB]", f"budget [64 MB]; {SIZES}"),
        (f"budget: {'9' * 400} slots", f'budget "{"9" * 37}..."; {SIZES}'),
        ("fields: algebra", 'fields "algebra"; allowed is a mapping (key: value)'),
        ("fields: {notes: x}", 'fields with "notes"; allowed is a name that the chain does not fill in itself'),
        ("fields: {round: x}", 'fields with "round"; allowed is a name that the chain does not fill in itself'),
        ("fields: {a-b: x}", 'fields with "a-b"; allowed is a name of letters, digits and _, no digit first'),
        ("fields: {a: off}", f"fields with a off; {TEXT}"),
        ("fields: {a: 1_000}", f"fields with a 1_000; {TEXT}"),
    ],
)  # fmt: skip
def test_a_fault_at_the_top(faults, text, message):
    assert faults(f"# first line\n{text}\n{THINKER}{JUDGER}") == [(2, f"the chain has {message}")]


def test_keys_that_come_twice(faults):
    text = f"name: a\n{THINKER}{JUDGER}    prompt: Again.\nname: b\n"
    assert faults(text) == [
        (12, "agent 'judger' has \"prompt\" again, after line 11; allowed is one"),
        (13, 'the chain has "name" again, after line 1; allowed is one'),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x", "the chain has no agents; allowed is an entry with agents"),
        ("agents: []", "the chain has agents []; allowed is a list of 1 or more"),
        ("agents: planner", 'the chain has agents "planner"; allowed is a list of 1 or more'),
        ("agents:", "the chain has agents (empty); allowed is a list of 1 or more"),
    ],
)
def test_a_chain_without_agents(faults, text, message):
    assert faults(text) == [(1, message)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("latent_step: 3", 'has the unknown key "latent_step"; did you mean latent_steps? '
         f"allowed are {AGENT_KEYS}"),
        ('latent_steps: "ten"', f'has latent_steps "ten"; {INTEGER}'),
        ("max_new_tokens: 3", "has max_new_tokens and output: latent; allowed is max_new_tokens with output: text"),
        ("settle: 2", f"has settle 2; {COSINE}"),
        ("think: yes", "has think yes; allowed is true or false"),
        ("think: 1", "has think 1; allowed is true or false"),
        ("model: 3", f"has model 3; {TEXT}"),
        ("memory: none", f'has memory "none"; {MEMORY}'),
        ("fields: {question: x}", 'has fields with "question"; allowed is a name that the chain does not fill in itself'),
    ],
)  # fmt: skip
def test_a_fault_of_an_agent(faults, line, message):
    assert faults(f"{THINKER}    {line}\n{JUDGER}") == [(8, f"agent 'planner' {message}")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("latent_steps: 3", "has latent_steps and output: text; allowed is latent_steps with output: latent"),
        ("settle: 0.9", "has settle and output: text; allowed is settle with output: latent"),
    ],
)
def test_what_a_writer_cannot_have(faults, line, message):
    assert faults(f"agents:\n{JUDGER}    {line}\n") == [(5, f"agent 'judger' {message}")]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("x", 'an agent is "x"; allowed is a mapping (key: value)'),
        ("[x]", "an agent is [x]; allowed is a mapping (key: value)"),
        ("{}", "an agent has no name and no prompt and no output; allowed is an entry with name, prompt, output"),
        ("{paralel: []}", 'an agent has the unknown key "paralel"; did you mean parallel? '
         f"allowed are {AGENT_KEYS}"),
        ("{name: a}", "agent 'a' has no prompt and no output; allowed is an entry with name, prompt, output"),
        ("{output: text, prompt: x}", "an agent has no name; allowed is an entry with name, prompt, output"),
        ("{name: ' ', output: text, prompt: x}", f"agent ' ' has name \" \"; {TEXT}"),
        ("{name: a + b, output: text, prompt: x}", 'agent \'a + b\' has name "a + b"; allowed is a name without ":" and " + "'),
        ("{name: 'a:b', output: text, prompt: x}", 'agent \'a:b\' has name "a:b"; allowed is a name without ":" and " + "'),
        ("{name: a, output: speech, prompt: x}", "agent 'a' has output \"speech\"; allowed is latent or text"),
        ("{name: a, output: text, prompt: ''}", f"agent 'a' has prompt \"\"; {TEXT}"),
        ("{name: a, output: text, prompt: {question}}",
         f"agent 'a' has prompt {{question}}; {TEXT}"),
        ("{parallel: [{name: a, output: text, prompt: x}]}",
         "a parallel group has parallel [{name: a, output: text, prompt: x}]; allowed is a list of 2 or more"),
        ("{parallel: x}", 'a parallel group has parallel "x"; allowed is a list of 2 or more'),
        ("{parallel: [{repeat: 2}, {parallel: []}]}", "a parallel group has a group or a repeat inside it; allowed are agents"),
        ("{repeat: 0, agents: [{name: a, output: text, prompt: x}]}",
         f"a repeat has repeat 0; {POSITIVE}"),
        ("{repeat: 2}", "a repeat has no agents; allowed is an entry with repeat, agents"),
        ("{repeat: 2, agents: []}", "a repeat has agents []; allowed is a list of 1 or more"),
        ("{repeat: 2, agents: [{repeat: 2}]}",
         "a repeat has a repeat inside it; allowed are agents and parallel groups"),
        ("{repeat: 2, name: x, agents: [{name: a, output: text, prompt: x}]}",
         'a repeat has the unknown key "name"; allowed are repeat, agents'),
    ],
)  # fmt: skip
def test_an_entry_that_cannot_be(faults, entry, message):
    assert faults(f"{THINKER}  - {entry}\n{LAST}") == [(8, message)]


# ---- places ------------------------------------------------------------------------------------------------------------


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


# ---- rules of the chain ------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("prompt", "line"),
    [("Answer.", 5), ("{{question}} {{notes}}", 5), ("{ question }", 5)],
)
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


def test_notes_behind_thoughts(faults):
    """A reader begins a new memory, in which the thoughts before it would be lost."""
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


# ---- files that make much of little --------------------------------------------------------------------------------------


def test_repeats_are_limited(faults, read):
    entry = "{name: a, output: text, prompt: '{question}'}"
    assert len(read(f"agents:\n  - {{repeat: {LIMIT - 1}, agents: [{entry}]}}\n").agents) == LIMIT - 1
    for times in (LIMIT, 10**9 - 1):
        assert faults(f"agents:\n  - repeat: {times}\n    agents: [{entry}]\n") == [
            (2, "the chain grows beyond 1000 agents, groups and repeats here; allowed are 1000")
        ]


def test_a_list_of_faults_is_cut_with_a_count(file):
    entries = "".join(f"  - {{name: a{number}, output: text, prompt: '{{foo}}'}}\n" for number in range(900))
    file.write_text("agents:\n" + entries)
    with pytest.raises(ValueError, match="foo") as caught:
        read_chain(file)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[1] for line in lines[:50]] == [str(number) for number in range(2, 52)]
    assert lines[50:] == [f"{file}:52: and 850 more faults from here on; mend those above first"]


def test_aliases_of_aliases_are_limited(faults):
    """2 x 10^9 agents in 12 kB."""
    agents = f"&p {{parallel: [&a {{name: a, output: text, prompt: x}}{', *a' * 1000}]}}"
    text = f"agents: [&r {{repeat: 2, agents: [{agents}{', *p' * 1000}]}}{', *r' * 1000}]\n"
    assert (1, "the chain grows beyond 1000 agents, groups and repeats here; allowed are 1000") in faults(text)


def test_aliases_in_what_is_not_read_cost_nothing(faults):
    levels = "".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 9)}]\n" for n in range(1, 30))
    assert len(faults(f"k0: &k0 [x]\n{levels}{THINKER}{JUDGER}")) == 30


# ---- any mistake ---------------------------------------------------------------------------------------------------------

PIECES = ["\n", "  ", "- ", ": ", "{", "}", "[", "]", "'", '"', "&a ", "*a", "!!str ", "|-\n", "\t", "---\n", "{notes}"]
WORDS = ["repeat: 3", "parallel:", "agents:", "output: text", "latent_steps: yes", "name: x", "system:", "\\U00110000"]


def refusal(file):
    try:
        read_chain(file)
    except ValueError as error:
        return str(error)
    return None


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(builtin_chains()),
    where=st.floats(0, 1),
    cut=st.integers(0, 40),
    put=st.sampled_from(PIECES + WORDS) | st.text(max_size=6),
    other=st.floats(0, 1),
    more=st.sampled_from(["", *PIECES, *WORDS]),
)
def test_a_file_with_a_mistake_is_a_chain_or_named_by_line(tmp_path_factory, name, where, cut, put, other, more):
    text = (CHAINS / f"{name}.yaml").read_text()
    begin = int(where * len(text))
    text = text[:begin] + put + text[begin + cut :]
    end = int(other * len(text))
    file = tmp_path_factory.getbasetemp() / "mistake.yaml"
    file.write_bytes((text[:end] + more + text[end:]).encode(errors="surrogatepass"))
    fault = refusal(file)
    if fault is None:
        assert serial(read_chain(file).agents)[-1].max_new_tokens is not None
    else:
        for line in fault.splitlines() or [fault]:
            assert re.fullmatch(re.escape(str(file)) + r":[1-9]\d*: \S.*; \S.*", line)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(PIECES + WORDS) | st.text(max_size=3), max_size=20))
def test_any_text_is_a_chain_or_named_by_line(tmp_path_factory, pieces):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes("".join(pieces).encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match="any.yaml:[1-9]"):
        read_chain(file)


def test_keys_that_are_no_words_are_shown_as_they_are_written(tmp_path, monkeypatch):
    """Not as what they hold: aliases of aliases would be endless."""
    monkeypatch.setattr(parser, "SHOWN_FAULTS", 2000)
    anchors = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'x'}]\n" for n in range(12))
    chain = "".join(f"b{n}: &b{n} [{f'*b{n - 1}' if n else 'x'}]\n" for n in range(1200))
    for number, text in enumerate((anchors + "? *a11\n: x\n", chain + "? *b1199\n: x\n", "? [a,\r b]\n: x\n")):
        file = tmp_path / f"{number}.yaml"
        file.write_bytes((text + "agents: []\n").encode())
        with pytest.raises(ValueError, match=rf"{number}.yaml:\d+: the chain has the key ") as refused:
            read_chain(file)
        assert all(line.isprintable() for line in str(refused.value).split("\n"))
