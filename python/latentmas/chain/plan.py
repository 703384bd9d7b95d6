"""Sizes of every KV buffer of a context, known before it runs: slots per question and stage, and bytes in all."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from latentmas.chain.agent import Agent
from latentmas.chain.memory_policy import MemoryPolicy
from latentmas.chain.stages import Stage
from latentmas_kernels.cache.segments import Kind
from latentmas_kernels.errors import LatentMASError

SINK_SLOTS = 1
"""Slots at the beginning of a cache that are never cut: models put the attention there that they have no use for. On
SmolLM2-135M, text behind a cache cut to its last 64 of 700 slots (moved to the first positions) costs 1.1 to 1.7 nats a token
more than behind all of it; with the first slot among the 64 it is 0.2 to 0.7, as behind 64 slots that were read by themselves.
Four slots do no better than one."""


@dataclass(frozen=True)
class StageTokens:
    """Slots that a stage adds to the cache of each question, at most.

    Attributes:
        stage: the stage.
        slot_bytes: bytes of keys and values of one slot; 0 where a decoder alone holds the cache.
        common: per question, the tokens that the prompts of all agents begin with, which are read once; 0 for one agent.
        prompts: per question and agent, the rest of the prompt.
        steps: per agent, latent steps, or tokens of its text that are fed in.
        carried: 1 where the stage before may leave the last token of a text, which this stage reads; else 0.
        recomputes: whether the cache before belongs to another model, so that this stage computes it again.
        extra_common: per question, tokens by which `common` may grow at the cost of `prompts`, where notes are not written yet.
    """

    stage: Stage
    slot_bytes: int
    common: list[int]
    prompts: list[list[int]]
    steps: list[int]
    carried: int = 0
    recomputes: bool = False
    extra_common: list[int] | None = None

    def beginning(self, question: int) -> int:
        """Return what is added before the agents' own parts, at least."""
        return self.carried + self.common[question]

    def before_fork(self, question: int) -> int:
        """Return what is added before the agents' own parts, at most."""
        return self.beginning(question) + (0 if self.extra_common is None else self.extra_common[question])

    def per_agent(self, question: int, agent: int) -> int:
        """Return what one agent adds behind the beginning."""
        return self.prompts[question][agent] + self.steps[agent]

    def total(self, question: int) -> int:
        """Return what all agents add, one behind the other."""
        return self.beginning(question) + sum(self.per_agent(question, a) for a in range(len(self.steps)))

    def longest(self, question: int, agents: Iterable[int]) -> int:
        """Return what is added where one of these agents runs by itself, at most."""
        return self.beginning(question) + max(self.per_agent(question, a) for a in agents)

    def longest_text(self, question: int) -> int:
        """Return the tokens of the longest prompt and text of an agent that writes, the text's last token included."""
        agents = zip(self.prompts[question], self.stage.agents, strict=True)
        texts = [prompt + agent.steps for prompt, agent in agents if not agent.thinks]
        return self.beginning(question) + max(texts, default=0)


@dataclass(frozen=True)
class SlotRun:
    """Consecutive slots of one question, written by one stage and of one kind."""

    stage: int
    kind: Kind
    slots: int


@dataclass(frozen=True)
class RetainedBound:
    """An upper bound of what the cache of one question holds.

    A text that ends early leaves more of the runs before it behind a cut than a long one does. So the worst case of each run
    is not the worst case of all: each has a bound of its own, and their sum has another.

    Attributes:
        runs: in order, each as long as it may be by itself.
        most: slots of all runs together, at most.
    """

    runs: tuple[SlotRun, ...] = ()
    most: int = 0

    def after_policy(self, policy: MemoryPolicy, last: int) -> "RetainedBound":
        """Return the bound behind a cut by a memory policy; the stage `last` wrote the latest slots."""
        if not self.runs:
            return self
        kept = [r for r in self.runs if policy.agents == "all" or r.stage == last]
        kept = [r for r in kept if policy.kinds == "all" or r.kind == "latent"]
        if self.runs[0] not in kept:
            kept.insert(0, replace(self.runs[0], slots=SINK_SLOTS))
        bound = RetainedBound(tuple(kept), min(self.most, _slots(kept)))
        return bound if policy.slots is None else bound.latest(policy.slots)

    def latest(self, slots: int) -> "RetainedBound":
        """Return the bound behind a cut to the first slot and the last ones, so many together."""
        return RetainedBound(tuple(replace(r, slots=min(r.slots, slots)) for r in self.runs), min(self.most, slots))

    def plus(self, runs: Sequence[SlotRun]) -> "RetainedBound":
        return RetainedBound((*self.runs, *(r for r in runs if r.slots)), self.most + _slots(runs))

    @property
    def prompts(self) -> int:
        """Slots that hold prompts, at most."""
        return min(_slots(r for r in self.runs if r.kind == "prompt"), self.most)


@dataclass(frozen=True)
class StageSlots:
    """Slots of the cache at a stage, per question, at most.

    Attributes:
        begin: slots in use as the agents begin.
        end: slots in use as they end; where no stage goes on from parallel agents, those of the longest of their caches.
        prompts: slots of `end` that hold prompts.
    """

    begin: list[int]
    end: list[int]
    prompts: list[int]


