"""latentmas run: files of questions and of results, and what ends a run early."""

import errno
import io
import json
import os
import re
import sys
import warnings

import latentmas.cli.execute
import pytest
import torch
from commands import AGENTS, FAST, QUESTION, assert_one_line, document_of, fail_at, numbers
from latentmas.cli.questions import SAMPLE, read_questions

pytestmark = pytest.mark.usefixtures("keys_are_moved_by_torch")


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
    output, run_batches = tmp_path / "results.jsonl", latentmas.cli.execute.run_batches

    def breaks(*given, **named):
        yield next(run_batches(*given, **named))
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("latentmas.cli.execute.run_batches", breaks)
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

    monkeypatch.setattr("latentmas.cli.execute.load_model", load_model)
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


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 12 bytes\nframes ..."
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError("Unable to allocate 8 GiB"),
        MemoryError(),  # as Python itself raises it
    ],
)
def test_out_of_memory_in_the_middle_keeps_what_is_finished(command, tiny, three, tmp_path, monkeypatch, error):
    fail_at(monkeypatch, read_questions(three)[0][2].text, error)
    output = tmp_path / "results.jsonl"
    code, _, err = command("run", "--questions", three, *FAST, "--output", str(output))
    assert code == 2
    last = err.strip().splitlines()[-1]
    says = (str(error) or "MemoryError").splitlines()[0]
    assert last.startswith(f"error: out of memory with 1 questions at a time ({says}); take a smaller")
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
