"""What a call of ModelWrapper goes on from, and what it gives back: a LatentCache, or a cache in columns."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from latentmas_kernels.cache.from_hf import append_columns
from latentmas_kernels.cache.latent_cache import LatentCache
from latentmas_kernels.cache.padded_cache import PaddedCache
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.hf.legacy_cache import as_cache, in_columns, past_length


@dataclass(frozen=True)
class Continued:
    """The inputs of a call, and the columns before them.

    Attributes:
        input_ids: int [B, T].
        attention_mask: over the new tokens or over past and new, or None.
        cache: the past, or None.
        kind: of the cache that is given back; None for a LatentCache.
        columns: the past as a cache of that kind, which is not the caller's; None for a LatentCache.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    cache: Cache | None
    kind: type[PaddedCache] | None
    columns: PaddedCache | None

    @classmethod
    def of(
        cls, input_ids: Tensor, mask: Tensor | None, past: Any, past_mask: Tensor | None, kind: type[PaddedCache] | None
    ) -> "Continued":
        """
        Args:
            mask: [B, T] or [B, past + T], or None.
            past: a cache, a tuple of (keys, values) by layer, or None.
            past_mask: [B, past], or None.

        Raises:
            ValueError: where the masks contradict each other or the past, and where it cannot be given back in columns.
        """
        cache = as_cache(past)
        if past_mask is not None and cache is not None:
            mask = _joined(mask, past_mask, cache, input_ids)
        if kind is None:
            return cls(input_ids, mask, cache, None, None)
        held, past_mask = past_length(cache), None
        if held and mask is not None and list(mask.shape) == [len(input_ids), held + input_ids.shape[1]]:
            past_mask = mask[:, :held]  # of any other shape it is refused before it is used
        return cls(input_ids, mask, cache, kind, in_columns(cache, past_mask, kind))

    @property
    def new_mask(self) -> Tensor | None:
        """[B, T], or None where no new token is padding."""
        return None if self.attention_mask is None else self.attention_mask[:, -self.input_ids.shape[1] :]

    @property
    def counts(self) -> Tensor:
        """int64 [B] on the CPU: real new tokens."""
        return self._real.sum(1)

    @property
    def _real(self) -> Tensor:
        if self.new_mask is None:
            return torch.ones(self.input_ids.shape, dtype=torch.bool)
        return self.new_mask.cpu() != 0

    def grown(self, memory: LatentCache, more: Tensor) -> Any:
        """The memory to give back once the prompt and more[b] slots behind it were added."""
        if self.columns is None:
            return memory
        append_columns(memory, self.columns, memory.lengths - self.counts - more, self._real)
        return self.columns

    def cut(self, memory: LatentCache, kept: Tensor, model: Any) -> Any:
        """The memory to give back of which only the last kept[b] slots of each row are kept."""
        slot = torch.arange(int(memory.lengths.max()))
        memory.keep((slot < memory.lengths[:, None]) & (slot >= (memory.lengths - kept)[:, None]))
        if self.kind is None:
            return memory
        memory.rebase(model)
        return in_columns(memory, None, self.kind)


def _joined(mask: Tensor | None, past_mask: Tensor, cache: Cache, input_ids: Tensor) -> Tensor | None:
    """The mask of past and new. Columns of padding that a LatentCache does not have are left out of its own."""
    if mask is not None and list(mask.shape) != list(input_ids.shape):
        raise LatentMASError(
            f"with past_attention_mask, attention_mask covers the new tokens ({list(input_ids.shape)}); got {list(mask.shape)}"
        )
    if isinstance(cache, LatentCache):
        ones = (past_mask != 0).sum(1).cpu()
        if not torch.equal(ones, cache.lengths):
            raise LatentMASError(
                f"past_attention_mask has {ones.tolist()} ones, past_key_values holds {cache.lengths.tolist()} tokens; leave "
                "it out, a LatentCache knows its lengths"
            )
        return mask
    return torch.cat(
        [past_mask.to(input_ids), torch.ones_like(input_ids) if mask is None else mask.to(input_ids)], dim=1
    )
