"""The inputs of a ModelWrapper call, and the cache that it returns: a LatentCache, or a padded cache of transformers."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from latentmas_kernels.cache.from_hf import append_columns
from latentmas_kernels.cache.latent_cache import LatentCache
from latentmas_kernels.cache.padded_cache import PaddedCache
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.hf.legacy_cache import as_cache, past_length, to_padded


@dataclass(frozen=True)
class CallInputs:
    """The inputs of a call.

    Attributes:
        input_ids: int [B, T].
        attention_mask: over the new tokens or over past and new, or None.
        past: the past as a cache, or None.
        cache_class: of the cache that the call returns; None for a LatentCache.
        padded: a copy of the past in that class, which the call extends; None for a LatentCache.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    past: Cache | None
    cache_class: type[PaddedCache] | None
    padded: PaddedCache | None

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        mask: Tensor | None,
        past: Any,
        past_mask: Tensor | None,
        cache_class: type[PaddedCache] | None,
    ) -> "CallInputs":
        """Check the masks and convert the past.

        Args:
            mask: [B, T] or [B, past + T], or None.
            past: a cache, a tuple of (keys, values) by layer, or None.
            past_mask: [B, past], or None.

        Raises:
            LatentMASError: where the masks contradict each other or the past, and where the past cannot be a padded cache.
        """
        past = as_cache(past)
        if past_mask is not None and past is not None:
            mask = _full_mask(mask, past_mask, past, input_ids)
        if cache_class is None:
            return cls(input_ids, mask, past, None, None)
        columns, past_mask = past_length(past), None
        if columns and mask is not None and list(mask.shape) == [len(input_ids), columns + input_ids.shape[1]]:
            past_mask = mask[:, :columns]  # of any other shape it is refused before it is used
        return cls(input_ids, mask, past, cache_class, to_padded(past, past_mask, cache_class))

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

    def extended(self, cache: LatentCache, more: Tensor) -> Any:
        """Return the call's cache, to which the prompt and more[b] slots behind it were appended. This modifies `padded`."""
        if self.padded is None:
            return cache
        append_columns(cache, self.padded, cache.lengths - self.counts - more, self._real)
        return self.padded

    def keep_last(self, cache: LatentCache, kept: Tensor, model: Any) -> Any:
        """Return the call's cache with only the last kept[b] slots of each row. This modifies the cache."""
        slot = torch.arange(int(cache.lengths.max()))
        cache.keep((slot < cache.lengths[:, None]) & (slot >= (cache.lengths - kept)[:, None]))
        if self.cache_class is None:
            return cache
        cache.rebase(model)
        return to_padded(cache, None, self.cache_class)


def _full_mask(mask: Tensor | None, past_mask: Tensor, past: Cache, input_ids: Tensor) -> Tensor | None:
    """Return the mask of past and new; of the new alone where the past is a LatentCache, which has no padding."""
    if mask is not None and list(mask.shape) != list(input_ids.shape):
        raise LatentMASError(
            f"with past_attention_mask, attention_mask covers the new tokens ({list(input_ids.shape)}); got {list(mask.shape)}"
        )
    if isinstance(past, LatentCache):
        ones = (past_mask != 0).sum(1).cpu()
        if not torch.equal(ones, past.lengths):
            raise LatentMASError(
                f"past_attention_mask has {ones.tolist()} ones, past_key_values holds {past.lengths.tolist()} tokens; leave "
                "it out, a LatentCache knows its lengths"
            )
        return mask
    return torch.cat(
        [past_mask.to(input_ids), torch.ones_like(input_ids) if mask is None else mask.to(input_ids)], dim=1
    )
