"""Everything about a chain that is fixed before a run: its contexts, models and limits; and the options of one run."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from latentmas.backends.base import TextBackend
from latentmas.chain.agent import Agent
from latentmas.chain.memory_policy import Budget
from latentmas.chain.model_context import ModelContext
from latentmas.chain.progress import Progress
from latentmas.chain.prompts import turn_ids
from latentmas.chain.question_state import Note, join_notes, truncate_note
from latentmas.chain.stages import Context, Stage

Prompts = list[list[list[int]]]
"""Token ids of one question, per stage of a context and agent."""
StagePrompts = list[list[list[int]]]
"""Token ids of one stage, per question and agent."""


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
    decoder: TextBackend | None
    records_inputs: bool
    vocab_mismatches: set[tuple[str | None, str | None]]

    @property
    def stages(self) -> list[Stage]:
        return [stage for context in self.contexts for stage in context]

    @property
    def agents(self) -> list[Agent]:
        """All agents, in the order in which they extend caches."""
        return [agent for stage in self.stages for agent in stage.agents]

    def decoder_of(self, stage: Stage) -> TextBackend | None:
        """Return the decoder where it writes the texts of a stage, None where the chain's own engine does."""
        return self.decoder if stage.writes and stage.model == self.stages[-1].model else None

    def has_reader(self, writer: Agent) -> bool:
        """Return whether an agent behind this one reads notes."""
        stages = self.stages
        at = next(number for number, stage in enumerate(stages) if writer in stage.agents)
        return any(stage.reads_notes for stage in stages[at + 1 :])

    def visible_notes(self, reader: Stage, notes: list[Note]) -> tuple[list[Note], list[str]]:
        """Return the notes as a stage reads them, and a warning for each that is truncated: where the reader's model has other
        tokens than the writer's, a text may be longer in them."""
        if not reader.reads_notes:
            return notes, []
        visible, warned, limit = [], [], self.max_note_tokens
        for note in notes:
            if (note.model, reader.model) in self.vocab_mismatches:
                text, count = truncate_note(note.text, self.model_contexts[reader.model].tokenizer, limit)
                note = replace(note, text=text)
                if count is not None:
                    warned.append(
                        f"what {note.agent} wrote is {count} tokens to {reader.names}, of which {limit} are read; "
                        "raise max_note_tokens (--handover-tokens) to hand on more"
                    )
            visible.append(note)
        return visible, warned

    def prompts(self, context: Context, question: str, notes: list[Note]) -> Prompts:
        """Return the token ids of each agent's turn; the first turn of a context opens the conversation."""
        prompts, read = [], join_notes(notes)
        for number, stage in enumerate(context):
            turn = partial(turn_ids, self.model_contexts[stage.model].tokenizer, first=number == 0)
            prompts.append(
                [turn(a.text(question, read), system=a.system, think=a.enable_thinking) for a in stage.agents]
            )
        return prompts
