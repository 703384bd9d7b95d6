"""A chain of agents on one model: thinkers extend a latent memory, writers write from it or read each other's notes."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from latentmas.agents import Agent
from latentmas.prompts import has_thinking_switch, padded, turn_ids
from latentmas.results import AgentMetrics, Answer, ChainResult, Turn
from latentmas_kernels import Aligner, LatentCache, build_aligner, generate, latent_generate
from latentmas_kernels.architecture import Architecture
from latentmas_kernels.engines import open_engine
from latentmas_kernels.generation import GenerateOutput, Metrics

CUT = " [...]"
"""Ends a text of which later agents read the beginning only."""


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        agent: who is at work.
        number, agents: the agent is the number-th, from 1, of so many.
        step: latent steps or new tokens per row so far; 0 while the prompt is read.
        tokens: int64 [B] on the CPU, the tokens just written, anything behind the end of a row; None at step 0 and for
            an agent that thinks.
    """

    agent: Agent
    number: int
    agents: int
    step: int
    tokens: Tensor | None = None


def check_request(questions: Sequence[str], temperature: float, top_p: float) -> None:
    """Raise ValueError for what no chain can run; needs no model."""
    if isinstance(questions, str):
        raise ValueError("questions must be a list of strings; got one string: put it into a list")
    if not questions or not all(q.strip() for q in questions):
        raise ValueError("every question needs some text; got an empty one")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 (greedy) or more; got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be more than 0 and at most 1 (off); got {top_p}")


