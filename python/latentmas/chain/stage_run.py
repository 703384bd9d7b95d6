"""One stage of a run: its agents go on from the memory before them, each by itself or side by side."""

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch

from latentmas.chain.model_context import Fed, Seat, replay
from latentmas.chain.plan import SINK, Plan, side_by_side
from latentmas.chain.progress import Laps, Progress, Teller
from latentmas.chain.prompts import padded
from latentmas.chain.question_state import Note, cut_note
from latentmas.chain.results import AgentTrace, Turn
from latentmas_kernels import LatentCache, generate, latent_generate
from latentmas_kernels.cache.segments import Kind, slots_of
from latentmas_kernels.engines import open_engine
from latentmas_kernels.generation import LatentOutput, Metrics
from latentmas_kernels.hf.chat import without_end
from latentmas_kernels.inputs import Prompt
from latentmas_kernels.trace import trace_of

if TYPE_CHECKING:
    from latentmas.chain.run import Run


class _Tally:
    """What an agent did, over all questions: tokens that it was to read, those of them that were computed for it (not for
    another row before), what it thought and wrote, steps one after the other, and seconds of prefill, latent steps and
    decoding; agents that one call runs share those evenly."""

    def __init__(self) -> None:
        self.read = self.computed = self.latent_steps = self.new_tokens = self.steps = 0
        self.seconds = [0.0, 0.0, 0.0]


class _Saying:
    """What an agent leaves for one question: its turn, its text as a note, and what its part of the memory was fed."""

    def __init__(self) -> None:
        self.turn: Turn | None = None
        self.notes: list[Note] = []
        self.fed: list[Fed] = []


