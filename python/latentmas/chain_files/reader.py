"""Chains as data: agents from a YAML file, or from one of those that come with the package (NAME.yaml in this folder)."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path

from latentmas.chain.agent import LATENT_STEPS, MAX_NEW_TOKENS, Agent
from latentmas.chain.memory_policy import Budget, is_integer
from latentmas_kernels.errors import LatentMASError

FOLDER = resources.files("latentmas.chain_files")
"""Folder of the chains that come with the package, NAME.yaml each."""

ALIASES = {"latent": "sequential"}
"""Second names of shipped chains. Results of earlier runs, and the default of `latentmas run`, name this one latent."""


@dataclass(frozen=True)
class ChainFile:
    """A chain as its file describes it.

    Attributes:
        name: the file's own, or the file's name without its ending.
        agents: in order; a list among them is a group that runs in parallel.
        budget: limit of keys and values; None is no limit.
        description: text from the file, or "".
        source: the path or name that it was read from.
    """

    name: str
    agents: list[Agent | list[Agent]]
    budget: Budget | None
    description: str
    source: str


def read_chain(
    source: str | Path,
    *,
    latent_steps: int | None = None,
    max_new_tokens: int | None = None,
    enable_thinking: bool = False,
) -> ChainFile:
    """Read a chain from a file, or where there is no such file, one that comes with the package.

    Args:
        source: a path, or the name of a shipped chain.
        latent_steps, max_new_tokens: in place of the file's defaults; agents with numbers of their own keep them.
        enable_thinking: turn a chat template's thinking switch on for all agents.

    Raises:
        LatentMASError: for a chain that does not exist, or with all faults of the file, a line for each:
            "FILE:LINE: what was found; what is allowed". Also where pydantic is not installed.
        OSError: where the file cannot be read.
    """
    path, name, known = Path(source), str(source), builtin_chains()
    options = {"latent_steps": latent_steps, "max_new_tokens": max_new_tokens}
    if path.exists() and not path.is_dir():
        return _read(path.read_bytes(), name, options, enable_thinking)
    if name in method_names():
        return read_builtin(name, **options, enable_thinking=enable_thinking)
    close = difflib.get_close_matches(path.stem, known, n=1)
    raise LatentMASError(
        f"got chain {name!r}, which is {'a folder' if path.is_dir() else 'no file'}; "
        + (f"did you mean {close[0]}? Give" if close else "give")
        + f" a file, or a chain that comes with the package: {', '.join(known)}"
    )


def read_builtin(
    name: str, *, latent_steps: int | None = None, max_new_tokens: int | None = None, enable_thinking: bool = False
) -> ChainFile:
    """Read a chain that comes with the package, whatever files there are; arguments as in `read_chain`."""
    name = ALIASES.get(name, name)
    options = {"latent_steps": latent_steps, "max_new_tokens": max_new_tokens}
    return _read(FOLDER.joinpath(f"{name}.yaml").read_bytes(), name, options, enable_thinking)


def builtin_chains() -> list[str]:
    """Return the names of the chains that come with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in FOLDER.iterdir() if entry.name.endswith(".yaml"))


def method_names() -> list[str]:
    """Return the names that `read_builtin` takes."""
    return [*builtin_chains(), *ALIASES]


def serial(agents: Iterable[Agent | list[Agent]]) -> list[Agent]:
    """Return the agents one after the other: those of a group see the ones before them, as in the published code."""
    return [agent for entry in agents for agent in (entry if isinstance(entry, list) else [entry])]


def _read(data: bytes, source: str, options: dict[str, int | None], enable_thinking: bool) -> ChainFile:
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        least = 0 if name == "latent_steps" else 1
        if not is_integer(value, least):
            raise LatentMASError(f"{name} must be an integer of {least} or more; got {value!r}")
    try:
        # Not at the top: the help needs the names of the chains, but neither pydantic nor PyYAML, which take 60 ms.
        from latentmas.chain_files.parser import parse
    except ModuleNotFoundError as error:
        raise LatentMASError(
            f"reading a chain needs {error.name}, which is not installed: pip install 'pydantic>=2.9,<3', or build the "
            "chain of latentmas.Agent in Python"
        ) from error
    chain, agents = parse(data, source, given, enable_thinking)
    return ChainFile(chain.name or Path(source).stem, agents, chain.budget, chain.description.strip(), source)


# ---- shipped chains as functions -------------------------------------------------------------------------------------


def single_agent(max_new_tokens: int = MAX_NEW_TOKENS) -> list[Agent]:
    """Return one agent that answers at once: the baseline of the other chains."""
    return serial(_agents("single", 0, max_new_tokens))


def text_agents(max_new_tokens: int = MAX_NEW_TOKENS) -> list[Agent]:
    """Return planner, critic, refiner and judger, who hand on text: the baseline TextMAS of LatentMAS, section 5."""
    return serial(_agents("text", 0, max_new_tokens))


def latent_agents(latent_steps: int = LATENT_STEPS, max_new_tokens: int = MAX_NEW_TOKENS) -> list[Agent]:
    """Return three agents that run latent steps in one cache, and a judger: the sequential chain of LatentMAS, section 4."""
    return serial(_agents("sequential", latent_steps, max_new_tokens))


def hierarchical_agents(
    latent_steps: int = LATENT_STEPS, max_new_tokens: int = MAX_NEW_TOKENS
) -> list[Agent | list[Agent]]:
    """Return a group of specialists that run latent steps in parallel, and a judger; `serial` puts them in a row."""
    return _agents("hierarchical", latent_steps, max_new_tokens)


def _agents(name: str, latent_steps: int, max_new_tokens: int) -> list[Agent | list[Agent]]:
    return read_builtin(name, latent_steps=latent_steps, max_new_tokens=max_new_tokens).agents


METHODS = {name: partial(_agents, name) for name in method_names()}
"""By name of a shipped chain: a function of (latent_steps, max_new_tokens) that returns its agents; a list is a group."""
