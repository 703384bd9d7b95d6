"""Everything about a chain that is fixed before a run: its contexts, models and limits; and the options of one run."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from latentmas.backends.base import Decoder
from latentmas.chain.agent import Agent
from latentmas.chain.decoder_check import check_decoder
from latentmas.chain.memory_policy import KEEP_ALL, Budget
from latentmas.chain.model_context import ModelContext, vocab_mismatch
from latentmas.chain.progress import Progress
from latentmas.chain.prompts import has_thinking_switch, turn_ids
from latentmas.chain.question_state import Note, join_notes, truncate_note
from latentmas.chain.stages import Context, Stage, flatten, split_contexts
from latentmas_kernels import Aligner, build_aligner
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.rope import RopeShift

Prompts = list[list[list[int]]]
"""Token ids of one question, per stage of a context and agent of the stage."""


@dataclass(frozen=True)
class RunOptions:
    """Options of one run, as in `Chain.run`."""

    temperature: float = 0.0
    top_p: float = 1.0
    on_progress: Callable[[Progress], None] | None = None
    trace: int | None = None


@dataclass(frozen=True)
class ChainSetup:
    """A chain, ready to be planned and run.

    Attributes:
        contexts: the stages, by the cache that they share.
        model_contexts: by name; None is the chain's own model.
        budget: limit of keys and values, or None.
        max_note_tokens: tokens of a text that later agents read.
        decoder: writes the texts on the last agent's model; None where the chain's own engine does.
        records_inputs: whether a run keeps the inputs of all slots: for a decoder that reads them again, or another model.
        vocab_mismatches: pairs of names of models with other tokens.
    """

    contexts: list[Context]
    model_contexts: dict[str | None, ModelContext]
    budget: Budget | None
    max_note_tokens: int
    decoder: Decoder | None
    records_inputs: bool
    vocab_mismatches: set[tuple[str | None, str | None]]

    @classmethod
    def build(
        cls,
        model: Any,
        tokenizer: Any,
        agents: Sequence[Agent | Sequence[Agent]],
        *,
        aligner: str | Aligner,
        engine: str,
        weights: str,
        max_note_tokens: int,
        budget: Budget | str | None,
        models: Mapping[str, tuple[Any, Any]],
        decoder: Decoder | None,
    ) -> "ChainSetup":
        """Check the arguments of `Chain` and build the aligners.

        Raises:
            LatentMASError: as `Chain`.
        """
        if max_note_tokens < 1:
            raise LatentMASError(f"max_note_tokens must be 1 or more; got {max_note_tokens}")
        if not isinstance(budget, Budget | str | None):
            raise LatentMASError(f"budget must be a Budget, text like '64 MB', or None; got {type(budget).__name__}")
        contexts = split_contexts(agents)
        budget = Budget.parse(budget) if isinstance(budget, str) else budget
        members = flatten(contexts)
        names = list(dict.fromkeys([None, *(agent.model for agent in members)]))
        given: dict[str | None, tuple[Any, Any]] = {None: (model, tokenizer)}
        given.update(models)
        unknown = [name for name in names if name not in given]
        if unknown:
            raise LatentMASError(
                f"agents run on model {unknown[0]!r}, which the chain was not given; given are {sorted(models)}"
            )
        contexts_of = {name: ModelContext(name, *given[name], engine, weights) for name in names}
        for context in contexts_of.values():
            _add_aligner(context, [agent for agent in members if agent.model == context.name], aligner)
        mismatches = {
            (a.name, b.name)
            for a in contexts_of.values()
            for b in contexts_of.values()
            if a is not b and vocab_mismatch(a, b)
        }
        if decoder is not None:
            check_decoder(decoder, contexts_of[members[-1].model], contexts, budget)
        crosses = [_connect(context, contexts_of, budget) for context in contexts]
        records = any(crosses) or (decoder is not None and decoder.kv_transfer == "embeds")
        return cls(contexts, contexts_of, budget, max_note_tokens, decoder, records, mismatches)

    @property
    def agents(self) -> list[Agent]:
        """All agents, in the order in which they extend caches."""
        return flatten(self.contexts)

    def decoder_of(self, stage: Stage) -> Decoder | None:
        """Return the decoder where it writes the texts of a stage, None where the chain's own engine does."""
        return self.decoder if stage.writes and stage.model == self.contexts[-1][-1].model else None

    def has_reader(self, writer: Agent) -> bool:
        """Return whether an agent behind this one reads notes."""
        stages = [stage for context in self.contexts for stage in context]
        at = next(number for number, stage in enumerate(stages) if writer in stage.agents)
        return any(stage.reads_notes for stage in stages[at + 1 :])

    def visible_notes(self, reader: Stage, notes: list[Note]) -> tuple[list[Note], list[str]]:
        """Return the notes as a stage reads them, and a warning for each that is truncated: where the reader's model has other
        tokens than the writer's, a text may be longer in them."""
        if not reader.reads_notes:
            return notes, []
        visible, warned = [], []
        for note in notes:
            if (note.model, reader.model) in self.vocab_mismatches:
                tokenizer, limit = self.model_contexts[reader.model].tokenizer, self.max_note_tokens
                text, count = truncate_note(note.text, tokenizer, limit)
                note = replace(note, text=text)
                if count is not None:
                    warned.append(
                        f"what {note.agent} wrote is {count} tokens to {reader.names}, of which {limit} are read; "
                        "raise max_note_tokens to hand on more"
                    )
            visible.append(note)
        return visible, warned

    def prompts(self, context: Context, question: str, notes: list[Note]) -> Prompts:
        """Return the token ids of each agent's turn; the first turn of a context opens the conversation."""
        return [
            [
                turn_ids(
                    self.model_contexts[stage.model].tokenizer,
                    agent.text(question, join_notes(notes)),
                    first=number == 0,
                    system=agent.system,
                    think=agent.enable_thinking,
                )
                for agent in stage.agents
            ]
            for number, stage in enumerate(context)
        ]


def _add_aligner(context: ModelContext, agents: list[Agent], aligner: str | Aligner) -> None:
    """Build the aligner of a model, where an agent on it thinks."""
    if any(agent.enable_thinking for agent in agents) and not has_thinking_switch(context.tokenizer):
        warnings.warn(
            "the tokenizer's chat template has no thinking switch, so enable_thinking changes nothing",
            stacklevel=4,  # the caller of Chain()
        )
    if any(agent.thinks for agent in agents):
        kind = aligner if isinstance(aligner, str) or context.name is None else aligner.kind
        context.aligner = build_aligner(context.model, kind) if isinstance(kind, str) else kind


def _connect(context: Context, contexts_of: Mapping[str | None, ModelContext], budget: Budget | None) -> bool:
    """Make sure that a cache can go from stage to stage; returns whether it goes from one model to another."""
    crosses = False
    for number, stage in enumerate(context):
        later = [stage.model for stage in context[number + 1 :]]
        for model in later:
            if model != stage.model:
                contexts_of[stage.model].connect(contexts_of[model])
                crosses = True
        cut = number > 0 and (stage.memory_policy != KEEP_ALL or budget is not None)
        if cut or (stage.parallel and later):
            RopeShift.of(contexts_of[stage.model].model)
    return crosses
