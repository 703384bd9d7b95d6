"""Chains from YAML: files that make much of little, and any mistake."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latentmas.chain_files import parser
from latentmas.chain_files.parser import LIMIT
from latentmas.chain_files.reader import builtin_chains, read_chain, serial
from yaml_texts import JUDGER, THINKER

CHAINS = Path(__file__).parents[2] / "python" / "latentmas" / "chain_files"


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
