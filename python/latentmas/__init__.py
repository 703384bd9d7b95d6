"""Chains of agents that think in hidden states."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentmas.agents import Agent, sequential
    from latentmas.chain import Chain, ChainResult, Turn
    from latentmas.loading import load_model

_HOME = {
    "Agent": "agents",
    "sequential": "agents",
    "Chain": "chain",
    "ChainResult": "chain",
    "Turn": "chain",
    "load_model": "loading",
}

__all__ = ["Agent", "Chain", "ChainResult", "Turn", "load_model", "sequential"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; the command line must answer --help and Ctrl-C before that.
    if name not in _HOME:
        raise AttributeError(f"module 'latentmas' has no attribute {name!r}")
    return getattr(import_module(f"latentmas.{_HOME[name]}"), name)