@dataclass
class Plan:
    """Sizes of a context.

    Attributes:
        stages: what each stage adds.
        shared: tokens that the first prompts of all questions begin with, which are read once, before everything else.
        limit: slots that a question may take; None is no limit.
        slots: of each stage.
    """

    stages: list[StageTokens]
    shared: int = 0
    limit: int | None = None
    slots: list[StageSlots] = field(init=False)

    def __post_init__(self) -> None:
        """Compute `slots`; raise LatentMASError where a stage alone takes more than the limit."""
        bounds = [RetainedBound() for _ in range(self.questions)]
        self.slots = []
        for number, tokens in enumerate(self.stages):
            for q in range(self.questions):
                bounds[q] = bounds[q].after_policy(tokens.stage.memory_policy, number - 1)
                if self.limit is not None:
                    bounds[q] = bounds[q].latest(self._left(tokens, q, bool(bounds[q].runs)))
            begin = [bound.most for bound in bounds]
            bounds = [bound.plus(_added(number, tokens, q)) for q, bound in enumerate(bounds)]
            end = [bound.most for bound in bounds]
            if tokens.stage.parallel and number + 1 == len(self.stages):
                end = [b + tokens.longest(q, range(len(tokens.steps))) for q, b in enumerate(begin)]
            prompts = [min(bound.prompts, e) for bound, e in zip(bounds, end, strict=True)]
            self.slots.append(StageSlots(begin, end, prompts))

    @property
    def questions(self) -> int:
        return len(self.stages[0].common)

    @property
    def most_slots(self) -> int:
        """Slots of the longest row at any stage."""
        return max(max(slots.end) for slots in self.slots)

    def _left(self, tokens: StageTokens, question: int, before: bool) -> int:
        """Return the slots that the limit leaves to what earlier stages wrote, if they wrote anything (`before`)."""
        assert self.limit is not None
        total, steps = tokens.total(question), sum(tokens.steps)
        left = self.limit - total
        if left < SINK_SLOTS * before:
            raise LatentMASError(
                f"{tokens.stage.names} takes {total} slots ({total - steps} of prompts, {steps} of latent steps and new "
                f"tokens){' and one of those before it' * before}, and the budget leaves {self.limit} to a question; raise it, "
                "shorten the question, or lower latent_steps and max_new_tokens"
            )
        return left

    def capacity(self, number: int, *, merged: bool = False) -> int:
        """Return the slots per question of a buffer made as a stage begins, or, `merged`, of the one that holds the caches of
        its parallel agents behind it. A buffer serves until the next one is made."""
        need = max(self.slots[number].end if merged else [*self.slots[number].begin, 1])
        for n in range(number + merged, len(self.stages)):
            tokens, slots = self.stages[n], self.slots[n]
            if tokens.recomputes and (merged or n != number):
                break
            if tokens.stage.parallel:
                return max([need, *(b + tokens.before_fork(q) for q, b in enumerate(slots.begin))])
            need = max([need, *slots.end])
        return need

    def group_capacity(self, number: int, agents: Sequence[int]) -> int:
        """Return the slots per row of a buffer with a row for each question and each of these parallel agents."""
        tokens = self.stages[number]
        return max(b + tokens.longest(q, agents) for q, b in enumerate(self.slots[number].begin))

    @property
    def kv_bytes(self) -> int:
        """Bytes of all KV buffers at the moment at which they are largest together."""
        most = cache = 0
        for number, tokens in enumerate(self.stages):
            row_bytes = self.questions * tokens.slot_bytes  # of one slot per question
            if number == 0 or tokens.recomputes:
                cache = self.capacity(number) * row_bytes
                most = max(most, cache + self.shared * tokens.slot_bytes * (number == 0))
            if tokens.stage.parallel:
                calls = group_calls(tokens.stage.agents)
                groups = sum(len(agents) * self.group_capacity(number, agents) * row_bytes for agents in calls)
                merged = self.capacity(number, merged=True) * row_bytes if number + 1 < len(self.stages) else 0
                most, cache = max(most, cache + groups, groups + merged), merged
        return most


def group_calls(agents: Sequence[Agent]) -> list[list[int]]:
    """Return the indices of the agents of a stage that one call runs together: latent agents with the same `settle`, and
    agents that write up to the same limit."""
    calls: dict[tuple, list[int]] = {}
    for number, agent in enumerate(agents):
        key = (True, min(agent.steps, 1), agent.settle) if agent.thinks else (False, agent.steps, None)
        calls.setdefault(key, []).append(number)
    return list(calls.values())


def _added(number: int, tokens: StageTokens, question: int) -> list[SlotRun]:
    runs = [SlotRun(number, "text", tokens.carried), SlotRun(number, "prompt", tokens.common[question])]
    for agent, prompt, steps in zip(tokens.stage.agents, tokens.prompts[question], tokens.steps, strict=True):
        runs += [SlotRun(number, "prompt", prompt), SlotRun(number, "latent" if agent.thinks else "text", steps)]
    return runs


def _slots(runs: Iterable[SlotRun]) -> int:
    return sum(run.slots for run in runs)