class Chain:
    """Agents in a row on one model; the last one answers."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        agents: Sequence[Agent],
        *,
        aligner: str | Aligner = "auto",
        engine: str = "auto",
        weights: str = "model",
        handover_tokens: int = 512,
    ) -> None:
        """Check the agents and measure how hidden states are fed back, where some agent thinks.

        Args:
            model: a decoder-only causal LM of transformers, in eval mode.
            tokenizer: the model's, with or without a chat template and a padding token.
            agents: the chain; the last one writes.
            aligner, engine, weights: as in `latent_generate`. Without an agent that thinks, there is no aligner.
            handover_tokens: tokens of a text that later agents read. What is longer is cut, with a warning.

        Raises:
            ValueError: where the model cannot run, or the agents make no chain.
        """
        if handover_tokens < 1:
            raise ValueError(f"handover_tokens must be 1 or more; got {handover_tokens}")
        self._groups = _groups(agents)
        self.model, self.tokenizer, self.agents = model, tokenizer, list(agents)
        self.architecture, self.engine, self.handover_tokens = Architecture.of(model), engine, handover_tokens
        self.weights = weights
        open_engine(engine, model, self.architecture, weights=weights)
        if any(agent.enable_thinking for agent in agents) and not has_thinking_switch(tokenizer):
            warnings.warn(
                "the tokenizer's chat template has no thinking switch, so enable_thinking changes nothing", stacklevel=2
            )
        self.aligner: Aligner | None = None
        if any(agent.latent_steps is not None for agent in agents):
            self.aligner = build_aligner(model, aligner) if isinstance(aligner, str) else aligner

    def check(self, question: str) -> None:
        """Raise ValueError where a question could not be run: empty, or longer than the model's positions allow.

        Notes of other agents are counted as long as they may become.
        """
        check_request([question], 0.0, 1.0)
        written: list[Agent] = []
        for group in self._groups:
            notes = _notes([(agent.name, CUT) for agent in written])
            longest = sum(min(agent.steps, self.handover_tokens) for agent in written) if group[0].reads_notes else 0
            self._slots(group, [self._prompts(group, question, notes)], longest)
            written += [agent for agent in group if agent.max_new_tokens is not None]

    def run(
        self,
        questions: Sequence[str],
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> ChainResult:
        """Answer the questions as one batch.

        Args:
            questions: one per row; none may be empty.
            temperature: of all that is written; 0 is greedy. Sampling draws from torch's global generator.
            top_p: sample from the most likely tokens that hold this much probability; 1 is off.
            on_progress: called as each agent begins and at each of its steps.

        Raises:
            ValueError: for an empty question, or where the chain does not fit the model's positions or the memory.
        """
        check_request(questions, temperature, top_p)
        began = time.perf_counter()
        laps = _Laps()
        rows = [_Row(question) for question in questions]
        metrics: list[AgentMetrics] = []
        memory: LatentCache | None = None
        for group in self._groups:
            memory = None  # what the group before left is free before there is more
            prompts = [self._prompts(group, row.question, _notes(row.notes)) for row in rows]
            # The chain owns the memory, so each agent extends it in place; none of them has to make room.
            memory = LatentCache.for_model(self.architecture, len(rows), self._slots(group, prompts))
            for row in rows:
                row.pending = []
            for turn, agent in enumerate(group):
                progress = Progress(agent, len(metrics) + 1, len(self.agents), 0)
                tell = _Teller(on_progress, progress)
                tell(0)
                for row, prompt in zip(rows, prompts, strict=True):
                    row.ids, row.pending = row.pending + prompt[turn], []
                ids, mask = padded([row.ids for row in rows], self.architecture.device)
                if agent.latent_steps is not None:
                    assert self.aligner is not None
                    thought = latent_generate(
                        self.model, ids, mask, latent_steps=agent.latent_steps, past_key_values=memory.donate(),
                        aligner=self.aligner, engine=self.engine, weights=self.weights, on_step=tell.think,
                    )  # fmt: skip
                    spent, steps = thought.metrics, agent.latent_steps
                    for row in rows:
                        row.turns.append(Turn(agent.name, len(row.ids), latent_steps=agent.latent_steps))
                else:
                    assert agent.max_new_tokens is not None
                    text = generate(
                        self.model, ids, mask, past_key_values=memory.donate(), max_new_tokens=agent.max_new_tokens,
                        do_sample=temperature > 0, temperature=temperature or 1.0, top_k=None, top_p=top_p,
                        streamer=tell, engine=self.engine, weights=self.weights,
                    )  # fmt: skip
                    spent, steps = text.metrics, max(text.new_tokens)
                    self._read(progress, rows, text, ids.shape[1])
                memory.name_segments(agent.name)
                metrics.append(_metrics(agent, spent, steps, laps()))
        assert memory is not None
        answers = [row.answer() for row in rows]
        return ChainResult(answers, metrics, time.perf_counter() - began, self.aligner, memory)

    def _prompts(self, group: list[Agent], question: str, notes: str) -> list[list[int]]:
        """Token ids of each agent's turn."""
        return [
            turn_ids(
                self.tokenizer,
                agent.text(question, notes),
                first=turn == 0,
                system=agent.system,
                think=agent.enable_thinking,
            )
            for turn, agent in enumerate(group)
        ]

    def _slots(self, group: list[Agent], prompts: list[list[list[int]]], notes: int = 0) -> int:
        """Slots of the longest row; ValueError where the model has no positions for them.

        Args:
            group: agents of one memory; the last one writes, and its last token is not fed in.
            prompts: per row and agent.
            notes: tokens that the prompts will have on top.
        """
        added = sum(agent.steps for agent in group) - 1
        prompt = max(sum(map(len, row)) for row in prompts) + notes
        limit = self.architecture.max_positions
        if limit is not None and prompt + added > limit:
            raise ValueError(
                f"the chain goes up to {prompt + added} positions ({prompt} of prompts, {added} of latent steps and new "
                f"tokens), but {self.architecture.name} was made for {limit}; shorten the question or lower latent_steps "
                "and max_new_tokens" + (", or handover_tokens" if group[0].reads_notes else "")
            )
        return prompt + added

    def _read(self, progress: Progress, rows: list["_Row"], said: GenerateOutput, columns: int) -> None:
        """Take down what an agent wrote behind prompts of `columns` columns."""
        agent = progress.agent
        handed_on = any(later.reads_notes for later in self.agents[progress.number :])
        for row, sequence, new, reason in zip(rows, said.sequences, said.new_tokens, said.finish_reasons, strict=True):
            ids = sequence[columns : columns + new].tolist()
            whole = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
            row.text, row.finish_reason = whole.rpartition("</think>")[2].strip(), reason
            row.notes.append((agent.name, row.text))
            row.pending = ids[-1:] if reason == "length" else []
            # What was written in few tokens is not counted again: another split of the same text is not worth a cut.
            read = self._cut(agent, row) if handed_on and new > self.handover_tokens else None
            row.turns.append(
                Turn(agent.name, len(row.ids), new_tokens=new, text=whole, finish_reason=reason, handed_over=read)
            )

    def _cut(self, agent: Agent, row: "_Row") -> int | None:
        """Note the beginning of a text that is too long to be handed on, and say so; None where it is not."""
        ids = self.tokenizer(row.text, add_special_tokens=False).input_ids
        if len(ids) <= self.handover_tokens:
            return None
        warnings.warn(
            f"{agent.name} wrote {len(ids)} tokens, of which the agents after it read the first {self.handover_tokens}; "
            f"raise handover_tokens to hand on more (question: {row.question[:60]!r})",
            stacklevel=4,
        )
        row.notes[-1] = (agent.name, self.tokenizer.decode(ids[: self.handover_tokens]) + CUT)
        return self.handover_tokens


