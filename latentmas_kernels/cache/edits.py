"""Cutting, merging and spreading the memory of a LatentCache."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from latentmas_kernels.cache.latent_cache import PREFIX_BLOCK, LatentCache, Part
from latentmas_kernels.cache.segments import Segment, segments_after_compaction
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.models.rope import RopeShift


def compact(cache: LatentCache, kept: Tensor) -> None:
    """Move the slots `kept`, bool [B, longest row] on the CPU, together, one layer at a time; see `LatentCache.keep`.

    Rows that borrow get what they keep from where it lies, into their own memory; afterwards nothing is borrowed.
    """
    slot = torch.arange(kept.shape[1])
    in_use = slot < cache.lengths[:, None]
    kept = kept & in_use
    counts = kept.sum(1)
    dropped = in_use & ~kept
    if not bool(dropped.any()):
        return
    cache.check_complete((dropped & (slot < cache.complete_from[:, None])).any(1), "keep")
    if bool((counts == (kept.long().cumprod(1).sum(1))).all()):  # nothing but ends is cut off
        cache.truncate(counts)
        return
    if cache.shared:
        cache.make_private()
    # What lies before the first gap of any row stays where it is.
    first = int(dropped.int().argmax(1)[counts < cache.lengths].min())
    order = (~kept[:, first:]).int().argsort(dim=1, stable=True)[:, : int(counts.max()) - first] + first
    own = torch.arange(len(kept))[:, None]
    rows = torch.where(order < cache.prefix_len[:, None], cache.prefix_row[:, None], own)
    device = cache.buffer.device
    order, rows, own = order.to(device), rows.to(device), own.to(device)
    for store in (cache.keys, cache.values):
        for states in store:
            # All of them before the first is written: a row reads what another is about to write over.
            moved = states.transpose(1, 2)[rows, order]
            _take_over(cache, states, first)
            states[:, :, first : first + order.shape[1]] = moved.transpose(1, 2)
    cache.positions[:, first : first + order.shape[1]] = cache.positions[own, order]
    cache.prefix_len = torch.zeros_like(cache.prefix_len)
    cache.segments = segments_after_compaction(cache.segments, kept)
    cache._measure(counts)


def materialize_shared(cache: LatentCache) -> None:
    """Copy to each row what it borrows, in place: prefix_row borrow nothing, so no row is written that is still to be read."""
    for store in (cache.keys, cache.values):
        for states in store:
            _take_over(cache, states, cache.capacity)
    cache.prefix_len = torch.zeros_like(cache.prefix_len)
    cache.device_copy_of = None


def _take_over(cache: LatentCache, states: Tensor, stop: int) -> None:
    """Copy what rows borrow of one layer's keys or values [B, kv_heads, capacity, head_dim], below the slot `stop`."""
    for row in cache.prefix_len.nonzero()[:, 0].tolist():
        end = min(stop, int(cache.prefix_len[row]))
        states[row, :, :end] = states[int(cache.prefix_row[row]), :, :end]


def rebase(cache: LatentCache, model: Any) -> None:
    """See `LatentCache.rebase`."""
    width = int(cache.lengths.max())
    counted = torch.arange(width, device=cache.positions.device)
    in_use = counted < cache.lengths[:, None].to(counted.device)
    shifts = torch.where(in_use, counted - cache.positions[:, :width], 0)
    if bool((shifts != 0).any()):
        rotation = RopeShift.of(model)
        cache.check_fits(Architecture.of(model), cache.batch_size)
        cache.check_complete(
            ((shifts.cpu() != 0) & (torch.arange(width) < cache.complete_from[:, None])).any(1), "rebase"
        )
        # A borrowed slot that moves would move for the lender, too; one that does not stays borrowed.
        prefix_len = counted < cache.prefix_len[:, None].to(counted.device)
        if cache.shared or bool((prefix_len & (shifts != 0)).any()):
            cache.make_private()
        cache.device_copy_of = None
        rotation.move(cache.keys, shifts)
        cache.positions[:, :width] = torch.where(in_use, counted, cache.positions[:, :width])
    cache.next_position, cache.device_copy_of = cache.lengths.clone(), None


def check_part(part: Part) -> None:
    """Raise ValueError where a part is not in its cache, as it is now."""
    cache, rows, start = part.cache, part.rows, part.start
    if not bool(((rows >= 0) & (rows < cache.batch_size)).all()):
        raise LatentMASError(f"part: got rows {rows.tolist()}; this cache has rows 0 to {cache.batch_size - 1}")
    lengths = cache.lengths[rows]
    if start.shape != rows.shape or not bool(((start >= 0) & (start <= lengths)).all()):
        raise LatentMASError(
            f"part: got the first slots {start.tolist()} of rows {rows.tolist()}; there must be one for each row, from 0 to "
            f"its length ({lengths.tolist()})"
        )


