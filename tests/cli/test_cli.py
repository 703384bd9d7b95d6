"""The command line, mostly in this process: what it prints, and how it ends where the user can mend something."""

import errno
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import latentmas.cli.batches
import latentmas.loading
import pytest
import torch
from latentmas.chain.chain import Chain
from latentmas.chain.memory_policy import MemoryPolicy
from latentmas.chain_files.reader import METHODS, latent_agents, read_chain, serial
from latentmas.cli import app as cli
from latentmas.cli.questions import SAMPLE, read_questions
from tiny_models import tiny_config, tiny_model
from tokenizers_offline import character_tokenizer

pytestmark = pytest.mark.usefixtures("keys_are_moved_by_torch")
QUESTION = "How many rolls are left?"
AGENTS = ["planner", "critic", "refiner", "judger"]
FAST = ["--latent-steps", "2", "--max-new-tokens", "6", "--aligner", "ridge"]


def model_and_tokenizer():
    with torch.random.fork_rng():  # a seed that was set stays set, as with weights that are read from a file
        model = tiny_model("llama", max_position_embeddings=4096)
    model.generation_config.eos_token_id = None
    return model, character_tokenizer()


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `latentmas ARGUMENTS` here: (exit code, stdout, stderr)."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back what the command sets

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["latentmas", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def tiny(monkeypatch):
    """The (name, dtype, device) that models were asked for by; each gives a tiny model that never stops."""
    asked = []

    def load_model(name=None, *, dtype="auto", device=None):
        asked.append((name, dtype, device))
        return model_and_tokenizer()

    monkeypatch.setattr(latentmas.loading, "load_model", load_model)
    return asked


@pytest.fixture
def offline(monkeypatch):
    """No network; the variable is read when the library is imported, which it was long ago."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def pip(command, **options):
        raise AssertionError(f"asked the network: {command}")

    monkeypatch.setattr("latentmas.default_model.subprocess.run", pip)


def assert_one_line(said, *parts):
    """Exit code 2, nothing but one line on stderr, with all of the parts."""
    code, out, err = said
    assert code == 2, f"{out}{err}"
    assert out == ""
    assert err.startswith("error:")
    assert len(err.strip().splitlines()) == 1, err
    assert all(part in err for part in parts), err


def answer_of(out: str) -> str:
    """What stands between the first question and what comes next: its mark, the next one or the table."""
    text = out.split("Question 1 ", 1)[1].split("\n\n", 1)[1]
    return re.split(r"\n\n(?:\(cut off by|expected: |Question \d|agent )", text)[0]


def table_of(out: str) -> list[list[str]]:
    """The words of each line of the table, the heading included."""
    lines = (line.split() for line in out.splitlines())
    return [words for words in lines if words and words[0] in ["agent", *AGENTS, "solver", "all"]]


@pytest.fixture
def three(tmp_path):
    """A file of three questions, the last one much longer."""
    file = tmp_path / "questions.jsonl"
    texts = [QUESTION, "And how many were there?", "Why is that? " * 12]
    file.write_text("".join(json.dumps({"question": text, "answer": "x"}) + "\n" for text in texts))
    return str(file)


def document_of(said):
    code, out, err = said
    assert code == 0, err
    return json.loads(out)


# ---- what a run prints ---------------------------------------------------------------------------------------------


def test_run_prints_the_answer_and_a_line_per_agent(command, tiny):
    """Each line has the counts as the chain gives them, and the seconds and shares add up."""
    code, out, err = command("run", QUESTION, *FAST)
    assert code == 0, err
    assert tiny == [(None, "auto", None)]
    want = Chain(*model_and_tokenizer(), latent_agents(2, 6), aligner="ridge").run([QUESTION])
    assert answer_of(out) == (want.answers[0].text or "(the answer is empty)")
    assert f"Question 1 {QUESTION}\n" in out
    assert "(cut off by --max-new-tokens)" in out
    head, *lines, last = table_of(out)
    assert " ".join(head) == "agent prompt tokens latent steps new tokens seconds ms/step KV MB share"
    counts = [[turn.prompt_tokens, turn.latent_steps, turn.new_tokens] for turn in want.answers[0].turns]
    assert [[line[0], *map(int, line[1:4])] for line in lines] == [
        [name, *count] for name, count in zip(AGENTS, counts, strict=True)
    ]
    assert last[:4] == ["all", *(str(sum(column)) for column in zip(*counts, strict=True))]
    seconds = [float(line[4]) for line in lines]
    assert sum(seconds) == pytest.approx(float(last[4]), abs=0.03)
    assert sum(float(line[-1].rstrip("%")) for line in lines) == pytest.approx(100, abs=4)
    total, *phases, _ = map(float, re.findall(r"([\d.]+) s\b", out))
    assert sum(phases) == pytest.approx(total, abs=0.03)
    assert "feedback: ridge" in out


@pytest.mark.parametrize("method", METHODS)
def test_methods(command, tiny, three, method):
    """The same from the command line as from Python, a batch and a rest."""
    options = ["--method", method, "--batch-size", "2", "--max-new-tokens", "6", "--latent-steps", "2", "--json"]
    document = document_of(command("run", "--questions", three, *options, "--aligner", "identity"))
    chain = Chain(*model_and_tokenizer(), METHODS[method](2, 6), aligner="identity")
    questions = [question.text for question in read_questions(three)[0]]
    want = [answer for part in (questions[:2], questions[2:]) for answer in chain.run(part).answers]
    assert [answer["answer"] for answer in document["answers"]] == [answer.text for answer in want]
    assert [answer["question"] for answer in document["answers"]] == questions
    assert [agent["agent"] for agent in document["agents"]] == [agent.name for agent in chain.agents]
    assert document["method"] == method
    assert (document["feedback"] is None) == (method in ("single", "text"))


def test_batches_change_no_answer(command, tiny, three):
    def answers(size):
        document = document_of(command("run", "--questions", three, *FAST, "--json", "--batch-size", size))
        assert [answer["batch_size"] for answer in document["answers"]] == [min(int(size), 3)] * 3
        return [answer["answer"] for answer in document["answers"]]

    assert answers("1") == answers("3") == answers("8")


def test_one_agent_needs_no_sum(command, tiny):
    code, out, err = command("run", QUESTION, *FAST, "--method", "single")
    assert code == 0, err
    assert [line[0] for line in table_of(out)] == ["agent", "solver"]
    assert "feedback" not in out


def test_expected_answers_are_shown(command, tiny, three):
    code, out, err = command("run", "--questions", three, *FAST, "--batch-size", "3")
    assert code == 0, err
    assert out.count("\nexpected: x\n") == 3
    assert [int(n) for n in re.findall(r"^Question (\d)", out, re.M)] == [1, 2, 3]


def test_an_empty_answer_says_so(command, tiny, monkeypatch):
    """And a question of GSM8K shows the final answer of its solution."""
    real = Chain.run

    def run(self, questions, **options):
        result = real(self, questions, **options)
        result.answers[0] = replace(result.answers[0], text=" \n")
        return result

    monkeypatch.setattr(Chain, "run", run)
    entry = {"question": QUESTION, "answer": "She has 2 + 2 = <<2+2=4>>4.\n#### 4"}
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(entry).encode())))
    code, out, err = command("run", "--questions", "-", *FAST)
    assert code == 0, err
    assert answer_of(out) == "(the answer is empty)"
    assert "\nexpected: 4\n" in out
    assert "<<" not in out


def test_a_table_in_a_pipe_has_whole_names(command, tiny, tmp_path):
    """However long, and whatever width is taken for a pipe."""
    file, name = tmp_path / "mine.yaml", "a name of some length, " * 8 + "and its end"
    file.write_text(CHAIN.replace("name: math", f"name: '{name}'"))
    code, out, err = command("run", QUESTION, "--chain", str(file), "--aligner", "ridge")
    assert code == 0, err
    assert any(line.startswith(f"{name}  ") and line.endswith("%") for line in out.splitlines()), out


HOSTILE = "Is\x1b[2J it\x1b]0;title\x07 so\x9b?\x7f"


def test_nothing_in_a_question_or_an_answer_steers_the_terminal(command, tiny, monkeypatch, tmp_path):
    real = Chain.run

    def run(self, questions, **options):
        result = real(self, questions, **options)
        result.answers[0] = replace(result.answers[0], text=f"No.{HOSTILE}\r\b")
        warnings.warn(f"about {questions[0]}", stacklevel=2)
        return result

    monkeypatch.setattr(Chain, "run", run)
    file = tmp_path / "q.json"
    file.write_text(json.dumps([{"question": HOSTILE, "answer": HOSTILE}]))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        said = [command("run", "--questions", str(file), *FAST, *more) for more in ([], ["--json"])]
    shown = HOSTILE.encode("unicode_escape").decode()
    for code, out, err in said:
        assert code == 0, err
        assert not set("\x1b\x07\x9b\x7f\r\b") & set(out + err)
        assert f"warning: about {shown}" in err.splitlines()
        assert shown in err.splitlines()
    out = said[0][1]
    assert f"Question 1 {shown}\n\nNo.{shown}\\r\\x08\n" in out
    assert f"expected: {shown}\n" in out
    answer = json.loads(said[1][1])["answers"][0]
    assert (answer["question"], answer["answer"], answer["expected"]) == (HOSTILE, f"No.{HOSTILE}\r\b", HOSTILE)


@pytest.mark.parametrize(
    ("stdin", "arguments", "parts"),
    [
        (b"sp\xe4t?", ["-"], ["standard input is not UTF-8 (byte 0xe4 in line 1)", "save it as UTF-8"]),
        (b"", ["Why \udcff?"], ["the question holds '\\udcff' at character 5", "half a surrogate pair or a byte"]),
        (
            b'{"question": "\\ud83d"}',
            ["--questions", "-"],
            ["line 1 has a", "holds '\\ud83d' at character 1", "--keep-going"],
        ),
        (b"[" * 100_000, ["--questions", "-"], ["standard input is not JSON that can be read (nested too deeply)"]),
        (None, ["-"], ["standard input is closed"]),
    ],
    ids=["bytes", "argument", "escape", "nested", "closed"],
)
def test_what_is_no_text_is_one_line(command, tiny, monkeypatch, stdin, arguments, parts):
    data = None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", data)
    assert_one_line(command("run", *arguments, *FAST), *parts)
    assert tiny == []


def test_settings_of_vllm_nested_too_deeply_are_one_line(command, tiny, monkeypatch):
    monkeypatch.setattr("latentmas.backends.vllm.launch.find_spec", lambda name: object())
    said = command("run", QUESTION, "--decoder", "vllm", "--vllm", "[" * 100_000)
    assert_one_line(said, "no JSON", "an object of vLLM's settings")
    assert len(said[2]) < 500


def test_half_a_character_costs_no_other_question(command, tiny, tmp_path):
    file, output = tmp_path / "q.jsonl", tmp_path / "results.jsonl"
    lines = [b'{"question": "First?"}', b'{"question": "\\udc00"}', b'{"question": "\xff"}', b'{"question": "Last?"}']
    file.write_bytes(b"\n".join(lines))
    code, _, err = command("run", "--questions", str(file), *FAST, "--keep-going", "--output", str(output))
    assert code == 2
    assert numbers(output) == [1, 4]
    assert "warning: left out: line 2 has a \"question\" that holds '\\udc00'" in err
    assert "warning: left out: line 3 is not UTF-8" in err


@pytest.mark.parametrize(
    ("stdin", "arguments"), [(QUESTION + "\n", ["-"]), (json.dumps({"question": QUESTION}), ["--questions", "-"])]
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "byte-order mark"])
def test_standard_input(command, tiny, monkeypatch, stdin, arguments, mark):
    """The mark that editors and shells put in front is no part of the question."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(mark + stdin.encode())))
    document = document_of(command("run", *arguments, *FAST, "--json"))
    assert [answer["question"] for answer in document["answers"]] == [QUESTION]


def test_json_is_all_there_is_on_standard_output(command, tiny):
    document = document_of(command("run", QUESTION, *FAST, "--json"))
    assert document["answers"][0]["finish_reason"] == "length"
    assert document["latent_steps"] == 2
    phases = ["prefill_seconds", "latent_seconds", "decode_seconds", "other_seconds"]
    assert sum(agent[phase] for agent in document["agents"] for phase in phases) == pytest.approx(
        document["seconds"], rel=0.02
    )


def test_without_a_terminal_progress_is_plain_lines_on_stderr(command, tiny, three):
    _, _, err = command("run", "--questions", three, *FAST, "--batch-size", "2", "--json")
    assert [line for line in err.splitlines() if line.startswith("  ")][:2] == [
        "  planner thinks 2 steps (1 of 4)",
        "  critic thinks 2 steps (2 of 4)",
    ]
    assert "1-2 of 3: " + QUESTION in err.splitlines()
    assert "\x1b" not in err


def test_think_turns_the_switch_of_every_agent(command, tiny, monkeypatch):
    seen = []
    real = Chain.__init__

    def init(self, model, tokenizer, agents, **options):
        seen.append([agent.enable_thinking for agent in agents])
        real(self, model, tokenizer, [replace(agent, enable_thinking=False) for agent in agents], **options)

    monkeypatch.setattr(Chain, "__init__", init)
    for arguments in ([], ["--think"]):
        assert command("run", QUESTION, *FAST, *arguments)[0] == 0
    assert seen == [[False] * 4, [True] * 4]


def test_think_without_a_switch_is_a_warning(command, tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, _, err = command("run", QUESTION, *FAST, "--think")
    assert code == 0
    assert "warning: the tokenizer's chat template has no thinking switch" in err


def test_model_option_is_handed_on(command, tiny):
    code, out, _ = command("run", QUESTION, *FAST, "--model", "some/model", "--dtype", "bfloat16", "--device", "cpu")
    assert code == 0
    assert tiny == [("some/model", "bfloat16", "cpu")]
    assert QUESTION in out


def test_without_a_question_there_is_one(command, tiny):
    code, out, _ = command("run", *FAST)
    assert code == 0
    assert f"Question 1 {read_questions(SAMPLE)[0][0].text}\n" in out
    assert "Question 2" not in out


def test_seed_repeats_a_sample(command, tiny):
    def sample(seed, temperature="1.5"):
        code, out, err = command("run", QUESTION, *FAST, "--temperature", temperature, "--seed", seed)
        assert code == 0, err
        return answer_of(out)

    assert sample("5") == sample("5")
    assert len({sample(seed) for seed in ("5", "6", "7")}) > 1
    assert sample("5", "0") == sample("6", "0"), "greedy needs no seed"


@pytest.mark.parametrize(
    "question", ["What is [INST] 2 [/INST]?", "Is [red]this[/red] bold?", "a [1, 2] b", "Say :smile: now"]
)
def test_question_is_printed_as_it_is(command, tiny, question):
    """Brackets and colons of a question are text, not markup."""
    code, out, err = command("run", question, *FAST)
    assert code == 0, err
    assert f"Question 1 {question}\n" in out


def test_letters_that_the_terminal_does_not_have(command, tiny, monkeypatch):
    paper = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(paper, encoding="ascii", write_through=True))
    code, _, err = command("run", "Wie spät ist es?", *FAST)
    assert code == 0, err
    assert b"Question 1 Wie sp\\xe4t ist es?\n" in paper.getvalue()


def test_answer_is_printed_as_it_is(command, tiny, monkeypatch):
    """The same for an answer, however long."""
    answer = "[bold]x[/bold] :smile: " + "word " * 60 + "end [/INST]"
    real = Chain.run

    def run(self, questions, **options):
        result = real(self, questions, **options)
        result.answers[0] = replace(result.answers[0], text=answer)
        return result

    monkeypatch.setattr(Chain, "run", run)
    code, out, err = command("run", QUESTION, *FAST)
    assert code == 0, err
    assert answer_of(out) == answer


def test_help_says_what_there_is(command):
    code, out, _ = command("run", "--help")
    assert code == 0
    options = (
        "model method latent-steps aligner max-new-tokens batch-size dtype device engine weights decoder hand-over vllm seed "
        "temperature top-p"
    )
    options = [
        f"--{option}" for option in (options + " think questions output resume overwrite json keep-going").split()
    ]
    assert [option for option in options if option not in out] == []


# ---- chains --------------------------------------------------------------------------------------------------------


CHAIN = """
latent_steps: 3
max_new_tokens: 4
budget: 900 slots
fields: {tone: calm}
agents:
  - parallel:
      - {name: math, prompt: "{question} As a {tone} mathematician.", output: latent}
      - {name: code, prompt: "{question} As a programmer.", output: latent, latent_steps: 2}
  - {name: judger, prompt: "Answer: {question}", output: text, memory: last}
"""


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


def test_a_chain_in_which_nobody_gets_the_question(command, tiny, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("agents: [{name: judger, output: text, prompt: 'Answer {{question}}'}]\n")
    assert_one_line(
        command("run", QUESTION, "--chain", str(file)),
        f"{file}:1: no prompt has {{question}}, so that nobody gets the question; {{{{question}}}} of agent 'judger'",
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

    monkeypatch.setattr("latentmas.cli.trace_file.write_trace", full)
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


# ---- what the user can mend: one line, exit code 2 -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["", *FAST], ["every question needs some text"]),
        ([" \n ", *FAST], ["every question needs some text"]),
        ([QUESTION, "--aligner", "magic"], ["--aligner magic", "auto, ridge, identity, soft"]),
        ([QUESTION, "--latent-steps", "-1"], ["latent_steps must be an integer of 0 or more", "-1"]),
        ([QUESTION, "--max-new-tokens", "0"], ["max_new_tokens must be an integer of 1 or more", "got 0"]),
        ([QUESTION, *FAST, "--temperature", "-1"], ["temperature must be 0 (greedy) or more", "-1"]),
        ([QUESTION, *FAST, "--temperature", "nan"], ["temperature must be 0 (greedy) or more", "nan"]),
        ([QUESTION, *FAST, "--top-p", "0"], ["top_p must be more than 0 and at most 1 (off)", "0"]),
        ([QUESTION, "--method", "magic"], ["--method magic", "single, text, latent, hierarchical"]),
        ([QUESTION, "--method", "text", "--chain", "debate"], ["--chain debate and --method text", "one of them"]),
        ([QUESTION, "--chain", "debat"], ["debat", "did you mean debate", "sequential"]),
        ([QUESTION, "--hierarchical", "both"], ["--hierarchical both", "parallel, serial"]),
        ([QUESTION, "--hierarchical", "serial", "--method", "text"], ["no agents of text work side by side"]),
        ([QUESTION, "--memory", "0"], ["--memory 0", "all, last, latent and a number of slots"]),
        ([QUESTION, "--budget", "many"], ["'many'", "64 MB", "512 slots"]),
        (
            [QUESTION, *FAST, "--budget", "20 slots"],
            ["question 1: planner takes", "the budget leaves 20 to a question"],
        ),
        ([QUESTION, "--trace", "x", "--output", "y", "--resume"], ["got --resume and --trace"]),
        ([QUESTION, "--trace", "x", "--method", "text"], ["got --trace", "no agent of this chain thinks"]),
        ([QUESTION, "--trace", "no/such/folder/x"], ["cannot write the trace to no/such/folder/x"]),
        ([QUESTION, "--engine", "magic"], ["--engine magic", "auto, eager"]),
        ([QUESTION, "--decoder", "magic"], ["--decoder magic", "own, vllm"]),
        ([QUESTION, "--decoder", "vllm", "--hand-over", "magic"], ["--hand-over magic", "kv, embeds"]),
        ([QUESTION, "--hand-over", "kv"], ["--hand-over, --vllm and --folder are for --decoder vllm", "own"]),
        ([QUESTION, "--vllm", "{}"], ["--hand-over, --vllm and --folder are for --decoder vllm", "own"]),
        ([QUESTION, "--folder", "."], ["--hand-over, --vllm and --folder are for --decoder vllm", "own"]),
        ([QUESTION, "--batch-size", "0"], ["--batch-size must be 1 or more", "got 0"]),
        ([QUESTION, "--handover-tokens", "0"], ["--handover-tokens must be 1 or more", "got 0"]),
        ([QUESTION, "--dtype", "int8"], ["dtype 'int8'", "auto, float32, bfloat16, float16"]),
        ([QUESTION, "--device", "gpu"], ["device 'gpu'", "here are cpu"]),
        ([QUESTION, "--questions", "sample"], ["got a question and --questions; give one of them"]),
        (["--questions", "no/such/file"], ["no/such/file", "No such file"]),
        (["--questions", "tests"], ["tests", "Is a directory"]),
        ([QUESTION, "--resume"], ["--resume and --overwrite", "got no --output"]),
        ([QUESTION, "--output", "no/such/folder/x"], ["no/such/folder/x", "No such file"]),
        (
            [QUESTION, "--latent-steps", "2000", "--aligner", "ridge"],
            ["question 1: ", "positions", "4096", "shorten the question or lower latent_steps"],
        ),
    ],
    ids=lambda it: " ".join(it[:3]) if it and it[0] in (QUESTION, "", "--questions") else "",
)
def test_user_errors_are_one_line(command, tiny, arguments, parts):
    assert_one_line(command("run", *arguments), *parts)


@pytest.mark.parametrize(
    ("there", "arguments", "parts"),
    [
        (False, [], ["vLLM is not installed here", "docs/vllm.md"]),
        (True, ["--vllm", "{'a': 1}"], ["got --vllm {'a': 1}", "no JSON", "an object of vLLM's settings"]),
        (True, ["--vllm", "[1]"], ["got --vllm [1]", "an object of vLLM's settings"]),
        (True, ["--folder", "no/such"], ["got --folder no/such", "no folder that can be written to"]),
        (
            True,
            ["--method", "debate", "--hand-over", "embeds"],
            ["first 1 + second 1 work side by side", "another memory", "(kv)"],
        ),
        (True, ["--hand-over", "embeds", "--memory", "latent"], ["the memory is cut before critic", "another memory"]),
    ],
)
def test_what_vllm_needs_is_seen_before_a_model_is_loaded(command, tiny, monkeypatch, there, arguments, parts):
    monkeypatch.setattr("latentmas.backends.vllm.launch.find_spec", lambda name: object() if there else None)
    assert_one_line(command("run", QUESTION, "--decoder", "vllm", *arguments), *parts)
    assert tiny == []


@pytest.mark.parametrize("arguments", [["--aligner", "magic"], ["--latent-steps", "-1"], ["--max-new-tokens", "0"]])
def test_wrong_options_are_seen_before_a_model_is_loaded(command, tiny, arguments):
    code, _, _ = command("run", QUESTION, *arguments)
    assert code == 2
    assert tiny == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run", QUESTION, "--nonsense"], "--nonsense"),
        (["run", QUESTION, "--latent-steps", "many"], "--latent-steps"),
        (["run", QUESTION, "--seed", str(2**63)], "--seed"),
        (["run", "How", "many?"], "many?"),
        (["think"], "think"),
    ],
    ids=["option", "number", "seed", "argument", "command"],
)
def test_wrong_usage_names_what_is_wrong(command, tiny, arguments, named):
    """Exit code 2 with the culprit's name and no traceback; nothing is loaded."""
    code, out, err = command(*arguments)
    assert code == 2
    assert out == ""
    assert named in err
    assert "Traceback" not in err
    assert tiny == []


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "nobody/nothing", "no [/such] name"])
def test_model_that_does_not_exist(command, offline, name):
    """A path or a hub name that leads nowhere is named, with what is supported."""
    assert_one_line(command("run", QUESTION, "--model", name), f"cannot load '{name}'", "Supported are a folder")


