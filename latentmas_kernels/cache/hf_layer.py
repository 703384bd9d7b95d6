"""A KVBuffer layer by layer, as transformers' own forward uses a cache."""

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from latentmas_kernels.cache.buffer import KVBuffer
from latentmas_kernels.errors import LatentMASError


def check_counted(cache: KVBuffer, what: str) -> None:
    """Raise LatentMASError where the slots of some row do not have the positions 0, 1, 2, ...; leave the cache as it is."""
    if bool((cache.next_position != cache.lengths).any()):
        raise LatentMASError(
            f"{what}: the slots of this LatentCache do not have the positions 0, 1, 2, ... (lengths "
            f"{cache.lengths.tolist()}, next positions {cache.next_position.tolist()}), which transformers would assume"
        )


def uniform_length(cache: KVBuffer) -> int:
    """Return the length of all rows; raise LatentMASError where lengths differ or positions have gaps. This does not modify the
    cache."""
    check_counted(cache, "use inside a transformers model")
    length = int(cache.lengths[0])
    if bool((cache.lengths != length).any()):
        raise LatentMASError(
            f"this LatentCache has ragged rows (lengths {cache.lengths.tolist()}), which a transformers model cannot "
            "tell apart; pass to_hf() with attention_mask(), or use latentmas_kernels.generate()"
        )
    return length


class HFCacheLayer(CacheLayerMixin):
    """One layer as transformers sees it. The last layer to write adds the tokens of the forward to the lengths."""

    is_sliding = False
    is_croppable = True
    is_compileable = False  # True would make generate() compile the model on CUDA
    supports_early_init = False
    is_initialized = True

    def __init__(self, cache: KVBuffer, index: int) -> None:
        # Not a cycle: buffers of gigabytes would wait for the garbage collector.
        self._cache_ref, self._index = weakref.ref(cache), index

    @property
    def _cache(self) -> KVBuffer:
        cache = self._cache_ref()
        assert cache is not None, "layers do not outlive their cache"
        return cache

    @property
    def _cache_without_prefixes(self) -> KVBuffer:
        """The cache with no shared prefix: transformers reads the keys and values of each row in that row. This modifies a
        cache that has shared prefixes."""
        cache = self._cache
        if bool(cache.prefix_len.any()):
            cache.make_private()
        return cache

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        return self._cache_without_prefixes.keys[self._index, :, :, : uniform_length(self._cache)]

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        return self._cache_without_prefixes.values[self._index, :, :, : uniform_length(self._cache)]

    @property
    def batch_size(self) -> int:
        return self._cache.batch_size

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the buffer exists."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new keys and values [B, kv_heads, T, head_dim] and return all of this layer. This modifies the cache."""
        cache, new = self._cache_without_prefixes, key_states.shape[2]
        start = uniform_length(cache)
        stop = start + new
        if stop > cache.capacity:
            raise LatentMASError(
                f"this LatentCache has a capacity of {cache.capacity} slots per row, {stop} are needed; "
                f"pass cache.fork(capacity={stop}) or more"
            )
        if key_states.shape[0] != cache.batch_size:
            raise LatentMASError(f"this LatentCache has {cache.batch_size} rows, the inputs have {key_states.shape[0]}")
        if self._index == 0:
            # Only here: a copy between two layers would lose what the layers before have written. Branches see that this cache
            # is being written until its last layer has; a forward that dies on the way costs them a copy, no more.
            cache.begin_write()
        cache.device_copy_of = None
        keys, values = cache.keys[self._index], cache.values[self._index]
        keys[:, :, start:stop], values[:, :, start:stop] = key_states, value_states
        if self._index == cache.kv_shape.layers - 1:
            before = cache.lengths
            cache.positions[:, start:stop] = torch.arange(start, stop, device=cache.positions.device)
            cache.advance(torch.full_like(before, new))
            cache.add_segment("prompt" if new > 1 else "text", before)
            cache.finish_write()
        return keys[:, :, :stop], values[:, :, :stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return uniform_length(self._cache) + query_length, 0

    def get_seq_length(self) -> int:
        return uniform_length(self._cache)

    def get_max_length(self) -> int:
        return self._cache.capacity
