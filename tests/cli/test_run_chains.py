"""latentmas run: chains by name and from files, and traces of what their agents think."""

import hashlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from commands import CHAIN, FAST, QUESTION, assert_one_line, document_of, model_and_tokenizer
from latentmas.chain.agent import Agent
from latentmas.chain.chain import Chain
from latentmas.chain.memory_policy import Budget, MemoryPolicy
from latentmas.chain_files.reader import METHODS, latent_agents, read_chain, serial
from latentmas.cli.questions import read_questions
from latentmas.cli.run_config import chain_digest

pytestmark = pytest.mark.usefixtures("keys_are_moved_by_torch")


def test_a_chain_from_a_file(command, tiny, three, tmp_path):
    """Numbers given on the command line are defaults in place of the file's; a budget, too."""
    file = tmp_path / "mine.yaml"
    file.write_text(CHAIN)
    options = ["--questions", three, "--chain", str(file), "--aligner", "ridge", "--batch-size", "3", "--json"]
    document = document_of(command("run", *options))
    read = read_chain(file)
    chain = Chain(*model_and_tokenizer(), read.agents, aligner="ridge", budget=read.budget)
    want = chain.run([question.text for question in read_questions(three)[0]])
    assert [answer["answer"] for answer in document["answers"]] == [answer.text for answer in want.answers]
    assert [(a["agent"], a["latent_steps"], a["new_tokens"]) for a in document["agents"]] == [
        ("math", 9, 0), ("code", 6, 0), ("judger", 0, 12)
    ]  # fmt: skip
    more = document_of(command("run", *options, "--latent-steps", "5", "--max-new-tokens", "2"))
    assert [(a["latent_steps"], a["new_tokens"]) for a in more["agents"]] == [(15, 0), (6, 0), (0, 6)]


