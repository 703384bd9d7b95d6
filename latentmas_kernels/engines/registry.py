"""The table of engines, which open_engine(), doctor() and the command line read.

To add an engine: a file with its class (the methods of `base.Engine`), `unsupported_reason` and `memory_report`, and an entry
in REGISTRY.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from latentmas_kernels.engines import cuda, eager, hf_graph, native
from latentmas_kernels.engines.base import Engine
from latentmas_kernels.engines.cuda import CudaEngine
from latentmas_kernels.engines.eager import EagerEngine
from latentmas_kernels.engines.hf_graph import HFGraphEngine
from latentmas_kernels.engines.native import NativeEngine
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.extension import extension, extension_state
from latentmas_kernels.models.architecture import Architecture, in_short
from latentmas_kernels.models.families import FAMILIES
from latentmas_kernels.models.module_settings import reading_once
from latentmas_kernels.warn_once import warn_once


class EngineModule(Protocol):
    """The file of an engine, whose class is beside these functions."""

    def unsupported_reason(self, model: Any, architecture: Architecture) -> str | None:
        """Return why the engine cannot run the model, as a clause; None where it can."""
        ...

    def memory_report(self, model: Any) -> dict[str, int]:
        """Return the bytes that the engine keeps for a model beside its weights, by what they are."""
        ...


@dataclass(frozen=True)
class EngineEntry:
    """An engine in the table.

    Attributes:
        name: in doctor()'s report.
        option: the value of `engine=` that asks for it. Entries that share one are tried in the table's order.
        device: type of the device where "auto" tries it, "cuda" for all but the CPU; None: not by "auto".
        module: its file. The functions are looked up at each call.
        open: makes the engine of (model, architecture); their name is a keyword for weights but "model": int8=True.
        summary: returns in a few words how it runs a model, for doctor().
        covers: models that it is for, for doctor(); empty: all.
        weights: the values of `weights=` that it has.
        missing: returns why this machine cannot run it, as a clause; None where it can.
    """

    name: str
    option: str
    device: str | None
    module: EngineModule
    open: Callable[..., Engine]
    summary: Callable[[], str]
    covers: str = ""
    weights: tuple[str, ...] = ("model",)
    missing: Callable[[], str | None] = lambda: None


def _no_cuda() -> str | None:
    return None if torch.cuda.is_available() else "there is no CUDA device"


REGISTRY = [
    EngineEntry(
        name="native",
        option="native",
        device="cpu",
        module=native,
        open=NativeEngine,
        summary=lambda: f"whole calls in C++ on {1 if extension() is None else extension().threads()} threads",
        covers=", ".join(FAMILIES),
        weights=("model", "int8"),
        missing=lambda: extension_state() if extension() is None else None,
    ),
    EngineEntry(
        name="cuda",
        option="cuda",
        device="cuda",
        module=cuda,
        open=CudaEngine,
        summary=lambda: "whole steps as CUDA graphs",
        covers=", ".join(FAMILIES),
        missing=_no_cuda,
    ),
    EngineEntry(
        name="generic",
        option="cuda",
        device="cuda",
        module=hf_graph,
        open=HFGraphEngine,
        summary=lambda: "transformers' own forward as a CUDA graph",
        covers="what the cuda engine does not cover",
        missing=_no_cuda,
    ),
    EngineEntry(
        name="eager",
        option="eager",
        device=None,
        module=eager,
        open=EagerEngine,
        summary=lambda: "transformers' own forward on our cache",
    ),
]
"""In the order in which they are tried: the fastest first."""


def engine_names() -> tuple[str, ...]:
    """Return the values of `engine=`."""
    return tuple(dict.fromkeys(["auto", "eager", *(entry.option for entry in REGISTRY)]))


def weight_names() -> tuple[str, ...]:
    """Return the values of `weights=`."""
    return tuple(dict.fromkeys(name for entry in REGISTRY for name in entry.weights))


def open_engine(engine: str, model: nn.Module, architecture: Architecture, *, weights: str = "model") -> Engine:
    """Return the engine for a model: "auto" takes the fastest that covers it.

    On the CPU that is the native engine for the families that it knows. On CUDA it is the packed engine for the same families
    and graphs of transformers' forward for the others; "cuda" asks for one of the two. Where "auto" ends up on the eager
    engine, one warning says why.

    Args:
        weights: "model" runs on the model's own; "int8" on a copy that is rounded by row, which the native engine has.

    Raises:
        LatentMASError: for an unknown name, or an engine that was asked for and does not cover the model.
    """
    check_engine_options(engine, weights)
    if engine == "eager" and weights == "model":
        return EagerEngine(model, architecture)
    fast = fast_engine(engine, model, architecture, weights=weights)
    if not isinstance(fast, str):
        return fast
    if weights != "model":
        names = " and ".join(entry.name for entry in REGISTRY if weights in entry.weights)
        raise LatentMASError(
            f"weights={weights!r} runs on the {names} engine only, and {fast}. Use weights='model', which runs everywhere"
        )
    if engine != "auto":
        raise LatentMASError(
            f"engine={engine!r} does not cover this {architecture.name}: {fast}. Use engine='auto' or 'eager'"
        )
    warn_once(f"{architecture.name} runs on the eager engine, since {fast}")
    return EagerEngine(model, architecture)


def check_engine_options(engine: str, weights: str) -> None:
    """Raise LatentMASError for an engine or weights that do not exist."""
    if engine not in engine_names():
        raise LatentMASError(f"got engine={engine!r}; supported are {', '.join(map(repr, engine_names()))}")
    if weights not in weight_names():
        raise LatentMASError(f"got weights={weights!r}; supported are {', '.join(map(repr, weight_names()))}")


def fast_engine(engine: str, model: nn.Module, architecture: Architecture, *, weights: str = "model") -> Engine | str:
    """Return the engine that is faster than transformers' own loop for this model, or, as a clause, why there is none.

    Whatever goes wrong while one is set up is a reason: no engine has done anything yet.
    """
    try:
        with reading_once():
            return _fast_engine(engine, model, architecture, weights)
    except Exception as error:
        return f"setting up its engine ended in {in_short(error)}"


def _fast_engine(engine: str, model: nn.Module, architecture: Architecture, weights: str) -> Engine | str:
    options = {} if weights == "model" else {weights: True}
    reasons = []
    for entry in _candidates(engine, architecture.device, weights):
        reason = entry.module.unsupported_reason(model, architecture)
        if reason is None:
            return entry.open(model, architecture, **options)
        reasons.append(reason)
    if not reasons:
        return f"engine={engine!r} was asked for"
    # By name the first is meant; of those that "auto" tries, the last covers the most models.
    return reasons[-1 if engine == "auto" else 0]


def _candidates(engine: str, device: torch.device, weights: str) -> list[EngineEntry]:
    """Return the engines to try, in order."""
    entries = [entry for entry in REGISTRY if weights in entry.weights]
    if engine != "auto":
        return [entry for entry in entries if entry.option == engine]
    if weights != "model":  # those that have them say why they do not run on this device
        return entries
    kind = "cpu" if device.type == "cpu" else "cuda"
    return [entry for entry in entries if entry.device == kind]
