"""The commands as installed and interrupted, and latentmas doctor."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import latentmas
import pytest
import torch
from commands import AGENTS, FAST, assert_one_line, document_of, fail_at, model_and_tokenizer, numbers, table_of
from latentmas.cli.questions import read_questions
from tiny_models import tiny_config

pytestmark = pytest.mark.usefixtures("keys_are_moved_by_torch")


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


def test_what_the_package_exports_is_there():
    """Among it what README and docs import."""
    promised = {
        "Agent",
        "Chain",
        "METHODS",
        "hierarchical_agents",
        "latent_agents",
        "load_model",
        "read_chain",
        "trace_table",
    }
    assert promised <= set(latentmas.__all__)
    assert all(getattr(latentmas, name) is not None for name in latentmas.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(latentmas, "nothing")  # noqa: B009


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