@dataclass
class _Row:
    """One question on its way through the chain."""

    question: str
    turns: list[Turn] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    # The last token of a text that was ended by its length. It was not fed in: the next turn in that memory brings it.
    pending: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: Literal["stop", "length"] = "stop"

    def answer(self) -> Answer:
        return Answer(self.question, self.text, self.finish_reason, self.turns)


class _Teller:
    """Tells of the steps of one agent; generate() takes it for a streamer."""

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


class _Laps:
    """Seconds since the last call."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def __call__(self) -> float:
        before, self.last = self.last, time.perf_counter()
        return self.last - before


def _metrics(agent: Agent, spent: Metrics, steps: int, seconds: float) -> AgentMetrics:
    """What is none of the phases is other, so that they add up to the seconds of the agent's turn."""
    phases = spent.prefill_seconds + spent.latent_seconds + spent.decode_seconds
    return AgentMetrics(
        agent.name,
        prompt_tokens=spent.prefill_tokens,
        latent_steps=spent.latent_tokens,
        new_tokens=spent.decode_tokens,
        steps=steps,
        prefill_seconds=spent.prefill_seconds,
        latent_seconds=spent.latent_seconds,
        decode_seconds=spent.decode_seconds,
        other_seconds=seconds - phases,
        kv_bytes=spent.kv_bytes,
    )


def _notes(written: list[tuple[str, str]]) -> str:
    return "\n\n".join(f"{name}:\n{text or '(nothing)'}" for name, text in written)


def _groups(agents: Sequence[Agent]) -> list[list[Agent]]:
    """The agents that share a memory, in order: one that reads notes begins a new one."""
    if not agents or agents[-1].max_new_tokens is None:
        raise ValueError(
            "a chain ends with an agent that writes (max_new_tokens); got "
            + (f"{agents[-1].name!r}, which thinks" if agents else "no agents")
        )
    groups: list[list[Agent]] = []
    for agent in agents:
        if not agent.reads_notes:
            if not groups:
                groups.append([])
            groups[-1].append(agent)
            continue
        if not groups:
            raise ValueError(f"agent {agent.name!r} reads {{notes}}, but nobody wrote any before it")
        if groups[-1][-1].latent_steps is not None:
            raise ValueError(
                f"agent {agent.name!r} reads {{notes}} and so begins a new memory, in which the thoughts of "
                f"{groups[-1][-1].name!r} before it would be lost; take {{notes}} out of its prompt to go on from them, or "
                "let an agent that writes come between"
            )
        groups.append([agent])
    return groups
