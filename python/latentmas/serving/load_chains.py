"""Read and build the chains that are served."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from latentmas.chain.agent import Agent
from latentmas.chain.chain import Chain
from latentmas.chain_files.reader import ChainFile, builtin_chains, read_builtin, read_chain, serial
from latentmas.loading import load_model
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
    """Return the chains by name. Models of their agents are loaded once, and the aligner is fitted once.

    Args:
        decoder: a TextBackend.
    """
    models: dict[str, tuple[Any, Any]] = {}
    aligner: str | Aligner = config.aligner

    def default_model(agent: Agent) -> Agent:
        return replace(agent, model=None) if agent.model == config.model else agent

    def build(name: str) -> Chain:
        nonlocal aligner
        entries = [
            [default_model(agent) for agent in entry] if isinstance(entry, list) else default_model(entry)
            for entry in files[name].agents
        ]
        agents = serial(entries)
        if agents[-1].model is not None:
            raise LatentMASError(
                f"its last agent runs on {agents[-1].model}, and vLLM on {config.model_path}; serve it with --model "
                f"{agents[-1].model}"
            )
        for other in {agent.model for agent in agents if agent.model is not None} - models.keys():
            models[other] = load_model(other, dtype=config.dtype, device=config.device)
        if isinstance(aligner, str) and any(agent.thinks and agent.model is None for agent in agents):
            aligner = build_aligner(model, aligner)
        return Chain(
            model, tokenizer, entries, aligner=aligner, engine=config.engine, weights=config.weights,
            budget=files[name].budget, models=models, decoder=decoder,
        )  # fmt: skip

    return keep_servable(config, {name: name for name in files}, build, warn)


def check_chains(config: ServeConfig, chains: dict[str, Chain], warn: Warn) -> dict[str, Chain]:
    """Return the chains that fit the server's max_model_len, which is known once it is connected."""

    def check(chain: Chain) -> Chain:
        chain.check("?")
        return chain

    return keep_servable(config, chains, check, warn)


def keep_servable(
    config: ServeConfig, entries: dict[str, Any], make: Callable[[Any], Chain], warn: Warn
) -> dict[str, Chain]:
    """Return `make` of each entry.

    A LatentMASError is raised for a chain that the user named; a chain that comes with the package is left out with a warning.

    Raises:
        LatentMASError: also where no chain is left.
    """
    chains = {}
    for name, entry in entries.items():
        try:
            chains[name] = make(entry)
        except LatentMASError as error:
            if config.chains:
                raise LatentMASError(f"chain {name}: {error}") from error
            warn(f"chain {name} is left out: {error}")
    if not chains:
        raise LatentMASError(
            "no chain that comes with the package can be served like this, for the reasons above; make room for them (a "
            "larger --max-model-len of vLLM, fewer --latent-steps or --max-new-tokens), or name a chain with --chain"
        )
    return chains
