"""What latent_generate() asks of an engine, and what it gets."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentParams:
    """How long to think, and what to keep of it; the parameters of latent_generate(), checked.

    Attributes:
        steps: int64 [B] on the CPU, each row's own number of steps, all of them 1 or more.
        stop_cosine: a row also ends with the first step, its second at the earliest, whose embedding has a cosine of at least
            this to the embedding of the step before (both as they were fed, in the model's dtype; see `cosine`). None is off.
        record: keep the states after the steps.
    """

    steps: Tensor
    stop_cosine: float | None = None
    record: bool = False

    @property
    def longest(self) -> int:
        return int(self.steps.max())


@dataclass(frozen=True)
class LatentResult:
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


def cosine(now: Tensor, before: Tensor) -> Tensor:
    """float64 [...], the cosine of embeddings [..., D]: 0 where one of them is zero, NaN where one holds NaN.

    One root of one product: that of a square is exact, so what has the same bits has a cosine of 1 and not a bit less. The
    other engines compute the same, `cosine` in csrc/cpu/runner.cpp and `cosine_to_last` in ops/triton/realign.py (in float32).
    """
    now, before = now.double(), before.double()
    size = ((now * now).sum(-1) * (before * before).sum(-1)).sqrt()
    return torch.where(size == 0, 0, (now * before).sum(-1) / size).clamp_min(-1)


def converged(latents: Tensor, step: int, stop_cosine: float | None) -> Tensor:
    """bool [B] on the CPU: whose embedding of this step, counted from 0, is as good as that of the step before."""
    if stop_cosine is None or step == 0:
        return torch.zeros(len(latents), dtype=torch.bool)
    return (cosine(latents[:, step], latents[:, step - 1]) >= stop_cosine).cpu()
