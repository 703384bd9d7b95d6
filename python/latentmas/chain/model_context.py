"""The models that agents run on, and how a memory crosses from one to another."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from latentmas_kernels import Aligner, LatentCache, build_aligner, latent_generate
from latentmas_kernels.engines import open_engine
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.hf.chat import text_ends
from latentmas_kernels.models.architecture import Architecture


@dataclass
class Seat:
    """A model with what agents on it need.

    Attributes:
        name: as agents call it; None is the chain's own.
        model, tokenizer: of transformers.
        aligner: how hidden states are fed back; None where no agent on it thinks.
        across: per other seat that thoughts go on to, the aligner to its input embeddings.
    """

    name: str | None
    model: Any
    tokenizer: Any
    aligner: Aligner | None = None
    across: dict[str | None, Aligner] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str | None, given: tuple[Any, Any], engine: str, weights: str) -> "Seat":
        """From (model, tokenizer). Raises ValueError where the model cannot run."""
        model, tokenizer = given
        open_engine(engine, model, Architecture.of(model), weights=weights)
        return cls(name, model, tokenizer)

    @property
    def architecture(self) -> Architecture:
        """As the model is now: a program may edit it between two runs."""
        return Architecture.of(self.model)

    @property
    def title(self) -> str:
        return "the chain's own model" if self.name is None else f"model {self.name!r}"

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text: those of the model's generation_config, and the one with which the chat template ends an
        assistant's message (a checkpoint may lack it there, and would write on into turns of its own)."""
        return text_ends(self.model, self.tokenizer)

    @property
    def slot_bytes(self) -> int:
        """Bytes of keys and values of one slot."""
        a = self.architecture
        return 2 * a.layers * a.kv_heads * a.head_dim * a.dtype.itemsize

    def open_way(self, other: "Seat") -> None:
        """Let the memory of agents on this model go on to the other one: texts as tokens, thoughts by an alignment.

        Raises:
            ValueError: where the two do not have the same tokens.
        """
        differs = tokens_differ(self, other)
        if differs:
            raise LatentMASError(
                f"memory cannot cross from {self.title} to {other.title}: {differs}. Let the agents before it write "
                "(max_new_tokens) and the next one read {notes}: text crosses between any two models"
            )
        if self.aligner is not None and other.name not in self.across:
            kind = "soft" if self.aligner.needs_logits else "ridge"
            self.across[other.name] = build_aligner(self.model, kind, target_model=other.model)


def tokens_differ(one: Seat, other: Seat) -> str | None:
    """Why token ids of one mean nothing to the other, as a clause; None where they mean the same."""
    here, there = one.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    apart = sorted(here.items() ^ there.items(), key=lambda item: item[1])
    if apart:
        token, number = apart[0]
        return f"their tokenizers have other tokens ({len(here)} and {len(there)}; {token!r} is {number} in one only)"
    rows = max(here.values(), default=-1) + 1
    for seat in (one, other):
        if seat.architecture.vocab_size < rows:
            return f"{seat.title} has {seat.architecture.vocab_size} input embeddings for {rows} tokens"
    return None


Fed = int | dict[str | None, Tensor]
"""What one slot was fed: a token, or per model of another seat the embedding [D] of a thought."""


@torch.no_grad()
def replay(seat: Seat, fed: list[list[Fed]], capacity: int, engine: str, weights: str) -> tuple[LatentCache, float]:
    """The memory of rows, read anew by a model from what their slots were fed.

    Returns:
        The memory, and seconds of the forward.
    """
    a, embedding = seat.architecture, seat.model.get_input_embeddings()
    width = max(map(len, fed))
    embeds = torch.zeros(len(fed), width, a.hidden_size, dtype=a.dtype, device=a.device)
    mask = torch.zeros(len(fed), width, dtype=torch.int64)
    for row, slots in enumerate(fed):
        mask[row, width - len(slots) :] = 1
        tokens = [(width - len(slots) + at, slot) for at, slot in enumerate(slots) if isinstance(slot, int)]
        if tokens:
            columns, ids = zip(*tokens, strict=True)
            embeds[row, list(columns)] = embedding(torch.tensor(ids, device=a.device)).to(a.dtype)
        for at, slot in enumerate(slots):
            if not isinstance(slot, int):
                embeds[row, width - len(slots) + at] = slot[seat.name]
    read = latent_generate(
        seat.model, inputs_embeds=embeds, attention_mask=mask, latent_steps=0, aligner="identity",
        engine=engine, weights=weights, max_cache_len=capacity,
    )  # fmt: skip
    return read.past_key_values, read.metrics.prefill_seconds
