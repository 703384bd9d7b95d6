"""One run of a chain: a batch of questions goes from stage to stage."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from latentmas.agents import Agent
from latentmas.plan import SINK, Plan, side_by_side
from latentmas.progress import Laps, Progress, Teller
from latentmas.prompts import padded
from latentmas.results import AgentMetrics, Turn
from latentmas.rows import CUT, Row
from latentmas.seats import Fed, Seat, replay
from latentmas.stages import Stretch
from latentmas.tracing import AgentTrace
from latentmas_kernels import LatentCache, generate, latent_generate
from latentmas_kernels.engines import open_engine
from latentmas_kernels.generation import LatentOutput, Metrics
from latentmas_kernels.prompt import Prompt
from latentmas_kernels.segments import slots_of
from latentmas_kernels.trace import trace_of

if TYPE_CHECKING:
    from latentmas.chain import Chain


class Run:
    """The state of a run.

    Attributes:
        rows: the questions.
        memory: of the stretch at work, a row for each question; None where none has begun.
        metrics: of each agent that is done.
        traces: of each agent that has thought, where they were asked for.
        warnings: for the caller of the chain.
    """

    def __init__(
        self,
        chain: "Chain",
        questions: list[str],
        *,
        temperature: float,
        top_p: float,
        on_progress: Callable[[Progress], None] | None,
        trace: int | None,
    ) -> None:
        self.chain, self.on_progress, self.trace = chain, on_progress, trace
        self.temperature, self.top_p = temperature, top_p
        self.rows = [Row(question) for question in questions]
        self.memory: LatentCache | None = None
        self.metrics: list[AgentMetrics] = []
        self.traces: list[AgentTrace] = []
        self.warnings: list[str] = []
        self._laps = Laps()

    @torch.no_grad()
    def stretch(self, stages: Stretch) -> None:
        """Run stages that share a memory."""
        self.memory = None  # what the stretch before left is free before there is more
        for row in self.rows:
            row.pending, row.fed = [], []
        prompts = [self.chain.prompts(stages, row.question, row.notes) for row in self.rows]
        plan = self.chain.lay_out(stages, prompts)
        self.chain.check_room(plan)
        for number in range(len(stages)):
            _StageRun(self, plan, number, [row[number] for row in prompts]).run()

    def close(self, stage: "_StageRun") -> None:
        """Take down what a stage took; agents side by side share its seconds evenly."""
        seconds, count = self._laps(), len(stage.agents)
        kv_bytes = sum(cache.kv_bytes for cache in stage.caches)
        for number, agent in enumerate(stage.agents):
            tally = stage.tallies[number]
            phases = [phase / count for phase in stage.seconds]
            self.metrics.append(
                AgentMetrics(
                    agent.name,
                    prompt_tokens=tally.computed,
                    shared_tokens=tally.read - tally.computed,
                    latent_steps=tally.latent_steps,
                    new_tokens=tally.new_tokens,
                    steps=tally.steps,
                    prefill_seconds=phases[0],
                    latent_seconds=phases[1],
                    decode_seconds=phases[2],
                    other_seconds=seconds / count - sum(phases),
                    kv_bytes=kv_bytes,
                )
            )


class _Tally:
    """What an agent did, over all questions: tokens that it was to read, those of them that were computed for it (not for
    another row before), what it thought and wrote, and steps one after the other."""

    def __init__(self) -> None:
        self.read = self.computed = self.latent_steps = self.new_tokens = self.steps = 0


class _Saying:
    """What an agent leaves for one question: its turn, its text as a note, and what its part of the memory was fed."""

    def __init__(self) -> None:
        self.turn: Any = None
        self.notes: list[tuple[str, str]] = []
        self.fed: list[Fed] = []


class _StageRun:
    """The state of one stage.

    Attributes:
        prompts: per question and agent, token ids, without what is pending.
        ids: per question and agent, what it reads: what was pending, and its prompt.
        sayings: per question and agent, what it leaves.
        memory: that the agents go on from, and then what they leave.
        caches: what the stage ends with: the memory, or those of the groups where nothing goes on from it.
        tallies: per agent.
        seconds: of prefill, latent steps and decoding.
    """

    def __init__(self, run: Run, plan: Plan, number: int, prompts: list[list[list[int]]]) -> None:
        self.whole, self.chain, self.rows, self.plan, self.number = run, run.chain, run.rows, plan, number
        self.load = plan.loads[number]
        self.stage, self.agents = self.load.stage, self.load.stage.agents
        self.seat: Seat = self.chain.seats[self.stage.model]
        self.last = number + 1 == len(plan.loads)
        self.prompts = prompts
        self.ids: list[list[list[int]]] = []
        self.memory: LatentCache | None = None
        self.caches: list[LatentCache] = []
        self.tallies = [_Tally() for _ in self.agents]
        self.sayings = [[_Saying() for _ in self.agents] for _ in self.rows]
        self.seconds = [0.0, 0.0, 0.0]

    def run(self) -> None:
        self.memory = self._begin()
        self.ids = [
            [row.pending + ids for ids in prompts] for row, prompts in zip(self.rows, self.prompts, strict=True)
        ]
        for row in self.rows:
            row.pending = []
        for number, tally in enumerate(self.tallies):
            tally.read += sum(len(ids[number]) for ids in self.ids)
        done = [self.plan.shared if self.number == 0 else 0] * len(self.rows)
        if self.stage.parallel:
            self._side_by_side(done)
        else:
            self._work(self.memory, [0], done)
            self.memory.name_segments(self.agents[0].name)
            self.caches = [self.memory]
        self.whole.memory = self.memory
        for row, sayings in zip(self.rows, self.sayings, strict=True):
            for number in range(len(self.agents)):
                said = sayings[number]
                row.turns.append(said.turn)
                row.notes += said.notes
                row.fed += said.fed
        self.whole.close(self)

    # ---- the memory before -----------------------------------------------------------------------------------------

    def _begin(self) -> LatentCache:
        """The memory that the agents go on from, with room for what they add."""
        memory, self.whole.memory = self.whole.memory, None
        capacity = self.plan.capacity(self.number)
        if memory is not None:
            self._hand_over(memory)
            if not self.load.crosses:
                memory.rebase(self.seat.model)
                return memory
            segments, lengths = memory.segments, memory.lengths
            del memory  # one model's memory is free before there is the other's
            if bool((lengths > 0).all()):
                crossed, seconds = replay(
                    self.seat, [row.fed for row in self.rows], capacity, self.chain.engine, self.chain.weights
                )
                crossed.segments = segments
                self.seconds[0] += seconds
                self.tallies[0].computed += int(lengths.sum())
                self.tallies[0].read += int(lengths.sum())
                return crossed
        if not self.plan.shared or self.number:
            return LatentCache.for_model(self.seat.architecture, len(self.rows), capacity)
        shared = self.prompts[0][0][: self.plan.shared]
        first = self._read_prompts([shared], None, len(shared))
        self.tallies[0].computed += len(shared)
        for row in self.rows:
            self._feed(row.fed, shared)
        return first.spread(len(self.rows), capacity)

    def _hand_over(self, memory: LatentCache) -> None:
        """Cut out what the agents do not get, and the oldest of what the budget has no room for."""
        what, batch, width = self.stage.memory, len(self.rows), int(memory.lengths.max())
        in_use = torch.arange(width) < memory.lengths[:, None]
        kept = in_use.clone()
        if what.agents == "last":
            before = self.plan.loads[self.number - 1].stage
            names = {before.names, *(agent.name for agent in before.agents)}
            kept &= slots_of([s for s in memory.segments if s.agent in names], batch, width)
        if what.kinds == "latent":
            kept &= slots_of([s for s in memory.segments if s.kind == "latent"], batch, width)
        kept[:, :SINK] = True
        for q, row in enumerate(self.rows):
            most = width if what.slots is None else what.slots
            if self.plan.limit is not None:
                most = min(most, self.plan.limit - self.load.of(q) - len(row.pending))
            kept[q, SINK:] &= kept[q, SINK:].flip(0).cumsum(0).flip(0) <= most - SINK
            row.fed = [
                fed for fed, keep in zip(row.fed, kept[q].tolist(), strict=False) if keep
            ]  # shorter, or not kept
        if not torch.equal(kept, in_use):
            memory.keep(kept)

    def _read_prompts(
        self, ids: list[list[int]], memory: LatentCache | None, capacity: int | None = None
    ) -> LatentCache:
        """Read prompts that no agent thinks or writes behind yet."""
        tokens, mask = padded(ids, self.seat.architecture.device)
        read = latent_generate(
            self.seat.model, tokens, mask, latent_steps=0, past_key_values=memory if memory is None else memory.donate(),
            aligner=self.seat.aligner or "identity", engine=self.chain.engine, weights=self.chain.weights,
            max_cache_len=capacity,
        )  # fmt: skip
        self.seconds[0] += read.metrics.prefill_seconds
        return read.past_key_values

    # ---- side by side ----------------------------------------------------------------------------------------------

    def _side_by_side(self, done: list[int]) -> None:
        """Let several agents go on from the memory and put what they add behind each other."""
        memory = self.memory
        assert memory is not None
        beginnings = [
            ids[0][start : len(ids[0]) - len(prompts[0]) + length]
            for ids, prompts, length, start in zip(self.ids, self.prompts, self.load.common, done, strict=True)
        ]
        if all(beginnings):
            memory = self._read_prompts(beginnings, memory)
            self.tallies[0].computed += sum(map(len, beginnings))
            for q, beginning in enumerate(beginnings):
                self._feed(self.rows[q].fed, beginning)
                done[q] += len(beginning)
        memory.name_segments(self.stage.names)
        base = memory.lengths.clone()
        groups: dict[int, tuple[LatentCache, int, int]] = {}
        for agents in side_by_side(self.agents):
            group = memory.spread(len(agents), self.plan.group_capacity(self.number, agents))
            self._work(group, agents, done)
            self.caches.append(group)
            for place, number in enumerate(agents):
                groups[number] = group, place, len(agents)
        del memory
        self.memory = None  # free before there is the merged one
        if self.last:
            return
        parts = []
        for number, agent in enumerate(self.agents):
            group, place, count = groups[number]
            rows = [q * count + place for q in range(len(self.rows))]
            parts.append(group.part(rows, base if number else None, agent.name))
        self.memory = LatentCache.concat(parts, self.seat.model, capacity=self.plan.capacity(self.number, merged=True))
        self.caches = [self.memory]

    # ---- thinking and writing --------------------------------------------------------------------------------------

    def _work(self, cache: LatentCache, numbers: list[int], done: list[int]) -> None:
        """Let agents, by number, go on in a cache with a row for each question and each of them."""
        agents = [self.agents[number] for number in numbers]
        progress = Progress(
            agents[0], len(self.whole.metrics) + numbers[0] + 1, len(self.chain.agents), 0, beside=tuple(agents[1:])
        )
        tell = Teller(self.whole.on_progress, progress)
        tell(0)
        ids = [self.ids[q][number][done[q] :] for q in range(len(self.rows)) for number in numbers]
        for place, number in enumerate(numbers):
            self.tallies[number].computed += sum(map(len, ids[place :: len(numbers)]))
        tokens, mask = padded(ids, self.seat.architecture.device)
        if agents[0].thinks:
            self._think(cache, numbers, ids, tokens, mask, tell)
        else:
            self._write(cache, numbers, ids, tokens, mask, tell)

    def _think(
        self, cache: LatentCache, numbers: list[int], ids: list[list[int]], tokens: Tensor, mask: Tensor, tell: Teller
    ) -> None:
        assert self.seat.aligner is not None
        steps = [self.agents[number].latent_steps or 0 for number in numbers]
        others = list(self.seat.across)
        thought = latent_generate(
            self.seat.model, tokens, mask, latent_steps=steps * len(self.rows) if len(set(steps)) > 1 else steps[0],
            settle=self.agents[numbers[0]].settle, past_key_values=cache.donate(), aligner=self.seat.aligner,
            engine=self.chain.engine, weights=self.chain.weights, on_step=tell.think,
            output_states=self.whole.trace is not None, cross=list(self.seat.across.values()),
        )  # fmt: skip
        self._count(thought.metrics)
        for place, number in enumerate(numbers):
            mine = slice(place, None, len(numbers))
            self.tallies[number].latent_steps += sum(thought.latent_steps[mine])
            self.tallies[number].steps += max(thought.latent_steps[mine])
            if self.whole.trace is not None and steps[place]:
                trace = trace_of(self.seat.model, _rows_of(thought, mine), top_k=self.whole.trace)
                self.whole.traces.append(AgentTrace(self.agents[number].name, trace))
        for r, taken in enumerate(thought.latent_steps):
            q, number = r // len(numbers), numbers[r % len(numbers)]
            saying = self.sayings[q][number]
            saying.turn = Turn(self.agents[number].name, len(self.ids[q][number]), latent_steps=taken)
            self._feed(saying.fed, ids[r])
            if self.chain.tracks:
                known = {
                    self.seat.name: thought.latents[r],
                    **dict(zip(others, (c[r] for c in thought.crossed), strict=True)),
                }
                saying.fed += [{name: states[step] for name, states in known.items()} for step in range(taken)]

    def _write(
        self, cache: LatentCache, numbers: list[int], ids: list[list[int]], tokens: Tensor, mask: Tensor, tell: Teller
    ) -> None:
        limit = self.agents[numbers[0]].max_new_tokens
        assert limit is not None
        said = generate(
            self.seat.model, tokens, mask, past_key_values=cache.donate(), max_new_tokens=limit,
            do_sample=self.whole.temperature > 0, temperature=self.whole.temperature or 1.0, top_k=None, top_p=self.whole.top_p,
            streamer=tell, engine=self.chain.engine, weights=self.chain.weights,
        )  # fmt: skip
        self._count(said.metrics)
        unfed = []
        for r, (new, reason) in enumerate(zip(said.new_tokens, said.finish_reasons, strict=True)):
            q, number = r // len(numbers), numbers[r % len(numbers)]
            text = said.sequences[r, tokens.shape[1] : tokens.shape[1] + new].tolist()
            self.tallies[number].new_tokens += new
            self.tallies[number].steps = max(self.tallies[number].steps, new)
            self._read_text(q, number, text, reason)
            # Another agent's memory comes behind it: the text goes in to its last token.
            followed = self.stage.parallel and not self.last and number + 1 < len(self.agents)
            if not followed and number + 1 == len(self.agents):
                self.rows[q].pending = text[-1:] if reason == "length" else []
            unfed.append(text[-1:] if followed else [])
            self._feed(self.sayings[q][number].fed, [*ids[r], *text[:-1], *unfed[-1]])
        if any(unfed):
            last, there = padded(unfed, self.seat.architecture.device)
            runner = open_engine(self.chain.engine, self.seat.model, self.seat.architecture, weights=self.chain.weights)
            start = cache.lengths
            runner.extend(cache, Prompt(there.sum(1).cpu(), last), logits=False)
            cache.add_segment("text", start)

    def _read_text(self, q: int, number: int, ids: list[int], reason: Literal["stop", "length"]) -> None:
        """Take down what an agent wrote."""
        row, agent, saying = self.rows[q], self.agents[number], self.sayings[q][number]
        whole = self.seat.tokenizer.decode(ids, skip_special_tokens=True).strip()
        row.text, row.finish_reason = whole.rpartition("</think>")[2].strip(), reason
        note, handed = row.text, None
        # What was written in few tokens is not counted again: another split of the same text is not worth a cut.
        if self.chain.is_read(agent) and len(ids) > self.chain.handover_tokens:
            note, handed = self._cut(agent, row)
        saying.notes.append((agent.name, note))
        saying.turn = Turn(
            agent.name,
            len(self.ids[q][number]),
            new_tokens=len(ids),
            text=whole,
            finish_reason=reason,
            handed_over=handed,
        )

    def _cut(self, agent: Agent, row: Row) -> tuple[str, int | None]:
        """A text as it is handed on, and its tokens where it is too long for that and was cut, which is said."""
        limit, tokenizer = self.chain.handover_tokens, self.seat.tokenizer
        ids = tokenizer(row.text, add_special_tokens=False).input_ids
        if len(ids) <= limit:
            return row.text, None
        self.whole.warnings.append(
            f"{agent.name} wrote {len(ids)} tokens, of which the agents after it read the first {limit}; raise "
            f"handover_tokens to hand on more (question: {row.question[:60]!r})"
        )
        return tokenizer.decode(ids[:limit]) + CUT, limit

    def _feed(self, fed: list[Fed], what: list[int]) -> None:
        if self.chain.tracks:
            fed += what

    def _count(self, spent: Metrics) -> None:
        for phase, seconds in enumerate((spent.prefill_seconds, spent.latent_seconds, spent.decode_seconds)):
            self.seconds[phase] += seconds


def _rows_of(thought: LatentOutput, rows: slice) -> LatentOutput:
    assert thought.states is not None
    return replace(
        thought, latents=thought.latents[rows], states=thought.states[rows], latent_steps=thought.latent_steps[rows]
    )
