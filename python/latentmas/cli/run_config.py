"""Who takes part in a run, as the command line says it: a method by name or a chain from a file, and what is changed of it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from latentmas.chain.agent import Agent
from latentmas.chain.memory_policy import MEMORY_POLICIES, Budget, MemoryPolicy
from latentmas.chain_files.reader import METHODS, read_chain, serial
from latentmas_kernels.errors import LatentMASError

LATENT_STEPS, MAX_NEW_TOKENS = 10, 256


@dataclass(frozen=True)
class Arrangement:
    """Agents and what they may take.

    Attributes:
        agents: a list among them works side by side.
        title: of the chain, where it came from a file that has one.
        budget: of keys and values, or None.
        settings: what was asked for, to be kept with results.
    """

    agents: list[Agent | list[Agent]]
    budget: Budget | None
    settings: Mapping[str, Any]
    title: str = ""

    @classmethod
    def read(
        cls,
        *,
        method: str | None,
        chain: str | None,
        hierarchical: str | None,
        latent_steps: int | None,
        max_new_tokens: int | None,
        think: bool,
        model: str | None,
        memory: str | None,
        budget: str | None,
    ) -> "Arrangement":
        """From the options of the command line, None where they were not given.

        Raises:
            ValueError: for what does not go together, or a chain file with faults.
            OSError: where the file cannot be read.
        """
        if chain is not None and method is not None:
            raise LatentMASError(f"got --chain {chain} and --method {method}; give one of them")
        if hierarchical not in (None, "parallel", "serial"):
            raise LatentMASError(f"got --hierarchical {hierarchical}; supported are parallel, serial")
        limit = None if budget is None else Budget.parse(budget)
        over = None if memory is None else _hand_over(memory)
        title = ""
        settings: dict[str, Any] = {"hierarchical": hierarchical, "memory": memory, "budget": budget}
        if chain is None:
            name = method or ("latent" if hierarchical is None else "hierarchical")
            if name not in METHODS:
                raise LatentMASError(f"got --method {name}; supported are {', '.join(METHODS)}")
            latent_steps = LATENT_STEPS if latent_steps is None else latent_steps
            max_new_tokens = MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens
            agents = list(METHODS[name](latent_steps, max_new_tokens))
            settings["method"] = name
        else:
            file = read_chain(chain, latent_steps=latent_steps, max_new_tokens=max_new_tokens, enable_thinking=think)
            agents, limit = file.agents, limit or file.budget
            title = f"{file.name}: {file.description}" if file.description else file.name
            # A file may change between a run and the one that goes on behind it.
            digest = hashlib.sha256(repr((agents, file.budget)).encode()).hexdigest()[:16]
            settings |= {"chain": chain, "chain_digest": digest}
        settings |= {"latent_steps": latent_steps, "max_new_tokens": max_new_tokens}
        if hierarchical is not None and not any(isinstance(entry, list) for entry in agents):
            raise LatentMASError(
                f"got --hierarchical {hierarchical}, and no agents of {chain or settings['method']} work side by side; "
                "take --method hierarchical, or a chain with a parallel group"
            )
        changes: dict[str, Any] = {"enable_thinking": True} if think else {}
        changes |= {} if over is None else {"memory": over}

        def change(agent: Agent) -> Agent:
            same: dict[str, Any] = {"model": None} if agent.model == model else {}  # what --model names is loaded once
            return replace(agent, **changes, **same)

        changed = [[change(a) for a in entry] if isinstance(entry, list) else change(entry) for entry in agents]
        return cls(list(serial(changed)) if hierarchical == "serial" else changed, limit, settings, title)

    @property
    def thinks(self) -> bool:
        return any(agent.thinks for agent in serial(self.agents))

    @property
    def models(self) -> list[str]:
        """Names of models that agents bring along."""
        return list(dict.fromkeys(agent.model for agent in serial(self.agents) if agent.model is not None))


def _hand_over(memory: str) -> MemoryPolicy:
    if memory in MEMORY_POLICIES:
        return MEMORY_POLICIES[memory]
    if memory.isascii() and memory.isdigit() and 0 < len(memory) < 10 and int(memory):
        return MemoryPolicy(slots=int(memory))
    raise LatentMASError(
        f"got --memory {memory}; supported are {', '.join(MEMORY_POLICIES)} and a number of slots of 1 or more"
    )
