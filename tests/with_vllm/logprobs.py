"""Log-probabilities of a text behind a cache, by the model itself."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from latentmas_kernels import LatentCache


def rows_of(memories: Sequence[LatentCache], model: Any) -> LatentCache:
    """Memories of one row each as the rows of one."""
    from latentmas_kernels.models.architecture import Architecture

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
