"""Real vLLM on the CPU: `make test-vllm` makes the environment. Elsewhere these tests are not collected."""

import importlib.util
import os
from collections.abc import Sequence

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
import torch
from latentmas import load_model
from torch import Tensor

from latentmas_kernels import LatentCache


@pytest.fixture(scope="package")
def float32() -> tuple[Any, Any]:
    """The default model and its tokenizer."""
    return load_model(dtype="float32")


def rows_of(memories: Sequence[LatentCache], model: Any) -> LatentCache:
    """Memories of one row each as the rows of one."""
    from latentmas_kernels.architecture import Architecture

    lengths = torch.cat([memory.lengths for memory in memories])
    whole = LatentCache.for_model(Architecture.of(model), len(memories), int(lengths.max()) + 3)
    whole.buffer.fill_(float("nan"))  # behind the lengths there may be anything
    for row, memory in enumerate(memories):
        memory.copy_slots(0, 0, int(lengths[row]), whole, row, 0)
    whole.lengths, whole.next_position = lengths, lengths.clone()
    whole.positions[:] = torch.arange(whole.capacity)
    return whole


@torch.no_grad()
def logprobs_of(model: Any, memory: LatentCache, prompt: list[int], text: list[int]) -> Tensor:
    """[len(text)], by the model itself, behind a memory of one row."""
    logits = model(torch.tensor([prompt + text[:-1]]), past_key_values=memory.to_hf()).logits
    return logits[0, len(prompt) - 1 :].float().log_softmax(-1)[range(len(text)), text]