def test_folder_that_is_no_model(command, offline, tmp_path):
    assert_one_line(command("run", QUESTION, "--model", str(tmp_path)), f"cannot load '{tmp_path}'", "the folder gave")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages[0]['content'] + 1 }}", "fails on a conversation of user: TypeError: "),
        ("{{ 1 // 0 }}", "fails on a conversation of user: ZeroDivisionError: "),
        ("{% for message in messages %}\n", "fails on a conversation of user: TemplateSyntaxError: "),
        ("{{ raise_exception('Not\\nnow') }}", "refuses a conversation of user: Not now; set tokenizer.chat_template"),
        ("User:{{ messages[0]['text'] }}", "does not write the user's message as it is (message 1 of 1: "),
    ],
)
@pytest.mark.parametrize("method", ["single", "latent"])
def test_a_chat_template_that_does_not_work_is_one_line(command, monkeypatch, template, words, method):
    model, tokenizer = model_and_tokenizer()
    tokenizer.chat_template, tokenizer.name_or_path = template, "some/model"
    monkeypatch.setattr(latentmas.loading, "load_model", lambda *_, **__: (model, tokenizer))
    said = command("run", QUESTION, *FAST, "--method", method)
    assert_one_line(said, f"the chat template of 'some/model' {words}")


@pytest.mark.parametrize("method", ["single", "latent", "text"])
def test_a_chat_template_of_parts_is_given_the_question(command, monkeypatch, method):
    model, tokenizer = model_and_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}>{% for part in message['content'] %}{{ part['text'] }}"
        "{% endfor %}|{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    monkeypatch.setattr(latentmas.loading, "load_model", lambda *_, **__: (model, tokenizer))
    code, out, _ = command("run", QUESTION, *FAST, "--method", method, "--json")
    assert code == 0
    (result,) = json.loads(out)["answers"]
    assert all(turn["prompt_tokens"] > len(QUESTION) for turn in result["turns"])


