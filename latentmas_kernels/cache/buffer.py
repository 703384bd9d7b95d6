"""KVBuffer: keys and values of all layers in one preallocated buffer, with ragged rows and explicit positions."""

import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from latentmas_kernels.cache.free_memory import check_free_memory
from latentmas_kernels.cache.segments import Kind, Segment, find_segments, segments_before, segments_of_rows
from latentmas_kernels.cache.slot_mapping import SlotMapping
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.architecture import Architecture, KVShape

PREFIX_BLOCK = 64
"""Shared prefixes are whole blocks of so many slots, so that no block which the native engine reads at once is in two rows."""
_SHARING = threading.RLock()
"""Held while caches on one buffer look at each other: of two that begin to write, one sees the other do it."""


class KVBuffer:
    """One buffer of fixed capacity, with a length and a next position per row; see `LatentCache` for its attributes.

    This class copies, shares and writes slots. It needs neither transformers' Cache nor the modules that edit, save or convert
    a cache, all of which build on it.
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        gaps: Sequence[int] = (),
    ) -> None:
        if min(layers, batch, kv_heads, capacity, head_dim) < 1:
            raise LatentMASError(
                f"a LatentCache needs sizes of at least 1; got layers={layers}, batch={batch}, kv_heads={kv_heads}, "
                f"capacity={capacity}, head_dim={head_dim}"
            )
        shape = (2, layers, batch, kv_heads, capacity, head_dim)
        check_free_memory(
            math.prod(shape) * dtype.itemsize, torch.device(device), f"a cache of {batch} rows of {capacity} slots",
            f"{layers} layers, {kv_heads} heads of {head_dim} in {dtype}",
        )  # fmt: skip
        self._init_buffer(torch.empty(shape, dtype=dtype, device=device), gaps)
        for place in self.gaps:
            self._buffer[:, place] = 0

    def _init_buffer(self, buffer: Tensor, gaps: Sequence[int]) -> None:
        """Make an empty cache of this object, on the given buffer."""
        _, _, batch, _, capacity, _ = buffer.shape
        self._buffer = buffer
        self.gaps = tuple(gaps)
        self.lengths = torch.zeros(batch, dtype=torch.int64)
        self.next_position = torch.zeros(batch, dtype=torch.int64)
        self.positions = torch.zeros(batch, capacity, dtype=torch.int64, device=buffer.device)
        self.segments: list[Segment] = []
        self.prefix_row = torch.arange(batch)
        self.prefix_len = torch.zeros(batch, dtype=torch.int64)
        self.complete_from = torch.zeros(batch, dtype=torch.int64)
        self.device_copy_of: object | None = None
        self._donated = False
        self._writing = False  # a call is extending it: it may use slots behind its lengths
        self._sharers: weakref.WeakSet[KVBuffer] = weakref.WeakSet([self])

    @classmethod
    def from_buffer(cls, buffer: Tensor, gaps: Sequence[int] = ()) -> Self:
        """Return an empty cache on a buffer [2, layers, B, kv_heads, capacity, head_dim], which it keeps and writes to."""
        cache = cls.__new__(cls)
        cache._init_buffer(buffer, gaps)
        return cache

    @classmethod
    def for_model(cls, architecture: Architecture, batch: int, capacity: int) -> Self:
        """Return an empty cache of the shape, dtype and device that a model writes, with zeros in the places of layers that
        the model does not run."""
        return cls.allocate(architecture.kv_shape, batch, capacity, architecture.device, architecture.gaps)

    def new_empty(self, batch: int, capacity: int, device: torch.device | None = None) -> Self:
        """Return an empty cache for the same model, on this cache's device when `device` is None."""
        return self.allocate(self.kv_shape, batch, capacity, device or self._buffer.device, self.gaps)

    @classmethod
    def allocate(cls, shape: KVShape, batch: int, capacity: int, device: torch.device, gaps: Sequence[int]) -> Self:
        """Return an empty cache of a new buffer. A subclass's own __init__ is not called: it may take other arguments."""
        cache = cls.__new__(cls)
        KVBuffer.__init__(
            cache, layers=shape.layers, batch=batch, kv_heads=shape.kv_heads, capacity=capacity, head_dim=shape.head_dim,
            dtype=shape.dtype, device=device, gaps=gaps,
        )  # fmt: skip
        return cache

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name != "_sharers"}
        if len(self._sharers) > 1:  # branches in one object would share their copy without knowing of each other
            state["_buffer"] = self._buffer.clone()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _writing=False, device_copy_of=None)
        self._sharers = weakref.WeakSet([self])

    def __copy__(self) -> Self:
        """Return a fork: a second object on the same buffer would write to it unknown to the first."""
        return self.fork()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(layers={self.kv_shape.layers}, lengths={self.lengths.tolist()}, "
            f"capacity={self.capacity}, dtype={self._buffer.dtype}, device={self._buffer.device}, "
            f"segments={len(self.segments)})"
        )

    # ---- shapes -----------------------------------------------------------------------------------------------------

    @property
    def buffer(self) -> Tensor:
        return self._buffer

    @property
    def keys(self) -> Tensor:
        return self._buffer[0]

    @property
    def values(self) -> Tensor:
        return self._buffer[1]

    @property
    def batch_size(self) -> int:
        return self._buffer.shape[2]

    @property
    def capacity(self) -> int:
        """Slots per row."""
        return self._buffer.shape[4]

    @property
    def kv_shape(self) -> KVShape:
        _, layers, _, heads, _, width = self._buffer.shape
        return KVShape(layers, heads, width, self._buffer.dtype)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values in use, over all rows; a shared prefix is counted once."""
        return int((self.lengths - self.prefix_len).sum()) * self.slot_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of the keys and values of one slot of one row, over all layers."""
        layers, heads, width, dtype = self.kv_shape
        return 2 * layers * heads * width * dtype.itemsize

    def check_fits(self, architecture: Architecture, batch: int) -> None:
        """Raise LatentMASError where this cannot be the past of `batch` rows of that model."""
        got, want = self.kv_shape._asdict(), architecture.kv_shape._asdict()
        wrong = [f"{name} {got[name]} instead of {want[name]}" for name in got if got[name] != want[name]]
        if wrong:
            raise LatentMASError(
                f"past_key_values is the cache of another model: {', '.join(wrong)} ({architecture.name}). "
                "Pass a cache that this model wrote, or None."
            )
        missing = sorted(set(architecture.slots) & set(self.gaps))
        if missing:
            raise LatentMASError(
                f"past_key_values holds nothing in the places {missing} of layers that {architecture.name} runs; pass a cache "
                "that this model wrote, or None"
            )
        if self._buffer.device != architecture.device:
            raise LatentMASError(
                f"past_key_values is on {self._buffer.device}, {architecture.name} on {architecture.device}; move one"
            )
        if self.batch_size != batch:
            raise LatentMASError(
                f"past_key_values has {self.batch_size} rows, the inputs have {batch}; use select(rows) to match them"
            )

    def check_complete(self, broken: Tensor, what: str) -> None:
        """Raise LatentMASError for the rows, bool [B], that would see slots which a sliding window dropped before `from_hf`."""
        if bool(broken.any()):
            row = int(broken.nonzero()[0])
            raise LatentMASError(
                f"{what}: row {row} was read from a transformers cache whose sliding windows had dropped what lay outside of "
                f"them at {int(self.complete_from[row])} tokens, so later positions would see slots that are not there. Let "
                "the model read the text into a LatentCache (latent_generate(..., latent_steps=0)), which keeps all slots, "
                "or edit only what was added behind them"
            )

    # ---- copies and branches ----------------------------------------------------------------------------------------

    def fork(self, capacity: int | None = None) -> Self:
        """Return a copy that can be extended without modifying this cache; only slots in use are copied.

        Unlike vLLM's fork it copies at once; `branch` is the copy-on-write one. This does not modify the cache.

        Args:
            capacity: slots per row of the copy; this cache's own when None.
        """
        capacity = self.capacity if capacity is None else capacity
        return self._copy_rows(torch.arange(self.batch_size), capacity, keep_prefixes=True)

    def select(self, rows: Sequence[int] | Tensor) -> Self:
        """Return a copy with the given rows, in the given order; a row may come more than once. No prefix is shared in the
        copy. This does not modify the cache."""
        index = torch.as_tensor(rows, dtype=torch.int64, device="cpu").reshape(-1)
        if index.numel() == 0 or not bool(((index >= 0) & (index < self.batch_size)).all()):
            raise LatentMASError(f"select: got rows {index.tolist()}; this cache has rows 0 to {self.batch_size - 1}")
        return self._copy_rows(index, self.capacity, keep_prefixes=False)

    def _copy_rows(self, rows: Tensor, capacity: int, *, keep_prefixes: bool) -> Self:
        """Copy rows; `keep_prefixes`, for all rows in their order, shares the same prefixes in the copy."""
        used = int(self.lengths[rows].max())
        if capacity < used:
            raise LatentMASError(
                f"a copy of {used} slots per row does not fit a capacity of {capacity}; ask for {used} or more"
            )
        copy, order = self.new_empty(len(rows), capacity), rows.tolist()
        if keep_prefixes:
            copy.prefix_row, copy.prefix_len = self.prefix_row.clone(), self.prefix_len.clone()
        if bool(self.prefix_len.any()):
            for row, source in enumerate(order):
                start = int(copy.prefix_len[row])
                self.copy_slots(source, start, int(self.lengths[source]), copy, row, start)
        else:
            used_slots = self._buffer[..., :used, :]
            if order != list(range(self.batch_size)):  # index_select makes a temporary
                used_slots = used_slots.index_select(2, rows.to(self._buffer.device))
            copy.buffer[..., :used, :] = used_slots
        copy.positions[:, :used] = self.positions[rows.to(self._buffer.device), :used]
        copy.lengths, copy.next_position = self.lengths[rows].clone(), self.next_position[rows].clone()
        copy.complete_from = self.complete_from[rows].clone()
        copy.segments = segments_of_rows(self.segments, order)
        return copy

    def copy_slots(self, row: int, start: int, stop: int, to: "KVBuffer", to_row: int, at: int) -> None:
        """Copy keys and values of the slots start to stop - 1 of a row, shared prefix included, to the slots from `at` on of a
        row of another cache. This modifies the buffer of `to`, and neither its lengths nor its positions."""
        end = min(max(int(self.prefix_len[row]), start), stop)
        for source, first, last in ((int(self.prefix_row[row]), start, end), (row, end, stop)):
            if first < last:
                target = to.buffer[:, :, to_row, :, at + first - start : at + last - start]
                target.copy_(self._buffer[:, :, source, :, first:last])

    def branch(self, name: str | None = None) -> Self:
        """Return a cache that goes on from here, or from the end of the segments of that name, without copying.

        Both use one buffer until one of them writes to slots that the other uses; that one then moves to a buffer of its own.
        So the first to go on from a common end does so in place, where it was `donate()`d or is used inside a transformers
        model, and the next one pays for a copy. This does not modify the cache.

        Raises:
            LatentMASError: where there is no segment of that name.
        """
        with _SHARING:
            branch = type(self).from_buffer(self._buffer, self.gaps)
            for attribute in ("positions", "lengths", "next_position", "prefix_row", "prefix_len", "complete_from"):
                setattr(branch, attribute, getattr(self, attribute).clone())
            branch.segments = list(self.segments)
            branch._sharers = self._sharers
            branch._sharers.add(branch)
        if name is not None:
            branch.rewind(name)
        return branch

    @property
    def shared(self) -> bool:
        """Whether a branch uses the same buffer."""
        return bool(self._branches())

    def _branches(self) -> "list[KVBuffer]":
        """Return the other caches on the same buffer."""
        with _SHARING:  # a branch that is made meanwhile would change the set under the loop
            return [other for other in list(self._sharers) if other is not self]

    def make_private(self, since: Tensor | None = None) -> None:
        """Move to a buffer of its own where a branch uses slots that are about to be written. This modifies the cache, and no
        content of any row.

        Args:
            since: int64 [B], first slot of each row that will be written to. None stands for all slots: then no prefix is
                shared any more, either; without branches that takes no second buffer.
        """
        with _SHARING:
            branches = self._branches()
            if since is not None:
                if any(branch._writing or bool((branch.lengths > since).any()) for branch in branches):
                    self._replace_with(self.fork())
            elif branches:
                self._replace_with(self.select(range(self.batch_size)))
            elif bool(self.prefix_len.any()):
                self.materialize_prefixes()

    def materialize_prefixes(self) -> None:
        """Copy its shared prefix to each row, in place. This modifies the cache."""
        # No row is overwritten that is still to be read: a row whose prefix others share has none of another row's.
        for store in (self.keys, self.values):
            for states in store:
                self.copy_prefixes(states, self.capacity)
        self.prefix_len = torch.zeros_like(self.prefix_len)
        self.device_copy_of = None

    def copy_prefixes(self, states: Tensor, stop: int) -> None:
        """Copy to each row its shared prefix, as far as it lies below the slot `stop`, in one layer's keys or values [B,
        kv_heads, capacity, head_dim]. This modifies the buffer; `prefix_len` is left to the caller."""
        for row in self.prefix_len.nonzero()[:, 0].tolist():
            end = min(stop, int(self.prefix_len[row]))
            states[row, :, :end] = states[int(self.prefix_row[row]), :, :end]

    def _replace_with(self, other: "KVBuffer") -> None:
        """Take over the buffer and the content of another cache; branches of this one stay on the old buffer."""
        with _SHARING:
            for name in (
                "_buffer", "lengths", "next_position", "positions", "segments", "prefix_row", "prefix_len", "complete_from",
                "gaps", "device_copy_of",
            ):  # fmt: skip
                setattr(self, name, getattr(other, name))
            self._sharers.discard(self)
            self._sharers = weakref.WeakSet([self])

    # ---- extending --------------------------------------------------------------------------------------------------

    def donate(self) -> Self:
        """Let the next call that gets this cache extend it in place instead of working on a fork; returns the cache.

        A call that needs more slots than `capacity` moves the cache to a larger buffer first, which copies what is in use;
        `max_cache_len` of the first call (in `latent_generate` and ModelWrapper) spares that. If the call fails, the cache
        holds what it held before.
        """
        self._donated = True
        return self

    def acquire(self, capacity: int) -> Self:
        """Return the cache to extend to `capacity` slots per row: this one where it was donated, moved to a larger buffer where
        it is too small; a fork otherwise. This modifies a donated cache: it is donated no more."""
        if not self._donated:
            return self.fork(max(capacity, int(self.lengths.max())))
        # Both may find too little free memory: the cache is as it was then, donation included.
        if capacity > self.capacity:
            self._replace_with(self.fork(capacity))
        else:
            self.make_private(since=self.lengths)
        self._donated = False
        return self

    def begin_write(self) -> None:
        """Begin to write behind the lengths, on a buffer of its own where a branch uses or writes those slots. This modifies
        the cache; branches see that it is being written until `finish_write`."""
        with _SHARING:
            self._writing = True
            self.make_private(since=self.lengths)

    def finish_write(self) -> None:
        """End what `begin_write` began. This modifies the cache."""
        self._writing = False

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Write inside the block; on any exception, Ctrl-C included, forget what was appended in it."""
        before = self.lengths.clone(), self.next_position.clone(), list(self.segments)
        try:
            self.begin_write()  # once more: a branch may have begun to write since `acquire`
            yield
        except BaseException:
            self.lengths, self.next_position, self.segments = before
            self.device_copy_of = None
            raise
        finally:
            self.finish_write()

    def reserve(self, counts: Tensor, columns: int) -> SlotMapping:
        """Plan one forward that appends counts[b] positions to row b from inputs left-padded to `columns`.

        This modifies the cache: the new positions are written to `positions`. Lengths change with `advance()`, after the
        forward.
        """
        assert int((self.lengths + counts).max()) <= self.capacity, "callers check the capacity before any work"
        slots = SlotMapping.plan(self.lengths, self.next_position, counts, columns, self._buffer.device)
        self.positions[slots.rows, slots.slots] = slots.positions[slots.rows, slots.columns]
        return slots

    def write(self, layer: int, keys: Tensor, values: Tensor, slots: SlotMapping) -> None:
        """Store one layer's new keys and values, [B, kv_heads, T, head_dim] after RoPE, without the padding. This modifies the
        cache."""
        self.device_copy_of = None
        for store, new in ((self.keys[layer], keys), (self.values[layer], values)):
            store[slots.rows, :, slots.slots] = new[slots.rows, :, slots.columns].to(store.device)

    def advance(self, counts: Tensor) -> None:
        """Add counts [B] to the lengths, once all layers have written the appended positions. This modifies the cache."""
        self.lengths = self.lengths + counts
        self.next_position = self.next_position + counts
        self.device_copy_of = None

    def add_segment(self, kind: Kind, start: Tensor) -> None:
        """Record that the slots from start[b] to the present length of each row hold `kind`. This modifies the cache.

        Extends the last segment where that has no agent yet, is of the same kind and ends there.
        """
        new = Segment(None, kind, tuple(start.tolist()), tuple(self.lengths.tolist()))
        last = self.segments[-1] if self.segments else None
        if last and (last.agent, last.kind, last.stop) == (None, kind, new.start):
            self.segments[-1] = replace(last, stop=new.stop)
        else:
            self.segments.append(new)

    def name_segments(self, agent: str) -> None:
        """Name the agent of all segments that have none yet. This modifies the cache."""
        self.segments = [s if s.agent is not None else replace(s, agent=agent) for s in self.segments]

    # ---- cutting the end --------------------------------------------------------------------------------------------

    def find_segments(self, names: str | Sequence[str]) -> list[Segment]:
        """Return the segments of these names in the order of the names given, those of one name in the order of the slots.
        This does not modify the cache.

        Raises:
            LatentMASError: where no segment has one of the names, or no name is given.
        """
        names = [names] if isinstance(names, str) else names
        if not len(names):
            raise LatentMASError("got no name of a segment; name one or more, or reset() to forget everything")
        return [s for name in names for s in find_segments(self.segments, name)]

    def rewind(self, name: str) -> None:
        """Forget all that was written behind the last segment of that name. This modifies the cache; nothing moves."""
        self.truncate(torch.tensor(self.find_segments(name)[-1].stop))

    def truncate(self, lengths: Tensor) -> None:
        """Forget the slots of row b from lengths[b] on. This modifies the cache; nothing moves, and shorter rows stay.

        Raises:
            LatentMASError: where later positions would see slots that `from_hf` found dropped.
        """
        lengths = torch.minimum(lengths, self.lengths)
        if bool((lengths == self.lengths).all()):
            return
        self.check_complete(lengths < self.complete_from, "cut")
        shared_len = torch.zeros_like(self.lengths).scatter_reduce(0, self.prefix_row, self.prefix_len, "amax")
        if bool((lengths < torch.maximum(self.prefix_len, shared_len)).any()):
            self.make_private()
        self.segments = segments_before(self.segments, lengths.tolist())
        self.set_lengths(lengths)

    def set_lengths(self, lengths: Tensor) -> None:
        """Set the lengths, and the next position of each row behind its last slot. This modifies the cache; an engine's copy of
        its content is no longer valid."""
        last = (lengths - 1).clamp_min(0)[:, None].to(self.positions.device)
        ends = self.positions.gather(1, last)[:, 0].cpu() + 1
        self.lengths, self.next_position = lengths.clone(), torch.where(lengths > 0, ends, 0)
        self.device_copy_of = None

    def reset(self) -> None:
        """Forget everything. This modifies the cache; the buffer stays."""
        self.lengths, self.next_position = torch.zeros_like(self.lengths), torch.zeros_like(self.lengths)
        self.prefix_len, self.complete_from = torch.zeros_like(self.lengths), torch.zeros_like(self.lengths)
        self.segments = []
        self.device_copy_of = None