def concat(parts: Sequence[LatentCache | Part], model: Any, capacity: int | None) -> LatentCache:
    """See `LatentCache.concat`."""
    given = [part if isinstance(part, Part) else part.part(range(part.batch_size)) for part in parts]
    architecture = Architecture.of(model)
    sizes = {len(part.rows) for part in given}
    if len(sizes) != 1:
        raise LatentMASError(
            f"concat merges parts of as many rows each, one or more; got rows {[len(p.rows) for p in given]}"
        )
    batch = sizes.pop()
    for part in given:
        part.cache.check_fits(architecture, part.cache.batch_size)
        check_part(part)  # the cache may have been cut since the part was made
        chosen = torch.zeros(part.cache.batch_size, dtype=torch.bool).index_fill_(0, part.rows, True)
        part.cache.check_complete(chosen & (part.cache.complete_from > 0), "concat")
    lengths = [part.cache.lengths[part.rows] - part.start for part in given]
    total = torch.stack(lengths).sum(0)
    capacity = int(total.max()) if capacity is None else capacity
    if capacity < int(total.max()):
        raise LatentMASError(
            f"the parts have {int(total.max())} slots in the longest row; a capacity of {capacity} is too small"
        )
    if len(given) > 1:
        RopeShift.of(model)  # refuses before anything is copied
    merged = LatentCache.for_model(architecture, batch, max(capacity, 1))
    at = torch.zeros_like(total)
    for part, length in zip(given, lengths, strict=True):
        for row, (source, start, count) in enumerate(
            zip(part.rows.tolist(), part.start.tolist(), length.tolist(), strict=True)
        ):
            here = int(at[row])
            part.cache.copy_slots(source, start, start + count, merged, row, here)
            merged.positions[row, here : here + count] = part.cache.positions[source, start : start + count]
        merged.segments += _moved(part, at)
        at = at + length
    merged.lengths = merged.next_position = total
    rebase(merged, model)
    return merged


def fork_rows(cache: LatentCache, times: int, capacity: int) -> LatentCache:
    """See `LatentCache.fork_rows`."""
    used = int(cache.lengths.max())
    if times < 1 or capacity < used:
        raise LatentMASError(
            f"spread makes 1 or more of each row, of {used} slots here or more; got times={times}, capacity={capacity}"
        )
    _, layers, batch, heads, _, width = cache.buffer.shape
    wide = LatentCache(
        layers=layers, batch=batch * times, kv_heads=heads, capacity=capacity, head_dim=width,
        dtype=cache.buffer.dtype, device=cache.buffer.device, gaps=cache.gaps,
    )  # fmt: skip
    sources = torch.arange(batch).repeat_interleave(times)
    wide.lengths, wide.next_position = cache.lengths[sources], cache.next_position[sources]
    wide.complete_from = cache.complete_from[sources]
    wide.positions[:, :used] = cache.positions[sources.to(cache.positions.device), :used]
    wide.prefix_row = torch.arange(batch * times) // times * times
    first = wide.prefix_row == torch.arange(batch * times)
    wide.prefix_len = torch.where(first, 0, wide.lengths // PREFIX_BLOCK * PREFIX_BLOCK)
    for row, source in enumerate(sources.tolist()):
        own = int(wide.prefix_len[row])
        cache.copy_slots(source, own, int(cache.lengths[source]), wide, row, own)
    order = sources.tolist()
    wide.segments = [
        replace(s, start=tuple(s.start[r] for r in order), stop=tuple(s.stop[r] for r in order)) for s in cache.segments
    ]
    return wide


def _moved(part: Part, at: Tensor) -> list[Segment]:
    """The segments of a part, as far as they are in it, where its first slots come to lie in the slots `at`."""

    def place(ends: tuple[int, ...]) -> tuple[int, ...]:
        chosen = torch.tensor(ends)[part.rows]
        return tuple((torch.maximum(chosen, part.start) - part.start + at).tolist())

    moved = [
        replace(s, agent=s.agent if s.agent is not None else part.agent, start=place(s.start), stop=place(s.stop))
        for s in part.cache.segments
    ]
    return [s for s in moved if s.start != s.stop]
