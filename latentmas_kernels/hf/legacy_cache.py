"""LegacyCache: a transformers cache with the interface of transformers 4, by layers of (keys, values)."""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from transformers import Cache

from latentmas_kernels.cache.latent_cache import LatentCache
from latentmas_kernels.cache.padded_cache import PaddedCache, is_gap, keeps, real_columns
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.warn_once import warn_once

Pair = tuple[Tensor, Tensor]
"""Keys and values of one layer, [B, kv_heads, columns, head_dim] each."""


MANUAL_CUT = (
    "from_legacy_cache, key_cache: what was cut out of a memory by hand is taken to have the positions 0, 1, 2, ..., as the "
    "published LatentMAS code takes it, under keys that were rotated for others; latent_only= and sequential_info_only= of "
    "ModelWrapper.generate_latent_batch keep the same tokens exactly"
)


class _PerLayer(list[Tensor]):
    """The keys or the values of all layers, as in transformers 4. Setting an item sets the layer's tensor in the cache."""

    def __init__(self, cache: Cache, name: str) -> None:
        self._layers: list[Any] = cache.layers
        self._name = name
        super().__init__(getattr(layer, name) for layer in self._layers)

    def __setitem__(self, index: Any, new: Any) -> None:
        super().__setitem__(index, new)
        if len(self) != len(self._layers):
            raise LatentMASError(
                f"got {len(self)} tensors for the {self._name} of a cache of {len(self._layers)} layers; set one per layer, or "
                "make a cache of fewer with LegacyCache.from_legacy_cache"
            )
        for layer, tensor in zip(self._layers, self, strict=True):
            if tensor is not getattr(layer, self._name):
                if self._name == "keys" and not _is_prefix(layer.keys, tensor):
                    warn_once(MANUAL_CUT)
                setattr(layer, self._name, tensor)

    def _fixed(self, *arguments: Any, **options: Any) -> Any:
        raise TypeError(
            "the layers of a cache can be set one by one (key_cache[0] = keys), and not added, removed or reordered here; "
            "make another cache with LegacyCache.from_legacy_cache"
        )

    __delitem__ = __iadd__ = __imul__ = append = extend = insert = pop = remove = clear = reverse = sort = _fixed


