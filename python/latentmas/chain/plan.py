"""How large a memory becomes, known before any work: the slots of every question at every stage, and bytes of the buffers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from latentmas.chain.agent import Agent
from latentmas.chain.memory_policy import MemoryPolicy
from latentmas.chain.stages import Stage
from latentmas_kernels.cache.segments import Kind
from latentmas_kernels.errors import LatentMASError

SINK = 1
"""Slots at the beginning of a memory that stay whatever is cut: models put the attention there that they have no use for. On
SmolLM2-135M, text behind a memory cut to its last 64 of 700 slots (moved to the first positions) costs 1.1 to 1.7 nats a token
more than behind all of it; with the first slot among the 64 it is 0.2 to 0.7, as behind 64 slots that were read by themselves.
Four slots do no better than one."""


@dataclass(frozen=True)
class Load:
    """What a stage adds to the memory of each question, at most, in slots.

    Attributes:
        stage: who works.
        common: per question, the beginning that the prompts of all its agents have in common, which is read once; 0 for a
            single agent.
        prompts: per question and agent, the prompt behind that.
        steps: per agent, latent steps or tokens that are fed in.
        pending: 1 where the stage before it may leave the last token of a text, which this one brings.
        crosses: whether the memory before it is another model's and is built anew.
        more: per question, tokens by which `common` may turn out longer, the prompts behind it being shorter then: where they
            hold notes that are not written yet.
    """

    stage: Stage
    common: list[int]
    prompts: list[list[int]]
    steps: list[int]
    pending: int = 0
    crosses: bool = False
    more: list[int] | None = None

    def own(self, question: int, agent: int) -> int:
        return self.prompts[question][agent] + self.steps[agent]

    def of(self, question: int) -> int:
        """All that is added."""
        return self.pending + self.common[question] + sum(self.own(question, a) for a in range(len(self.steps)))

    def once(self, question: int) -> int:
        """What is added before the agents part, at most."""
        return self.pending + self.common[question] + (0 if self.more is None else self.more[question])

    def row(self, question: int, agents: Iterable[int]) -> int:
        """What is added where one of these agents works, at most."""
        return self.pending + self.common[question] + max(self.own(question, a) for a in agents)

    def request(self, question: int) -> int:
        """Tokens of the longest text that one of these agents writes, the prompt before it included, to the last one."""
        agents = zip(self.prompts[question], self.stage.agents, strict=True)
        own = [prompt + agent.steps for prompt, agent in agents if not agent.thinks]
        return self.pending + self.common[question] + max(own, default=0)


@dataclass(frozen=True)
class Slots:
    """Slots of one question that belong together."""

    stage: int
    kind: Kind
    slots: int


@dataclass(frozen=True)
class Held:
    """What the memory of one question may hold.

    A text or a thought that ends early leaves more of others behind a cut than one that does not. So there is no worst case of
    all runs together: each is as long as it may be, and all of them are at most so many.

    Attributes:
        runs: in order, each as long as it may be by itself.
        most: slots of all together, at most.
    """

    runs: tuple[Slots, ...] = ()
    most: int = 0

    def handed_over(self, what: MemoryPolicy, last: int) -> "Held":
        """What is handed on, the stage `last` having written the latest; always with the first slot."""
        if not self.runs:
            return self
        kept = [r for r in self.runs if what.agents == "all" or r.stage == last]
        kept = [r for r in kept if what.kinds == "all" or r.kind == "latent"]
        if self.runs[0] not in kept:
            kept.insert(0, replace(self.runs[0], slots=SINK))
        held = Held(tuple(kept), min(self.most, _sum(kept)))
        return held if what.slots is None else held.latest(what.slots)

    def latest(self, slots: int) -> "Held":
        """The first slot and the last ones: so many together."""
        return Held(tuple(replace(r, slots=min(r.slots, slots)) for r in self.runs), min(self.most, slots))

    def plus(self, runs: Sequence[Slots]) -> "Held":
        return Held((*self.runs, *(r for r in runs if r.slots)), self.most + _sum(runs))

    @property
    def prompts(self) -> int:
        """Slots that hold prompts, at most."""
        return min(_sum(r for r in self.runs if r.kind == "prompt"), self.most)


@dataclass(frozen=True)
class Size:
    """A stage in slots, per question, at most.

    Attributes:
        begin: of the memory that the agents get.
        end: of the memory that they leave; where nothing goes on from agents side by side, of the longest of theirs.
        prompts: those of `end` that hold prompts.
    """

    begin: list[int]
    end: list[int]
    prompts: list[int]


@dataclass
class Plan:
    """Sizes of a stretch.

    Attributes:
        loads, sizes: per stage.
        shared: tokens that the first prompts of all questions have in common and that are read once, before all else.
        limit: slots that a question may take; None where nothing limits it.
    """

    loads: list[Load]
    shared: int = 0
    limit: int | None = None
    sizes: list[Size] = field(init=False)

    def __post_init__(self) -> None:
        """Raises ValueError where a stage alone takes more than the limit."""
        questions = range(len(self.loads[0].common))
        held = [Held() for _ in questions]
        self.sizes = []
        for number, load in enumerate(self.loads):
            for q in questions:
                held[q] = held[q].handed_over(load.stage.memory_policy, number - 1)
                if self.limit is not None:
                    held[q] = held[q].latest(self._left(load, q, bool(held[q].runs)))
            begin = [of.most for of in held]
            held = [of.plus(_added(number, load, q)) for q, of in enumerate(held)]
            end = [of.most for of in held]
            if load.stage.parallel and number + 1 == len(self.loads):
                end = [b + load.row(q, range(len(load.steps))) for q, b in enumerate(begin)]
            self.sizes.append(Size(begin, end, [min(of.prompts, e) for of, e in zip(held, end, strict=True)]))

    def _left(self, load: Load, question: int, before: bool) -> int:
        """Slots that a stage leaves to what was there before it, if anything was."""
        assert self.limit is not None
        left = self.limit - load.of(question)
        if left < SINK * before:
            raise LatentMASError(
                f"{load.stage.names} takes {load.of(question)} slots ({load.of(question) - sum(load.steps)} of prompts, "
                f"{sum(load.steps)} of latent steps and new tokens){' and one of those before it' * before}, and the budget "
                f"leaves {self.limit} to a question; raise it, shorten the question, or lower latent_steps and max_new_tokens"
            )
        return left

    def capacity(self, number: int, *, merged: bool = False) -> int:
        """Slots per question of a buffer that begins with a stage, or that holds the merged memory behind it: it serves
        until the next one is made."""
        need = max(self.sizes[number].end if merged else [*self.sizes[number].begin, 1])
        for n in range(number + merged, len(self.loads)):
            load, size = self.loads[n], self.sizes[n]
            if load.crosses and (merged or n != number):
                break
            if load.stage.parallel:
                return max([need, *(b + load.once(q) for q, b in enumerate(size.begin))])
            need = max([need, *size.end])
        return need

    def group_capacity(self, number: int, agents: Sequence[int]) -> int:
        """Slots per row of a buffer in which agents of a stage work side by side, a row for each question and agent."""
        load = self.loads[number]
        return max(b + load.row(q, agents) for q, b in enumerate(self.sizes[number].begin))

    def bytes(self, slot_bytes: Sequence[int]) -> int:
        """Bytes of all KV buffers where they are largest together.

        Args:
            slot_bytes: per stage, of one slot of its model.
        """
        questions, most, memory = len(self.loads[0].common), 0, 0
        for number, (load, size) in enumerate(zip(self.loads, slot_bytes, strict=True)):
            if number == 0 or load.crosses:
                memory = questions * self.capacity(number) * size
                most = max(most, memory + self.shared * size * (number == 0))
            if load.stage.parallel:
                groups = 0
                for agents in side_by_side(load.stage.agents):
                    groups += questions * len(agents) * self.group_capacity(number, agents) * size
                following = questions * self.capacity(number, merged=True) * size if number + 1 < len(self.loads) else 0
                most, memory = max(most, memory + groups, groups + following), following
        return most


def side_by_side(agents: Sequence[Agent]) -> list[list[int]]:
    """Agents of a stage, by number, that one call runs together: those that think, by when they settle, and those that
    write, by their limit."""
    calls: dict[tuple, list[int]] = {}
    for number, agent in enumerate(agents):
        key = (True, min(agent.steps, 1), agent.settle) if agent.thinks else (False, agent.steps, None)
        calls.setdefault(key, []).append(number)
    return list(calls.values())


def _added(number: int, load: Load, question: int) -> list[Slots]:
    runs = [Slots(number, "text", load.pending), Slots(number, "prompt", load.common[question])]
    for agent, (prompt, steps) in enumerate(zip(load.prompts[question], load.steps, strict=True)):
        runs += [
            Slots(number, "prompt", prompt),
            Slots(number, "latent" if load.stage.agents[agent].thinks else "text", steps),
        ]
    return runs


def _sum(runs: Iterable[Slots]) -> int:
    return sum(run.slots for run in runs)
