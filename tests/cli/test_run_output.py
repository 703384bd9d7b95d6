"""latentmas run: what it prints, whatever is in questions and answers."""

import io
import json
import re
import sys
import warnings
from dataclasses import replace

import pytest
from commands import (
    AGENTS,
    CHAIN,
    FAST,
    QUESTION,
    answer_of,
    assert_one_line,
    document_of,
    model_and_tokenizer,
    numbers,
    table_of,
)
from latentmas.chain.chain import Chain
from latentmas.chain_files.reader import METHODS, latent_agents
from latentmas.cli.questions import SAMPLE, read_questions
from tokenizers_offline import character_tokenizer

pytestmark = pytest.mark.usefixtures("keys_are_moved_by_torch")


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

    monkeypatch.setattr("latentmas.cli.execute.load_model", load_model)

    def answers(size):
        document = document_of(
            command("run", "--questions", three, *FAST, "--json", "--method", method, "--batch-size", size)
        )
        return [[turn["text"] for turn in answer["turns"]] for answer in document["answers"]]

    assert answers("1") == answers("3")
