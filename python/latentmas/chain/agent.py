"""An agent as data: what it is told, and whether it thinks in hidden states or writes text."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from latentmas.chain.memory_policy import KEEP_ALL, MemoryPolicy
from latentmas.characters import check_characters
from latentmas_kernels.errors import LatentMASError

PLACES = ("question", "notes")
"""Names that a chain fills in; an agent's own fields have others."""


@dataclass(frozen=True)
class Agent:
    """One member of a chain.

    Attributes:
        name: shown in reports, kept in the memory's segments and put above what it writes.
        prompt: what the agent is told. "{question}" stands for the question, "{notes}" for what the agents before it
            wrote, and "{name}" for the field of that name; "{{name}}" is the text "{name}". An agent that is given notes
            reads them in a memory of its own; one that is not goes on from the memory of the agent before it.
        latent_steps: steps it thinks in hidden states; None for an agent that writes.
        max_new_tokens: limit of its text; None for an agent that thinks.
        system: system message, where the agent begins a memory and the chat template takes one; put in front of the
            prompt otherwise.
        enable_thinking: turn a chat template's thinking switch on.
        settle: an agent that thinks ends before its latent_steps, for each question by itself, once an embedding has at least
            this cosine to that of the step before; None is off.
        memory: what it gets of the memory before it.
        model: name of the model that it runs on, of those that the chain is given; None is the chain's own.
        fields: what stands for further places in the prompt.
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
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < least):
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
        taken = [name for name in self.fields if name in PLACES]
        if taken:
            raise LatentMASError(f"agent {self.name!r}: {taken[0]!r} is filled in by the chain and cannot be a field")
        for what, text in (("name", self.name), ("prompt", self.prompt), ("system", self.system), *self.fields.items()):
            check_characters(text or "", f"agent {self.name!r}: {what}")

    @property
    def thinks(self) -> bool:
        return self.latent_steps is not None

    @property
    def reads_question(self) -> bool:
        return "question" in self.places

    @property
    def reads_notes(self) -> bool:
        return "notes" in self.places

    @property
    def places(self) -> list[str]:
        """Names in braces in the prompt, in order."""
        return [place[2] for place in _PLACE.finditer(self.prompt) if place[2]]

    @property
    def steps(self) -> int:
        """Positions that it adds behind its prompt, at most."""
        return self.latent_steps if self.latent_steps is not None else self.max_new_tokens or 0

    def text(self, question: str, notes: str = "") -> str:
        """The prompt with its places filled in, all at once: what is filled in is not looked through again.

        Braces that are no place stay as they are.
        """
        filled = {**self.fields, "question": question, "notes": notes}
        return _PLACE.sub(
            lambda found: "{" + found[1] + "}" if found[1] else filled.get(found[2], found[0]), self.prompt
        )


_PLACE = re.compile(r"\{\{(\w+)\}\}|\{(\w+)\}")
