"""The order of a chain: which agents run at the same time, and which share a KV cache. And the rules of a chain."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from latentmas.chain.agent import Agent
from latentmas.chain.memory_policy import MemoryPolicy
from latentmas_kernels.errors import LatentMASError


@dataclass(frozen=True)
class Stage:
    """Agents that run at the same time: one, or several in parallel, each extending the same cache.

    `check_chain` makes sure that they agree in what a stage has one of: memory policy, model, and whether they read notes.
    """

    agents: tuple[Agent, ...]

    @property
    def parallel(self) -> bool:
        return len(self.agents) > 1

    @property
    def writes(self) -> bool:
        """Whether an agent of the stage writes text."""
        return not all(agent.thinks for agent in self.agents)

    @property
    def reads_notes(self) -> bool:
        return self.agents[0].reads_notes

    @property
    def memory_policy(self) -> MemoryPolicy:
        """What the agents get of the cache before them."""
        return self.agents[0].memory

    @property
    def model(self) -> str | None:
        return self.agents[0].model

    @property
    def names(self) -> str:
        return " + ".join(agent.name for agent in self.agents)


Context = list[Stage]
"""Stages that share a KV cache: the first of them starts it, and it is freed after the last."""


@dataclass(frozen=True)
class ChainFault:
    """A rule that a chain breaks.

    Attributes:
        agent: index of the agent at fault, counted through all stages; None where there is no such agent.
        field: the field of that `Agent` at fault; None where it is none in particular.
        message: what was found, and what to do about it.
    """

    agent: int | None
    field: str | None
    message: str


def to_stages(agents: Sequence[Agent | Sequence[Agent]]) -> list[Stage]:
    """Return the stages of a chain; agents in a list of their own run in parallel."""
    return [Stage((entry,) if isinstance(entry, Agent) else tuple(entry)) for entry in agents]


def split_contexts(agents: Sequence[Agent | Sequence[Agent]]) -> list[Context]:
    """Return the stages of a chain, grouped by the cache that they share: a stage that reads notes starts a new one.

    Raises:
        LatentMASError: for the first of `check_chain`'s faults.
    """
    for fault in check_chain(agents):
        raise LatentMASError(fault.message)
    contexts: list[Context] = [[]]
    for stage in to_stages(agents):
        if stage.reads_notes:
            contexts.append([])
        contexts[-1].append(stage)
    return contexts


def check_chain(agents: Sequence[Agent | Sequence[Agent]]) -> list[ChainFault]:
    """Return the rules that the agents break, most basic first; none where they make a chain."""
    stages = to_stages(agents)
    faults = [
        ChainFault(None, None, "a group of agents that work side by side needs one agent or more; got none")
        for stage in stages
        if not stage.agents
    ]
    stages = [stage for stage in stages if stage.agents]
    starts = list(accumulate((len(stage.agents) for stage in stages), initial=0))[:-1]
    members = [agent for stage in stages for agent in stage.agents]
    for start, stage in zip(starts, stages, strict=True):
        faults += _check_stage(start, stage)
    faults += _check_repeated_names(members)
    faults += _check_last(stages)
    faults += _check_question(members)
    faults += _check_group_names(stages, members)
    faults += _check_notes(starts, stages)
    return faults


def _check_stage(start: int, stage: Stage) -> Iterator[ChainFault]:
    first = stage.agents[0]
    for number, agent in enumerate(stage.agents[1:], start + 1):
        for field, rule, one, other in (
            ("model", "run on the same model", first.model, agent.model),
            ("memory", "get the same memory", first.memory, agent.memory),
            ("prompt", "all read {notes}, or none of them", first.reads_notes, agent.reads_notes),
        ):
            if one != other:
                message = f"agents side by side {rule}; got {one!r} for {first.name!r} and {other!r} for {agent.name!r}"
                yield ChainFault(number, field, message)


def _check_repeated_names(members: Sequence[Agent]) -> list[ChainFault]:
    names = [agent.name for agent in members]
    return [
        ChainFault(
            number,
            "name",
            f"every agent needs a name of its own, by which its memory is found; got more than one {name!r}",
        )
        for name, number in sorted((name, number) for number, name in enumerate(names) if name in names[:number])
    ]


def _check_last(stages: Sequence[Stage]) -> Iterator[ChainFault]:
    rule = "a chain ends with an agent that writes (max_new_tokens); got"
    last = sum(len(stage.agents) for stage in stages) - 1
    if not stages:
        yield ChainFault(None, None, f"{rule} no agents")
    elif stages[-1].parallel:
        yield ChainFault(last, None, f"{rule} {stages[-1].names!r}, side by side")
    elif stages[-1].agents[0].thinks:
        yield ChainFault(last, "latent_steps", f"{rule} {stages[-1].names!r}, which thinks")


def _check_question(members: Sequence[Agent]) -> Iterator[ChainFault]:
    if members and not any(agent.reads_question for agent in members):
        # Most likely the question was meant to be where it is written literally.
        literal = (number for number, agent in enumerate(members) if "{{question}}" in agent.prompt)
        names = ", ".join(repr(agent.name) for agent in members)
        yield ChainFault(
            next(literal, 0),
            "prompt",
            f"nobody gets the question: no agent of {names} has {{question}} in its prompt; put it into one or more "
            "({{question}} is the text {question})",
        )


def _check_group_names(stages: Sequence[Stage], members: Sequence[Agent]) -> Iterator[ChainFault]:
    groups = {stage.names for stage in stages if stage.parallel}
    for number, agent in enumerate(members):
        if agent.name in groups:
            message = (
                f"no agent may be called {agent.name!r}, as what those agents side by side read together is called; give it "
                "another name"
            )
            yield ChainFault(number, "name", message)


def _check_notes(starts: Sequence[int], stages: Sequence[Stage]) -> Iterator[ChainFault]:
    if stages and stages[0].reads_notes:
        name = stages[0].agents[0].name
        message = f"agent {name!r} reads {{notes}}, but nobody wrote any before it; put an agent that writes before it"
        yield ChainFault(0, "prompt", message)
    for start, (before, stage) in zip(starts[1:], pairwise(stages), strict=True):
        thinker = next((agent for agent in before.agents if agent.thinks), None)
        if stage.reads_notes and thinker is not None:
            message = (
                f"agent {stage.agents[0].name!r} reads {{notes}} and so begins a new memory, in which the thoughts of "
                f"{thinker.name!r} before it would be lost; take {{notes}} out of its prompt to go on from them, or "
                "let an agent that writes come between"
            )
            yield ChainFault(start, "prompt", message)
