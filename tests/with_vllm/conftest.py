"""Real vLLM on the CPU: `make test-vllm` makes the environment. Elsewhere these tests are not collected."""

import importlib.util
import os

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    # Before vLLM is imported. In this process: an engine then starts in seconds, and what it raises is seen here.
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_LOGGING_LEVEL="WARNING",
        OMP_NUM_THREADS="2",
    )

from typing import Any

import pytest
from latentmas import load_model


@pytest.fixture(scope="package")
def float32() -> tuple[Any, Any]:
    """The default model and its tokenizer."""
    return load_model(dtype="float32")
