"""Progress of a run while it goes on, and the clock that its parts are timed with."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentmas.chain.agent import Agent


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        agent: the agent at work.
        number, agents: the agent is the number-th, from 1, of so many.
        step: latent steps or new tokens per row so far; 0 while the prompt is read.
        tokens: int64 [B] on the CPU, the tokens just written, undefined in rows whose text has ended; None at step 0 and for
            an agent that runs latent steps.
        beside: further agents at work in the same steps; rows of a question follow each other, those of `agent` first.
        others: the numbers of these agents.
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
        """Steps of the agent that may take the most."""
        return max(agent.steps for agent in (self.agent, *self.beside))


class ProgressReporter:
    """Reports the steps of the agents of one call; `generate` takes it as a streamer."""

    def __init__(self, on_progress: Callable[[Progress], None] | None, progress: Progress) -> None:
        self.on_progress, self.progress = on_progress, progress

    def __call__(self, step: int, tokens: Tensor | None = None) -> None:
        self.progress = replace(self.progress, step=step, tokens=tokens)
        if self.on_progress is not None:
            self.on_progress(self.progress)

    def on_latent_step(self, step: int) -> None:
        """Report a step of `latent_generate`, which counts from 0 and calls this as a step begins."""
        self(step + 1)

    def put(self, tokens: Tensor) -> None:
        """Report a step of `generate`, which puts the prompt [B, T] first and then tokens [B]."""
        if tokens.dim() == 1:
            self(self.progress.step + 1, tokens)

    def end(self) -> None:
        """Do nothing: the next agent's first report follows at once."""


class Stopwatch:
    """Seconds from lap to lap.

    Args:
        device: waited for at the end of each lap, where it is a CUDA device.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device, self.last = device, time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the lap before."""
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self.last = self.last, time.perf_counter()
        return self.last - before