class LegacyCache(PaddedCache):
    """A PaddedCache that can be indexed and iterated as a tuple of (keys, values), and made from one.

    `past[0][0].shape[-2]`, `len(past)`, `for keys, values in past`, `key_cache`, `to_legacy_cache()`, `from_legacy_cache()` and
    `crop(columns_to_keep)` work as in transformers 4. Columns of padding hold zeros, and are recognized by that.
    """

    @overload
    def __getitem__(self, layer: int) -> Pair: ...
    @overload
    def __getitem__(self, layer: slice) -> tuple[Pair, ...]: ...
    def __getitem__(self, layer: int | slice) -> Pair | tuple[Pair, ...]:
        return self.to_legacy_cache()[layer]

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.to_legacy_cache())

    @property
    def key_cache(self) -> list[Tensor]:
        """The keys of each layer. `key_cache[i] = keys` and `key_cache = [...]` set those of the cache."""
        return _PerLayer(self, "keys")

    @key_cache.setter
    def key_cache(self, keys: Iterable[Tensor]) -> None:
        self.key_cache[:] = keys

    @property
    def value_cache(self) -> list[Tensor]:
        """The values of each layer; as `key_cache`."""
        return _PerLayer(self, "values")

    @value_cache.setter
    def value_cache(self, values: Iterable[Tensor]) -> None:
        self.value_cache[:] = values

    def to_legacy_cache(self) -> tuple[Pair, ...]:
        """Return (keys, values) of each layer: the cache's own tensors, which nothing changes in place. Zeros where the model
        runs no layer."""
        layers: list[Any] = self.layers
        _exposed.add(self)
        like = next((layer for layer in layers if layer.is_initialized), None)
        return tuple(
            (layer.keys, layer.values)
            if layer.is_initialized or like is None
            else (torch.zeros_like(like.keys), torch.zeros_like(like.values))
            for layer in layers
        )

    @classmethod
    def from_legacy_cache(cls, past_key_values: Sequence[Sequence[Tensor]] | None = None) -> "LegacyCache":
        """Return a cache of such layers, mostly some that were cut; an empty one from None.

        The columns of each row that are not zeros have the positions 0, 1, 2, ... from here on, as in transformers: where
        others were cut off before them, their keys stay rotated for the positions that they had. One warning reports it,
        unless these are the first columns, or all, of a LegacyCache that still exists: then nothing was cut off before them.
        """
        if past_key_values is not None and len(past_key_values):
            known = [list[Any](cache.layers)[0].keys for cache in list(_exposed) if cache.layers]
            if not any(_is_prefix(keys, past_key_values[0][0]) for keys in known):
                warn_once(MANUAL_CUT)
        return cls.of(past_key_values or ())

    @classmethod
    def of(cls, layers: Sequence[Sequence[Tensor]]) -> "LegacyCache":
        return cls(ddp_cache_data=[(layer[0], layer[1]) for layer in layers]) if len(layers) else cls()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove columns, as in transformers; a positive number is, as in transformers 4, that of the columns to keep."""
        if tokens_to_remove > 0:
            tokens_to_remove = min(0, tokens_to_remove - self.get_seq_length())
        super().crop(tokens_to_remove)


_exposed: weakref.WeakSet[LegacyCache] = weakref.WeakSet()
"""Caches whose tensors a caller has got, and may have cut."""


def _is_prefix(whole: Any, part: Any) -> bool:
    """Return whether keys `part` [B, kv_heads, columns, head_dim] are the first columns, or all, of keys `whole`."""
    if not (isinstance(whole, Tensor) and isinstance(part, Tensor)) or whole.ndim != 4 or part.ndim != 4:
        return False
    first = whole[:, :, : part.shape[2]]
    return first.shape == part.shape and first.device == part.device and torch.equal(first, part)


CACHES: dict[str, type[PaddedCache]] = {"hf": PaddedCache, "legacy": LegacyCache}
"""Classes of the cache that ModelWrapper returns in place of a LatentCache, by name."""


def past_length(past: Any) -> int:
    """Return the columns of a past, padding included: of any cache of transformers, or of a tuple of (keys, values); 0 for
    None. Of a LatentCache the slots of its longest row."""
    if past is None:
        return 0
    if isinstance(past, LatentCache):
        return int(past.lengths.max())
    if isinstance(past, Cache):
        return int(past.get_seq_length())
    return int(past[0][0].shape[-2]) if len(past) else 0


def as_cache(past: Any) -> Cache | None:
    """Return a past as a cache: None for an empty one of transformers, a LegacyCache for a tuple of (keys, values).

    Raises:
        LatentMASError: for anything else.
    """
    if past is None or isinstance(past, LatentCache):
        return past
    if not isinstance(past, (Cache, tuple, list)):
        raise LatentMASError(
            "past_key_values must be a LatentCache, another transformers Cache, or a tuple of (keys, values) by layer; got "
            f"{type(past).__name__}"
        )
    if past_length(past) == 0:
        return None
    return past if isinstance(past, Cache) else LegacyCache.of(past)


def to_padded(past: Cache | None, past_mask: Tensor | None, cache_class: type[PaddedCache]) -> PaddedCache:
    """Return a cache of that class with the columns of `past`, which is not changed; an empty one without a past.

    Args:
        past_mask: [B, columns], 0 for padding, which becomes zeros; None where the past has it.

    Raises:
        LatentMASError: where layers keep less than all columns.
    """
    if past is None or past_length(past) == 0:
        return cache_class()
    if isinstance(past, LatentCache):
        past = past.to_hf()
    length, layers = int(past.get_seq_length()), dict[int, Any](enumerate(past.layers))
    if past_mask is None:
        past_mask = real_columns(past)
    layers = {place: layer for place, layer in layers.items() if keeps(layer, length) or not is_gap(layer)}
    if past_mask is None or not all(keeps(layer, length) for layer in layers.values()):
        raise LatentMASError(
            f"past_key_values is a {type(past).__name__} whose layers do not keep all of its {length} columns, which cache="
            "'hf' and cache='legacy' cannot give back; use cache='latent'"
        )
    cache = cache_class()
    cache.expect(past_mask != 0)
    for place, layer in layers.items():
        cache.update(layer.keys[:, :, :length], layer.values[:, :, :length], place)
    return cache
