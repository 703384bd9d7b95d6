"""Chain: agents that pass a KV cache or notes on to each other, one after the other or in parallel."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from typing import Any

from latentmas.backends.base import TextBackend
from latentmas.chain.agent import Agent
from latentmas.chain.decoded_stage import DecodedStage
from latentmas.chain.decoder_check import check_decoder
from latentmas.chain.memory_policy import KEEP_ALL, Budget
from latentmas.chain.model_context import ModelContext, vocab_mismatch
from latentmas.chain.planner import plan_chain
from latentmas.chain.progress import Progress
from latentmas.chain.prompts import has_thinking_switch
from latentmas.chain.results import ChainResult
from latentmas.chain.run import PendingAnswer, Run
from latentmas.chain.setup import ChainSetup, RunOptions
from latentmas.chain.stages import Context, split_contexts
from latentmas.characters import check_characters
from latentmas_kernels import Aligner, build_aligner
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.generation import check_sampling
from latentmas_kernels.models.rope import RopeShift


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
        decoder: TextBackend | None = None,
    ) -> None:
        """Check the agents and measure how hidden states are fed back, where an agent runs latent steps.

        Args:
            model: a decoder-only causal LM of transformers, in eval mode.
            tokenizer: the model's, with or without a chat template and a padding token.
            agents: the chain; the last one writes. Agents in a list of their own run in parallel: as rows of one batch, each
                on a fork of the same cache; their parts are then put behind each other.
            aligner, engine, weights: as in `latent_generate`. Without an agent that runs latent steps there is no aligner.
            max_note_tokens: tokens of a text that later agents read. A longer text is truncated, with a warning.
            budget: limit of keys and values ("64 MB", "512 slots"); the oldest are cut out of the cache.
            models: (model, tokenizer) by the names that agents have in `Agent.model`; their aligner is a kind, as `aligner`.
            decoder: writes the texts of all agents on the last agent's model; None writes them here.

        Raises:
            LatentMASError: where a model cannot run, the agents make no chain, or a cache cannot be cut, or go on to another
                model, as they ask for.
        """
        if max_note_tokens < 1:
            raise LatentMASError(f"max_note_tokens must be 1 or more; got {max_note_tokens}")
        if not isinstance(budget, Budget | str | None):
            raise LatentMASError(f"budget must be a Budget, text like '64 MB', or None; got {type(budget).__name__}")
        contexts = split_contexts(agents)
        budget = Budget.parse(budget) if isinstance(budget, str) else budget
        self.model, self.tokenizer = model, tokenizer
        self.agents = [agent for context in contexts for stage in context for agent in stage.agents]
        given: dict[str | None, tuple[Any, Any]] = {None: (model, tokenizer)}
        given.update(models or {})
        names = list(dict.fromkeys([None, *(agent.model for agent in self.agents)]))
        unknown = [name for name in names if name not in given]
        if unknown:
            raise LatentMASError(
                f"agents run on model {unknown[0]!r}, which the chain was not given; given are {sorted(models or {})}"
            )
        model_contexts = {name: ModelContext(name, *given[name], engine, weights) for name in names}
        for name, model_context in model_contexts.items():
            _add_aligner(model_context, [agent for agent in self.agents if agent.model == name], aligner)
        self.aligner = model_contexts[None].aligner
        mismatches = {(a.name, b.name) for a, b in permutations(model_contexts.values(), 2) if vocab_mismatch(a, b)}
        if decoder is not None:
            check_decoder(decoder, model_contexts[self.agents[-1].model], contexts, budget)
        records_inputs = decoder is not None and decoder.kv_transfer == "embeds"
        for context in contexts:
            records_inputs |= _connect(context, model_contexts, budget)
        self.setup = ChainSetup(contexts, model_contexts, budget, max_note_tokens, decoder, records_inputs, mismatches)

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


def _add_aligner(model_context: ModelContext, agents: list[Agent], aligner: str | Aligner) -> None:
    """Build the aligner of a model, where an agent on it runs latent steps."""
    if any(agent.enable_thinking for agent in agents) and not has_thinking_switch(model_context.tokenizer):
        warnings.warn(
            "the tokenizer's chat template has no thinking switch, so enable_thinking (--think) changes nothing",
            stacklevel=3,
        )
    if any(agent.thinks for agent in agents):
        kind = aligner if isinstance(aligner, str) or model_context.name is None else aligner.kind
        model_context.aligner = build_aligner(model_context.model, kind) if isinstance(kind, str) else kind


def _connect(context: Context, model_contexts: Mapping[str | None, ModelContext], budget: Budget | None) -> bool:
    """Make sure that a cache can go from stage to stage; return whether it goes from one model to another."""
    crosses = False
    for number, stage in enumerate(context):
        model_context, later = model_contexts[stage.model], context[number + 1 :]
        for target in later:
            if target.model != stage.model:
                model_context.connect(model_contexts[target.model])
                crosses = True
        cut = number > 0 and (stage.memory_policy != KEEP_ALL or budget is not None)
        if cut or (stage.parallel and later):
            RopeShift.probe(model_context.model)
    return crosses
