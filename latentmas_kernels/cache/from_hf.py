"""Convert a transformers cache, plain or quantized, to a KVBuffer, and append new slots of a KVBuffer to such a cache."""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import Cache, cache_utils
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    QuantizedLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from latentmas_kernels.cache.buffer import KVBuffer
from latentmas_kernels.cache.padded_cache import PaddedCache, check_agrees, is_gap, real_columns
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.architecture import Architecture, KVShape
from latentmas_kernels.warn_once import warn_once

BufferT = TypeVar("BufferT", bound=KVBuffer)
# Exact classes: their subclasses (indexed, recurrent) keep part of their state elsewhere.
PLAIN_LAYERS = {DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer}
# quanto, HQQ and what else derives from it. Newer transformers have a wider base, for FP8, which keeps no residual.
QUANTIZED_LAYER: Any = getattr(cache_utils, "BaseQuantizedLayer", QuantizedLayer)


def cache_from_hf(cls: type[BufferT], cache: Cache, attention_mask: Tensor | None, capacity: int | None) -> BufferT:
    """Return a transformers cache as a `cls`; see `LatentCache.from_hf`. This does not modify the transformers cache."""
    other = [type(layer) for layer in cache.layers if not isinstance(layer, QUANTIZED_LAYER)]
    strange = sorted({kind.__name__ for kind in other if kind not in PLAIN_LAYERS})
    if strange:
        raise LatentMASError(
            f"got a {type(cache).__name__} with layers of type {', '.join(strange)}; "
            f"supported are {', '.join(sorted(c.__name__ for c in PLAIN_LAYERS))} and quantized layers"
        )
    layers: list[Any] = cache.layers
    while layers and not layers[-1].is_initialized:  # of layers that the model does not run
        layers = layers[:-1]
    filled = [layer for layer in layers if layer.is_initialized]
    length = int(filled[0].get_seq_length()) if filled else 0
    if length == 0:
        raise LatentMASError(f"got an empty {type(cache).__name__}; pass past_key_values=None to start without a past")
    _wait_for_offload(cache)
    keys, _ = _states(filled[0], length)
    batch, heads, _, width = keys.shape
    mask = _mask(cache, attention_mask, batch, length)
    counts = (mask != 0).sum(1)
    capacity = int(counts.max()) if capacity is None else capacity
    if capacity < int(counts.max()):
        raise LatentMASError(
            f"the cache holds up to {int(counts.max())} tokens in a row; a capacity of {capacity} is too small"
        )
    copied = cls.allocate(
        KVShape(len(layers), heads, width, keys.dtype),
        batch,
        capacity,
        filled[0].device if cache.offloading else keys.device,
        [place for place, layer in enumerate(layers) if not _is_filled(layer, length)],
    )
    device = copied.buffer.device
    rows, columns = (mask != 0).nonzero(as_tuple=True)
    slots = ((mask != 0).cumsum(1) - 1)[rows, columns]
    rows, columns, slots = (t.to(device) for t in (rows, columns, slots))
    cut = torch.zeros(batch, dtype=torch.bool)  # rows of which some layer has dropped slots
    for index, layer in enumerate(layers):
        if index in copied.gaps:
            continue
        if int(layer.get_seq_length()) != length:
            raise LatentMASError(
                f"layer {index} of this {type(cache).__name__} counts {int(layer.get_seq_length())} columns, layer 0 {length}; "
                "cut all layers alike"
            )
        pair = _states(layer, length)  # one layer at a time: quantized ones are taken for their small size
        shapes = [[*full.shape[:2], full.shape[3]] for full in pair]
        if shapes != [[batch, heads, width]] * 2:
            raise LatentMASError(
                f"layer {index} of this {type(cache).__name__} holds keys and values of [batch, heads, width] {shapes}, "
                f"the first keys of {[batch, heads, width]}; supported is one shape for all"
            )
        for store, full in zip((copied.keys[index], copied.values[index]), pair, strict=True):
            full = full.to(device)
            dropped = length - full.shape[2]
            cut |= (mask[:, :dropped] != 0).any(1)
            kept = columns >= dropped
            store[rows[~kept], :, slots[~kept]] = 0
            store[rows[kept], :, slots[kept]] = full[rows[kept], :, columns[kept] - dropped]
    copied.positions[rows, slots] = slots
    copied.lengths, copied.next_position = counts, counts.clone()
    copied.complete_from = torch.where(cut, counts, 0)
    copied.add_segment("prompt", torch.zeros_like(counts))
    return copied


def _wait_for_offload(cache: Cache) -> None:
    """Wait for the copies of layers to the CPU that transformers has started and not waited for."""
    if cache.offloading:
        layers: list[Any] = cache.layers
        for device in {layer.device for layer in layers if layer.is_initialized}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)


def _is_filled(layer: Any, length: int) -> bool:
    """Return whether the model runs a layer: it counts as many columns as the other layers, or is not empty."""
    return (layer.is_initialized and int(layer.get_seq_length()) == length) or not is_gap(layer)


def check_covers(cache: Cache, architecture: Architecture) -> None:
    """Raise LatentMASError where a transformers cache with all of the model's layers lacks what they attend to.

    transformers makes sliding layers where a configuration says so, whether the model's code reads that or not: the cache of a
    Llama with a `sliding_window` keeps the last positions only, and its layers attend to all that they are given.
    """
    for slot, window in zip(architecture.slots, architecture.windows, strict=True):
        layer: Any = cache.layers[slot]
        if not layer.is_sliding:
            continue
        length = int(layer.get_seq_length())
        kept = _states(layer, length)[0].shape[2]
        if kept < length and (window is None or window - 1 > kept):
            raise LatentMASError(
                f"past_key_values kept the last {kept} of {length} positions in layer {slot}, where {architecture.name} "
                f"attends to {'all of them' if window is None else window}. Pass a cache that keeps them: DynamicCache() "
                "without a configuration"
            )


