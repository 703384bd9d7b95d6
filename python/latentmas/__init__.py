"""Chains of agents that think in hidden states."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentmas.agents import Agent
    from latentmas.chain import Chain
    from latentmas.handover import Budget, HandOver
    from latentmas.loading import load_model
    from latentmas.methods import METHODS, latent_agents, single_agent, text_agents
    from latentmas.progress import Progress
    from latentmas.results import AgentMetrics, Answer, ChainResult, Turn

_HOME = {
    "Agent": "agents",
    "AgentMetrics": "results",
    "Answer": "results",
    "Budget": "handover",
    "Chain": "chain",
    "ChainResult": "results",
    "HandOver": "handover",
    "METHODS": "methods",
    "Progress": "progress",
    "Turn": "results",
    "latent_agents": "methods",
    "load_model": "loading",
    "single_agent": "methods",
    "text_agents": "methods",
}

__all__ = [
    "METHODS",
    "Agent",
    "AgentMetrics",
    "Answer",
    "Budget",
    "Chain",
    "ChainResult",
    "HandOver",
    "Progress",
    "Turn",
    "latent_agents",
    "load_model",
    "single_agent",
    "text_agents",
]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; the command line must answer --help and Ctrl-C before that.
    if name not in _HOME:
        raise AttributeError(f"module 'latentmas' has no attribute {name!r}")
    return getattr(import_module(f"latentmas.{_HOME[name]}"), name)
