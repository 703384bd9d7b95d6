"""Latent steps one `extend` at a time: for engines, and kinds of feedback, that have no loop of their own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from latentmas_kernels.alignment import Aligner
from latentmas_kernels.cache import LatentCache
from latentmas_kernels.prompt import Prompt


def think_stepwise(
    engine: Any,
    cache: LatentCache,
    seed: Tensor,
    aligner: Aligner,
    steps: int,
    on_step: Callable[[int], None] | None,
) -> tuple[Tensor, Tensor]:
    """`Engine.think` by `engine.extend`."""
    one_each = torch.ones(len(seed), dtype=torch.int64)
    shape = (len(seed), steps, engine.architecture.hidden_size)
    latents = torch.empty(shape, dtype=engine.architecture.dtype, device=seed.device)
    for step in range(steps):
        if on_step is not None:
            on_step(step)
        latents[:, step] = aligner(seed)
        prompt = Prompt(one_each, inputs_embeds=latents[:, step : step + 1])
        seed = engine.extend(cache, prompt, logits=aligner.needs_logits and step + 1 < steps)
    return latents, seed
