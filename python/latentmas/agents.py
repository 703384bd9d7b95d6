"""An agent as data: what it is told, and whether it thinks in hidden states or writes text."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Agent:
    """One member of a chain.

    Attributes:
        name: shown in reports, kept in the memory's segments and put above what it writes.
        prompt: what the agent is told. "{question}" stands for the question, "{notes}" for what the agents before it
            wrote. An agent that is given notes reads them in a memory of its own; one that is not goes on from the memory
            of the agent before it.
        latent_steps: steps it thinks in hidden states; None for an agent that writes.
        max_new_tokens: limit of its text; None for an agent that thinks.
        system: system message, where the agent begins a memory and the chat template takes one; put in front of the
            prompt otherwise.
        enable_thinking: turn a chat template's thinking switch on.
    """

    name: str
    prompt: str
    latent_steps: int | None = None
    max_new_tokens: int | None = None
    system: str | None = None
    enable_thinking: bool = False

    def __post_init__(self) -> None:
        if (self.latent_steps is None) == (self.max_new_tokens is None):
            raise ValueError(
                f"agent {self.name!r} needs either latent_steps (it thinks) or max_new_tokens (it writes); "
                f"got latent_steps={self.latent_steps}, max_new_tokens={self.max_new_tokens}"
            )
        if self.latent_steps is not None and self.latent_steps < 0:
            raise ValueError(f"agent {self.name!r}: latent_steps must be 0 or more; got {self.latent_steps}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"agent {self.name!r}: max_new_tokens must be 1 or more; got {self.max_new_tokens}")

    @property
    def reads_notes(self) -> bool:
        return "{notes}" in self.prompt

    @property
    def steps(self) -> int:
        """Positions that it adds behind its prompt, at most."""
        return self.latent_steps if self.latent_steps is not None else self.max_new_tokens or 0

    def text(self, question: str, notes: str = "") -> str:
        """The prompt with its places filled in, all at once: braces in the question or the notes stay as they are."""
        return re.sub(
            r"\{(question|notes)\}", lambda place: {"question": question, "notes": notes}[place[1]], self.prompt
        )
