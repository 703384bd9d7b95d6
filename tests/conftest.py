"""Fixtures for all tests: tiny random models, the default model, and a cache folder for each test."""

import os

# One test process per core, and the processes that tests start: more threads than cores spin against each other, which
# made single tests twenty times slower.
os.environ["OMP_NUM_THREADS"] = os.environ["LATENTMAS_NUM_THREADS"] = "1"

import torch

# Before triton is imported anywhere: without a GPU its kernels run in the interpreter. `make test-ptx` says otherwise.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import sys
from pathlib import Path
from typing import Any

import pytest
from latentmas.default_model import default_model_folder
from tiny_models import FAMILIES, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(params=FAMILIES)
def family_model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


@pytest.fixture
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="session")
def default_folder() -> Path:
    return default_model_folder()


@pytest.fixture(scope="session")
def default_model(default_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(default_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def default_tokenizer(default_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(default_folder)


@pytest.fixture(autouse=True)
def own_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "default_folder" in request.fixturenames:
        request.getfixturevalue("default_folder")  # looked up in the user's cache, before that is hidden
    monkeypatch.setenv("LATENTMAS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def keys_are_moved_by_torch(monkeypatch):
    """Not in Triton's interpreter, which takes a hundred times as long; the kernel has tests of its own."""
    monkeypatch.setattr(sys.modules["latentmas_kernels.ops.rerotate_keys"], "runs_on", lambda tensor: tensor.is_cuda)