def test_a_chain_that_is_added_to_the_folder_is_a_method(command, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("latentmas.chain_files.reader.FOLDER", tmp_path)
    (tmp_path / "mine.yaml").write_text(CHAIN)
    document = document_of(command("run", QUESTION, "--method", "mine", *FAST, "--json"))
    assert document["method"] == "mine"
    assert [agent["agent"] for agent in document["agents"]] == ["math", "code", "judger"]


@pytest.mark.parametrize("name", ["latent", "sequential"])
def test_one_chain_has_a_second_name(command, tiny, name):
    """Results of earlier runs name it latent; it is the default, too."""
    document, default = (
        document_of(command("run", QUESTION, *FAST, *options, "--json")) for options in (["--method", name], [])
    )
    assert (document["method"], default["method"]) == (name, "latent")
    assert document["answers"][0]["turns"] == default["answers"][0]["turns"]


def test_faults_of_a_chain_file_are_told_by_line(command, tiny, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(CHAIN.replace("latent_steps: 3", "latent_steps: three").replace("memory: last", "memory: lost"))
    code, out, err = command("run", QUESTION, "--chain", str(file))
    assert (code, out) == (2, "")
    assert f"{file}:2: " in err
    assert f"{file}:10: " in err
    assert tiny == [], "before a model is loaded"


def test_a_chain_that_changed_is_not_gone_on_with(command, tiny, three, tmp_path):
    file, output = tmp_path / "mine.yaml", str(tmp_path / "results.jsonl")
    file.write_text(CHAIN)
    options = ["--questions", three, "--chain", str(file), "--aligner", "ridge", "--output", output]
    assert command("run", *options)[0] == 0
    assert command("run", *options, "--resume")[0] == 0
    file.write_text(CHAIN.replace("calm", "loud"))
    code, _, err = command("run", *options, "--resume")
    assert code == 2
    assert "chain_digest" in err


@pytest.mark.parametrize(
    ("name", "want"),
    [("sequential", "4f341ec8c18b09e4"), ("hierarchical", "3d975afd7008225d"), ("mix", "3562806c3d99a1ef")],
)
def test_the_digest_of_a_chain_is_that_of_earlier_versions(name, want):
    """It is in files of results: with another one, no run could go on behind them."""
    file = read_chain(name)
    assert chain_digest(file.agents, file.budget) == want


def test_the_digest_of_a_chain_does_not_read_names_of_classes_in_texts():
    """Memory policies had another name; a prompt that holds the name stays as it is."""
    prompt, field = "MemoryPolicy( {question} HandOver(", {"tone": "MemoryPolicy()"}
    agent = Agent("a", prompt, max_new_tokens=1, memory=MemoryPolicy(slots=3), fields=field)
    text = (
        "([Agent(name='a', prompt='MemoryPolicy( {question} HandOver(', latent_steps=None, max_new_tokens=1, system=None, "
        "enable_thinking=False, settle=None, memory=HandOver(agents='all', kinds='all', slots=3), model=None, "
        "fields={'tone': 'MemoryPolicy()'})], Budget(bytes=None, slots=9))"
    )
    assert chain_digest([agent], Budget(slots=9)) == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_a_chain_in_which_nobody_gets_the_question(command, tiny, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("agents: [{name: judger, output: text, prompt: 'Answer {{question}}'}]\n")
    assert_one_line(
        command("run", QUESTION, "--chain", str(file)),
        f"{file}:1: nobody gets the question: no agent of 'judger' has {{question}} in its prompt; put it into one or more",
    )
    assert tiny == []


def test_a_chain_is_named_as_the_run_begins(command, tiny, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: two\ndescription: Two think.\n" + CHAIN)
    _, _, err = command("run", QUESTION, "--chain", str(file), "--aligner", "ridge")
    assert re.fullmatch(
        r"two: Two think\.; keys and values take up to [\d.]+ MB \(budget: 900 slots\)", err.splitlines()[0]
    )


def test_the_model_of_the_run_is_loaded_once(command, tiny, tmp_path):
    """Agents may name it; another one is another."""
    file = tmp_path / "mine.yaml"
    file.write_text(CHAIN.replace("memory: last", "model: here, memory: last"))
    assert command("run", QUESTION, "--chain", str(file), "--aligner", "ridge", "--model", "here")[0] == 0
    assert [asked[0] for asked in tiny] == ["here"]
    assert command("run", QUESTION, "--chain", str(file), "--aligner", "ridge", "--model", "there")[0] == 0
    assert [asked[0] for asked in tiny] == ["here", "there", "here"]


@pytest.mark.parametrize("mode", ["parallel", "serial"])
def test_hierarchical(command, tiny, mode):
    document = document_of(command("run", QUESTION, *FAST, "--hierarchical", mode, "--json"))
    agents = METHODS["hierarchical"](2, 6)
    want = Chain(*model_and_tokenizer(), serial(agents) if mode == "serial" else agents, aligner="ridge").run(
        [QUESTION]
    )
    assert document["answers"][0]["answer"] == want.answers[0].text
    assert [agent["shared_tokens"] for agent in document["agents"]] == [a.shared_tokens for a in want.agents]
    assert any(agent["shared_tokens"] for agent in document["agents"]) == (mode == "parallel")


@pytest.mark.parametrize(("memory", "over"), [("last", MemoryPolicy(agents="last")), ("30", MemoryPolicy(slots=30))])
def test_memory_goes_for_every_agent(command, tiny, memory, over):
    document = document_of(command("run", QUESTION, *FAST, "--memory", memory, "--json"))
    agents = [replace(agent, memory=over) for agent in latent_agents(2, 6)]
    want = Chain(*model_and_tokenizer(), agents, aligner="ridge").run([QUESTION])
    assert document["answers"][0]["answer"] == want.answers[0].text
    assert document["agents"][-1]["kv_bytes"] == want.agents[-1].kv_bytes


def test_the_need_is_told_before_the_first_question(command, tiny, three):
    """Of the batch that needs the most."""
    _, _, err = command("run", "--questions", three, *FAST)
    chain = Chain(*model_and_tokenizer(), latent_agents(2, 6), aligner="ridge")
    need = max(chain.kv_bytes([question.text]) for question in read_questions(three)[0])
    said = err.splitlines()
    assert f"keys and values take up to {need / 2**20:.1f} MB" in said[0]
    _, _, err = command("run", QUESTION, *FAST, "--budget", "400 slots")
    assert err.splitlines()[0].endswith("(budget: 400 slots)")


def test_a_trace_is_shown_and_written(command, tiny, three, tmp_path):
    """A table per question and thinking agent; the file has all batches."""
    file = tmp_path / "trace.json"
    options = ["--questions", three, *FAST, "--batch-size", "2", "--trace", str(file)]
    code, out, err = command("run", *options)
    assert code == 0, err
    document = json.loads(file.read_text())
    assert [question["number"] for question in document["questions"]] == [1, 2, 3]
    for question in document["questions"]:
        assert [(agent["agent"], len(agent["steps"])) for agent in question["agents"]] == [
            ("planner", 2), ("critic", 2), ("refiner", 2)
        ]  # fmt: skip
    assert out.count("nearest") == 9
    as_json = document_of(command("run", *options, "--json"))
    assert len(as_json["answers"]) == 3
    assert json.loads(file.read_text()) == document


def test_interrupted_runs_keep_the_trace_of_what_is_finished(command, tiny, three, tmp_path, monkeypatch):
    file, run = tmp_path / "trace.json", Chain.run

    def interrupted(chain, questions, **options):
        if questions[0] != QUESTION:
            raise KeyboardInterrupt
        return run(chain, questions, **options)

    monkeypatch.setattr(Chain, "run", interrupted)
    assert command("run", "--questions", three, *FAST, "--trace", str(file))[0] == 130
    assert [question["number"] for question in json.loads(file.read_text())["questions"]] == [1]


@pytest.mark.parametrize("other", ["--output", "--questions"])
def test_a_trace_does_not_take_the_place_of_another_file(command, tiny, three, tmp_path, other):
    path = three if other == "--questions" else str(tmp_path / "results.jsonl")
    before = Path(three).read_text()
    options = ["--questions", three, *FAST, *([other, path] if other == "--output" else []), "--trace", path]
    assert_one_line(command("run", *options), "cannot write the trace", "name another file")
    assert Path(three).read_text() == before


def test_a_trace_that_cannot_be_written_in_the_end_costs_nothing_else(command, tiny, three, tmp_path, monkeypatch):
    def full(path, document):
        raise OSError("no space")

    monkeypatch.setattr("latentmas.cli.trace_view.write_trace", full)
    code, out, err = command("run", "--questions", three, *FAST, "--trace", str(tmp_path / "t.json"), "--json")
    assert code == 2
    assert len(json.loads(out)["answers"]) == 3
    assert "error: no space" in err
    monkeypatch.setattr(Chain, "run", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert command("run", "--questions", three, *FAST, "--trace", str(tmp_path / "t.json"))[0] == 130


def test_a_pipe_is_no_place_for_a_trace(command, tiny, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert_one_line(
        command("run", QUESTION, *FAST, "--trace", str(tmp_path / "pipe")), "must be a plain file or nothing"
    )


def test_a_trace_file_has_the_mode_of_any_new_file(command, tiny, tmp_path):
    before = os.umask(0o027)
    try:
        assert command("run", QUESTION, *FAST, "--trace", str(tmp_path / "t.json"))[0] == 0
    finally:
        os.umask(before)
    assert (tmp_path / "t.json").stat().st_mode & 0o777 == 0o640
