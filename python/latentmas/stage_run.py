"""One stage of a run: its agents go on from the memory before them, each by itself or side by side."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from latentmas.backends.writing import TextRequest, Written
from latentmas.plan import SINK, Plan, side_by_side
from latentmas.progress import Laps, Progress, Teller
from latentmas.prompts import padded
from latentmas.results import Turn
from latentmas.rows import Note, cut_note
from latentmas.seats import Fed, Seat, replay
from latentmas.tracing import AgentTrace
from latentmas_kernels import LatentCache, generate, latent_generate
from latentmas_kernels.engines import open_engine
from latentmas_kernels.generation import LatentOutput, Metrics
from latentmas_kernels.prompt import Prompt
from latentmas_kernels.segments import Kind, slots_of
from latentmas_kernels.trace import trace_of

if TYPE_CHECKING:
    from latentmas.run import Run


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
        ids: per question and agent, what it reads: what was pending, and its prompt.
        sayings: per question and agent, what it leaves.
        memory: that the agents go on from, and then what they leave; None where the chain's decoder keeps it to itself.
        writers: those of the agents that write, by number.
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
        self.decoder = self.chain.decoder_of(self.stage)
        self.writers = [number for number, agent in enumerate(self.agents) if not agent.thinks]
        self.last = number + 1 == len(plan.loads)
        self.prompts = prompts
        self.ids: list[list[list[int]]] = []
        self.memory: LatentCache | None = None
        self.caches: list[LatentCache] = []
        self.tallies = [_Tally() for _ in self.agents]
        self.sayings = [[_Saying() for _ in self.agents] for _ in self.rows]
        self.prefill_seconds = 0.0
        self._traces: dict[int, AgentTrace] = {}
        self._texts: dict[tuple[int, int], Written] = {}
        self._read_again: list[int] = []  # of each question, slots that the decoder is fed again

    @property
    def traces(self) -> list[AgentTrace]:
        return [trace for _, trace in sorted(self._traces.items())]

    @property
    def is_final(self) -> bool:
        """Whether it is the chain's last."""
        return self.agents[-1] is self.chain.agents[-1]

    def run(self) -> None:
        self.begin()
        if self.decoder is not None:
            tell, lap = self._teller(self.writers), Laps()
            tell(0)
            written = self.decoder.write(self.given, self.requests(), tell)
            seconds = lap() / len(self.writers)
            for number in self.writers:
                self.tallies[number].seconds[2] += seconds
            self.end(written)
        else:
            self.end()

    @torch.no_grad()
    def begin(self) -> None:
        """Get the memory and the prompts ready."""
        alone = self.decoder is not None and self.last and self.number == 0  # nobody needs what it reads
        self.memory = None if alone else self._begin()
        self.ids = [
            [row.pending + ids for ids in prompts] for row, prompts in zip(self.rows, self.prompts, strict=True)
        ]
        for row in self.rows:
            row.pending = []
        for number, tally in enumerate(self.tallies):
            tally.read += sum(len(ids[number]) for ids in self.ids)

    @property
    def given(self) -> LatentCache | None:
        """The memory that the agents go on from, where there is anything in it."""
        return self.memory if self.memory is not None and bool(self.memory.lengths.any()) else None

    def requests(self) -> list[TextRequest]:
        """What the chain's decoder is to write: of each question the writers' texts, behind the memory as `begin` left it."""
        given, temperature = self.given, self.whole.temperature
        shared = self.plan.shared if given is not None and self.number == 0 else 0
        fed = [self._fed_again(row.fed) for row in self.rows]
        self._read_again = [len(slots) for slots in fed]
        return [
            TextRequest(
                self.ids[q][number][shared:], self.agents[number].max_new_tokens or 0, self.seat.end_ids,
                row=None if given is None else q, fed=fed[q], temperature=temperature, top_p=self.whole.top_p,
                seed=int(torch.randint(2**31, ())) if temperature else 0,
            )
            for q in range(len(self.rows))
            for number in self.writers
        ]  # fmt: skip

    def _fed_again(self, fed: list[Fed]) -> Sequence[Fed]:
        """What the decoder reads in place of a memory: of thoughts, the embeddings of its own model, which it calls None."""
        if self.given is None or self.decoder is None or self.decoder.hand_over != "embeds":
            return ()
        return [slot if isinstance(slot, int) else {None: slot[self.seat.name]} for slot in fed]

    @torch.no_grad()
    def end(self, written: Sequence[Written] = ()) -> None:
        """Let the agents work, or take down what the chain's decoder wrote for them; and leave the memory to the next stage."""
        places = [(q, number) for q in range(len(self.rows)) for number in self.writers]
        self._texts = dict(zip(places, written, strict=True)) if written else {}
        done = [self.plan.shared if self.number == 0 else 0] * len(self.rows)
        if written and self.last:
            for q, number in places:
                self.tallies[number].read += self._read_again[q]
                self.tallies[number].computed += self._texts[q, number].computed_tokens
            self._take_texts(self.writers)
            self.caches = [] if self.memory is None else [self.memory]
        elif self.stage.parallel:
            self._side_by_side(done)
        else:
            assert self.memory is not None
            self._work(self.memory, [0], done)
            self.memory.name_segments(self.agents[0].name)
            self.caches = [self.memory]
        for row, sayings in zip(self.rows, self.sayings, strict=True):
            for number in range(len(self.agents)):
                said = sayings[number]
                assert said.turn is not None
                row.turns.append(said.turn)
                row.notes += said.notes
                row.fed += said.fed

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
        ids = [self.ids[q][number][done[q] :] for q in range(len(self.rows)) for number in numbers]
        for place, number in enumerate(numbers):
            self.tallies[number].computed += sum(map(len, ids[place :: len(numbers)]))
        if self._texts and not self.agents[numbers[0]].thinks:
            self._read_along(cache, numbers, ids)
            return
        tell = self._teller(numbers)
        tell(0)
        tokens, mask = padded(ids, self.seat.architecture.device)
        if self.agents[numbers[0]].thinks:
            self._think(cache, numbers, ids, tokens, mask, tell)
        else:
            self._write(cache, numbers, ids, tokens, mask, tell)

    def _teller(self, numbers: list[int]) -> Teller:
        agents, before = [self.agents[number] for number in numbers], len(self.whole.metrics) + 1
        progress = Progress(
            agents[0], before + numbers[0], len(self.chain.agents), 0,
            beside=tuple(agents[1:]), others=tuple(before + number for number in numbers[1:]),
        )  # fmt: skip
        return Teller(self.whole.on_progress, progress)

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

    def _read_along(self, cache: LatentCache, numbers: list[int], ids: list[list[int]]) -> None:
        """Bring what the chain's decoder wrote into the memory that goes on from it."""
        self._take_texts(numbers)
        texts = [
            text.ids if self._followed(number) else text.ids[:-1]
            for q in range(len(self.rows))
            for number in numbers
            for text in [self._texts[q, number]]
        ]
        for r, text in enumerate(texts):
            self._feed(self.sayings[r // len(numbers)][numbers[r % len(numbers)]].fed, [*ids[r], *text])
        self._extend(cache, ids, "prompt")
        if any(texts):
            self._extend(cache, texts, "text")

    def _take_texts(self, numbers: list[int]) -> None:
        for q in range(len(self.rows)):
            for number in numbers:
                text = self._texts[q, number]
                self._take_text(q, number, text.ids, text.finish_reason)

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
        whole = self.seat.tokenizer.decode(ids, skip_special_tokens=True).strip()
        text = whole.rpartition("</think>")[2].strip()
        note, handed = text, None
        # What was written in few tokens is not counted again: another split of the same text is not worth a cut.
        limit = self.chain.handover_tokens
        if self.chain.is_read(agent) and len(ids) > limit:
            note, count = cut_note(text, self.seat.tokenizer, limit)
            if count is not None:
                handed = limit
                self.whole.warnings.append(
                    f"{agent.name} wrote {count} tokens, of which the agents after it read the first {limit}; raise "
                    f"handover_tokens to hand on more (question: {row.question[:60]!r})"
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
