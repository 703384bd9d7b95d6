"""Who runs a step. `open_engine` chooses; every engine has the methods of `Engine`."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from latentmas_kernels.alignment import Aligner
from latentmas_kernels.architecture import Architecture
from latentmas_kernels.cache import LatentCache
from latentmas_kernels.engines.eager import EagerEngine
from latentmas_kernels.prompt import Prompt

ENGINES = ("auto", "eager")


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


def open_engine(engine: str, model: nn.Module, architecture: Architecture) -> Engine:
    """The engine for a model; ValueError for an unknown name."""
    if engine not in ENGINES:
        raise ValueError(f"got engine={engine!r}; supported are {', '.join(map(repr, ENGINES))}")
    return EagerEngine(model, architecture)


__all__ = ["ENGINES", "EagerEngine", "Engine", "open_engine"]
