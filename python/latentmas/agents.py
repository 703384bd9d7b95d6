"""Agents as data: who takes part in a chain, what each is told, how it thinks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Agent:
    """One member of a chain.

    Attributes:
        name: shown in reports and kept in the memory's segments.
        prompt: what the agent is told; "{question}" stands for the question.
        latent_steps: steps it thinks in hidden states; None for an agent that answers in text.
        max_new_tokens: limit of its text; None for an agent that thinks.
    """

    name: str
    prompt: str
    latent_steps: int | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if (self.latent_steps is None) == (self.max_new_tokens is None):
            raise ValueError(
                f"agent {self.name!r} needs either latent_steps (it thinks) or max_new_tokens (it answers); "
                f"got latent_steps={self.latent_steps}, max_new_tokens={self.max_new_tokens}"
            )
        if self.latent_steps is not None and self.latent_steps < 0:
            raise ValueError(f"agent {self.name!r}: latent_steps must be 0 or more; got {self.latent_steps}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"agent {self.name!r}: max_new_tokens must be 1 or more; got {self.max_new_tokens}")


# The question comes first and the role last: a small model follows what it read last. On SmolLM2-135M the other order
# made the judger talk about the plan instead of answering.
PLANNER = """Question: {question}

You are the planner. Write a short plan for answering this question."""

CRITIC = """Question: {question}

You are the critic. Say what is missing in the plan."""

REFINER = """Question: {question}

You are the refiner. Write a better plan."""

JUDGER = """{question}

The notes so far may not help. Give the complete answer in your own words."""


def sequential(latent_steps: int = 10, max_new_tokens: int = 256) -> list[Agent]:
    """The chain of LatentMAS, section 4: planner, critic and refiner think one after the other, the judger answers."""
    thinkers = [("planner", PLANNER), ("critic", CRITIC), ("refiner", REFINER)]
    return [
        *(Agent(name, prompt, latent_steps=latent_steps) for name, prompt in thinkers),
        Agent("judger", JUDGER, max_new_tokens=max_new_tokens),
    ]
