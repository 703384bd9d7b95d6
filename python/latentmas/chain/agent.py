"""An agent as data: its prompt, and whether it runs latent steps or writes text."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from latentmas.chain.memory_policy import KEEP_ALL, MemoryPolicy, is_integer
from latentmas.characters import check_characters
from latentmas_kernels.errors import LatentMASError

LATENT_STEPS, MAX_NEW_TOKENS = 10, 256
"""Defaults of agents in chain files, of the shipped chains as functions, and of the command line."""

PLACEHOLDERS = ("question", "notes")
"""Names that a chain fills in; an agent's own fields have others."""

_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}|\{(\w+)\}")


@dataclass(frozen=True)
class Agent:
    """One member of a chain.

    Attributes:
        name: shown in reports, kept in the cache's segments and put above the agent's text in notes.
        prompt: instructions of the agent. "{question}" stands for the question, "{notes}" for what the agents before it
            wrote, and "{name}" for the field of that name; "{{name}}" is the text "{name}". An agent that reads notes
            starts an empty cache; any other one goes on from the cache of the agent before it.
        latent_steps: latent steps that the agent runs, at most; None for an agent that writes.
        max_new_tokens: limit of the agent's text; None for an agent that runs latent steps.
        system: system message, where the agent starts a cache and the chat template takes one; put in front of the
            prompt otherwise.
        enable_thinking: turn a chat template's thinking switch on.
        settle: a latent agent ends before its latent_steps, for each question by itself, once an embedding has at least this
            cosine to that of the step before; None is off.
        memory: what the agent gets of the cache before it.
        model: name of the model that the agent runs on, of those that the chain is given; None is the chain's own.
        fields: texts of further placeholders in the prompt, by name.
    """

    name: str
    prompt: str
    latent_steps: int | None = None
    max_new_tokens: int | None = None
    system: str | None = None
    enable_thinking: bool = False
    settle: float | None = None
    memory: MemoryPolicy = KEEP_ALL
    model: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if (self.latent_steps is None) == (self.max_new_tokens is None):
            raise LatentMASError(
                f"agent {self.name!r} needs either latent_steps (it thinks) or max_new_tokens (it writes); "
                f"got latent_steps={self.latent_steps}, max_new_tokens={self.max_new_tokens}"
            )
        for what, number, least in (("latent_steps", self.latent_steps, 0), ("max_new_tokens", self.max_new_tokens, 1)):
            if number is not None and not is_integer(number, least):
                raise LatentMASError(
                    f"agent {self.name!r}: {what} must be an integer of {least} or more; got {number!r}"
                )
        if not isinstance(self.memory, MemoryPolicy):
            raise LatentMASError(
                f"agent {self.name!r}: memory must be a MemoryPolicy, like MemoryPolicy(agents='last'); got {self.memory!r}"
            )
        if self.settle is not None and (self.latent_steps is None or not -1 <= self.settle <= 1):
            raise LatentMASError(
                f"agent {self.name!r}: settle is a cosine, from -1 to 1, for agents that think; got {self.settle} and "
                f"latent_steps={self.latent_steps}"
            )
        taken = [name for name in self.fields if name in PLACEHOLDERS]
        if taken:
            raise LatentMASError(f"agent {self.name!r}: {taken[0]!r} is filled in by the chain and cannot be a field")
        for what, text in (("name", self.name), ("prompt", self.prompt), ("system", self.system), *self.fields.items()):
            check_characters(text or "", f"agent {self.name!r}: {what}")

    @property
    def thinks(self) -> bool:
        """Whether the agent runs latent steps; otherwise it writes."""
        return self.latent_steps is not None

    @property
    def reads_question(self) -> bool:
        return "question" in self.placeholders

    @property
    def reads_notes(self) -> bool:
        return "notes" in self.placeholders

    @property
    def placeholders(self) -> list[str]:
        """Names in braces in the prompt, in order."""
        return [found[2] for found in _PLACEHOLDER.finditer(self.prompt) if found[2]]

    @property
    def steps(self) -> int:
        """Positions that the agent adds behind its prompt, at most."""
        return self.latent_steps if self.latent_steps is not None else self.max_new_tokens or 0

    def text(self, question: str, notes: str = "") -> str:
        """Return the prompt with all placeholders filled in at once: braces in the question or the notes are none.

        Braces with a name that is not known stay as they are.
        """
        filled = {**self.fields, "question": question, "notes": notes}
        return _PLACEHOLDER.sub(
            lambda found: "{" + found[1] + "}" if found[1] else filled.get(found[2], found[0]), self.prompt
        )
