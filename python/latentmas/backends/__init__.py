"""Text-generation backends: engines outside this package that generate the texts of a chain (vLLM)."""

from contextlib import AbstractContextManager
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentmas.backends.base import TextBackend

BACKENDS = {"vllm": ("latentmas.backends.vllm", "Vllm")}
"""The package of each backend and its class, a `TextBackend` and a context manager with the arguments of `open_backend`.
The package also has `check_installed()`, which does not import the engine."""

DECODERS = ("own", *BACKENDS)
"""Choices of `--decoder`; "own" is the chain's own engine, which is no backend."""


def check_installed(decoder: str) -> None:
    """Raise LatentMASError where the engine of a backend is not installed. This does not import it."""
    package, _ = BACKENDS[decoder]
    import_module(package).check_installed()


def open_backend(decoder: str, name: str, model: Any, **options: Any) -> "AbstractContextManager[TextBackend]":
    """Start the engine of a backend, and return the context manager that ends it.

    Args:
        decoder: a name in BACKENDS.
        name: folder or hub name of the model.
        model: the same model as a causal LM of transformers, whose caches will be transferred.
        options: kv_transfer, folder and settings, as of `latentmas.backends.vllm.Vllm`.

    Raises:
        LatentMASError: where the engine is not installed, or cannot run this model or these settings.
    """
    # torch and the engine take seconds to import, and the command line needs DECODERS before that.
    package, backend = BACKENDS[decoder]
    opened: AbstractContextManager[TextBackend] = getattr(import_module(package), backend)(name, model, **options)
    return opened
