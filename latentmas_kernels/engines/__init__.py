"""Who runs a step. `open_engine` chooses; every engine has the methods of `Engine`."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from latentmas_kernels.alignment import Aligner
from latentmas_kernels.architecture import Architecture
from latentmas_kernels.cache import LatentCache
from latentmas_kernels.engines import cuda, generic
from latentmas_kernels.engines.cuda import CudaEngine
from latentmas_kernels.engines.decoding import Decoding
from latentmas_kernels.engines.eager import EagerEngine
from latentmas_kernels.engines.generic import GenericEngine
from latentmas_kernels.engines.once import warn_once
from latentmas_kernels.prompt import Prompt

ENGINES = ("auto", "eager", "cuda")


class Engine(Protocol):
    """Appends positions to a LatentCache. The caller has checked that they fit."""

    name: str

    def extend(self, cache: LatentCache, prompt: Prompt, *, logits: bool) -> Tensor:
        """Run the prompt behind the cache and append it.

        Returns:
            For each row's last position the logits [B, V] (the lm_head runs on nothing else), or, with logits=False,
            the state after the final norm [B, D] (the lm_head does not run).
        """
        ...

    def think(
        self, cache: LatentCache, seed: Tensor, aligner: Aligner, steps: int, on_step: Callable[[int], None] | None
    ) -> tuple[Tensor, Tensor]:
        """Run latent steps: embedding = aligner(seed), feed it, take the next seed; `steps` times.

        Args:
            seed: what the aligner reads, from `extend`: [B, V] where it needs logits, [B, D] otherwise.
            on_step: called with the number of each step as it is issued; must not make the engine wait for a device.

        Returns:
            latents [B, steps, D], the embeddings fed; last_hidden [B, D], the state after the last of them.
        """
        ...


@runtime_checkable
class Speaker(Protocol):
    """An engine that also chooses tokens by itself, on the device."""

    def can_speak(self, decoding: Decoding, batch: int, *, streaming: bool) -> bool:
        """Whether `speak` covers this; callers decode by `extend` where it does not."""
        ...

    def speak(
        self, cache: LatentCache, logits: Tensor, decoding: Decoding, on_tokens: Callable[[Tensor], None] | None
    ) -> Tensor:
        """Decode text behind the cache.

        Args:
            logits: [B, V], of each row's last position.
            on_tokens: gets each step's tokens, int64 [B] on the CPU; the device is waited for at every step then.

        Returns:
            int64 [B, n], n the new tokens of the longest row; behind a row's end the padding token. All but each row's
            last are in the cache.
        """
        ...


def open_engine(engine: str, model: nn.Module, architecture: Architecture) -> Engine:
    """The engine for a model: "auto" takes the fastest that covers it.

    On CUDA that is the packed engine for the families that it knows and the generic tier for the others; "cuda" asks for
    one of the two. Where a GPU or another accelerator ends up on the eager engine, one warning says why.

    Raises:
        ValueError: for an unknown name, or an engine that was asked for by name and does not cover the model.
    """
    if engine not in ENGINES:
        raise ValueError(f"got engine={engine!r}; supported are {', '.join(map(repr, ENGINES))}")
    if engine == "eager" or (engine == "auto" and architecture.device.type == "cpu"):
        return EagerEngine(model, architecture)
    reason = cuda.why_not(model, architecture)
    if reason is None:
        return CudaEngine(model, architecture)
    harder = generic.why_not(model, architecture)
    if harder is None:
        return GenericEngine(model, architecture)
    if engine == "cuda":
        raise ValueError(
            f"engine='cuda' does not cover this {architecture.name}: {reason}. Use engine='auto' or 'eager'"
        )
    warn_once(f"{architecture.name} runs on the eager engine, since {harder}")
    return EagerEngine(model, architecture)


__all__ = [
    "ENGINES", "CudaEngine", "Decoding", "EagerEngine", "Engine", "GenericEngine", "Speaker", "open_engine",
]  # fmt: skip
