"""Cut, merge and fork the rows of a KVBuffer. `LatentCache` has a method for each of these functions."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from latentmas_kernels.cache.buffer import PREFIX_BLOCK, KVBuffer
from latentmas_kernels.cache.segments import Segment, segments_after_compaction, segments_of_rows
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.models.rope import RopeShift

BufferT = TypeVar("BufferT", bound=KVBuffer)


class CacheSlice(NamedTuple):
    """Rows of a cache, each from the slot start[i] on; `LatentCache.concat` merges them. Segments without an agent are named
    after `agent`."""

    cache: KVBuffer
    rows: Tensor
    start: Tensor
    agent: str | None = None


def compact(cache: KVBuffer, kept: Tensor) -> None:
    """Keep only the slots `kept`, bool [B, longest row] on the CPU, and move them together, one layer at a time; see
    `LatentCache.keep`. This modifies the cache.

    Where slots move, rows copy what they keep of a shared prefix, and no prefix is shared any more.
    """
    slot = torch.arange(kept.shape[1])
    in_use = slot < cache.lengths[:, None]
    kept = kept & in_use
    counts = kept.sum(1)
    dropped = in_use & ~kept
    if not bool(dropped.any()):
        return
    cache.check_complete((dropped & (slot < cache.complete_from[:, None])).any(1), "keep")
    if bool((counts == (kept.long().cumprod(1).sum(1))).all()):  # only ends are cut off
        cache.truncate(counts)
        return
    if cache.shared:
        cache.make_private()
    # What lies before the first gap of any row stays where it is.
    first = int(dropped.int().argmax(1)[counts < cache.lengths].min())
    order = (~kept[:, first:]).int().argsort(dim=1, stable=True)[:, : int(counts.max()) - first] + first
    row = torch.arange(len(kept))[:, None]
    source = torch.where(order < cache.prefix_len[:, None], cache.prefix_row[:, None], row)
    device = cache.buffer.device
    order, source, row = order.to(device), source.to(device), row.to(device)
    for store in (cache.keys, cache.values):
        for states in store:
            # All of them before the first is written: a row reads slots that are about to be overwritten for another row.
            moved = states.transpose(1, 2)[source, order]
            cache.copy_prefixes(states, first)
            states[:, :, first : first + order.shape[1]] = moved.transpose(1, 2)
    cache.positions[:, first : first + order.shape[1]] = cache.positions[row, order]
    cache.prefix_len = torch.zeros_like(cache.prefix_len)
    cache.segments = segments_after_compaction(cache.segments, kept)
    cache.set_lengths(counts)


def rebase(cache: KVBuffer, model: Any) -> None:
    """See `LatentCache.rebase`. This modifies the cache."""
    width = int(cache.lengths.max())
    counted = torch.arange(width, device=cache.positions.device)
    in_use = counted < cache.lengths[:, None].to(counted.device)
    shifts = torch.where(in_use, counted - cache.positions[:, :width], 0)
    if bool((shifts != 0).any()):
        rope_shift = RopeShift.probe(model)
        cache.check_fits(Architecture.of(model), cache.batch_size)
        cache.check_complete(
            ((shifts.cpu() != 0) & (torch.arange(width) < cache.complete_from[:, None])).any(1), "rebase"
        )
        # A slot of a shared prefix would move in all rows that share it; where none moves, prefixes stay shared.
        in_prefix = counted < cache.prefix_len[:, None].to(counted.device)
        if cache.shared or bool((in_prefix & (shifts != 0)).any()):
            cache.make_private()
        cache.device_copy_of = None
        rope_shift.move(cache.keys, shifts)
        cache.positions[:, :width] = torch.where(in_use, counted, cache.positions[:, :width])
    cache.next_position, cache.device_copy_of = cache.lengths.clone(), None


def slice_of(cache: KVBuffer, rows: Sequence[int], start: Tensor | None = None, agent: str | None = None) -> CacheSlice:
    """See `LatentCache.part`. This does not modify the cache."""
    index = torch.as_tensor(rows, dtype=torch.int64, device="cpu")
    part = CacheSlice(cache, index, torch.zeros_like(index) if start is None else start.cpu(), agent)
    check_slice(part)
    return part


def check_slice(part: CacheSlice) -> None:
    """Raise LatentMASError where a slice is not within its cache, as the cache is now. This does not modify it."""
    cache, rows, start = part.cache, part.rows, part.start
    if not bool(((rows >= 0) & (rows < cache.batch_size)).all()):
        raise LatentMASError(f"part: got rows {rows.tolist()}; this cache has rows 0 to {cache.batch_size - 1}")
    lengths = cache.lengths[rows]
    if start.shape != rows.shape or not bool(((start >= 0) & (start <= lengths)).all()):
        raise LatentMASError(
            f"part: got the first slots {start.tolist()} of rows {rows.tolist()}; there must be one for each row, from 0 to "
            f"its length ({lengths.tolist()})"
        )


def concat(cls: type[BufferT], parts: Sequence[KVBuffer | CacheSlice], model: Any, capacity: int | None) -> BufferT:
    """See `LatentCache.concat`: build a `cls` of the parts. This does not modify the parts."""
    given = [part if isinstance(part, CacheSlice) else slice_of(part, range(part.batch_size)) for part in parts]
    architecture = Architecture.of(model)
    sizes = {len(part.rows) for part in given}
    if len(sizes) != 1:
        raise LatentMASError(
            f"concat merges parts of as many rows each, one or more; got rows {[len(p.rows) for p in given]}"
        )
    batch = sizes.pop()
    for part in given:
        part.cache.check_fits(architecture, part.cache.batch_size)
        check_slice(part)  # the cache may have been cut since the slice was made
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
        RopeShift.probe(model)  # refuses before anything is copied
    merged = cls.for_model(architecture, batch, max(capacity, 1))
    at = torch.zeros_like(total)
    for part, length in zip(given, lengths, strict=True):
        for row, (source, start, count) in enumerate(
            zip(part.rows.tolist(), part.start.tolist(), length.tolist(), strict=True)
        ):
            here = int(at[row])
            part.cache.copy_slots(source, start, start + count, merged, row, here)
            merged.positions[row, here : here + count] = part.cache.positions[source, start : start + count]
        merged.segments += _segments_at(part, at)
        at = at + length
    merged.lengths = merged.next_position = total
    rebase(merged, model)
    return merged


def _segments_at(part: CacheSlice, at: Tensor) -> list[Segment]:
    """Return the segments of a slice, cut to it, where its first slots become the slots `at`, int64 [rows]."""

    def place(ends: tuple[int, ...]) -> tuple[int, ...]:
        chosen = torch.tensor(ends)[part.rows]
        return tuple((torch.maximum(chosen, part.start) - part.start + at).tolist())

    moved = [
        replace(s, agent=s.agent if s.agent is not None else part.agent, start=place(s.start), stop=place(s.stop))
        for s in part.cache.segments
    ]
    return [s for s in moved if s.start != s.stop]


def fork_rows(cache: BufferT, times: int, capacity: int) -> BufferT:
    """See `LatentCache.fork_rows`. This does not modify the cache."""
    used = int(cache.lengths.max())
    if times < 1 or capacity < used:
        raise LatentMASError(
            f"fork_rows makes 1 or more of each row, of {used} slots here or more; got times={times}, capacity={capacity}"
        )
    batch = cache.batch_size
    wide = cache.new_empty(batch * times, capacity)
    sources = torch.arange(batch).repeat_interleave(times)
    wide.lengths, wide.next_position = cache.lengths[sources], cache.next_position[sources]
    wide.complete_from = cache.complete_from[sources]
    wide.positions[:, :used] = cache.positions[sources.to(cache.positions.device), :used]
    wide.prefix_row = torch.arange(batch * times) // times * times
    first = wide.prefix_row == torch.arange(batch * times)
    wide.prefix_len = torch.where(first, 0, wide.lengths // PREFIX_BLOCK * PREFIX_BLOCK)
    for row, source in enumerate(sources.tolist()):
        start = int(wide.prefix_len[row])
        cache.copy_slots(source, start, int(cache.lengths[source]), wide, row, start)
    wide.segments = segments_of_rows(cache.segments, sources.tolist())
    return wide
