"""Chains of agents that run latent steps, write texts, and pass a KV cache on to each other."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentmas.chain.agent import Agent
    from latentmas.chain.chain import Chain
    from latentmas.chain.memory_policy import Budget, MemoryPolicy
    from latentmas.chain.progress import Progress
    from latentmas.chain.results import AgentMetrics, AgentTurn, Answer, ChainResult
    from latentmas.chain_files.reader import (
        METHODS,
        hierarchical_agents,
        latent_agents,
        read_chain,
        single_agent,
        text_agents,
    )
    from latentmas.cli.trace_view import trace_table
    from latentmas.loading import load_model

_MODULES = {
    "chain.agent": "Agent",
    "chain.chain": "Chain",
    "chain.memory_policy": "Budget MemoryPolicy",
    "chain.progress": "Progress",
    "chain.results": "AgentMetrics AgentTurn Answer ChainResult",
    "chain_files.reader": "METHODS hierarchical_agents latent_agents read_chain single_agent text_agents",
    "cli.trace_view": "trace_table",
    "loading": "load_model",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; the command line must answer --help and Ctrl-C before that.
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'latentmas' has no attribute {name!r}")
    return getattr(import_module(f"latentmas.{_MODULE_OF[name]}"), name)
