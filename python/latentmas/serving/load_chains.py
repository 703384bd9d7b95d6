"""Read and build the chains that are served."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from latentmas.chain.agent import Agent
from latentmas.chain.chain import Chain
from latentmas.chain_files.reader import ChainFile, builtin_chains, read_builtin, read_chain, serial
from latentmas.loading import load_model, model_path
from latentmas.serving.config import ServeConfig
from latentmas_kernels import Aligner, build_aligner
from latentmas_kernels.errors import LatentMASError

Warn = Callable[[str], None]
"""Prints a warning for the user."""


def read_chain_files(config: ServeConfig) -> dict[str, ChainFile]:
    """Return the chain files by name.

    Raises:
        LatentMASError: for a file that is wrong, or two of one name.
        OSError: where a file cannot be read.
    """
    options: dict[str, Any] = {"latent_steps": config.latent_steps, "max_new_tokens": config.max_new_tokens}
    if not config.chains:
        return {name: read_builtin(name, **options) for name in builtin_chains()}
    files: dict[str, ChainFile] = {}
    for source in config.chains:
        file = read_chain(source, **options)
        if file.name in files:
            raise LatentMASError(
                f"{file.source} and {files[file.name].source} are both called {file.name!r}, and requests name chains by that; "
                "give one of them another name"
            )
        files[file.name] = file
    return files


def build_chains(
    config: ServeConfig, files: dict[str, ChainFile], model: Any, tokenizer: Any, decoder: Any, warn: Warn
) -> dict[str, Chain]:
    """Return the chains by name, those that can be served. Agents' models are loaded once, and the aligner is fitted once.

    Args:
        decoder: a TextBackend.

    Raises:
        LatentMASError: for a chain that the user named, or where none can be served.
    """
    models: dict[str, tuple[Any, Any]] = {}
    aligner: str | Aligner = config.aligner
    chains: dict[str, Chain] = {}
    for name, file in files.items():
        # What --model names is loaded once.
        agents = [
            [_on_default_model(agent, config) for agent in entry]
            if isinstance(entry, list)
            else _on_default_model(entry, config)
            for entry in file.agents
        ]
        every = serial(agents)
        with _servable(config, name, warn):
            if every[-1].model is not None:
                raise LatentMASError(
                    f"its last agent runs on {every[-1].model}, and vLLM on {model_path(config.model)}; serve it with --model "
                    f"{every[-1].model}"
                )
            for other in {agent.model for agent in every if agent.model is not None} - models.keys():
                models[other] = load_model(other, dtype=config.dtype, device=config.device)
            if isinstance(aligner, str) and any(agent.thinks and agent.model is None for agent in every):
                aligner = build_aligner(model, aligner)
            chains[name] = Chain(
                model, tokenizer, agents, aligner=aligner, engine=config.engine, weights=config.weights,
                budget=file.budget, models=models, decoder=decoder,
            )  # fmt: skip
    return _check_any(chains)


def check_chains(config: ServeConfig, chains: dict[str, Chain], warn: Warn) -> dict[str, Chain]:
    """Return the chains that fit vLLM's max_model_len, which is known once it is connected. Raises as `build_chains`."""
    fitting = {}
    for name, chain in chains.items():
        with _servable(config, name, warn):
            chain.check("?")
            fitting[name] = chain
    return _check_any(fitting)


@contextmanager
def _servable(config: ServeConfig, name: str, warn: Warn) -> Iterator[None]:
    """Name the chain in a LatentMASError; where the chain merely comes with the package, warn instead."""
    try:
        yield
    except LatentMASError as error:
        if config.chains:
            raise LatentMASError(f"chain {name}: {error}") from error
        warn(f"chain {name} is left out: {error}")


def _check_any(chains: dict[str, Chain]) -> dict[str, Chain]:
    if not chains:
        raise LatentMASError(
            "no chain that comes with the package can be served like this, for the reasons above; make room for them (a "
            "larger --max-model-len of vLLM, fewer --latent-steps or --max-new-tokens), or name a chain with --chain"
        )
    return chains


def _on_default_model(agent: Agent, config: ServeConfig) -> Agent:
    return replace(agent, model=None) if agent.model == config.model else agent
