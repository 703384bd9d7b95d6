"""One question of a run: what the agents did for it so far, and the notes that later agents read."""

from dataclasses import dataclass, field
from typing import Any

from latentmas.chain.results import AgentTurn, Answer

TRUNCATED = " [...]"
"""Ends a text of which later agents read the beginning only."""
EMPTY_NOTE = "(nothing)"
"""Stands for an empty text."""


@dataclass(frozen=True)
class Note:
    """A text as later agents read it.

    Attributes:
        agent: name of the agent that wrote it.
        text: without a visible chain of thought.
        model: the writer's, as agents call it.
    """

    agent: str
    text: str
    model: str | None


@dataclass
class QuestionState:
    """A question, the turns of its agents so far, and the notes of those that wrote."""

    question: str
    turns: list[AgentTurn] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def answer(self) -> Answer:
        """Return the answer, once the chain's last agent has written."""
        reason = self.turns[-1].finish_reason
        assert reason is not None, "the last agent of a chain writes"
        return Answer(self.question, self.notes[-1].text, reason, self.turns)


def join_notes(notes: list[Note]) -> str:
    """Return the text that takes the place of "{notes}"."""
    return "\n\n".join(f"{note.agent}:\n{note.text or EMPTY_NOTE}" for note in notes)


def truncate_note(text: str, tokenizer: Any, limit: int) -> tuple[str, int | None]:
    """Return a text of `limit` tokens at most, and how many it had where that was more."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return (text, None) if len(ids) <= limit else (tokenizer.decode(ids[:limit]) + TRUNCATED, len(ids))


def common_prefix_len(rows: list[list[int]]) -> int:
    """Return how many tokens all rows begin with, but for the last one of each: every row keeps something to read."""
    shortest = min(map(len, rows)) - 1
    first = rows[0]
    for at in range(shortest):
        if any(row[at] != first[at] for row in rows):
            return at
    return max(shortest, 0)
