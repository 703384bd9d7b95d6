"""The engine protocol, with its parameters and results."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from latentmas_kernels.alignment import Aligner
from latentmas_kernels.cache.latent_cache import LatentCache
from latentmas_kernels.inputs import Prompt
from latentmas_kernels.models.architecture import Architecture

OnStep = Callable[[int], None]
"""Called with the number of each latent step as it is issued; must not make the engine wait for a device."""
OnTokens = Callable[[Tensor], None]
"""Gets each decode step's tokens, int64 [B] on the CPU; the engine waits for the device at every step then."""


@dataclass(frozen=True)
class LatentParams:
    """Number of latent steps, stopping and recording; the parameters of latent_generate(), checked.

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
    """The latent steps that an engine ran. All tensors are on the model's device and in its dtype, but for `steps`.

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


@dataclass(frozen=True)
class SamplingParams:
    """Choice of tokens and stopping; the parameters of generate(), checked.

    Attributes:
        top_k: 0 is off.
        eos_token_ids: end-of-sequence tokens; none: rows end at max_new_tokens.
        pad_token_id: fills behind ended rows.
        min_p: least share of the most likely token's probability, after top-k and top-p; 0 is off.
        repetition_penalty: divides positive logits of the tokens in `penalty_mask` and multiplies negative ones, before all
            else; 1 is off.
        penalty_mask: bool [B, V], the tokens of each row that the penalty meets; the engine marks those that it chooses. None
            without a penalty.
    """

    max_new_tokens: int
    min_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    eos_token_ids: list[int]
    pad_token_id: int
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    penalty_mask: Tensor | None = None

    def lengths(self, tokens: Tensor) -> Tensor:
        """Return a row's tokens up to its first end token, that one included, or all of them: int64 [B] on the CPU."""
        ended = self._is_end(tokens)
        first = ended.int().argmax(dim=1) + 1
        return torch.where(ended.any(dim=1), first, tokens.shape[1])

    def stopped(self, tokens: Tensor) -> Tensor:
        """Return whether a row ended with an end token: bool [B] on the CPU."""
        return self._is_end(tokens).any(dim=1)

    def _is_end(self, tokens: Tensor) -> Tensor:
        return torch.isin(tokens.cpu(), torch.tensor(self.eos_token_ids, dtype=torch.int64))


class Engine(Protocol):
    """Appends positions to a LatentCache. The caller has checked that they fit.

    Attributes:
        name: for metrics.
        architecture: of the model that it runs.
        uses_thread_pool: whether it computes on CPU threads of its own, whose cores torch's threads would occupy.
    """

    name: str
    architecture: Architecture
    uses_thread_pool: bool

    def extend(self, cache: LatentCache, prompt: Prompt, *, logits: bool) -> Tensor:
        """Run the prompt behind the cache and append it. This modifies the cache.

        Returns:
            For each row's last position the logits [B, V] (the lm_head runs on nothing else), or, with logits=False,
            the state after the final norm [B, D] (the lm_head does not run). V counts the tokens that have an input
            embedding: rows of the lm_head beyond those are padding, which no text or latent step can hold.
        """
        ...

    def run_latent(
        self, cache: LatentCache, seed: Tensor, aligner: Aligner, latent_params: LatentParams, on_step: OnStep | None
    ) -> LatentResult:
        """Run latent steps: embedding = aligner(seed), feed it, take the next seed; each row until it ends. This modifies the
        cache.

        Args:
            seed: what the aligner reads, from `extend`: [B, V] where it needs logits, [B, D] otherwise.
        """
        ...


class SupportsExtendBoth(Engine, Protocol):
    """An engine that gives a step's states and logits together, as `latent_stepwise` needs."""

    def extend_both(self, cache: LatentCache, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """Run the prompt as `extend` does; return states [B, D] and logits [B, V]."""
        ...


@runtime_checkable
class SupportsDecode(Protocol):
    """An engine that also chooses tokens by itself, on the device."""

    def can_decode(self, sampling_params: SamplingParams, batch: int, *, streaming: bool) -> bool:
        """Return whether `decode` covers this; callers decode by `extend` where it does not."""
        ...

    def decode(
        self, cache: LatentCache, logits: Tensor, sampling_params: SamplingParams, on_tokens: OnTokens | None
    ) -> Tensor:
        """Decode text behind the cache. This modifies the cache.

        Args:
            logits: [B, V], of each row's last position.

        Returns:
            int64 [B, n], n the new tokens of the longest row; behind a row's end the padding token. All but each row's
            last are in the cache.
        """
        ...


def cosine(now: Tensor, before: Tensor) -> Tensor:
    """Return the cosine of embeddings [..., D], float64 [...]: 0 where one of them is zero, NaN where one holds NaN.

    One root of one product: that of a square is exact, so what has the same bits has a cosine of 1 and not a bit less. The
    other engines compute the same, `cosine` in csrc/cpu/runner.cpp and `cosine_to_last` in ops/triton/realign.py (in float32).
    """
    now, before = now.double(), before.double()
    size = ((now * now).sum(-1) * (before * before).sum(-1)).sqrt()
    return torch.where(size == 0, 0, (now * before).sum(-1) / size).clamp_min(-1)


def converged(latents: Tensor, step: int, stop_cosine: float | None) -> Tensor:
    """Return whose embedding of this step, counted from 0, is within stop_cosine of the step before: bool [B] on the CPU."""
    if stop_cosine is None or step == 0:
        return torch.zeros(len(latents), dtype=torch.bool)
    return (cosine(latents[:, step], latents[:, step - 1]) >= stop_cosine).cpu()
