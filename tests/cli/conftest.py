"""The command line in this process, on a tiny model."""

import json
import sys
import warnings

import pytest
from commands import QUESTION, model_and_tokenizer
from latentmas.cli import app


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `latentmas ARGUMENTS` here: (exit code, stdout, stderr)."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back what the command sets

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["latentmas", *arguments])
        code = 0
        try:
            app.main()
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

    monkeypatch.setattr("latentmas.cli.execute.load_model", load_model)
    return asked


@pytest.fixture
def offline(monkeypatch):
    """No network; the variable is read when the library is imported, which it was long ago."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def pip(command, **options):
        raise AssertionError(f"asked the network: {command}")

    monkeypatch.setattr("latentmas.default_model.subprocess.run", pip)


@pytest.fixture
def three(tmp_path):
    """A file of three questions, the last one much longer."""
    file = tmp_path / "questions.jsonl"
    texts = [QUESTION, "And how many were there?", "Why is that? " * 12]
    file.write_text("".join(json.dumps({"question": text, "answer": "x"}) + "\n" for text in texts))
    return str(file)


@pytest.fixture
def broken_lines(tmp_path):
    file = tmp_path / "broken.jsonl"
    lines = ['{"question": "First?"}', '{"question": ', '{"question": "Third?"}', '{"question": ""}']
    file.write_text("\n".join(lines))
    return str(file)
