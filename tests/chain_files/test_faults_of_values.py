"""Chains from YAML: faults of YAML, keys and values, and the lines that they are in."""

import pytest
from yaml_texts import JUDGER, LAST, THINKER


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
