"""Chain: agents that hand a KV cache or notes on to each other, one after the other or in parallel."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from latentmas.backends.base import Decoder
from latentmas.chain.agent import Agent
from latentmas.chain.decoded_stage import DecodedStage
from latentmas.chain.memory_policy import Budget
from latentmas.chain.planner import plan_chain
from latentmas.chain.progress import Progress
from latentmas.chain.results import ChainResult
from latentmas.chain.run import PendingAnswer, Run
from latentmas.chain.setup import ChainSetup, RunOptions
from latentmas.characters import check_characters
from latentmas_kernels import Aligner
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.generation import check_sampling


def check_request(questions: Sequence[str], temperature: float, top_p: float) -> None:
    """Raise LatentMASError for questions or sampling options that no chain can run; needs no model."""
    if isinstance(questions, str):
        raise LatentMASError("questions must be a list of strings; got one string: put it into a list")
    if not questions or not all(q.strip() for q in questions):
        raise LatentMASError("every question needs some text; got an empty one")
    for number, question in enumerate(questions, start=1):
        check_characters(question, "the question" if len(questions) == 1 else f"question {number}")
    check_sampling(temperature, top_p)


class Chain:
    """Agents on one model or several; the last one answers.

    Attributes:
        model, tokenizer, aligner: the chain's own.
        agents: all agents, in the order in which they extend caches.
        setup: contexts, models and limits.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        agents: Sequence[Agent | Sequence[Agent]],
        *,
        aligner: str | Aligner = "auto",
        engine: str = "auto",
        weights: str = "model",
        max_note_tokens: int = 512,
        budget: Budget | str | None = None,
        models: Mapping[str, tuple[Any, Any]] | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        """Check the agents and measure how hidden states are fed back, where some agent thinks.

        Args:
            model: a decoder-only causal LM of transformers, in eval mode.
            tokenizer: the model's, with or without a chat template and a padding token.
            agents: the chain; the last one writes. Agents in a list of their own run in parallel: as rows of one batch, each
                on a fork of the same cache; their parts are then put behind each other.
            aligner, engine, weights: as in `latent_generate`. Without an agent that thinks, there is no aligner.
            max_note_tokens: tokens of a text that later agents read. A longer text is truncated, with a warning.
            budget: limit of keys and values ("64 MB", "512 slots"); the oldest are cut out of the cache.
            models: (model, tokenizer) by the names that agents have in `Agent.model`; their aligner is a kind, as `aligner`.
            decoder: writes the texts of all agents on the last agent's model; None writes them here.

        Raises:
            LatentMASError: where a model cannot run, the agents make no chain, or a cache cannot be cut, or go on to another
                model, as they ask for.
        """
        self.model, self.tokenizer = model, tokenizer
        self.setup = ChainSetup.build(
            model, tokenizer, agents, aligner=aligner, engine=engine, weights=weights, max_note_tokens=max_note_tokens,
            budget=budget, models=models or {}, decoder=decoder,
        )  # fmt: skip
        self.agents = self.setup.agents
        self.aligner = self.setup.model_contexts[None].aligner

    def check(self, question: str) -> None:
        """Raise LatentMASError where a question could not be run: empty, longer than the model's positions allow, or more than
        the budget allows.

        Notes of other agents are counted as long as they may become.
        """
        check_request([question], 0.0, 1.0)
        plan_chain(self.setup, [question])

    def kv_bytes(self, questions: Sequence[str]) -> int:
        """Return the bytes that keys and values of these questions may take as one batch, all buffers together.

        Raises:
            LatentMASError: as `check`.
        """
        return max(plan.kv_bytes for plan in plan_chain(self.setup, questions))

    def run(
        self,
        questions: Sequence[str],
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        on_progress: Callable[[Progress], None] | None = None,
        trace: int | None = None,
    ) -> ChainResult:
        """Answer the questions as one batch.

        What the first prompts of all questions have in common at their beginning is read once.

        Args:
            questions: one per row; none may be empty.
            temperature: of all texts; 0 is greedy. Sampling draws from torch's global generator.
            top_p: sample from the most likely tokens that hold this much probability; 1 is off.
            on_progress: called as each agent begins and at each of its steps.
            trace: look at every latent step: its so many likeliest tokens, norms, cosines and nearest embeddings.

        Raises:
            LatentMASError: for an empty question, or where the chain does not fit the model's positions, the budget or free
                memory.
        """
        run = self._begin(questions, RunOptions(temperature, top_p, on_progress, trace))
        try:
            run.record(run.run_until_last().run())
        finally:
            for text in run.warnings:
                warnings.warn(text, stacklevel=2)
        return run.result()

    def prepare(
        self,
        questions: Sequence[str],
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> PendingAnswer:
        """Run all agents but the last, whose text the caller has a decoder write; arguments as of `run`.

        Raises:
            LatentMASError: as `run`.
        """
        assert self.setup.decoder is not None, "without a decoder nobody could write the last text"
        run = self._begin(questions, RunOptions(temperature, top_p, on_progress))
        try:
            last = run.run_until_last()
            assert isinstance(last, DecodedStage), "the decoder writes the last text"
            last.begin()
        finally:
            for text in run.warnings:
                warnings.warn(text, stacklevel=2)
        return PendingAnswer(run, last)

    def _begin(self, questions: Sequence[str], options: RunOptions) -> Run:
        check_request(questions, options.temperature, options.top_p)
        return Run(self.setup, questions, options)