def _mask(cache: Cache, given: Tensor | None, batch: int, length: int) -> Tensor:
    """Return int64 [B, length] on the CPU: the mask that was given, or one without the columns of zeros. See
    `LatentCache.from_hf`."""
    if given is not None and list(given.shape) != [batch, length]:
        raise LatentMASError(
            f"the mask of this cache must be {[batch, length]} ([B, cached tokens]); got {list(given.shape)}"
        )
    knows = isinstance(cache, PaddedCache)
    held = real_columns(cache) if knows or given is None else None
    if given is not None:
        if held is not None:
            check_agrees(held, given != 0)
        return given.cpu()
    if held is None:
        return torch.ones(batch, length, dtype=torch.int64)
    if not bool(held.any()):
        raise LatentMASError(
            f"this {type(cache).__name__} holds nothing but zeros, which stand for padding; pass a mask"
        )
    if not knows and not bool(held.all()):
        zeros = (~held).sum(1).cpu()
        rows = zeros.nonzero()[:, 0]
        warn_once(
            f"{zeros[rows].tolist()} columns in the rows {rows.tolist()} of a {type(cache).__name__} hold zeros and are taken "
            "for padding; tokens whose embedding is zero look the same. A mask over the past tells them apart: "
            "LatentCache.from_hf(cache, attention_mask)"
        )
    return held.long().cpu()


def check_call_mask(cache: Cache, given: Tensor) -> None:
    """Raise LatentMASError where the mask over the past [B, columns] of a call takes padding of the cache for tokens.

    Published code passes ones over every past, padded ones too, in caches that it put together from tensors. So a column of
    zeros is padding even where such a mask has a one, with one exception: where the zeros are the first token of every row and
    no other. The longest row of a padded batch has no padding; a token of zero embedding at the beginning of a text (a BOS that
    is the embedding's padding_idx) looks exactly like that. A single row with one column of padding does too, and there the
    mask is believed.
    """
    _wait_for_offload(cache)
    held = None if isinstance(cache, PaddedCache) else real_columns(cache)
    if held is None:
        return  # `LatentCache.from_hf` looks at a PaddedCache
    mask = given.to(held.device) != 0
    denied = mask & ~held
    if bool(denied.any()) and not torch.equal(denied, mask & (mask.cumsum(1) == 1)):
        check_agrees(
            held, mask, "Columns of zeros are taken for padding; where they are tokens of zero embedding, pass "
            "LatentCache.from_hf(cache, mask over the past), which believes the mask",
        )  # fmt: skip


def _states(layer: Any, length: int) -> tuple[Tensor, Tensor]:
    """Return the filled part of a transformers layer's keys and values, each [B, H, S, D], dequantized where it is quantized.

    S is `length`, or less for a sliding window that has dropped some.
    """
    if not isinstance(layer, QUANTIZED_LAYER):
        return layer.keys[:, :, :length], layer.values[:, :, :length]
    # The part that is not quantized yet tells the shape of no tokens; where all is quantized, it has no shape.
    states = layer.keys, layer.values
    if layer.keys.dim() != 4:
        states = layer._dequantize(layer._quantized_keys), layer._dequantize(layer._quantized_values)
    # An update by no tokens returns all states. It assigns the layer's fields and may quantize again: so to a copy.
    keys, values = copy.copy(layer).update(states[0][:, :, :0], states[1][:, :, :0])
    if keys.shape[2] != length:
        raise LatentMASError(
            f"a {type(layer).__name__} counts {length} tokens and holds {keys.shape[2]}, as after a crop(), which "
            "quantized layers do not support; pass a cache that was not cropped"
        )
    return keys, values


def append_columns(cache: KVBuffer, target: Cache, held: Tensor, columns: Tensor) -> None:
    """Append to a transformers cache the slots that `cache` has behind its first `held` ones, and zeros where a column is
    padding. This modifies `target` and not `cache`.

    Args:
        held: int64 [B], slots that came from `target`.
        columns: bool [B, T], which columns of the prompt are real. The slots of each row behind its prompt follow in further
            columns, as many as the longest row needs.

    A place in which the model runs no layer stays empty, as the model's own forward leaves it, but for the first, by which
    transformers counts.
    """
    prompt = held[:, None] + columns.long().cumsum(1) - 1
    more = cache.lengths - held - columns.sum(1)
    behind = torch.arange(int(more.max()))
    real = torch.cat([columns, behind < more[:, None]], dim=1)
    slots = torch.cat([prompt, (held + columns.sum(1))[:, None] + behind], dim=1).masked_fill(~real, 0)
    slots, real = slots.to(cache.keys.device), real.to(cache.keys.device)

    def picked(store: Tensor) -> Tensor:
        index = slots[:, None, :, None].expand(-1, store.shape[1], -1, store.shape[3])
        return store.gather(2, index).masked_fill_(~real[:, None, :, None], 0)

    if isinstance(target, PaddedCache):
        target.expect(real)
    layers: list[Any] = target.layers  # update() adds layers
    for layer in range(cache.keys.shape[0]):
        empty = layer >= len(layers) or not layers[layer].is_initialized
        if layer in cache.gaps and layer and empty:
            continue
        target.update(picked(cache.keys[layer]), picked(cache.values[layer]), layer)
