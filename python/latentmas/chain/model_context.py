"""The models of a chain: how each runs, and how a cache of one is computed again by another."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from latentmas.chain.progress import Stopwatch
from latentmas.chain.prompts import padded
from latentmas_kernels import Aligner, LatentCache, build_aligner, latent_generate
from latentmas_kernels.cache.segments import Kind
from latentmas_kernels.engines import open_engine
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.hf.chat import text_ends
from latentmas_kernels.inputs import Prompt
from latentmas_kernels.models.architecture import Architecture

SlotInput = int | dict[str | None, Tensor]
"""The input of one slot: a token id, or for a latent step its embedding [D] for each model, by the model's name."""


@dataclass
class ModelContext:
    """A model of a chain, with everything that its agents need of it.

    Attributes:
        name: as agents call it; None is the chain's own model.
        model, tokenizer: of transformers.
        engine, weights: as in `latent_generate`.
        aligner: maps hidden states to input embeddings; None where no agent on the model runs latent steps.
        target_aligners: by name of another model that latent steps go on to, the aligner to the input embeddings of that one.
    """

    name: str | None
    model: Any
    tokenizer: Any
    engine: str
    weights: str
    aligner: Aligner | None = None
    target_aligners: dict[str | None, Aligner] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise LatentMASError where the model cannot run."""
        open_engine(self.engine, self.model, self.architecture, weights=self.weights)

    @property
    def architecture(self) -> Architecture:
        """The architecture of the model as it is now: a program may edit it between two runs."""
        return Architecture.of(self.model)

    @property
    def title(self) -> str:
        return "the chain's own model" if self.name is None else f"model {self.name!r}"

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text: those of the model's generation_config, and the one with which the chat template ends an
        assistant's message (a checkpoint may lack it there, and would write on into turns of its own)."""
        return text_ends(self.model, self.tokenizer)

    def connect(self, target: "ModelContext") -> None:
        """Make the aligner for latent steps whose cache goes on to another model; token ids go there as they are.

        Raises:
            LatentMASError: where the two do not have the same tokens.
        """
        mismatch = vocab_mismatch(self, target)
        if mismatch:
            raise LatentMASError(
                f"memory cannot cross from {self.title} to {target.title}: {mismatch}. Let the agents before it write "
                "(max_new_tokens) and the next one read {notes}: text crosses between any two models"
            )
        if self.aligner is not None and target.name not in self.target_aligners:
            kind = "soft" if self.aligner.needs_logits else "ridge"
            self.target_aligners[target.name] = build_aligner(self.model, kind, target_model=target.model)

    def extend(self, cache: LatentCache, ids: list[list[int]], kind: Kind) -> float:
        """Feed tokens into a cache, which this modifies, as a segment of that kind.

        Args:
            ids: per row; rows may have none.

        Returns:
            Seconds that it took.
        """
        architecture = self.architecture
        runner = open_engine(self.engine, self.model, architecture, weights=self.weights)
        tokens, mask = padded(ids, architecture.device)
        start, stopwatch = cache.lengths, Stopwatch(architecture.device)
        with cache.transaction():
            runner.extend(cache, Prompt(mask.sum(1).cpu(), tokens), logits=False)
        cache.add_segment(kind, start)
        return stopwatch.lap()


def vocab_mismatch(one: ModelContext, other: ModelContext) -> str | None:
    """Return why token ids of one model mean nothing to the other, as a clause; None where they mean the same."""
    here, there = one.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    apart = sorted(here.items() ^ there.items(), key=lambda item: item[1])
    if apart:
        token, number = apart[0]
        return f"their tokenizers have other tokens ({len(here)} and {len(there)}; {token!r} is {number} in one only)"
    rows = max(here.values(), default=-1) + 1
    for context in (one, other):
        if context.architecture.vocab_size < rows:
            return f"{context.title} has {context.architecture.vocab_size} input embeddings for {rows} tokens"
    return None


@torch.no_grad()
def recompute_cache(
    context: ModelContext, slot_inputs: list[list[SlotInput]], capacity: int
) -> tuple[LatentCache, float]:
    """Compute a cache with a model, from the inputs of its slots.

    Args:
        slot_inputs: per row and slot.
        capacity: slots per row of the new buffer.

    Returns:
        The cache, and the seconds of the forward.
    """
    a, embedding = context.architecture, context.model.get_input_embeddings()
    rows = []
    for inputs in slot_inputs:
        ids = torch.tensor([slot if isinstance(slot, int) else 0 for slot in inputs], device=a.device)
        row = embedding(ids).to(a.dtype)
        for at, slot in enumerate(inputs):
            if not isinstance(slot, int):
                row[at] = slot[context.name]
        rows.append(row)
    embeds = pad_sequence(rows, batch_first=True, padding_side="left")
    ones = [torch.ones(len(row), dtype=torch.int64) for row in rows]
    mask = pad_sequence(ones, batch_first=True, padding_side="left")
    read = latent_generate(
        context.model, inputs_embeds=embeds, attention_mask=mask, latent_steps=0, aligner="identity",
        engine=context.engine, weights=context.weights, max_cache_len=capacity,
    )  # fmt: skip
    return read.past_key_values, read.metrics.prefill_seconds
