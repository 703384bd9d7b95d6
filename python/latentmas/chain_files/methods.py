"""The methods as functions; what their agents are told is in the chains that come with the package."""

from collections.abc import Callable, Sequence

from latentmas.chain.agent import Agent
from latentmas.chain_files.reader import read_builtin, serial


def single_agent(max_new_tokens: int = 256) -> list[Agent]:
    """One agent that answers at once: what the other methods are held against."""
    return serial(read_builtin("single", max_new_tokens=max_new_tokens).agents)


def text_agents(max_new_tokens: int = 256) -> list[Agent]:
    """Planner, critic, refiner and judger; each reads the question and what those before it wrote.

    The baseline TextMAS of LatentMAS, section 5.
    """
    return serial(read_builtin("text", max_new_tokens=max_new_tokens).agents)


def latent_agents(latent_steps: int = 10, max_new_tokens: int = 256) -> list[Agent]:
    """Planner, critic and refiner think one after the other in one memory, the judger answers from it.

    The sequential chain of LatentMAS, section 4.
    """
    return serial(read_builtin("sequential", latent_steps=latent_steps, max_new_tokens=max_new_tokens).agents)


def hierarchical_agents(latent_steps: int = 10, max_new_tokens: int = 256) -> list[Agent | list[Agent]]:
    """Specialists for mathematics, science and code think side by side, the judger answers from their memory.

    `chain_file.serial` puts them one after the other, as the published code does.
    """
    return read_builtin("hierarchical", latent_steps=latent_steps, max_new_tokens=max_new_tokens).agents


def _shipped(name: str) -> Callable[[int, int], Sequence[Agent | list[Agent]]]:
    return lambda latent_steps, max_new_tokens: (
        read_builtin(name, latent_steps=latent_steps, max_new_tokens=max_new_tokens).agents
    )


METHODS: dict[str, Callable[[int, int], Sequence[Agent | list[Agent]]]] = {
    "single": _shipped("single"),
    "text": _shipped("text"),
    "latent": latent_agents,
    "hierarchical": hierarchical_agents,
    "debate": _shipped("debate"),
    "mix": _shipped("mix"),
}
"""By name: a function of (latent_steps, max_new_tokens) that gives the agents; a list among them is a parallel group."""
