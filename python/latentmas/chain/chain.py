"""A chain of agents: thinkers extend a latent memory, writers write from it or read each other's notes; some side by side."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from latentmas.backends.base import Completion, GenerationRequest, TextBackend
from latentmas.chain.agent import Agent
from latentmas.chain.decoded_stage import DecodedStage
from latentmas.chain.decoder_check import check_decoder
from latentmas.chain.memory_policy import KEEP_ALL, Budget
from latentmas.chain.model_context import Seat, tokens_differ
from latentmas.chain.plan import SINK, Load, Plan
from latentmas.chain.progress import Progress
from latentmas.chain.prompts import has_thinking_switch, turn_ids
from latentmas.chain.question_state import CUT, NOTHING, Note, common_beginning, cut_note, notes_of
from latentmas.chain.results import ChainResult
from latentmas.chain.run import Run
from latentmas.chain.stages import Stage, Stretch, stretches_of
from latentmas.characters import check_characters
from latentmas_kernels import Aligner, LatentCache, build_aligner
from latentmas_kernels.cache.latent_cache import check_free_memory
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.generation import check_sampling
from latentmas_kernels.models.rope import RopeShift

SHARE_FROM = 64
"""Tokens that reading a common beginning once must save. The pass of its own reads the weights once more: on SmolLM2-135M in
bfloat16 on two cores, 30 tokens saved took 29 ms instead of 33, 64 tokens 39 instead of 56, 90 tokens 40 instead of 66."""

RESPLIT = 4
"""Tokens by which a text may be longer when it is split anew, its ends stripped, than it was written."""


@dataclass
class Prepared:
    """A run whose last text is still to be written.

    Attributes:
        memory: that it is written behind, a row for each question; None where there is nothing in it.
        requests: of each question.
    """

    run: Run
    last: DecodedStage
    memory: LatentCache | None = field(init=False)
    requests: list[GenerationRequest] = field(init=False)

    def __post_init__(self) -> None:
        self.memory, self.requests = self.last.given, self.last.requests()

    def forget(self) -> None:
        """Free the memory, once the decoder has one of its own."""
        self.memory = self.last.memory = None

    def finish(self, written: Sequence[Completion]) -> ChainResult:
        """The answers, from the texts of the requests."""
        self.last.take(written)
        self.run.take_down(self.last)
        return self.run.result()


Prompts = list[list[list[int]]]
"""Token ids, per stage and agent of it."""


def check_request(questions: Sequence[str], temperature: float, top_p: float) -> None:
    """Raise ValueError for what no chain can run; needs no model."""
    if isinstance(questions, str):
        raise LatentMASError("questions must be a list of strings; got one string: put it into a list")
    if not questions or not all(q.strip() for q in questions):
        raise LatentMASError("every question needs some text; got an empty one")
    for number, question in enumerate(questions, start=1):
        check_characters(question, "the question" if len(questions) == 1 else f"question {number}")
    check_sampling(temperature, top_p)


class Chain:
    """Agents on one model or several; the last one answers.

    Attributes:
        model, tokenizer, aligner: the chain's own.
        agents: all of them, in the order of what they add to the memory.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        agents: Sequence[Agent | Sequence[Agent]],
        *,
        aligner: str | Aligner = "auto",
        engine: str = "auto",
        weights: str = "model",
        max_note_tokens: int = 512,
        budget: Budget | str | None = None,
        models: Mapping[str, tuple[Any, Any]] | None = None,
        decoder: TextBackend | None = None,
    ) -> None:
        """Check the agents and measure how hidden states are fed back, where some agent thinks.

        Args:
            model: a decoder-only causal LM of transformers, in eval mode.
            tokenizer: the model's, with or without a chat template and a padding token.
            agents: the chain; the last one writes. Agents in a list of their own work side by side: as rows of one batch,
                from a memory that they share, and what each adds is put behind what the one before it adds.
            aligner, engine, weights: as in `latent_generate`. Without an agent that thinks, there is no aligner.
            max_note_tokens: tokens of a text that later agents read. What is longer is cut, with a warning.
            budget: what keys and values may take ("64 MB", "512 slots"); the oldest are cut out of the memory.
            models: (model, tokenizer) by the names that agents have in `Agent.model`; their aligner is a kind, as `aligner`.
            decoder: writes the texts of all agents on the last agent's model; None writes them here.

        Raises:
            ValueError: where a model cannot run, the agents make no chain, or a memory cannot be cut or cross as they want.
        """
        if max_note_tokens < 1:
            raise LatentMASError(f"max_note_tokens must be 1 or more; got {max_note_tokens}")
        if not isinstance(budget, Budget | str | None):
            raise LatentMASError(f"budget must be a Budget, text like '64 MB', or None; got {type(budget).__name__}")
        self.stretches = stretches_of(agents)
        self.agents = [agent for stretch in self.stretches for stage in stretch for agent in stage.agents]
        self.model, self.tokenizer, self.engine, self.weights = model, tokenizer, engine, weights
        self.max_note_tokens = max_note_tokens
        self.budget = Budget.parse(budget) if isinstance(budget, str) else budget
        given: dict[str | None, tuple[Any, Any]] = {None: (model, tokenizer)}
        given.update(models or {})
        names = list(dict.fromkeys([None, *(agent.model for agent in self.agents)]))
        unknown = [name for name in names if name not in given]
        if unknown:
            raise LatentMASError(
                f"agents run on model {unknown[0]!r}, which the chain was not given; given are {sorted(models or {})}"
            )
        self.seats = {name: Seat.of(name, given[name], engine, weights) for name in names}
        for seat in self.seats.values():
            on_it = [agent for agent in self.agents if agent.model == seat.name]
            if any(agent.enable_thinking for agent in on_it) and not has_thinking_switch(seat.tokenizer):
                warnings.warn(
                    "the tokenizer's chat template has no thinking switch, so enable_thinking changes nothing",
                    stacklevel=2,
                )
            if any(agent.thinks for agent in on_it):
                kind = aligner if isinstance(aligner, str) or seat.name is None else aligner.kind
                seat.aligner = build_aligner(seat.model, kind) if isinstance(kind, str) else kind
        self.aligner = self.seats[None].aligner
        # Pairs of models with other tokens.
        self._foreign = {
            (a.name, b.name)
            for a in self.seats.values()
            for b in self.seats.values()
            if a is not b and tokens_differ(a, b)
        }
        self.decoder = decoder
        if decoder is not None:
            check_decoder(decoder, self.seats[self.agents[-1].model], self.stretches, self.budget)
        self.tracks = decoder is not None and decoder.kv_transfer == "embeds"
        for stretch in self.stretches:
            self._open_ways(stretch)

    def _open_ways(self, stretch: Stretch) -> None:
        """Make sure that the memory of a stretch can go from stage to stage."""
        for number, stage in enumerate(stretch):
            seat = self.seats[stage.model]
            for later in stretch[number + 1 :]:
                if later.model != stage.model:
                    seat.open_way(self.seats[later.model])
                    self.tracks = True
            cut = number > 0 and (stage.memory != KEEP_ALL or self.budget is not None)
            if cut or (stage.parallel and number + 1 < len(stretch)):
                RopeShift.of(seat.model)

    def check(self, question: str) -> None:
        """Raise ValueError where a question could not be run: empty, longer than the model's positions allow, or more than
        the budget allows.

        Notes of other agents are counted as long as they may become.
        """
        check_request([question], 0.0, 1.0)
        self._plans([question])

    def kv_bytes(self, questions: Sequence[str]) -> int:
        """Bytes that keys and values of these questions, as one batch, may come to take, all buffers together.

        Raises:
            ValueError: as `check`.
        """
        return max(plan.bytes(self._slot_bytes(plan)) for plan in self._plans(questions))

    def run(
        self,
        questions: Sequence[str],
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        on_progress: Callable[[Progress], None] | None = None,
        trace: int | None = None,
    ) -> ChainResult:
        """Answer the questions as one batch.

        What the first prompts of all questions have in common at their beginning is read once.

        Args:
            questions: one per row; none may be empty.
            temperature: of all that is written; 0 is greedy. Sampling draws from torch's global generator.
            top_p: sample from the most likely tokens that hold this much probability; 1 is off.
            on_progress: called as each agent begins and at each of its steps.
            trace: look at every latent step: its so many likeliest tokens, norms, cosines and nearest embeddings.

        Raises:
            ValueError: for an empty question, or where the chain does not fit the model's positions, the budget or the
                memory.
        """
        check_request(questions, temperature, top_p)
        run = Run(self, list(questions), temperature=temperature, top_p=top_p, on_progress=on_progress, trace=trace)
        try:
            last = run.to_last()
            last.run()
            run.take_down(last)
        finally:
            for text in run.warnings:
                warnings.warn(text, stacklevel=2)
        return run.result()

    def prepare(
        self,
        questions: Sequence[str],
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Prepared:
        """Run all agents but the last, whose text the caller lets a decoder write; arguments as of `run`.

        Raises:
            ValueError: as `run`.
        """
        assert self.decoder is not None, "without a decoder nobody could write the last text"
        check_request(questions, temperature, top_p)
        run = Run(self, list(questions), temperature=temperature, top_p=top_p, on_progress=on_progress, trace=None)
        try:
            last = run.to_last()
            assert isinstance(last, DecodedStage), "the decoder writes the last text"
            last.begin()
        finally:
            for text in run.warnings:
                warnings.warn(text, stacklevel=2)
        return Prepared(run, last)

    # ---- what a run needs to know ----------------------------------------------------------------------------------

    def decoder_of(self, stage: Stage) -> TextBackend | None:
        """Who writes the texts of a stage, where that is not the chain's own engine."""
        return self.decoder if stage.writes and stage.model == self.agents[-1].model else None

    def readable(self, reader: Stage, notes: list[Note]) -> tuple[list[Note], list[str]]:
        """Notes as a stage reads them, and what is to be said of those that were cut for that: where its model has other
        tokens than the writer's, a text may be longer in them."""
        if not reader.reads_notes:
            return notes, []
        cut, said = [], []
        for note in notes:
            count = None
            if (note.model, reader.model) in self._foreign:
                text, count = cut_note(note.text, self.seats[reader.model].tokenizer, self.max_note_tokens)
                note = replace(note, text=text)
            if count is not None:
                said.append(
                    f"what {note.agent} wrote is {count} tokens to {reader.names}, of which {self.max_note_tokens} are read; "
                    "raise max_note_tokens to hand on more"
                )
            cut.append(note)
        return cut, said

    def prompts(self, stretch: Stretch, question: str, notes: list[Note]) -> Prompts:
        """Token ids of each agent's turn. The first one of a memory opens the conversation."""
        prompts = []
        for number, stage in enumerate(stretch):
            tokenizer = self.seats[stage.model].tokenizer
            prompts.append(
                [
                    turn_ids(
                        tokenizer, agent.text(question, notes_of(notes)), first=number == 0, system=agent.system,
                        think=agent.enable_thinking,
                    )
                    for agent in stage.agents
                ]
            )  # fmt: skip
        return prompts

    def lay_out(self, stretch: Stretch, prompts: Sequence[Prompts], more: int = 0) -> Plan:
        """How large the memory of a stretch becomes.

        Args:
            prompts: of each question.
            more: tokens that notes may add to the first prompts.

        Raises:
            ValueError: where it does not fit the models' positions or the budget.
        """
        loads = [self._load(stretch, number, [of[number] for of in prompts], more) for number in range(len(stretch))]
        shared = 0
        if len(prompts) > 1:
            first = [ids for of in prompts for ids in of[0]]
            # Notes that are not known yet may be alike, too.
            shared = min(map(len, first)) - 1 + more if more else common_beginning(first)
            shared = shared if shared * (len(prompts) - 1) >= SHARE_FROM else 0
        plan = Plan(loads, shared, None if self.budget is None else self.budget.slots)
        if self.budget is not None and self.budget.bytes is not None:
            plan = self._within(plan, self.budget.bytes)
        self._check_positions(plan)
        return plan

    def is_read(self, writer: Agent) -> bool:
        """Whether an agent behind it reads what it wrote."""
        stages = [stage for stretch in self.stretches for stage in stretch]
        at = next(number for number, stage in enumerate(stages) if writer in stage.agents)
        return any(stage.reads_notes for stage in stages[at + 1 :])

    def check_free_memory(self, plan: Plan) -> None:
        """Raise InsufficientMemoryError where the buffers of a stretch do not fit what is free."""
        need = plan.bytes(self._slot_bytes(plan))
        device = self.seats[plan.loads[0].stage.model].architecture.device
        rows, slots = len(plan.loads[0].common), max(max(size.end) for size in plan.sizes)
        check_free_memory(need, device, f"a memory of {rows} rows of {slots} slots")

    def _slot_bytes(self, plan: Plan) -> list[int]:
        """Per stage, of its model; nothing where a decoder keeps all of the memory."""
        if len(plan.loads) == 1 and self.decoder_of(plan.loads[0].stage) is not None:
            return [0]
        return [self.seats[load.stage.model].slot_bytes for load in plan.loads]

    def _plans(self, questions: Sequence[str]) -> list[Plan]:
        """Of each stretch, notes being as long as they may become."""
        written: list[Agent] = []
        plans = []
        for stretch in self.stretches:
            notes = [Note(agent.name, CUT, agent.model) for agent in written]
            times = max(agent.places.count("notes") for agent in stretch[0].agents)
            longest = times * sum(self._longest_note(agent, stretch[0].model) for agent in written)
            plans.append(self.lay_out(stretch, [self.prompts(stretch, q, notes) for q in questions], longest))
            written += [agent for stage in stretch for agent in stage.agents if not agent.thinks]
        return plans

    def _longest_note(self, writer: Agent, reader: str | None) -> int:
        """Tokens that a text may have as a note to a model, beyond those of CUT."""
        if (writer.model, reader) in self._foreign:
            return self.max_note_tokens
        tokenizer = self.seats[reader].tokenizer
        nothing, cut = (len(tokenizer(text, add_special_tokens=False).input_ids) for text in (NOTHING, CUT))
        return max(min(writer.steps, self.max_note_tokens) + RESPLIT, nothing - cut)

    def _load(self, stretch: Stretch, number: int, prompts: Prompts, more: int) -> Load:
        """Of one stage; prompts per question and agent."""
        stage, last = stretch[number], number + 1 == len(stretch)
        extra = more if number == 0 else 0
        # Where notes are still to be written, nobody knows how far prompts begin alike: counted as if they did not at all, and
        # as if the shortest were common to all.
        common = [common_beginning(of) if stage.parallel and not extra else 0 for of in prompts]
        shortest = [min(map(len, of)) + extra for of in prompts] if stage.parallel and extra else None
        return Load(
            stage,
            common,
            [[len(ids) - start + extra for ids in of] for of, start in zip(prompts, common, strict=True)],
            # The last token of a text is not fed in, but by the next turn, or before another agent's part is put behind it.
            [a.steps - (not a.thinks and (last or a is stage.agents[-1])) for a in stage.agents],
            pending=int(number > 0 and not stretch[number - 1].agents[-1].thinks),
            crosses=number > 0 and stage.model != stretch[number - 1].model,
            more=shortest,
        )

    def _within(self, plan: Plan, most: int) -> Plan:
        """The plan with as many slots for each question as the bytes allow."""
        sizes = self._slot_bytes(plan)
        if plan.bytes(sizes) <= most:
            return plan
        questions = range(len(plan.loads[0].common))
        low = max(load.of(q) + SINK * (number > 0) for number, load in enumerate(plan.loads) for q in questions)
        high = max(max(size.end) for size in plan.sizes)
        least = Plan(plan.loads, plan.shared, low)
        if least.bytes(sizes) > most:
            hungry = max(plan.loads, key=lambda load: max(load.of(q) for q in questions)).stage.names
            raise LatentMASError(
                f"{len(questions)} questions take at least {least.bytes(sizes) / 2**20:,.1f} MB of keys and values (most of "
                f"it for {hungry}), and the budget is {most / 2**20:,.1f} MB; raise it, take fewer questions at a time, or "
                "lower latent_steps and max_new_tokens"
            )
        while low + 1 < high:
            middle = (low + high) // 2
            if Plan(plan.loads, plan.shared, middle).bytes(sizes) <= most:
                low = middle
            else:
                high = middle
        return Plan(plan.loads, plan.shared, low)

    def _check_positions(self, plan: Plan) -> None:
        for load, size in zip(plan.loads, plan.sizes, strict=True):
            decoder = self.decoder_of(load.stage)
            tokens = max(begin + load.request(q) for q, begin in enumerate(size.begin))
            if decoder is not None and tokens > decoder.max_model_len:
                raise LatentMASError(
                    f"{load.stage.names} goes up to {tokens} tokens ({max(size.begin)} of memory), and the decoder was started "
                    f"for {decoder.max_model_len} (max_model_len); start it with more, shorten the question, or lower "
                    "latent_steps and max_new_tokens"
                )
        # The longest row of the largest stage of each model.
        ends = [
            (end, prompt, load)
            for load, size in zip(plan.loads, plan.sizes, strict=True)
            for end, prompt in zip(size.end, size.prompts, strict=True)
        ]
        for name in dict.fromkeys(load.stage.model for load in plan.loads):
            architecture = self.seats[name].architecture
            limit = architecture.max_positions
            end, prompt, load = max((e for e in ends if e[2].stage.model == name), key=lambda e: e[0])
            if limit is not None and end > limit:
                raise LatentMASError(
                    f"the chain goes up to {end} positions ({prompt} of prompts, {end - prompt} of latent steps and new "
                    f"tokens), but {architecture.name} was made for {limit}; shorten the question or lower latent_steps "
                    "and max_new_tokens" + (", or max_note_tokens" if load.stage.reads_notes else "")
                )
