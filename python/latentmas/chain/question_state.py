"""A question on its way through a chain."""

from dataclasses import dataclass, field
from typing import Any, Literal

from latentmas.chain.model_context import Fed
from latentmas.chain.results import Answer, Turn

CUT = " [...]"
"""Ends a text of which later agents read the beginning only."""
NOTHING = "(nothing)"
"""Stands for an empty text."""


@dataclass(frozen=True)
class Note:
    """A text as others read it; `model` is the writer's, as agents call it."""

    agent: str
    text: str
    model: str | None


@dataclass
class Row:
    """One question: what was said so far, and what its memory was fed.

    Attributes:
        notes: of each agent that wrote.
        pending: the last token of a text that was ended by its length. It was not fed in: the next turn in that memory
            brings it.
        fed: per slot of the memory; kept only where it may have to cross to another model.
    """

    question: str
    turns: list[Turn] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    fed: list[Fed] = field(default_factory=list)
    text: str = ""
    finish_reason: Literal["stop", "length"] = "stop"

    def answer(self) -> Answer:
        return Answer(self.question, self.text, self.finish_reason, self.turns)


def notes_of(written: list[Note]) -> str:
    """What "{notes}" stands for."""
    return "\n\n".join(f"{note.agent}:\n{note.text or NOTHING}" for note in written)


def cut_note(text: str, tokenizer: Any, limit: int) -> tuple[str, int | None]:
    """A text of so many tokens at most, and the number of its tokens where it was cut."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return (text, None) if len(ids) <= limit else (tokenizer.decode(ids[:limit]) + CUT, len(ids))


def common_beginning(rows: list[list[int]]) -> int:
    """Tokens that all rows begin with, but for the last one of each: every row keeps something to read."""
    shortest = min(map(len, rows)) - 1
    first = rows[0]
    for at in range(shortest):
        if any(row[at] != first[at] for row in rows):
            return at
    return max(shortest, 0)
