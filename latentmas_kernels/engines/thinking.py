"""What latent_generate() asks of an engine, and what it gets."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Thinking:
    """How long to think, and what to keep of it; the parameters of latent_generate(), checked.

    Attributes:
        steps: int64 [B] on the CPU, each row's own number of steps, all of them 1 or more.
        settle: a row also ends with the first step, its second at the earliest, whose embedding has a cosine of at least
            this to the embedding of the step before (both as they were fed, in the model's dtype; the cosine in float32).
            None is off.
        record: keep the states after the steps.
    """

    steps: Tensor
    settle: float | None = None
    record: bool = False

    @property
    def longest(self) -> int:
        return int(self.steps.max())


@dataclass(frozen=True)
class Thought:
    """What an engine thought. All tensors are on the model's device and in its dtype, but for `steps`.

    Attributes:
        latents: [B, n, D], the embeddings that were fed; n is the longest row's number of steps. Zero behind a row's end.
        last_hidden: [B, D], the state after each row's own last step.
        steps: int64 [B] on the CPU, steps that each row took. The cache has grown by as many.
        states: [B, n, D], the state after the final norm behind each step, zero behind a row's end; None where they were
            not recorded.
    """

    latents: Tensor
    last_hidden: Tensor
    steps: Tensor
    states: Tensor | None = None


def settled(latents: Tensor, step: int, settle: float | None) -> Tensor:
    """bool [B]: whose embedding of this step, counted from 0, is as good as that of the step before."""
    if settle is None or step == 0:
        return torch.zeros(len(latents), dtype=torch.bool, device=latents.device)
    now, before = latents[:, step].float(), latents[:, step - 1].float()
    return torch.cosine_similarity(now, before, dim=-1) >= settle
