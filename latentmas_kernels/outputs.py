"""Results of latent_generate() and generate()."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from latentmas_kernels.cache.latent_cache import LatentCache


@dataclass
class Metrics:
    """Counts and times of a call. Tokens are summed over rows, without padding; seconds are wall clock.

    Attributes:
        engine: the engine that ran.
        aligner: the kind of feedback, None for generate().
        prefill_tokens, latent_tokens, decode_tokens: positions of the prompt, latent steps, new tokens.
        setup_seconds: checks, aligner, the fork or allocation of the cache.
        prefill_seconds, latent_seconds, decode_seconds: the phases; the first new token is counted as decoding.
        kv_bytes: keys and values that the cache holds afterwards.
    """

    engine: str
    aligner: str | None = None
    prefill_tokens: int = 0
    latent_tokens: int = 0
    decode_tokens: int = 0
    setup_seconds: float = 0.0
    prefill_seconds: float = 0.0
    latent_seconds: float = 0.0
    decode_seconds: float = 0.0
    kv_bytes: int = 0


@dataclass
class LatentOutput:
    """Result of latent_generate().

    Attributes:
        past_key_values: the cache, with the prompt and the latent steps.
        latents: [B, n, D], the embeddings that were fed back, after W_a and the rescale; n is the longest row's number of
            steps, behind a row's end there are zeros.
        last_hidden: [B, D], the state after the final norm at each row's last position.
        metrics: counts and times.
        latent_steps: per row, how many steps it took.
        states: [B, n, D], the state after the final norm behind each step, or None where they were not asked for.
        crossed: per aligner of `cross` the embeddings of its target, [B, n, D of the target], that it makes of the states
            which the latents were made of.
    """

    past_key_values: LatentCache
    latents: Tensor
    last_hidden: Tensor
    metrics: Metrics
    latent_steps: list[int]
    states: Tensor | None = None
    crossed: list[Tensor] = field(default_factory=list)


@dataclass
class GenerateOutput:
    """Result of generate().

    Attributes:
        sequences: int64 [B, T + new], the prompt left-padded, then the new tokens; behind a row's end the padding token.
        past_key_values: the cache, with the prompt and all new tokens but each row's last, which was not fed in.
        metrics: counts and times.
        new_tokens: per row, how many of the new tokens are its own, its end token included.
        finish_reasons: per row, "stop" (an end token or a stopping criterion) or "length".
    """

    sequences: Tensor
    past_key_values: LatentCache
    metrics: Metrics
    new_tokens: list[int]
    finish_reasons: list[Literal["stop", "length"]]