class StageRun:
    """The state of one stage.

    Attributes:
        prompts: per question and agent, token ids, without what is pending.
        ends: tokens that end a text.
        ids: per question and agent, what it reads: what was pending, and its prompt.
        sayings: per question and agent, what it leaves.
        memory: that the agents go on from, and then what they leave; None where the chain's decoder keeps it to itself.
        caches: what the stage ends with: the memory, or those of the groups where nothing goes on from it.
        tallies: per agent.
        traces: of those that thought, in their order, where they were asked for.
        prefill_seconds: of what is read for all agents.
    """

    def __init__(self, run: "Run", plan: Plan, number: int, prompts: list[list[list[int]]]) -> None:
        self.whole, self.chain, self.rows, self.plan, self.number = run, run.chain, run.rows, plan, number
        self.load = plan.loads[number]
        self.stage, self.agents = self.load.stage, self.load.stage.agents
        self.seat: Seat = self.chain.seats[self.stage.model]
        self.ends = self.seat.end_ids  # once: the template is rendered for it
        self.last = number + 1 == len(plan.loads)
        self.prompts = prompts
        self.ids: list[list[list[int]]] = []
        self.memory: LatentCache | None = None
        self.caches: list[LatentCache] = []
        self.tallies = [_Tally() for _ in self.agents]
        self.sayings = [[_Saying() for _ in self.agents] for _ in self.rows]
        self.prefill_seconds = 0.0
        self._traces: dict[int, AgentTrace] = {}

    @property
    def traces(self) -> list[AgentTrace]:
        return [trace for _, trace in sorted(self._traces.items())]

    @property
    def is_final(self) -> bool:
        """Whether it is the chain's last."""
        return self.agents[-1] is self.chain.agents[-1]

    def run(self) -> None:
        self.begin()
        self.end()

    @torch.no_grad()
    def begin(self) -> None:
        """Get the memory and the prompts ready."""
        self.memory = self._begin()
        self.ids = [
            [row.pending + ids for ids in prompts] for row, prompts in zip(self.rows, self.prompts, strict=True)
        ]
        for row in self.rows:
            row.pending = []
        for number, tally in enumerate(self.tallies):
            tally.read += sum(len(ids[number]) for ids in self.ids)

    @torch.no_grad()
    def end(self) -> None:
        """Let the agents work, and leave the memory to the next stage."""
        self._go_on()
        for row, sayings in zip(self.rows, self.sayings, strict=True):
            for number in range(len(self.agents)):
                said = sayings[number]
                assert said.turn is not None
                row.turns.append(said.turn)
                row.notes += said.notes
                row.fed += said.fed

    def _go_on(self) -> None:
        done = [self.plan.shared if self.number == 0 else 0] * len(self.rows)
        if self.stage.parallel:
            self._side_by_side(done)
        else:
            assert self.memory is not None
            self._work(self.memory, [0], done)
            self.memory.name_segments(self.agents[0].name)
            self.caches = [self.memory]

    # ---- the memory before -----------------------------------------------------------------------------------------

    def _begin(self) -> LatentCache | None:
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
            fed = [row.fed for row in self.rows]
            crossed, seconds = replay(self.seat, fed, capacity, self.chain.engine, self.chain.weights)
            crossed.segments = segments
            self.prefill_seconds += seconds
            self.tallies[0].computed += int(lengths.sum())
            self.tallies[0].read += int(lengths.sum())
            return crossed
        if not self.plan.shared:
            return LatentCache.for_model(self.seat.architecture, len(self.rows), capacity)
        shared = self.prompts[0][0][: self.plan.shared]
        first = LatentCache.for_model(self.seat.architecture, 1, len(shared))
        self._extend(first, [shared], "prompt")
        self.tallies[0].computed += len(shared)
        for row in self.rows:
            self._feed(row.fed, shared)
        return first.fork_rows(len(self.rows), capacity)

    def _hand_over(self, memory: LatentCache) -> None:
        """Cut out what the agents do not get, and the oldest of what the budget has no room for."""
        what, batch, width = self.stage.memory_policy, len(self.rows), int(memory.lengths.max())
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
                most = min(most, self.plan.limit - self.load.of(q) + self.load.pending - len(row.pending))
            kept[q, SINK:] &= kept[q, SINK:].flip(0).cumsum(0).flip(0) <= most - SINK
            # What is not tracked is empty, and a row may be shorter than the longest.
            row.fed = [fed for fed, keep in zip(row.fed, kept[q].tolist(), strict=False) if keep]
        if not torch.equal(kept, in_use):
            memory.keep(kept)

    def _extend(self, cache: LatentCache, ids: list[list[int]], kind: Kind) -> None:
        """Feed tokens that no agent thinks or writes behind yet; rows may have none."""
        runner = open_engine(self.chain.engine, self.seat.model, self.seat.architecture, weights=self.chain.weights)
        tokens, mask = padded(ids, self.seat.architecture.device)
        start, lap = cache.lengths, Laps()
        with cache.transaction():
            runner.extend(cache, Prompt(mask.sum(1).cpu(), tokens), logits=False)
        if tokens.is_cuda:
            torch.cuda.synchronize(tokens.device)
        cache.add_segment(kind, start)
        self.prefill_seconds += lap()

    # ---- side by side ----------------------------------------------------------------------------------------------

    def _side_by_side(self, done: list[int]) -> None:
        """Let several agents go on from the memory and put what they add behind each other."""
        memory = self.memory
        assert memory is not None
        beginnings = [
            ids[0][start : len(ids[0]) - len(prompts[0]) + length]
            for ids, prompts, length, start in zip(self.ids, self.prompts, self.load.common, done, strict=True)
        ]
        if any(beginnings):
            self._extend(memory, beginnings, "prompt")
            self.tallies[0].computed += sum(map(len, beginnings))
            for q, beginning in enumerate(beginnings):
                self._feed(self.rows[q].fed, beginning)
                done[q] += len(beginning)
        memory.name_segments(self.stage.names)
        base = memory.lengths.clone()
        groups: dict[int, tuple[LatentCache, int, int]] = {}
        for agents in side_by_side(self.agents):
            group = memory.fork_rows(len(agents), self.plan.group_capacity(self.number, agents))
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
        ids = [self.ids[q][number][done[q] :] for q in range(len(self.rows)) for number in numbers]
        for place, number in enumerate(numbers):
            self.tallies[number].computed += sum(map(len, ids[place :: len(numbers)]))
        if self.agents[numbers[0]].thinks:
            self._think(cache, numbers, ids)
        else:
            self._write(cache, numbers, ids)

    def _teller(self, numbers: list[int]) -> Teller:
        """For these agents; has told that they begin."""
        agents, before = [self.agents[number] for number in numbers], len(self.whole.metrics) + 1
        progress = Progress(
            agents[0], before + numbers[0], len(self.chain.agents), 0,
            beside=tuple(agents[1:]), others=tuple(before + number for number in numbers[1:]),
        )  # fmt: skip
        tell = Teller(self.whole.on_progress, progress)
        tell(0)
        return tell

    def _think(self, cache: LatentCache, numbers: list[int], ids: list[list[int]]) -> None:
        assert self.seat.aligner is not None
        tell = self._teller(numbers)
        tokens, mask = padded(ids, self.seat.architecture.device)
        steps = [self.agents[number].latent_steps or 0 for number in numbers]
        others = list(self.seat.across)
        thought = latent_generate(
            self.seat.model, tokens, mask, latent_steps=steps * len(self.rows) if len(set(steps)) > 1 else steps[0],
            settle=self.agents[numbers[0]].settle, past_key_values=cache.donate(), aligner=self.seat.aligner,
            engine=self.chain.engine, weights=self.chain.weights, on_step=tell.think,
            output_states=self.whole.trace is not None, cross=list(self.seat.across.values()),
        )  # fmt: skip
        self._count(numbers, thought.metrics)
        for place, number in enumerate(numbers):
            mine = slice(place, None, len(numbers))
            self.tallies[number].latent_steps += sum(thought.latent_steps[mine])
            self.tallies[number].steps += max(thought.latent_steps[mine])
            if self.whole.trace is not None and steps[place]:
                trace = trace_of(self.seat.model, _rows_of(thought, mine), top_k=self.whole.trace)
                self._traces[number] = AgentTrace(self.agents[number].name, trace, self.seat.tokenizer)
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

    def _write(self, cache: LatentCache, numbers: list[int], ids: list[list[int]]) -> None:
        tell = self._teller(numbers)
        tokens, mask = padded(ids, self.seat.architecture.device)
        limit = self.agents[numbers[0]].max_new_tokens
        assert limit is not None
        said = generate(
            self.seat.model, tokens, mask, past_key_values=cache.donate(), max_new_tokens=limit,
            do_sample=self.whole.temperature > 0, temperature=self.whole.temperature or 1.0, top_k=None, top_p=self.whole.top_p,
            eos_token_id=self.ends, streamer=tell, engine=self.chain.engine, weights=self.chain.weights,
        )  # fmt: skip
        self._count(numbers, said.metrics)
        unfed = []
        for r, (new, reason) in enumerate(zip(said.new_tokens, said.finish_reasons, strict=True)):
            q, number = r // len(numbers), numbers[r % len(numbers)]
            text = said.sequences[r, tokens.shape[1] : tokens.shape[1] + new].tolist()
            self._take_text(q, number, text, reason)
            unfed.append(text[-1:] if self._followed(number) else [])
            self._feed(self.sayings[q][number].fed, [*ids[r], *text[:-1], *unfed[-1]])
        if any(unfed):
            self._extend(cache, unfed, "text")

    def _followed(self, number: int) -> bool:
        """Whether another agent's part of the memory comes behind this one's: then its text goes in to the last token."""
        return self.stage.parallel and not self.last and number + 1 < len(self.agents)

    def _take_text(self, q: int, number: int, ids: list[int], reason: Literal["stop", "length"]) -> None:
        """Count a text, and leave its last token to the next turn where nothing ended it."""
        self.tallies[number].new_tokens += len(ids)
        self.tallies[number].steps = max(self.tallies[number].steps, len(ids))
        self._read_text(q, number, ids, reason)
        if number + 1 == len(self.agents):
            self.rows[q].pending = ids[-1:] if reason == "length" else []

    def _read_text(self, q: int, number: int, ids: list[int], reason: Literal["stop", "length"]) -> None:
        """Take down what an agent wrote."""
        row, agent, saying = self.rows[q], self.agents[number], self.sayings[q][number]
        own = without_end(ids, self.ends)
        whole = self.seat.tokenizer.decode(own, skip_special_tokens=True).strip()
        text = whole.rpartition("</think>")[2].strip()
        note, handed = text, None
        # What was written in few tokens is not counted again: another split of the same text is not worth a cut.
        limit = self.chain.max_note_tokens
        if self.chain.is_read(agent) and len(ids) > limit:
            note, count = cut_note(text, self.seat.tokenizer, limit)
            if count is not None:
                handed = limit
                self.whole.warnings.append(
                    f"{agent.name} wrote {count} tokens, of which the agents after it read the first {limit}; raise "
                    f"max_note_tokens to hand on more (question: {row.question[:60]!r})"
                )
        saying.notes.append(Note(agent.name, note, agent.model))
        saying.turn = Turn(
            agent.name,
            len(self.ids[q][number]),
            new_tokens=len(ids),
            text=whole,
            finish_reason=reason,
            handed_over=handed,
        )
        if number + 1 == len(self.agents):
            row.text, row.finish_reason = text, reason

    def _feed(self, fed: list[Fed], what: list[int]) -> None:
        if self.chain.tracks:
            fed += what

    def _count(self, numbers: list[int], spent: Metrics) -> None:
        for number in numbers:
            seconds = self.tallies[number].seconds
            for phase, taken in enumerate((spent.prefill_seconds, spent.latent_seconds, spent.decode_seconds)):
                seconds[phase] += taken / len(numbers)


def _rows_of(thought: LatentOutput, rows: slice) -> LatentOutput:
    assert thought.states is not None
    return replace(
        thought, latents=thought.latents[rows], states=thought.states[rows], latent_steps=thought.latent_steps[rows]
    )
