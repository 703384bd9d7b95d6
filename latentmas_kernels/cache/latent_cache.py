"""LatentCache: the KV cache that agents pass on, which is also a transformers Cache while its rows have one length."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from latentmas_kernels.cache import edits
from latentmas_kernels.cache.buffer import KVBuffer
from latentmas_kernels.cache.edits import CacheSlice
from latentmas_kernels.cache.file import load_cache, save_cache
from latentmas_kernels.cache.from_hf import cache_from_hf
from latentmas_kernels.cache.hf_layer import HFCacheLayer, check_counted, uniform_length
from latentmas_kernels.cache.padded_cache import PaddedCache, ask_about_masks
from latentmas_kernels.cache.segments import mask_of
from latentmas_kernels.errors import LatentMASError


class LatentCache(KVBuffer, Cache):
    """Keys and values of all layers in one buffer of fixed capacity, with a length and a next position per row.

    Row b uses the slots 0 to lengths[b] - 1; what lies behind is undefined and never read. Padding is never stored.
    While all rows have the same length the object works as a transformers `Cache` in `model(...)` and
    `model.generate(...)`, which then append to it in place; ragged rows go through `to_hf()` or this package's
    `generate()`.

    Copies, branches and what the classmethods return are of the object's own class. Its `__init__` is not called for them, so
    attributes that a subclass adds are not in them, but for `copy.deepcopy` and pickles.

    Attributes:
        buffer: [2, layers, B, kv_heads, capacity, head_dim], keys and values.
        keys, values: [layers, B, kv_heads, capacity, head_dim], views of it.
        lengths: int64 [B] on the CPU, slots in use.
        next_position: int64 [B] on the CPU, position of the next token. Larger than the length where slots were cut out
            and the rest kept its positions.
        positions: int64 [B, capacity] on the cache's device, position of each slot in use.
        segments: what the slots hold, in the order of writing.
        prefix_row, prefix_len: int64 [B] on the CPU, shared prefixes. The first prefix_len[b] slots of row b, a multiple of
            PREFIX_BLOCK, are those of row prefix_row[b], which itself has none of another row; the slots that row b has in the
            buffer for them are not used. See `fork_rows`.
        complete_from: int64 [B] on the CPU. From this length on, the cache holds all slots that later positions see: the length
            that `from_hf` read where some layer had dropped what lay outside its window, 0 elsewhere. No cut goes below it.
        gaps: places of layers that the model does not run. They hold zeros, which no layer reads.
        device_copy_of: the copy of this content that an engine holds elsewhere; None after every change.
    """

    def _init_buffer(self, buffer: Tensor, gaps: Sequence[int]) -> None:
        super()._init_buffer(buffer, gaps)
        Cache.__init__(self, layers=[])
        self._make_layers()
        ask_about_masks()

    def _make_layers(self) -> None:
        self.layers = [HFCacheLayer(self, index) for index in range(self.kv_shape.layers)]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "layers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or a pickle, with layers of its own."""
        super().__setstate__(state)
        self._make_layers()

    # ---- cutting and merging ----------------------------------------------------------------------------------------

    def keep(self, what: str | Sequence[str] | Tensor) -> None:
        """Keep some slots and forget all others. This modifies the cache: what is kept moves together and keeps its positions.

        Keys stay as they were rotated: the gaps are recorded in `positions` and `next_position`, every engine here continues
        behind them exactly, and `rebase` closes them.

        Args:
            what: names of segments ("planner", "planner:latent"), or bool [B, longest row], true for slots to keep.

        Raises:
            LatentMASError: for no name, a name that no segment has, a mask of another shape, or where later positions would see
                slots that `from_hf` found dropped.
        """
        width = int(self.lengths.max())
        if not isinstance(what, Tensor):
            what = mask_of(self.find_segments(what), self.batch_size, width)
        elif what.dtype != torch.bool or list(what.shape) != [self.batch_size, width]:
            raise LatentMASError(
                f"keep takes names of segments, or bool {[self.batch_size, width]}; got {what.dtype} {list(what.shape)}"
            )
        edits.compact(self, what.cpu())

    def drop(self, what: str | Sequence[str]) -> None:
        """Forget the segments of these names, as `keep` of everything else. This modifies the cache."""
        self.keep(~mask_of(self.find_segments(what), self.batch_size, int(self.lengths.max())))

    def rebase(self, model: Any) -> None:
        """Give the slots of each row the positions 0, 1, 2, ... and rotate the keys to them. This modifies the cache.

        Args:
            model: the causal LM that wrote this cache.

        Raises:
            LatentMASError: where the positions of that model's keys cannot be changed afterwards (anything but plain RoPE).
        """
        edits.rebase(self, model)

    @classmethod
    def concat(
        cls, parts: "Sequence[LatentCache | CacheSlice]", model: Any, *, capacity: int | None = None
    ) -> "LatentCache":
        """Merge caches of the same rows into a new one, one behind the other. Positions are 0, 1, 2, ... in the order of the
        slots, and keys are rotated to them. This does not modify the parts.

        Args:
            parts: caches of one model with as many rows each, or slices of them (`part`).
            model: the causal LM that wrote them.
            capacity: slots per row of the result; what is in use when None.

        Raises:
            LatentMASError: where the parts do not fit together, or keys cannot be moved (as `rebase`).
        """
        return edits.concat(cls, parts, model, capacity)

    def part(self, rows: Sequence[int], start: Tensor | None = None, agent: str | None = None) -> CacheSlice:
        """Return rows of this cache, each from the slot start[i] on, for `concat`. This copies nothing and does not modify the
        cache.

        Raises:
            LatentMASError: where there is no such row or slot.
        """
        return edits.slice_of(self, rows, start, agent)

    def fork_rows(self, times: int, capacity: int) -> "LatentCache":
        """Return a copy with each row `times` times, side by side, for that many continuations. The first of them shares its
        prefix with the others, in whole blocks of PREFIX_BLOCK slots. This does not modify the cache.

        A shared prefix is neither computed nor copied again, and engines read it in the row that holds it. The buffer has slots
        for it in every row all the same: on CUDA that memory is reserved, on the CPU its pages are never touched.
        """
        return edits.fork_rows(self, times, capacity)

    # ---- files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], model: Any) -> None:
        """Write what is in use to a safetensors file, which `load` reads again, in another process too. This does not modify
        the cache.

        Args:
            path: replaces a file that is there, once all is written; missing folders are made.
            model: the causal LM that wrote this cache; its fingerprint goes into the file, and no weights.

        Raises:
            LatentMASError: where this cannot be the cache of that model.
            OSError: where the file cannot be written.
        """
        save_cache(self.select(range(self.batch_size)) if bool(self.prefix_len.any()) else self, path, model)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any) -> "LatentCache":
        """Return the cache of a file that `save` wrote, for the same model. Its capacity is what is in use.

        On the CPU the file is mapped: keys and values are read when a call gets to them, and writing to the cache does
        not change the file. Nothing in the file is trusted but the numbers that keys and values are; nothing is executed.
        While the cache lives, the file may be replaced or deleted, but not be cut short by another program.

        Args:
            model: the causal LM that wrote the cache, in evaluation mode; the cache goes to its device.

        Raises:
            FileNotFoundError: where there is no such file.
            LatentMASError: for a file that is damaged or not of this format, or that another model wrote.
        """
        return load_cache(cls, path, model)

    # ---- to and from transformers -----------------------------------------------------------------------------------

    def attention_mask(self, new: Tensor | None = None) -> Tensor:
        """Return int64 [B, longest row (+ T)]: the mask of what `to_hf()` gives, followed by the mask [B, T] of new tokens.
        This does not modify the cache."""
        width = int(self.lengths.max())
        mask = (torch.arange(width)[None, :] >= width - self.lengths[:, None]).long().to(self.buffer.device)
        return mask if new is None else torch.cat([mask, new.to(mask)], dim=1)

    def to_hf(self) -> PaddedCache:
        """Return a transformers DynamicCache with the same keys and values, left-padded, which knows its padding. This does not
        modify the cache.

        This package's calls take it without a mask. transformers counts positions from the mask, so plain `generate()` needs
        `attention_mask(new)`, and a plain forward its `position_ids` too: a mask or positions that do not fit the padding are a
        LatentMASError there (see `PaddedCache`). Every layer is kept in full, sliding windows included, so the model's own
        masks are right. But transformers counts a window in columns: new tokens with padding between them and the past, which
        would use it up, are refused as well. The places of layers that the model does not run stay empty, as the model leaves
        them in a cache of transformers, but the first, by which transformers counts.

        Raises:
            LatentMASError: where positions have gaps, which a transformers cache cannot express.
        """
        check_counted(self, "to_hf")
        if bool(self.prefix_len.any()):
            return self.select(range(self.batch_size)).to_hf()
        width = int(self.lengths.max())
        slot = torch.arange(width)[None, :] - (width - self.lengths[:, None])
        index = slot.clamp_min(0).to(self.buffer.device)[:, None, :, None]

        def placed(store: Tensor) -> Tensor:
            used = store[:, :, :width]
            return used.gather(2, index.expand_as(used))

        cache = PaddedCache()
        cache.expect((slot >= 0).to(self.buffer.device))
        for layer in range(self.kv_shape.layers):
            if layer == 0 or layer not in self.gaps:
                cache.update(placed(self.keys[layer]), placed(self.values[layer]), layer)
        return cache

    @classmethod
    def from_hf(
        cls, cache: Cache, attention_mask: Tensor | None = None, *, capacity: int | None = None
    ) -> "LatentCache":
        """Copy a transformers cache, without its padding. This does not modify the transformers cache.

        Args:
            cache: dynamic, static or quantized layers of keys and values. Layers that hold nothing, or fewer columns than the
                others and only zeros, are places in which the model runs none (`gaps`). Layers that kept only their sliding
                window are fine: what they dropped lies outside the window of every later query, as long as the row is not cut
                below what it holds now (`complete_from`). Quantized ones (quanto, HQQ, FP8) are dequantized; offloaded ones go
                back to the device that wrote them.
            attention_mask: [B, cached tokens], 0 marks padding anywhere. It is believed, columns of zeros included, which
                calls like `generate` do not always do: convert a cache here where it holds tokens whose embedding is zero.
                Only of a PaddedCache (`to_hf`), which knows its padding, it must be the padding.
                None: padding are the columns that hold zeros in place of keys and values, as `to_hf` writes them; for other
                caches than a PaddedCache a warning says which (see `padded_cache.real_columns`).
            capacity: slots per row; what is in use when None.

        Raises:
            LatentMASError: for other kinds of layers, an empty cache, and a mask of the wrong shape or that contradicts the
                padding of a PaddedCache.
        """
        return (
            cache.fork(capacity)
            if isinstance(cache, LatentCache)
            else cache_from_hf(cls, cache, attention_mask, capacity)
        )

    # ---- as a transformers Cache, while rows are uniform ------------------------------------------------------------

    def uniform_length(self) -> int:
        """Return the length of all rows; raise LatentMASError where lengths differ or positions have gaps. This does not modify
        the cache."""
        return uniform_length(self)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return uniform_length(self)

    def look_at(self, mask: Any, columns: int, positions: Tensor | None, window: int | None = None) -> Any:
        """Return the mask of a plain forward, as `PaddedCache.look_at`; raise LatentMASError where it marks padding, which is
        never stored. This does not modify the cache."""
        if isinstance(mask, Tensor) and mask.dim() == 2 and not bool((mask != 0).all()):
            raise LatentMASError(
                f"attention_mask has {(mask != 0).sum(1).tolist()} ones in {mask.shape[1]} columns, but the "
                f"{int(self.lengths[0])} slots of each row of this LatentCache are tokens, and it takes no padding from a "
                "transformers model. Use latentmas_kernels.generate(), or pass to_hf() with attention_mask(new). (transformers "
                "takes ids that equal pad_token_id for padding where it gets no mask.)"
            )
        return mask

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove slots of every row (transformers' sign). This modifies the cache."""
        count = -tokens_to_remove
        if not 0 <= count <= int(self.lengths.min()):
            raise LatentMASError(
                f"crop takes minus the number of tokens to remove, at most {int(self.lengths.min())} here; "
                f"got {tokens_to_remove}"
            )
        self.truncate(self.lengths - count)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Replace the rows by the given ones. This modifies the cache."""
        self._replace_with(self.select(indices))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the rows by the given ones. This modifies the cache."""
        self._replace_with(self.select(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row, side by side. This modifies the cache."""
        self._replace_with(self.select(torch.arange(self.batch_size).repeat_interleave(repeats)))
