"""vLLM as a text-generation backend: an engine of this process, a server, and the KV connector that vLLM's workers load."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentmas.backends.vllm.engine import Vllm
    from latentmas.backends.vllm.launch import check_installed
    from latentmas.backends.vllm.server import VllmServer

_MODULES = {"Vllm": "engine", "VllmServer": "server", "check_installed": "launch"}

__all__ = ["Vllm", "VllmServer", "check_installed"]


def __getattr__(name: str) -> Any:
    # vLLM's workers import the connector from this package, and need neither the clients nor httpx.
    if name not in _MODULES:
        raise AttributeError(f"module 'latentmas.backends.vllm' has no attribute {name!r}")
    return getattr(import_module(f"latentmas.backends.vllm.{_MODULES[name]}"), name)
