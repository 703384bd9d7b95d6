"""Who runs a step. `open_engine` chooses; every engine has the methods of `Engine`."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from latentmas_kernels.alignment import Aligner
from latentmas_kernels.cache.latent_cache import LatentCache
from latentmas_kernels.engines import cuda, native
from latentmas_kernels.engines import hf_graph as generic
from latentmas_kernels.engines.cuda import CudaEngine
from latentmas_kernels.engines.decoding import SamplingParams
from latentmas_kernels.engines.eager import EagerEngine
from latentmas_kernels.engines.hf_graph import HFGraphEngine
from latentmas_kernels.engines.native import NativeEngine
from latentmas_kernels.engines.thinking import LatentParams, LatentResult
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.inputs import Prompt
from latentmas_kernels.models.architecture import Architecture, in_short
from latentmas_kernels.warn_once import warn_once

ENGINES = ("auto", "eager", "native", "cuda")
WEIGHTS = ("model", "int8")


class Engine(Protocol):
    """Appends positions to a LatentCache. The caller has checked that they fit.

    Attributes:
        name: for metrics.
        architecture: of the model that it runs.
        uses_thread_pool: whether it computes on CPU threads of its own, which torch's would be in the way of.
    """

    name: str
    architecture: Architecture
    uses_thread_pool: bool

    def extend(self, cache: LatentCache, prompt: Prompt, *, logits: bool) -> Tensor:
        """Run the prompt behind the cache and append it.

        Returns:
            For each row's last position the logits [B, V] (the lm_head runs on nothing else), or, with logits=False,
            the state after the final norm [B, D] (the lm_head does not run). V counts the tokens that have an input
            embedding: rows of the lm_head beyond those are padding, which no text or thought can hold.
        """
        ...

    def run_latent(
        self,
        cache: LatentCache,
        seed: Tensor,
        aligner: Aligner,
        latent_params: LatentParams,
        on_step: Callable[[int], None] | None,
    ) -> LatentResult:
        """Run latent steps: embedding = aligner(seed), feed it, take the next seed; each row until it ends.

        Args:
            seed: what the aligner reads, from `extend`: [B, V] where it needs logits, [B, D] otherwise.
            on_step: called with the number of each step as it is issued; must not make the engine wait for a device.
        """
        ...


@runtime_checkable
class SupportsDecode(Protocol):
    """An engine that also chooses tokens by itself, on the device."""

    def can_decode(self, sampling_params: SamplingParams, batch: int, *, streaming: bool) -> bool:
        """Whether `speak` covers this; callers decode by `extend` where it does not."""
        ...

    def decode(
        self,
        cache: LatentCache,
        logits: Tensor,
        sampling_params: SamplingParams,
        on_tokens: Callable[[Tensor], None] | None,
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


def open_engine(engine: str, model: nn.Module, architecture: Architecture, *, weights: str = "model") -> Engine:
    """The engine for a model: "auto" takes the fastest that covers it.

    On the CPU that is the native engine for the families that it knows. On CUDA it is the packed engine for the same
    families and the generic tier for the others; "cuda" asks for one of the two. Where "auto" ends up on the eager engine,
    one warning says why.

    Args:
        weights: "model" runs on the model's own; "int8" on a copy that is rounded by row, which the native engine has.

    Raises:
        ValueError: for an unknown name, or an engine that was asked for and does not cover the model.
    """
    check_engine_options(engine, weights)
    if engine == "eager" and weights == "model":
        return EagerEngine(model, architecture)
    fast = fast_engine(engine, model, architecture, weights=weights)
    if not isinstance(fast, str):
        return fast
    if weights == "int8":
        raise LatentMASError(
            f"weights='int8' runs on the native engine only, and {fast}. Use weights='model', which runs everywhere"
        )
    if engine != "auto":
        raise LatentMASError(
            f"engine={engine!r} does not cover this {architecture.name}: {fast}. Use engine='auto' or 'eager'"
        )
    warn_once(f"{architecture.name} runs on the eager engine, since {fast}")
    return EagerEngine(model, architecture)


def check_engine_options(engine: str, weights: str) -> None:
    """Raise ValueError for a name that there is not."""
    if engine not in ENGINES:
        raise LatentMASError(f"got engine={engine!r}; supported are {', '.join(map(repr, ENGINES))}")
    if weights not in WEIGHTS:
        raise LatentMASError(f"got weights={weights!r}; supported are {', '.join(map(repr, WEIGHTS))}")


def fast_engine(engine: str, model: nn.Module, architecture: Architecture, *, weights: str = "model") -> Engine | str:
    """The engine that is faster than transformers' own loop for this model, or, as a clause, why there is none.

    Whatever goes wrong while one is set up is a reason: no engine has done anything yet.
    """
    try:
        return _fast_engine(engine, model, architecture, weights)
    except Exception as error:
        return f"setting up its engine ended in {in_short(error)}"


def _fast_engine(engine: str, model: nn.Module, architecture: Architecture, weights: str) -> Engine | str:
    if weights == "int8":
        if engine not in ("auto", "native"):
            return f"engine={engine!r} was asked for"
        return native.unsupported_reason(model, architecture) or NativeEngine(model, architecture, int8=True)
    if engine == "native" or (engine == "auto" and architecture.device.type == "cpu"):
        return native.unsupported_reason(model, architecture) or NativeEngine(model, architecture)
    reason = cuda.unsupported_reason(model, architecture)
    if reason is None:
        return CudaEngine(model, architecture)
    harder = generic.unsupported_reason(model, architecture)
    if harder is None:
        return HFGraphEngine(model, architecture)
    return reason if engine == "cuda" else harder


__all__ = [
    "ENGINES",
    "WEIGHTS",
    "CudaEngine",
    "EagerEngine",
    "Engine",
    "HFGraphEngine",
    "LatentParams",
    "LatentResult",
    "NativeEngine",
    "SamplingParams",
    "SupportsDecode",
    "check_engine_options",
    "fast_engine",
    "open_engine",
]  # fmt: skip
