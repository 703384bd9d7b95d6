"""Validate the inputs of a call: prompts, left-packed per row; steps, capacity and end tokens."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from latentmas_kernels.cache.from_hf import check_call_mask, check_covers
from latentmas_kernels.cache.latent_cache import LatentCache
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.architecture import Architecture


@dataclass(frozen=True)
class Prompt:
    """The inputs of one forward over ragged rows.

    Attributes:
        counts: int64 [B] on the CPU, real positions of each row; a row with 0 takes part but stores nothing.
        input_ids: int64 [B, T] with the last counts[b] columns of row b real, or None.
        inputs_embeds: [B, T, D] likewise, or None.
    """

    counts: Tensor
    input_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None

    @property
    def columns(self) -> int:
        given = self.input_ids if self.input_ids is not None else self.inputs_embeds
        assert given is not None
        return given.shape[1]


def read_prompt(
    architecture: Architecture,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
    past: Cache | None,
) -> tuple[Prompt, LatentCache | None]:
    """Check the inputs of a call and drop their padding.

    The mask may cover the new tokens, or past + new as transformers wants it; its part over the past then marks which
    tokens of a transformers cache are padding, and must agree with the lengths of a LatentCache.

    Returns:
        The prompt, and the past as a LatentCache (the caller's own object where it was one).

    Raises:
        LatentMASError: for every input that is not supported.
    """
    given = _given(architecture, input_ids, inputs_embeds)
    batch, columns = given.shape[:2]
    past_columns = 0
    if past is not None:
        if not isinstance(past, Cache):
            raise LatentMASError(
                f"past_key_values must be a LatentCache or another transformers Cache; got {type(past).__name__}"
            )
        past_columns = int(past.lengths.max()) if isinstance(past, LatentCache) else int(past.get_seq_length())
    mask, past_mask = _masks(attention_mask, batch, columns, past_columns)
    if isinstance(past, LatentCache):
        past.check_fits(architecture, batch)
        if past_mask is not None and not torch.equal((past_mask != 0).sum(1), past.lengths):
            raise LatentMASError(
                f"attention_mask has {(past_mask != 0).sum(1).tolist()} ones over the past, past_key_values holds "
                f"{past.lengths.tolist()} tokens; pass a mask over the new tokens only, or attention_mask(new) of the cache"
            )
    elif past is not None:
        if past_mask is not None:
            check_call_mask(past, past_mask)
        read = LatentCache.from_hf(past, past_mask)
        read.check_fits(architecture, batch)
        check_covers(past, architecture)
        past = read

    counts = mask.sum(1)
    if bool((counts == 0).any()):
        empty = (counts == 0).nonzero().flatten().tolist()
        raise LatentMASError(f"attention_mask is all zeros in row {empty}; every row needs at least one token")
    if input_ids is not None:
        real = input_ids[mask.to(input_ids.device)]
        low, high = int(real.min()), int(real.max())
        if low < 0 or high >= architecture.vocab_size:
            raise LatentMASError(
                f"input_ids go from {low} to {high}; {architecture.name} has token ids 0 to {architecture.vocab_size - 1}. "
                "Use the tokenizer that belongs to the model."
            )
    packed = _left_pack(given, mask, counts)
    prompt = Prompt(counts, **{"input_ids" if input_ids is not None else "inputs_embeds": packed})
    return prompt, past


def _given(architecture: Architecture, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    if (input_ids is None) == (inputs_embeds is None):
        raise LatentMASError("pass either input_ids or inputs_embeds, and not both")
    if input_ids is not None:
        given, name = input_ids, "input_ids"
        if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise LatentMASError(f"input_ids must be integers [B, T]; got {input_ids.dtype} {list(input_ids.shape)}")
    else:
        assert inputs_embeds is not None
        given, name = inputs_embeds, "inputs_embeds"
        width, dtype = architecture.hidden_size, architecture.dtype
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != width or inputs_embeds.dtype != dtype:
            raise LatentMASError(
                f"inputs_embeds must be {dtype} [B, T, {width}]; got {inputs_embeds.dtype} {list(inputs_embeds.shape)}"
            )
        if inputs_embeds.requires_grad:
            raise LatentMASError(
                "inputs_embeds requires a gradient, which no call here computes; pass inputs_embeds.detach()"
            )
        if not bool(inputs_embeds.isfinite().all()):
            raise LatentMASError("inputs_embeds holds NaN or Inf; supported are finite embeddings")
    if given.shape[0] == 0 or given.shape[1] == 0:
        raise LatentMASError(f"{name} is empty ({list(given.shape)}); every row needs at least one token")
    if given.device != architecture.device:
        raise LatentMASError(
            f"{name} is on {given.device}, {architecture.name} on {architecture.device}; move it with .to(model.device)"
        )
    return given


def _masks(mask: Tensor | None, batch: int, columns: int, past_columns: int) -> tuple[Tensor, Tensor | None]:
    """Return the mask of the new tokens and, where it was given, that of the past; both bool on the CPU."""
    if mask is None:
        return torch.ones(batch, columns, dtype=torch.bool), None
    if list(mask.shape) not in ([batch, columns], [batch, past_columns + columns]):
        both = f" or {[batch, past_columns + columns]} (past + new tokens)" if past_columns else ""
        raise LatentMASError(f"attention_mask must be {[batch, columns]} (new tokens){both}; got {list(mask.shape)}")
    mask = mask.cpu()
    strange = mask[(mask != 0) & (mask != 1)]
    if strange.numel():
        raise LatentMASError(f"attention_mask must hold 0 (padding) and 1; got {strange[0].item()}")
    mask = mask.bool()
    if mask.shape[1] == columns:
        return mask, None
    return mask[:, past_columns:], mask[:, :past_columns]


def _left_pack(given: Tensor, mask: Tensor, counts: Tensor) -> Tensor:
    """Move the real columns of each row to its right end, in order, and drop columns that are padding in every row."""
    width = int(counts.max())
    # A stable sort of the mask puts the padding (0) first and keeps the order among the real columns.
    order = mask.int().argsort(dim=1, stable=True)[:, -width:].to(given.device)
    packed = given[torch.arange(len(given), device=given.device)[:, None], order]
    padding = (torch.arange(width)[None, :] < width - counts[:, None]).to(given.device)
    return packed.masked_fill(padding if given.dim() == 2 else padding[:, :, None], 0)


def padded_ids(prompt: Prompt, pad_token_id: int) -> Tensor:
    """Return the prompt's ids, int64 [B, T], with the padding token before each row's first real one."""
    assert prompt.input_ids is not None
    padding = torch.arange(prompt.columns)[None, :] < prompt.columns - prompt.counts[:, None]
    return prompt.input_ids.long().masked_fill(padding.to(prompt.input_ids.device), pad_token_id)


def steps_per_row(latent_steps: int | Sequence[int], batch: int) -> Tensor:
    """Return each row's number of latent steps, int64 [B] on the CPU.

    Raises:
        LatentMASError: for numbers below 0, another count of them than rows, and 0 beside others.
    """
    given = list(latent_steps) if isinstance(latent_steps, Sequence) else [latent_steps] * batch
    try:
        each = [-1 if isinstance(n, bool) else operator.index(n) for n in given]  # those of numpy as well
    except TypeError:
        each = []
    if len(each) != batch or min(each) < 0:
        raise LatentMASError(f"latent_steps must be an integer of 0 or more, or {batch} of them; got {latent_steps!r}")
    if 0 in each and any(each):
        raise LatentMASError(
            f"rows with latent steps and rows without need calls of their own; got latent_steps={each}"
        )
    return torch.tensor(each)


def needed_capacity(
    architecture: Architecture,
    prompt: Prompt,
    past: LatentCache | None,
    more: Tensor,
    what: str,
    max_cache_len: int | None,
) -> int:
    """Return the slots per row that the cache of a call has: all that the call appends, or max_cache_len.

    Args:
        more: int64 [B] on the CPU, positions to append behind the prompt.
        what: their name in error messages.
        max_cache_len: slots that the caller asks for; None: as many as are needed.

    Raises:
        LatentMASError: where max_cache_len slots or the model's positions are too few.
    """
    zeros = torch.zeros_like(prompt.counts)
    held, position = (zeros, zeros) if past is None else (past.lengths, past.next_position)
    slots = held + prompt.counts + more
    row = int(slots.argmax())
    need = int(slots[row])
    parts = f"past {int(held[row])} + prompt {int(prompt.counts[row])} + {what} {int(more[row])}"
    if max_cache_len is not None and need > max_cache_len:
        raise LatentMASError(
            f"row {row} needs {need} slots ({parts}), but max_cache_len is {max_cache_len}; "
            f"pass max_cache_len={need} or more, or shorten the prompt"
        )
    last = int((position + prompt.counts + more).max())
    if architecture.max_positions is not None and last > architecture.max_positions:
        raise LatentMASError(
            f"the call goes up to {last} positions ({parts}), but {architecture.name} was made for "
            f"{architecture.max_positions} (max_position_embeddings); shorten the prompt, or ask for fewer "
            f"{what.removesuffix(' but the last')}"
        )
    return need if max_cache_len is None else max_cache_len


def end_tokens(model: Any, eos_token_id: int | Sequence[int] | None | str) -> list[int]:
    """Return the end-of-sequence tokens that `eos_token_id` means; "auto" is those of the model's generation_config."""
    if eos_token_id == "auto":
        eos_token_id = model.generation_config.eos_token_id
    if eos_token_id is None:
        return []
    return [eos_token_id] if isinstance(eos_token_id, int) else [int(token) for token in eos_token_id]
