"""A LatentCache layer by layer, as transformers' own forward uses a cache."""

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from latentmas_kernels.errors import LatentMASError

if TYPE_CHECKING:
    from latentmas_kernels.cache.latent_cache import LatentCache


class HFCacheLayer(CacheLayerMixin):
    """One layer as transformers sees it. The last layer to write counts the tokens of the forward in."""

    is_sliding = False
    is_croppable = True
    is_compileable = False  # True would make generate() compile the model on CUDA
    supports_early_init = False
    is_initialized = True

    def __init__(self, cache: "LatentCache", index: int) -> None:
        # Not a cycle: buffers of gigabytes would wait for the garbage collector.
        self._of, self._index = weakref.ref(cache), index

    @property
    def _cache(self) -> "LatentCache":
        cache = self._of()
        assert cache is not None, "layers do not outlive their cache"
        return cache

    @property
    def _unborrowed(self) -> "LatentCache":
        """For whoever reads keys and values: transformers takes each row from its own place."""
        cache = self._cache
        if bool(cache.prefix_len.any()):
            cache.make_private()
        return cache

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        return self._unborrowed.keys[self._index, :, :, : self._cache.uniform_length()]

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        return self._unborrowed.values[self._index, :, :, : self._cache.uniform_length()]

    @property
    def batch_size(self) -> int:
        return self._cache.batch_size

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the buffer exists."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        cache, new = self._unborrowed, key_states.shape[2]
        start = cache.uniform_length()
        stop = start + new
        if stop > cache.capacity:
            raise LatentMASError(
                f"this LatentCache has a capacity of {cache.capacity} slots per row, {stop} are needed; "
                f"pass cache.fork(capacity={stop}) or more"
            )
        if key_states.shape[0] != cache.batch_size:
            raise LatentMASError(f"this LatentCache has {cache.batch_size} rows, the inputs have {key_states.shape[0]}")
        if self._index == 0:
            # Just here: a copy between two layers would leave behind what the layers before have written. Branches see that
            # this one is writing until its last layer has; a forward that dies on the way costs them a copy, no more.
            cache.begin_write()
        cache.device_copy_of = None
        keys, values = cache.keys[self._index], cache.values[self._index]
        keys[:, :, start:stop], values[:, :, start:stop] = key_states, value_states
        if self._index == len(cache) - 1:
            before = cache.lengths
            cache.positions[:, start:stop] = torch.arange(start, stop, device=cache.positions.device)
            cache.advance(torch.full_like(before, new))
            cache.add_segment("prompt" if new > 1 else "text", before)
            cache._writing = False
        return keys[:, :, :stop], values[:, :, :stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.uniform_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self._cache.uniform_length()

    def get_max_length(self) -> int:
        return self._cache.capacity
