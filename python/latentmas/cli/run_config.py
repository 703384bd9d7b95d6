"""RunConfig: the options of `latentmas run`, and the chain and the vLLM settings that they ask for. Needs no torch."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, Literal

import typer

from latentmas import options
from latentmas.backends import check_installed
from latentmas.chain.agent import LATENT_STEPS, MAX_NEW_TOKENS, Agent
from latentmas.chain.memory_policy import MEMORY_POLICIES, Budget, MemoryPolicy
from latentmas.chain_files.reader import method_names, read_builtin, read_chain, serial
from latentmas.options import CHAIN, QUESTIONS, RESULTS, SAMPLING, SHIPPED, VLLM, option
from latentmas_kernels.errors import LatentMASError


@dataclass(frozen=True)
class ChainConfig:
    """The agents of a run and their limit.

    Attributes:
        agents: a list among them runs in parallel.
        budget: of keys and values; None is no limit.
        settings: the options that it was made of, which are kept with results.
        title: of the chain, where it came from a file that has one.
    """

    agents: list[Agent | list[Agent]]
    budget: Budget | None
    settings: Mapping[str, Any]
    title: str = ""

    @property
    def thinks(self) -> bool:
        return any(agent.thinks for agent in serial(self.agents))

    @property
    def models(self) -> list[str]:
        """Return the names of models that agents have of their own."""
        return list(dict.fromkeys(agent.model for agent in serial(self.agents) if agent.model is not None))


@dataclass(frozen=True)
class RunConfig:
    """The options of `latentmas run`. Those of the command line are made of these fields."""

    question: Annotated[str | None, typer.Argument(help="The question to answer; - reads it from standard input.")] = (
        None
    )
    questions: Annotated[
        str | None,
        option(
            QUESTIONS,
            'File (JSON lines, a JSON array, CSV or Parquet) with "question" and, optionally, "answer" and "options"; '
            "- for standard input, or: sample. CSV is known by the name of its file, which must end in .csv, so it cannot "
            "come from standard input.",
        ),
    ] = None
    model: options.Model = None
    method: Annotated[
        str | None, option(CHAIN, f"A chain of the package: {SHIPPED}. Default: latent, which is sequential.")
    ] = None
    chain: Annotated[
        str | None, option(CHAIN, "File that describes the agents (docs/chains.md), instead of a method.")
    ] = None
    hierarchical: Annotated[
        Literal["parallel", "serial"] | None,
        option(CHAIN, "parallel: groups of agents run side by side; serial: each sees those before it."),
    ] = None
    latent_steps: options.LatentSteps = None
    aligner: options.AlignerKind = "auto"
    max_new_tokens: options.MaxNewTokens = None
    max_note_tokens: Annotated[
        int, option(CHAIN, "Tokens of a text that later agents read (text).", "--handover-tokens", min=1)
    ] = 512
    memory: Annotated[
        str | None, option(CHAIN, "What agents get of the cache before them: all, last, latent or a number of slots.")
    ] = None
    budget: Annotated[str | None, option(CHAIN, 'Limit of keys and values: "64 MB" or "512 slots".')] = None
    batch_size: Annotated[int, option(QUESTIONS, "Questions at a time.", min=1)] = 1
    dtype: options.DType = "auto"
    device: options.Device = None
    engine: options.EngineName = "auto"
    weights: options.Weights = "model"
    decoder: options.Decoder = "own"
    kv_transfer: options.KVTransfer = None
    vllm: Annotated[str | None, option(VLLM, 'Settings of vLLM as JSON: {"tensor_parallel_size": 2}, say.')] = None
    folder: options.Folder = None
    seed: Annotated[int, option(SAMPLING, "Seed of the sampling.", min=0, max=2**62)] = 0
    temperature: Annotated[float, option(SAMPLING, "0 is greedy.")] = 0.0
    top_p: Annotated[float, option(SAMPLING, "Sample from the likeliest tokens with this probability together.")] = 1.0
    think: Annotated[bool, option(CHAIN, "Turn the chat template's thinking switch on.", "--think")] = False
    output: Annotated[str | None, option(RESULTS, "File to write results to, a line of JSON each.")] = None
    resume: Annotated[bool, option(RESULTS, "Go on behind the results that are in --output.", "--resume")] = False
    overwrite: Annotated[bool, option(RESULTS, "Replace what is in --output.", "--overwrite")] = False
    as_json: Annotated[bool, option(RESULTS, "Print one JSON document instead of text.", "--json")] = False
    trace: Annotated[
        str | None, option(RESULTS, "Show every latent step (nearest tokens, norms) and write them to this file.")
    ] = None
    keep_going: Annotated[bool, option(QUESTIONS, "Leave out questions that cannot be run.", "--keep-going")] = False

    def __post_init__(self) -> None:
        if self.question is not None and self.questions is not None:
            raise LatentMASError("got a question and --questions; give one of them")
        if self.chain is not None and self.method is not None:
            raise LatentMASError(f"got --chain {self.chain} and --method {self.method}; give one of them")
        if self.method not in (None, *method_names()):
            raise LatentMASError(f"got --method {self.method}; supported are {', '.join(method_names())}")
        if self.decoder == "own" and (self.kv_transfer, self.vllm, self.folder) != (None, None, None):
            raise LatentMASError("--hand-over, --vllm and --folder are for --decoder vllm; got --decoder own")
        if self.trace is not None and self.resume:
            raise LatentMASError(
                "got --resume and --trace; what is finished is not thought again, so the trace would lack it"
            )
        if (self.resume or self.overwrite) and self.output is None:
            raise LatentMASError("--resume and --overwrite say what to do with the file of --output; got no --output")

    def read_chain(self) -> ChainConfig:
        """Read the chain, and change of it what the options say.

        Raises:
            LatentMASError: for options that the chain has no use for, or a file with faults.
            OSError: where the file cannot be read.
        """
        steps, tokens, title = self.latent_steps, self.max_new_tokens, ""
        settings: dict[str, Any] = {
            "hierarchical": self.hierarchical, "memory": self.memory, "budget": self.budget,
        }  # fmt: skip
        if self.chain is None:
            name = self.method or ("latent" if self.hierarchical is None else "hierarchical")
            steps = LATENT_STEPS if steps is None else steps
            tokens = MAX_NEW_TOKENS if tokens is None else tokens
            file = read_builtin(name, latent_steps=steps, max_new_tokens=tokens)
            settings["method"] = name
        else:
            name = self.chain
            file = read_chain(name, latent_steps=steps, max_new_tokens=tokens, enable_thinking=self.think)
            title = f"{file.name}: {file.description}" if file.description else file.name
            settings |= {"chain": name, "chain_digest": chain_digest(file.agents, file.budget)}
        settings |= {"latent_steps": steps, "max_new_tokens": tokens}
        if self.hierarchical is not None and not any(isinstance(entry, list) for entry in file.agents):
            raise LatentMASError(
                f"got --hierarchical {self.hierarchical}, and no agents of {name} work side by side; "
                "take --method hierarchical, or a chain with a parallel group"
            )
        changes: dict[str, Any] = {"enable_thinking": True} if self.think else {}
        if self.memory is not None:
            changes["memory"] = _memory_policy(self.memory)

        def change(agent: Agent) -> Agent:
            agent = replace(agent, **changes)
            return replace(agent, model=None) if agent.model == self.model else agent  # --model is loaded once

        agents = [[change(a) for a in entry] if isinstance(entry, list) else change(entry) for entry in file.agents]
        if self.hierarchical == "serial":
            agents = list(serial(agents))
        chain = ChainConfig(agents, file.budget if self.budget is None else Budget.parse(self.budget), settings, title)
        if self.trace is not None and not chain.thinks:
            raise LatentMASError("got --trace, and no agent of this chain thinks in hidden states")
        return chain

    def read_vllm_settings(self) -> dict[str, Any] | None:
        """Return the settings of vLLM's engine; None where it does not write the texts.

        Raises:
            LatentMASError: for settings that are none, or where vLLM is not installed.
        """
        if self.decoder == "own":
            return None
        check_installed(self.decoder)
        if self.folder is not None and not os.access(self.folder, os.W_OK | os.X_OK):
            raise LatentMASError(
                f"got --folder {self.folder}, which is no folder that can be written to; name one that is"
            )
        try:
            settings = json.loads(self.vllm or "{}")
        except (ValueError, RecursionError) as error:
            raise LatentMASError(
                f"got --vllm {str(self.vllm)[:60]}, which is no JSON ({error}); it takes an object of vLLM's settings"
            ) from error
        if not isinstance(settings, dict):
            raise LatentMASError(f"got --vllm {self.vllm}; it takes an object of vLLM's settings")
        return settings

    def settings(self, model: str, chain: ChainConfig, vllm: dict[str, Any] | None) -> dict[str, Any]:
        """Return what is kept with each result; a run goes on behind results with the same settings.

        Args:
            model: name of the model.
            chain, vllm: of `read_chain` and `read_vllm_settings`.
        """
        return {
            "model": model, **chain.settings, "aligner": self.aligner, "handover_tokens": self.max_note_tokens,
            "dtype": self.dtype, "seed": self.seed, "temperature": self.temperature, "top_p": self.top_p,
            "think": self.think, "decoder": None if vllm is None else self.decoder, "vllm": vllm,
            "hand_over": None if vllm is None else self.kv_transfer or "kv",
        }  # fmt: skip


def chain_digest(agents: list[Agent | list[Agent]], budget: Budget | None) -> str:
    """Return a digest of what a chain file says: the file may change between a run and the one that goes on behind it.

    It is kept in files of results. A field or a class that is renamed must therefore keep its first name here.
    """
    text = f"({_first_repr(agents)}, {_first_repr(budget)})"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _first_repr(value: Any) -> str:
    """Return the repr of agents and budgets as it was when the first files of results were written."""
    if isinstance(value, list):
        return f"[{', '.join(map(_first_repr, value))}]"
    if not is_dataclass(value):
        return repr(value)
    name = "HandOver" if isinstance(value, MemoryPolicy) else type(value).__name__
    return f"{name}({', '.join(f'{entry.name}={_first_repr(getattr(value, entry.name))}' for entry in fields(value))})"


def _memory_policy(memory: str) -> MemoryPolicy:
    if memory in MEMORY_POLICIES:
        return MEMORY_POLICIES[memory]
    if memory.isascii() and memory.isdigit() and 0 < len(memory) < 10 and int(memory):
        return MemoryPolicy(slots=int(memory))
    raise LatentMASError(
        f"got --memory {memory}; supported are {', '.join(MEMORY_POLICIES)} and a number of slots of 1 or more"
    )
