"""The eager engine: transformers' own forward, with explicit positions and masks, on a ragged cache.

Runs every model that `Architecture.of` accepts, and is the reference that every faster engine is tested against.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from latentmas_kernels.alignment import Aligner
from latentmas_kernels.cache.latent_cache import LatentCache
from latentmas_kernels.cache.slot_mapping import SlotMapping
from latentmas_kernels.engines.base import LatentParams, LatentResult, OnStep
from latentmas_kernels.engines.stepwise import latent_stepwise
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.inputs import Prompt
from latentmas_kernels.models.architecture import Architecture, cache_argument, decoder_of


def unsupported_reason(model: Any, architecture: Architecture) -> str | None:
    """Return None: this engine runs every model that has an Architecture."""
    return None


def memory_report(model: Any) -> dict[str, int]:
    """Return nothing: this engine keeps nothing between calls."""
    return {}


class EagerEngine:
    """See `latentmas_kernels.engines.base.Engine`."""

    name = "eager"
    uses_thread_pool = False

    def __init__(self, model: Any, architecture: Architecture) -> None:
        self.model, self.decoder, self.architecture = model, decoder_of(model), architecture
        self.cache_argument = cache_argument(model.forward)

    def extend(self, cache: LatentCache, prompt: Prompt, *, logits: bool) -> Tensor:
        # Left-padding puts the last position of every row into the last column, which is where logits_to_keep=1 looks.
        # The model's own forward is asked for logits, since some scale or cap them after the lm_head.
        with self._inputs(cache, prompt) as inputs:
            if logits:
                return self.of_tokens(self.model(**inputs, logits_to_keep=1).logits)
            return self.decoder(**inputs).last_hidden_state[:, -1]

    def extend_both(self, cache: LatentCache, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """Run the prompt as `extend` does; return states [B, D] and logits [B, V]. The forward collects all layers' states."""
        with self._inputs(cache, prompt) as inputs:
            result = self.model(**inputs, logits_to_keep=1, output_hidden_states=True)
        return result.hidden_states[-1][:, -1], self.of_tokens(result.logits)

    def of_tokens(self, logits: Tensor) -> Tensor:
        """Return [B, V] of a forward's logits [B, 1, rows of the lm_head], which may be more than those of the embedding."""
        return logits[:, -1, : self.architecture.vocab_size]

    @contextmanager
    def _inputs(self, cache: LatentCache, prompt: Prompt) -> Iterator[dict[str, Any]]:
        """Give the arguments of a forward that appends the prompt. The cache's lengths grow at the end of the block."""
        slots = cache.reserve(prompt.counts, prompt.columns)
        yield {
            "input_ids": prompt.input_ids,
            "inputs_embeds": prompt.inputs_embeds,
            "attention_mask": self._masks(cache, slots),
            "position_ids": slots.positions,
            self.cache_argument: _RaggedForward(cache, slots),
            "use_cache": True,
        }
        cache.advance(prompt.counts)

    def run_latent(
        self, cache: LatentCache, seed: Tensor, aligner: Aligner, latent_params: LatentParams, on_step: OnStep | None
    ) -> LatentResult:
        return latent_stepwise(self, cache, seed, aligner, latent_params, on_step)

    def _masks(self, cache: LatentCache, slots: SlotMapping) -> Tensor | dict[str, Tensor]:
        """Return the explicit mask [B, 1, T, width], one per layer type where the model mixes them.

        Query q sees slot k of its row if k is in use, pos_k <= pos_q and, in a sliding layer, pos_q - pos_k < window.
        """
        stored = cache.positions[:, None, None, : slots.width]
        query = slots.positions[:, None, :, None]
        in_use = torch.arange(slots.width, device=stored.device) < slots.stop[:, None, None, None]
        causal = in_use & (stored <= query)
        masks = {}
        for kind, window in zip(self.architecture.layer_types, self.architecture.windows, strict=True):
            if kind not in masks:
                masks[kind] = self.attention_mask_of(causal if window is None else causal & (query - stored < window))
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def attention_mask_of(self, mask: Tensor) -> Tensor:
        """Return a bool mask of visible slots in the form that the model's attention takes: bool, or added to the scores."""
        if self.model.config._attn_implementation == "sdpa":
            return mask
        lowest = torch.finfo(self.architecture.dtype).min
        return torch.zeros(mask.shape, dtype=self.architecture.dtype, device=mask.device).masked_fill_(~mask, lowest)


class _RaggedForward(Cache):
    """The cache of one forward: stores the real positions in their slots, returns all slots in use."""

    def __init__(self, cache: LatentCache, slots: SlotMapping) -> None:
        super().__init__(layers=cache.layers)
        self.cache, self.slots = cache, slots
        # [B, 1, width, 1], true for slots behind a row's end: they are undefined, and 0 x NaN is NaN in attention.
        stop, width = slots.stop, slots.width
        # The row that holds each slot of a row: the row itself, or for a shared prefix the prefix row.
        self.rows: Tensor | None = None
        if bool(cache.prefix_len.any()):
            own = torch.arange(width) >= cache.prefix_len[:, None]
            rows = torch.where(own, torch.arange(len(own))[:, None], cache.prefix_row[:, None])
            self.rows = rows.to(stop.device)
        self.unused = (
            (torch.arange(width, device=stop.device) >= stop[:, None])[:, None, :, None] if slots.ragged else None
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        expected = (self.cache.keys.shape[2], self.cache.keys.shape[4])
        for states in (key_states, value_states):
            if (states.shape[1], states.shape[3]) != expected:
                raise LatentMASError(
                    f"layer {layer_idx} writes {states.shape[1]} heads of width {states.shape[3]}, the cache is made for "
                    f"{expected[0]} of {expected[1]}; supported are models with one KV shape for all layers"
                )
        self.cache.write(layer_idx, key_states, value_states, self.slots)
        return self._gather(self.cache.keys[layer_idx], key_states), self._gather(
            self.cache.values[layer_idx], key_states
        )

    def _gather(self, store: Tensor, like: Tensor) -> Tensor:
        used = store[:, :, : self.slots.width]
        if self.rows is not None:
            columns = torch.arange(self.slots.width, device=self.rows.device)
            used = store.transpose(1, 2)[self.rows, columns].transpose(1, 2)
        if self.unused is not None:
            used = used.masked_fill(self.unused, 0)
        return used.to(like.device)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.slots.width
