"""The order of a chain: who works at the same time, and who shares a memory with whom."""

from collections.abc import Sequence
from dataclasses import dataclass

from latentmas.chain.agent import Agent
from latentmas.chain.memory_policy import MemoryPolicy
from latentmas_kernels.errors import LatentMASError


@dataclass(frozen=True)
class Stage:
    """Agents that work at the same time: one, or several side by side, each going on from the same memory.

    What they have in common is checked by `stretches_of`.
    """

    agents: tuple[Agent, ...]

    @property
    def parallel(self) -> bool:
        return len(self.agents) > 1

    @property
    def writes(self) -> bool:
        """Whether one of the agents does."""
        return not all(agent.thinks for agent in self.agents)

    @property
    def reads_notes(self) -> bool:
        return self.agents[0].reads_notes

    @property
    def memory(self) -> MemoryPolicy:
        """What the agents get of the memory before them."""
        return self.agents[0].memory

    @property
    def model(self) -> str | None:
        return self.agents[0].model

    @property
    def names(self) -> str:
        return " + ".join(agent.name for agent in self.agents)


Stretch = list[Stage]
"""Stages that share a memory: it begins with the first of them and is gone behind the last."""


def stretches_of(agents: Sequence[Agent | Sequence[Agent]]) -> list[Stretch]:
    """The stages of a chain, cut where one reads notes and so begins a new memory.

    Raises:
        ValueError: where the agents make no chain.
    """
    stages = [Stage((entry,) if isinstance(entry, Agent) else tuple(entry)) for entry in agents]
    for stage in stages:
        _check_stage(stage)
    names = [agent.name for stage in stages for agent in stage.agents]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise LatentMASError(
            f"every agent needs a name of its own, by which its memory is found; got more than one {twice[0]!r}"
        )
    if not stages or stages[-1].parallel or stages[-1].agents[0].thinks:
        raise LatentMASError(
            "a chain ends with an agent that writes (max_new_tokens); got "
            + (f"{stages[-1].names!r}, which thinks" if stages and not stages[-1].parallel else "")
            + (f"{stages[-1].names!r}, side by side" if stages and stages[-1].parallel else "")
            + ("" if stages else "no agents")
        )
    if not any(agent.reads_question for stage in stages for agent in stage.agents):
        raise LatentMASError(
            f"nobody gets the question: no agent of {', '.join(map(repr, names))} has {{question}} in its prompt; put it into "
            "one or more ({{question}} is the text {question})"
        )
    joined = next((stage.names for stage in stages if stage.parallel and stage.names in names), None)
    if joined is not None:
        raise LatentMASError(
            f"no agent may be called {joined!r}, as what those agents side by side read together is called; give it "
            "another name"
        )
    stretches: list[Stretch] = []
    for stage in stages:
        if not stage.reads_notes:
            if not stretches:
                stretches.append([])
            stretches[-1].append(stage)
            continue
        if not stretches:
            raise LatentMASError(f"agent {stage.agents[0].name!r} reads {{notes}}, but nobody wrote any before it")
        thinker = next((agent for agent in stretches[-1][-1].agents if agent.thinks), None)
        if thinker is not None:
            raise LatentMASError(
                f"agent {stage.agents[0].name!r} reads {{notes}} and so begins a new memory, in which the thoughts of "
                f"{thinker.name!r} before it would be lost; take {{notes}} out of its prompt to go on from them, or "
                "let an agent that writes come between"
            )
        stretches.append([stage])
    return stretches


def _check_stage(stage: Stage) -> None:
    if not stage.agents:
        raise LatentMASError("a group of agents that work side by side needs one agent or more; got none")
    first = stage.agents[0]
    for agent in stage.agents[1:]:
        for what, one, other in (
            ("run on the same model", first.model, agent.model),
            ("get the same memory", first.memory, agent.memory),
            ("all read {notes}, or none of them", first.reads_notes, agent.reads_notes),
        ):
            if one != other:
                raise LatentMASError(
                    f"agents side by side {what}; got {one!r} for {first.name!r} and {other!r} for {agent.name!r}"
                )
