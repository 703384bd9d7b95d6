"""A chain of agents over one latent memory: thinkers extend it, the last agent answers from it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from latentmas.agents import Agent
from latentmas.prompts import padded, turn_ids
from latentmas_kernels import Aligner, LatentCache, build_aligner, generate, latent_generate
from latentmas_kernels.architecture import Architecture


@dataclass(frozen=True)
class Turn:
    """What one agent did, over all questions of the batch."""

    agent: str
    prompt_tokens: int
    latent_steps: int
    new_tokens: int
    seconds: float


@dataclass(frozen=True)
class ChainResult:
    """Answers in the order of the questions, one Turn per agent, and the memory that the last agent left."""

    answers: list[str]
    turns: list[Turn]
    aligner: Aligner
    memory: LatentCache


def check_request(questions: Sequence[str], temperature: float) -> None:
    """Raise ValueError for what no chain can run; needs no model."""
    if isinstance(questions, str):
        raise ValueError("questions must be a list of strings; got one string: put it into a list")
    if not questions or not all(q.strip() for q in questions):
        raise ValueError("every question needs some text; got an empty one")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 (greedy) or more; got {temperature}")


class Chain:
    """Agents in a row on one model; all but the last think in hidden states, the last answers in text."""

    def __init__(self, model: Any, tokenizer: Any, agents: Sequence[Agent], *, aligner: str | Aligner = "auto") -> None:
        thinkers, judger = list(agents[:-1]), agents[-1] if agents else None
        if judger is None or judger.max_new_tokens is None or any(a.latent_steps is None for a in thinkers):
            raise ValueError(
                "a chain needs agents that think (latent_steps) followed by one that answers (max_new_tokens)"
            )
        self.model, self.tokenizer, self.agents = model, tokenizer, [*thinkers, judger]
        self.aligner = build_aligner(model, aligner) if isinstance(aligner, str) else aligner

    def run(
        self,
        questions: Sequence[str],
        *,
        temperature: float = 0.0,
        on_turn: Callable[[Agent], None] = lambda agent: None,
    ) -> ChainResult:
        """Answer the questions as one batch.

        Args:
            questions: one per row; none may be empty.
            temperature: of the judger's text; 0 is greedy.
            on_turn: called as each agent begins.

        Raises:
            ValueError: for an empty question, or where the chain does not fit the model's positions.
        """
        check_request(questions, temperature)
        prompts = [
            [turn_ids(self.tokenizer, agent.prompt.replace("{question}", q), first=index == 0) for q in questions]
            for index, agent in enumerate(self.agents)
        ]
        capacity = self._slots(prompts)
        memory: LatentCache | None = None
        turns, answers = [], []
        for agent, rows in zip(self.agents, prompts, strict=True):
            on_turn(agent)
            began = time.perf_counter()
            ids, mask = padded(rows, self.model.device)
            # The chain owns the memory, so each agent extends it in place.
            past = memory.donate() if memory is not None else None
            if agent.latent_steps is not None:
                thought = latent_generate(
                    self.model, ids, mask, latent_steps=agent.latent_steps, past_key_values=past,
                    aligner=self.aligner, max_cache_len=capacity,
                )  # fmt: skip
                memory, metrics = thought.past_key_values, thought.metrics
            else:
                assert agent.max_new_tokens is not None
                text = generate(
                    self.model, ids, mask, past_key_values=past, max_new_tokens=agent.max_new_tokens,
                    do_sample=temperature > 0, temperature=temperature or 1.0,
                )  # fmt: skip
                memory, metrics = text.past_key_values, text.metrics
                new = text.sequences[:, ids.shape[1] :]
                answers = [s.strip() for s in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
            memory.name_segments(agent.name)
            seconds = time.perf_counter() - began
            turns.append(
                Turn(agent.name, metrics.prefill_tokens, metrics.latent_tokens, metrics.decode_tokens, seconds)
            )
        assert memory is not None
        return ChainResult(answers, turns, self.aligner, memory)

    def _slots(self, prompts: list[list[list[int]]]) -> int:
        """Slots of the longest row over the whole chain; ValueError where the model has no positions for them."""
        added = sum(a.latent_steps if a.latent_steps is not None else (a.max_new_tokens or 0) for a in self.agents)
        longest = max(sum(map(len, row)) for row in zip(*prompts, strict=True)) + added
        limit = Architecture.of(self.model).max_positions
        if limit is not None and longest > limit:
            raise ValueError(
                f"the chain goes up to {longest} positions ({longest - added} of prompts, {added} of latent steps and new "
                f"tokens), but {type(self.model).__name__} was made for {limit}; shorten the question or lower "
                "latent_steps and max_new_tokens"
            )
        return longest
