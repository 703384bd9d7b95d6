"""Chains of agents that think in hidden states."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentmas.chain.agent import Agent
    from latentmas.chain.chain import Chain
    from latentmas.chain.memory_policy import Budget, MemoryPolicy
    from latentmas.chain.progress import Progress
    from latentmas.chain.results import AgentMetrics, AgentTurn, Answer, ChainResult
    from latentmas.chain_files.methods import METHODS, latent_agents, single_agent, text_agents
    from latentmas.loading import load_model

_HOME = {
    "Agent": "chain.agent",
    "AgentMetrics": "chain.results",
    "AgentTurn": "chain.results",
    "Answer": "chain.results",
    "Budget": "chain.memory_policy",
    "Chain": "chain.chain",
    "ChainResult": "chain.results",
    "MemoryPolicy": "chain.memory_policy",
    "METHODS": "chain_files.methods",
    "Progress": "chain.progress",
    "latent_agents": "chain_files.methods",
    "load_model": "loading",
    "single_agent": "chain_files.methods",
    "text_agents": "chain_files.methods",
}

__all__ = [
    "METHODS",
    "Agent",
    "AgentMetrics",
    "AgentTurn",
    "Answer",
    "Budget",
    "Chain",
    "ChainResult",
    "MemoryPolicy",
    "Progress",
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