def test_encoder_decoder_is_refused_by_name(command, offline, tmp_path):
    """The configuration alone is enough to say so: there are no weights in the folder."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]})
    )
    assert_one_line(command("run", QUESTION, "--model", str(tmp_path)), "encoder-decoder model (t5)", "decoder-only")


def test_default_model_that_cannot_be_fetched(command, monkeypatch):
    def pip(command, **options):
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="ERROR: no [network] here\n")

    monkeypatch.setattr("latentmas.default_model.subprocess.run", pip)
    assert_one_line(command("run", QUESTION), "could not be fetched", "ERROR: no [network] here", "--model")


def test_warnings_are_one_line(command, tiny, monkeypatch):
    """A warning is a line on stderr without the place in the code, and keeps its brackets."""
    real = Chain.run

    def run(self, questions, **options):
        warnings.warn("the file [/tmp/x] is not used", stacklevel=2)
        return real(self, questions, **options)

    monkeypatch.setattr(Chain, "run", run)
    with warnings.catch_warnings():  # without pytest's recording
        warnings.simplefilter("always")
        code, out, err = command("run", QUESTION, *FAST)
    assert code == 0, err
    assert "warning: the file [/tmp/x] is not used" in err.splitlines()
    assert QUESTION in out


def test_a_run_that_shares_its_cores_is_told_once(command, tiny, monkeypatch):
    from latentmas.cli.free_cores import OtherProcesses

    asked = []
    monkeypatch.setattr(OtherProcesses, "warning", lambda self, threads: asked.append(threads) or "others are at work")
    code, _, err = command("run", QUESTION, *FAST)
    assert code == 0, err
    assert err.splitlines().count("warning: others are at work") == 1
    assert asked == [1], "the threads of the engine, of which conftest.py asks for one"


def test_ctrl_c_exits_130(command, tiny, monkeypatch):
    def run(self, questions, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Chain, "run", run)
    code, out, err = command("run", QUESTION, *FAST)
    assert code == 130
    assert out == ""
    assert "Traceback" not in err


# ---- files of questions and results --------------------------------------------------------------------------------


def numbers(path):
    return [json.loads(line)["number"] for line in path.read_text().splitlines()]


def test_results_are_lines_with_everything(command, tiny, three, tmp_path):
    output = tmp_path / "results.jsonl"
    document = document_of(command("run", "--questions", three, *FAST, "--output", str(output), "--json"))
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    settings = lines[0]["settings"]
    assert [{**answer, "settings": settings} for answer in document["answers"]] == lines
    assert {name: document[name] for name in settings} == settings
    assert (settings["method"], settings["latent_steps"], settings["model"]) == ("latent", 2, "SmolLM2-135M-Instruct")
    assert [line["expected"] for line in lines] == ["x"] * 3
    assert [turn["agent"] for turn in lines[0]["turns"]] == AGENTS


def test_resume_goes_on_as_if_never_stopped(command, tiny, three, tmp_path):
    """With sampling too; and once all is there, no model is loaded."""
    arguments = ["run", "--questions", three, *FAST, "--temperature", "1.5"]
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    assert command(*arguments, "--output", str(whole))[0] == 0
    lines = whole.read_text().splitlines(keepends=True)
    parts.write_text(lines[0])
    code, out, err = command(*arguments, "--output", str(parts), "--resume")
    assert code == 0, err
    assert "Question 1" not in out
    assert f"1 results are in {parts}, 2 questions are left" in err

    def answers(path):
        return [json.loads(line)["answer"] for line in path.read_text().splitlines()]

    assert answers(parts) == answers(whole)
    tiny.clear()
    code, out, _ = command(*arguments, "--output", str(parts), "--resume")
    assert (code, out, tiny) == (0, "", [])


def test_resumed_results_are_in_the_document(command, tiny, three, tmp_path):
    arguments = ["run", "--questions", three, *FAST, "--output", str(tmp_path / "r.jsonl"), "--json"]
    whole = document_of(command(*arguments))
    again = document_of(command(*arguments, "--resume"))
    assert again["answers"] == whole["answers"]
    assert again["seconds"] == 0


def test_output_that_exists_is_refused_before_a_model_is_loaded(command, tiny, tmp_path):
    output = tmp_path / "results.jsonl"
    output.write_text("my thesis\n")
    assert_one_line(command("run", QUESTION, *FAST, "--output", str(output)), "exists", "--resume", "--overwrite")
    assert output.read_text() == "my thesis\n"
    assert tiny == []
    assert command("run", QUESTION, *FAST, "--output", str(output), "--overwrite")[0] == 0
    assert numbers(output) == [1]


@pytest.fixture
def broken_lines(tmp_path):
    file = tmp_path / "broken.jsonl"
    lines = ['{"question": "First?"}', '{"question": ', '{"question": "Third?"}', '{"question": ""}']
    file.write_text("\n".join(lines))
    return str(file)


def test_broken_lines_are_all_named(command, tiny, broken_lines):
    said = command("run", "--questions", broken_lines, *FAST)
    assert_one_line(said, "line 2 is not JSON", "line 4 has an empty question", "--keep-going")
    assert tiny == []


def test_keep_going_runs_the_others_and_ends_with_2(command, tiny, broken_lines, tmp_path):
    output = tmp_path / "results.jsonl"
    code, out, err = command("run", "--questions", broken_lines, *FAST, "--keep-going", "--output", str(output))
    assert code == 2
    assert numbers(output) == [1, 3]
    assert [int(n) for n in re.findall(r"^Question (\d)", out, re.M)] == [1, 3]
    assert [line for line in err.splitlines() if line.startswith("warning: left out: line ")][1:] == [
        "warning: left out: line 4 has an empty question"
    ]


@pytest.mark.parametrize("kept", [False, True], ids=["", "with --output"])
def test_where_all_are_left_out_no_model_is_loaded(command, tiny, tmp_path, monkeypatch, kept):
    """Nor is vLLM started; the document still has all faults."""
    monkeypatch.setattr("latentmas.backends.vllm.launch.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "latentmas.backends.vllm.engine", None)
    file, output = tmp_path / "broken.jsonl", tmp_path / "results.jsonl"
    file.write_text('{"question": \n{"question": ""}\n')
    arguments = ["run", "--questions", str(file), *FAST, "--keep-going", *(["--output", str(output)] if kept else [])]
    code, out, err = command(*arguments, "--decoder", "vllm")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == "error: no question is left to run: all 2 were left out"
    code, out, err = command(*arguments, "--json")
    assert code == 2
    document = json.loads(out)
    assert document["answers"] == []
    assert [fault[:6] for fault in document["left_out"]] == ["line 1", "line 2"]
    assert [agent["agent"] for agent in document["agents"]] == AGENTS
    assert tiny == []
    assert not output.exists()


@pytest.mark.parametrize("arguments", [["--questions", "-"], ["--questions", "-", "--keep-going"]])
def test_a_table_that_is_piped_in_is_one_error(command, tiny, monkeypatch, arguments):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"question,answer\nOne?,1\nTwo?,2\n")))
    said = command("run", *arguments, *FAST)
    assert_one_line(said, "standard input is neither JSON nor JSON lines", "supported are JSON lines", "CSV (in a file")
    assert tiny == []


def test_the_help_says_how_csv_is_known(command):
    assert "name of its file, which must end in .csv" in " ".join(
        re.sub("[│|]", " ", command("run", "--help")[1]).split()
    )


def test_a_pipe_that_breaks_in_a_run_is_no_success(command, tiny, monkeypatch, tmp_path):
    """In a file of results, what was finished is; the exit code says that the rest is not."""
    output, run_batches = tmp_path / "results.jsonl", latentmas.cli.batches.run_batches

    def breaks(*given, **named):
        yield next(run_batches(*given, **named))
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("latentmas.cli.batches.run_batches", breaks)
    arguments = ["run", "--questions", SAMPLE, *FAST]
    code, _, err = command(*arguments, "--output", str(output))
    assert code == 2
    assert err.splitlines()[-1].startswith("error: [Errno 32] Broken pipe. 1 of 8 questions are answered and kept in")
    assert numbers(output) == [1]
    code, _, err = command(*arguments)
    assert code == 2
    assert "1 of 8 questions are answered; --output would keep them" in err


@pytest.mark.parametrize("kept", [False, True], ids=["", "with --output"])
def test_a_pipe_that_breaks_elsewhere_is_a_success_only_where_nothing_is_lost(command, monkeypatch, tmp_path, kept):
    def load_model(*given, **named):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(latentmas.loading, "load_model", load_model)
    code, _, err = command("run", QUESTION, *FAST, *(["--output", str(tmp_path / "results.jsonl")] if kept else []))
    assert code == (2 if kept else 0)
    assert ("error: the run did not come to its end ([Errno 32] Broken pipe); go on with --resume" in err) == kept


def test_a_long_list_of_faults_is_cut_with_a_count(command, tiny, tmp_path):
    """In an error, and as warnings; the document has all of them."""
    file = tmp_path / "broken.jsonl"
    lines = ["}"] * 4500 + ['{"question": "Last?"}']
    file.write_text("\n".join(lines))
    said = command("run", "--questions", str(file), *FAST)
    assert_one_line(said, "line 1 is not JSON", "line 5 is not JSON", "; and 4,495 more. Mend this", "--keep-going")
    assert len(said[2]) < 600
    code, out, err = command("run", "--questions", str(file), *FAST, "--keep-going", "--json")
    assert code == 2
    assert [line for line in err.splitlines() if "left out" in line][5:] == ["warning: left out: and 4,495 more"]
    document = json.loads(out)
    assert len(document["left_out"]) == 4500
    assert [answer["number"] for answer in document["answers"]] == [4501]


def test_a_file_of_choices_as_the_data_sets_have_them(command, tiny, tmp_path):
    """The question that lists its options once, and the letter of the expected one."""
    entry = {"question": "Which?\nA. a\nB. b\n\nA. a\nB. b", "options": ["A. a", "B. b"], "answer": "b"}
    file = tmp_path / "medqa.json"
    file.write_text(json.dumps([entry | {"query": "Which?\nA. a\nB. b\nChoose."}], indent=2))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, out, err = command("run", "--questions", str(file), *FAST)
    assert code == 0, err
    assert "Question 1 Which?\nA. a\nB. b\nChoose.\n" in out
    assert "\nexpected: B\n" in out
    assert f'warning: {file}: "query" is read, not "question" (first in entry 1)' in err.splitlines()


def test_a_question_that_is_too_long_is_named_before_any_is_answered(command, tiny, tmp_path):
    """Of a file whose other questions fit; with --keep-going those run."""
    file, output = tmp_path / "long.jsonl", tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps({"question": text}) + "\n" for text in (QUESTION, "long " * 900)))
    arguments = ["run", "--questions", str(file), *FAST, "--output", str(output)]
    assert_one_line(command(*arguments), "question 2: the chain goes up to", "4096", "--keep-going")
    assert not output.exists()
    code, out, err = command(*arguments, "--keep-going", "--json")
    assert code == 2
    assert numbers(output) == [1]
    assert json.loads(out)["left_out"][0].startswith("question 2: the chain goes up to")
    assert "warning: left out: question 2: " in err


def fail_at(monkeypatch, question, error):
    """Chain.run() raises where it comes to this question."""
    real = Chain.run

    def run(self, questions, **options):
        if question in questions:
            raise error
        return real(self, questions, **options)

    monkeypatch.setattr(Chain, "run", run)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 12 bytes\nframes ..."
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError("Unable to allocate 8 GiB"),
    ],
)
def test_out_of_memory_in_the_middle_keeps_what_is_finished(command, tiny, three, tmp_path, monkeypatch, error):
    fail_at(monkeypatch, read_questions(three)[0][2].text, error)
    output = tmp_path / "results.jsonl"
    code, _, err = command("run", "--questions", three, *FAST, "--output", str(output))
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith(
        f"error: out of memory with 1 questions at a time ({str(error).splitlines()[0]}); take a smaller"
    )
    assert last.endswith(f"2 of 3 questions are answered and kept in {output}; go on with --resume")
    assert numbers(output) == [1, 2]


def test_rows_that_do_not_fit_the_memory_together(command, tiny, three, tmp_path, monkeypatch):
    """Short and long questions in one batch need slots for the longest of them in each row."""
    import psutil

    output = tmp_path / "results.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 200_000})())
        code, out, err = command("run", "--questions", three, *FAST, "--batch-size", "3", "--output", str(output))
    assert code == 2
    assert out == ""
    assert re.match(
        "error: a memory of 3 rows of 923 slots needs 2 MB.*a smaller batch", err.strip().splitlines()[-1]
    ), err
    assert not output.exists()


def test_other_faults_are_not_taken_for_a_lack_of_memory(command, tiny, monkeypatch):
    """What the user cannot mend is a traceback."""
    fail_at(monkeypatch, QUESTION, RuntimeError("a fault of ours"))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        command("run", QUESTION, *FAST)


def test_a_full_disk(command, tiny, three, tmp_path, monkeypatch):
    output, write = tmp_path / "results.jsonl", os.write

    def full(handle, data):
        if output.stat().st_size:
            raise OSError(28, "No space left on device")
        return write(handle, data)

    monkeypatch.setattr("latentmas.cli.results_file.os.write", full)
    code, out, err = command("run", "--questions", three, *FAST, "--output", str(output))
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith(
        f"error: cannot write to {output}: No space left on device; 1 finished results are kept in it"
    )
    assert numbers(output) == [1]
    assert "Question 2" not in out, "an answer that is not kept is not printed as if it were"


# ---- templates and padding -----------------------------------------------------------------------------------------

REFUSES_SYSTEM = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}"
    "{{ '[' + message['role'] + ']' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("template", [None, REFUSES_SYSTEM], ids=["no template", "no system role"])
@pytest.mark.parametrize("pad", [True, False], ids=["pad", "no pad"])
def test_any_tokenizer_runs_and_batches_change_nothing(command, monkeypatch, three, method, template, pad):
    def load_model(name=None, **placement):
        return model_and_tokenizer()[0], character_tokenizer(template, pad=pad)

    monkeypatch.setattr(latentmas.loading, "load_model", load_model)

    def answers(size):
        document = document_of(
            command("run", "--questions", three, *FAST, "--json", "--method", method, "--batch-size", size)
        )
        return [[turn["text"] for turn in answer["turns"]] for answer in document["answers"]]

    assert answers("1") == answers("3")


# ---- doctor --------------------------------------------------------------------------------------------------------


def test_doctor_looks_at_a_model_without_its_weights(command, tmp_path):
    tiny_config("qwen3").save_pretrained(tmp_path)
    code, out, err = command("doctor", "--model", str(tmp_path))
    assert code == 0, err
    assert re.search(r"^model +Qwen3ForCausalLM, 3 layers of width 48", out, re.M)
    assert re.search(r"^eager engine +on: ", out, re.M)


def test_doctor_without_a_model(command):
    code, out, err = command("doctor")
    assert code == 0, err
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", out, re.M)
    assert not re.search(r"^model", out, re.M)


def test_doctor_in_json(command):
    document = document_of(command("doctor", "--json"))
    assert document["packages"]["torch"] == torch.__version__
    assert document["model"] is None


def test_doctor_with_a_model_that_is_not_there(command, offline):
    assert_one_line(command("doctor", "--model", "./nowhere"), "cannot load './nowhere'")


# ---- stopped -------------------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_and_counts_what_is_finished(command, tiny, three, tmp_path, monkeypatch):
    fail_at(monkeypatch, read_questions(three)[0][2].text, KeyboardInterrupt())
    output = tmp_path / "results.jsonl"
    code, _, err = command("run", "--questions", three, *FAST, "--output", str(output))
    assert code == 130
    assert f"stopped: 2 of 3 questions are answered and kept in {output}; go on with --resume" in err.splitlines()
    assert "Traceback" not in err
    assert numbers(output) == [1, 2]
    code, _, err = command("run", "--questions", three, *FAST)
    assert "stopped: 2 of 3 questions are answered; --output would keep them" in err.splitlines()


def test_ctrl_c_on_a_terminal(tmp_path):
    """The command as installed, on a terminal of its own, interrupted by a key while the second question is answered."""
    folder, output, questions = tmp_path / "model", tmp_path / "results.jsonl", tmp_path / "questions.jsonl"
    model, tokenizer = model_and_tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    questions.write_text("".join(json.dumps({"question": text}) + "\n" for text in ("short", "next")))
    script = str(Path(sys.executable).parent / "latentmas")
    arguments = [
        "run", "--questions", str(questions), "--model", str(folder), "--output", str(output), "--aligner", "identity",
        "--latent-steps", "500", "--max-new-tokens", "500", "--device", "cpu",
    ]  # fmt: skip
    child, terminal = pty.fork()
    if child == 0:
        # A shell's background jobs, and all that they start, ignore the key.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.execve(script, [script, *arguments], {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"})
    seen, pressed, deadline = b"", False, time.monotonic() + 120
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                seen += os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
        if not pressed and b"2 of 2: next" in seen:
            pressed = os.write(terminal, b"\x03") == 1
    else:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(terminal)
    screen = seen.decode(errors="replace")
    assert pressed, screen
    assert code == 130, screen
    assert numbers(output) == [1]
    assert "Traceback" not in screen
    assert "stopped: 1 of 2 questions are answered and kept in" in screen
    assert "/500" in screen, "steps were shown"
    assert screen.rfind("\x1b[?25l") < screen.rfind("\x1b[?25h"), "the cursor is back"


# ---- in a process of its own ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["run", "--help"], ["doctor", "--json"]])
def test_a_reader_that_has_gone_is_no_error(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    script = str(Path(sys.executable).parent / "latentmas")
    done = subprocess.run([script, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("kept", [False, True], ids=["", "with --output"])
def test_a_reader_that_has_seen_enough_ends_the_run(tmp_path, kept):
    """`latentmas run ... | head -1`: 0, and not a word about it. A run with a file of results goes on to its end."""
    folder, output, questions = tmp_path / "model", tmp_path / "results.jsonl", tmp_path / "questions.jsonl"
    model, tokenizer = model_and_tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    questions.write_text("".join(json.dumps({"question": f"Why {n}?" * 20}) + "\n" for n in range(300)))
    script = str(Path(sys.executable).parent / "latentmas")
    arguments = [
        "run", "--questions", str(questions), "--model", str(folder), "--method", "single", "--max-new-tokens", "2",
        "--device", "cpu", *(["--output", str(output)] if kept else []),
    ]  # fmt: skip
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen([script, *arguments], stdout=subprocess.PIPE, stderr=errors)
    assert process.stdout.readline().startswith(b"Question 1 Why 0?")
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    said = (tmp_path / "errors").read_text()
    assert "rror" not in said, said
    assert "Broken" not in said, said
    if kept:
        assert numbers(output) == list(range(1, 301))
    else:
        assert "300 of 300: " not in said


def test_import_leaves_torch_alone():
    """Help and Ctrl-C answer before the seconds that torch takes."""
    code = (
        "import sys, latentmas, latentmas.cli.app; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.real_model
def test_console_script_end_to_end(default_folder):
    """`latentmas run` on the default model from the user's cache, as installed."""
    environment = {
        **os.environ,
        "LATENTMAS_CACHE": str(default_folder.parent.parent),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # one test process per core
    }
    script = Path(sys.executable).parent / "latentmas"
    arguments = ["run", "What is 2 + 2?", "--max-new-tokens", "12", "--latent-steps", "3"]
    done = subprocess.run([script, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Question 1 What is 2 + 2?\n" in done.stdout
    assert [words[0] for words in table_of(done.stdout)] == ["agent", *AGENTS, "all"]
