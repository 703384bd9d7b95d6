"""Telling of a run while it goes on, and what its parts take."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from latentmas.chain.agent import Agent


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        agent: who is at work.
        number, agents: the agent is the number-th, from 1, of so many.
        step: latent steps or new tokens per row so far; 0 while the prompt is read.
        tokens: int64 [B] on the CPU, the tokens just written, anything behind the end of a row; None at step 0 and for
            an agent that thinks.
        beside: who else is at work in the same steps; rows of a question follow each other, the agent's own first.
        others: their numbers.
    """

    agent: Agent
    number: int
    agents: int
    step: int
    tokens: Tensor | None = None
    beside: tuple[Agent, ...] = ()
    others: tuple[int, ...] = ()

    @property
    def names(self) -> str:
        return " + ".join(agent.name for agent in (self.agent, *self.beside))

    @property
    def steps(self) -> int:
        """Of the agent that takes the most, at most."""
        return max(agent.steps for agent in (self.agent, *self.beside))


class Teller:
    """Tells of the steps of one agent, or of several at the same time; generate() takes it for a streamer."""

    def __init__(self, on_progress: Callable[[Progress], None] | None, progress: Progress) -> None:
        self.on_progress, self.progress = on_progress, progress

    def __call__(self, step: int, tokens: Tensor | None = None) -> None:
        self.progress = replace(self.progress, step=step, tokens=tokens)
        if self.on_progress is not None:
            self.on_progress(self.progress)

    def think(self, step: int) -> None:
        """For latent_generate(), which counts from 0 and tells as a step begins."""
        self(step + 1)

    def put(self, tokens: Tensor) -> None:
        if tokens.dim() == 1:  # the prompt comes first, [B, T]
            self(self.progress.step + 1, tokens)

    def end(self) -> None:
        """Nothing to do: the next agent begins."""


class Laps:
    """Seconds since the last call."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def __call__(self) -> float:
        before, self.last = self.last, time.perf_counter()
        return self.last - before
