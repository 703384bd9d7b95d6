"""with_transformers/run.py, which runs transformers' own tests on accelerated models, on a checkout of three tests."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import transformers

ROOT = Path(__file__).parents[2]
RUN = ROOT / "tests/with_transformers/run.py"
TESTS = """
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

SIZES = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)


def generated():
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    return model, model.generate(max_new_tokens=3, min_new_tokens=3, do_sample=False)


class TestMini:
    def test_same(self):
        model, ids = generated()
        assert ids.shape[1] == 4
        assert type(model).__name__ == "LlamaForCausalLM"

    def test_differs(self):
        model, _ = generated()
        assert type(model) is LlamaForCausalLM

    def test_fails_anyway(self):
        assert type(LlamaModel(LlamaConfig(**SIZES))) is not LlamaModel

    def test_needs_the_hub(self):
        LlamaForCausalLM.from_pretrained("nobody/has-this-model")
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "src/transformers").mkdir(parents=True)
    (tmp_path / "src/transformers/__init__.py").write_text(f'__version__ = "{transformers.__version__}"\n')
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_mini.py").write_text(TESTS)
    (tmp_path / "pytest.ini").touch()
    return tmp_path


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    """run.py as a module."""
    spec = importlib.util.spec_from_file_location("with_transformers_run", RUN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_causal_lm_is_accelerated_and_the_difference_is_found(checkout: Path) -> None:
    """In two processes of pytest's, whose counts are added up."""
    listed = checkout / "differences.toml"
    listed.write_text('"TestMini::test_differs" = "the class is a subclass"')
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    done = subprocess.run(
        [sys.executable, RUN, checkout, "tests/test_mini.py", f"--differences={listed}", "-n2"],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-3:] == [
        "differs, as listed: tests/test_mini.py::TestMini::test_differs",
        "    the class is a subclass",
        f"transformers {transformers.__version__} on accelerated models: 1 passed, 1 skipped (1 need the Hub), 2 failed, of "
        "which 1 fail on plain models too; of 2 calls of generate() that are greedy or sample, 2 ran on an engine",
    ]


@pytest.mark.parametrize(
    ("ours", "plain", "listed", "said", "good"),
    [
        ("failed", "passed", True, "differs, as listed: t.py::T::test_a\n    because", True),
        ("failed", "passed", False, "DIFFERS: t.py::T::test_a\n    it passes on plain models", False),
        ("passed", None, True, "PASSES: t.py::T::test_a\n    it is in differences.toml: take it out", False),
        ("passed", None, False, "", True),
        ("skipped", None, True, "", True),
        ("failed", "failed", False, "", True),
        ("failed", "failed", True, "", True),
    ],
)
def test_verdict(runner: ModuleType, ours: str, plain: str | None, listed: bool, said: str, good: bool) -> None:
    name = "t.py::T::test_a"
    lines, verdict = runner.verdict(
        {name: ours, "t.py::T::test_b": "passed"},
        {} if plain is None else {name: plain},
        {"T::test_a*" if listed else "T::test_c": "because"},
    )
    assert verdict == good
    assert len(lines) == bool(said)
    assert "".join(lines).startswith(said)


def test_another_version_is_refused_by_both_names(runner: ModuleType, checkout: Path) -> None:
    runner.check_version(checkout)
    (checkout / "src/transformers/__init__.py").write_text('__version__ = "5.2.0.dev0"\n')
    with pytest.raises(SystemExit, match=f"is transformers 5.2.0.dev0, and {transformers.__version__} is installed"):
        runner.check_version(checkout)


def test_a_folder_that_is_no_checkout_is_refused(runner: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"{tmp_path} is no checkout of transformers"):
        runner.check_version(tmp_path)
