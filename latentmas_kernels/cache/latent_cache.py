"""LatentCache: the KV memory that agents hand on. One preallocated buffer, ragged rows, explicit positions."""

import math
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor
from transformers import Cache

from latentmas_kernels.cache.hf_layer import HFCacheLayer
from latentmas_kernels.cache.padded_cache import PaddedCache, ask_about_masks
from latentmas_kernels.cache.segments import Kind, Segment, named, slots_of, up_to
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.architecture import Architecture

PREFIX_BLOCK = 64
"""Rows lend each other whole runs of so many slots: what engines attend to at once then lies in one row."""
_SHARING = threading.RLock()
"""Held while caches that share memory look at each other, so that of two that are about to write one sees the other do it."""


class Slots(NamedTuple):
    """Where the new positions of one forward go. Inputs are left-padded to [B, T]; row b brings counts[b] of them.

    rows, columns, slots: index of each real input, and the slot that it is written to. [N], on the cache's device.
    positions: [B, T], position of each input; padding repeats the row's first.
    width: slots that the longest row has after this forward.
    stop: [B], each row's length after this forward, on the cache's device.
    ragged: whether some row has fewer than `width` slots, or some input is padding.
    """

    rows: Tensor
    columns: Tensor
    slots: Tensor
    positions: Tensor
    width: int
    stop: Tensor
    ragged: bool


class Part(NamedTuple):
    """Rows of a cache from the slots start[i] of each on; what `LatentCache.concat` takes. Segments without an agent are this
    one's."""

    cache: "LatentCache"
    rows: Tensor
    start: Tensor
    agent: str | None = None


class InsufficientMemoryError(LatentMASError):
    """A buffer is larger than the memory that is free."""


def check_free_memory(need: int, device: torch.device, what: str, detail: str = "") -> None:
    """Raise InsufficientMemoryError where so many bytes are not free: a CPU would hand out the pages and kill us at the last.

    Args:
        what, detail: of the message: "what needs so many MB (detail)".
    """
    if device.type == "cpu":
        free = psutil.virtual_memory().available
    elif device.type == "cuda":
        # What torch has reserved and not handed out is free for it as well.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
    else:
        return
    if need > free:
        told = f" ({detail})" if detail else ""
        raise InsufficientMemoryError(
            f"{what} needs {need / 2**20:,.0f} MB{told}; free on {device} are {free / 2**20:,.0f} MB: take fewer rows at a "
            "time (a smaller batch), or shorter ones"
        )


class LatentCache(Cache):
    """Keys and values of all layers in one buffer of fixed capacity, with a length and a next position per row.

    Row b uses the slots 0 to lengths[b] - 1; what lies behind is undefined and never read. Padding is never stored.
    While all rows have the same length the object works as a transformers `Cache` in `model(...)` and
    `model.generate(...)`, which then append to it in place; ragged rows go through `to_hf()` or this package's
    `generate()`.

    Attributes:
        buffer: [2, layers, B, kv_heads, capacity, head_dim], keys and values.
        keys, values: [layers, B, kv_heads, capacity, head_dim], views of it.
        lengths: int64 [B] on the CPU, slots in use.
        next_position: int64 [B] on the CPU, position of the next token. Larger than the length where slots were cut out
            and the rest kept its positions.
        positions: int64 [B, capacity] on the cache's device, position of each slot in use.
        segments: what the slots hold, in the order of writing.
        prefix_row, prefix_len: int64 [B] on the CPU. The first prefix_len[b] slots of row b, a multiple of PREFIX_BLOCK, are
            those of row prefix_row[b], which borrows none itself; its own memory for them is there and not used. See
            `fork_rows`.
        complete_from: int64 [B] on the CPU. From this length on, all that later positions see is there: the length that
            `from_hf` read where some layer had dropped what lay outside its window, 0 elsewhere. No cut goes below it.
        gaps: places of layers that the model does not run. They hold zeros, which no layer reads.
        device_copy_of: what an engine holds of this content elsewhere; forgotten with every change.
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
        _, layers, batch, _, capacity, _ = buffer.shape
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
        self._sharers: weakref.WeakSet[LatentCache] = weakref.WeakSet([self])
        super().__init__(layers=[])
        self._make_layers()
        ask_about_masks()

    @classmethod
    def from_buffer(cls, buffer: Tensor, gaps: Sequence[int] = ()) -> "LatentCache":
        """An empty cache on the given memory [2, layers, B, kv_heads, capacity, head_dim], which it keeps and writes to."""
        cache = cls.__new__(cls)
        cache._init_buffer(buffer, gaps)
        return cache

    @classmethod
    def for_model(cls, architecture: Architecture, batch: int, capacity: int) -> "LatentCache":
        """An empty cache of the shape, dtype and device that a model writes, with zeros in the places of layers that it does
        not run."""
        return cls(
            layers=architecture.layers,
            batch=batch,
            kv_heads=architecture.kv_heads,
            capacity=capacity,
            head_dim=architecture.head_dim,
            dtype=architecture.dtype,
            device=architecture.device,
            gaps=architecture.gaps,
        )

    @property
    def buffer(self) -> Tensor:
        return self._buffer

    def _make_layers(self) -> None:
        self.layers = [HFCacheLayer(self, index) for index in range(self._buffer.shape[1])]

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name not in ("layers", "_sharers")}
        if len(self._sharers) > 1:  # branches in one object would share their copy, and not know it
            state["_buffer"] = self._buffer.clone()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies and pickles get layers of their own."""
        vars(self).update(state, _writing=False, device_copy_of=None)
        self._sharers = weakref.WeakSet([self])
        self._make_layers()

    def __copy__(self) -> "LatentCache":
        """A fork: a second object over the same memory would write into it and not be known to the first."""
        return self.fork()

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
    def kv_bytes(self) -> int:
        """Bytes of the keys and values in use, over all rows; what rows borrow is counted once."""
        return int((self.lengths - self.prefix_len).sum()) * self.slot_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of the keys and values of one slot of one row, over all layers."""
        _, layers, _, heads, _, width = self._buffer.shape
        return 2 * layers * heads * width * self._buffer.element_size()

    def __repr__(self) -> str:
        return (
            f"LatentCache(layers={len(self)}, lengths={self.lengths.tolist()}, capacity={self.capacity}, "
            f"dtype={self._buffer.dtype}, device={self._buffer.device}, segments={len(self.segments)})"
        )

    # ---- handing on -------------------------------------------------------------------------------------------------

    def fork(self, capacity: int | None = None) -> "LatentCache":
        """A copy that can be extended without touching this one; only slots in use are copied.

        Args:
            capacity: slots per row of the copy; this cache's own when None.
        """
        capacity = self.capacity if capacity is None else capacity
        return self._copy(torch.arange(self.batch_size), capacity, lending=True)

    def select(self, rows: Sequence[int] | Tensor) -> "LatentCache":
        """A copy with the given rows, in the given order; a row may come more than once."""
        index = torch.as_tensor(rows, dtype=torch.int64, device="cpu").reshape(-1)
        if index.numel() == 0 or not bool(((index >= 0) & (index < self.batch_size)).all()):
            raise LatentMASError(f"select: got rows {index.tolist()}; this cache has rows 0 to {self.batch_size - 1}")
        return self._copy(index, self.capacity)

    def donate(self) -> "LatentCache":
        """Let the next call that gets this cache extend it in place instead of working on a fork; returns it.

        A call that needs more slots than `capacity` moves it to a larger buffer first, which copies what is in use;
        `max_cache_len` of the first call (in `latent_generate` and ModelWrapper) spares that. If the call fails, the cache
        holds what it held before.
        """
        self._donated = True
        return self

    def acquire(self, capacity: int) -> "LatentCache":
        """The cache to extend to `capacity` slots per row: this one where it was donated, moved to a larger buffer where it is
        too small; a fork otherwise."""
        if not self._donated:
            return self.fork(max(capacity, int(self.lengths.max())))
        # Both may find no room: the cache is as it was then, donation included.
        if capacity > self.capacity:
            self._replace_with(self.fork(capacity))
        else:
            self.make_private(since=self.lengths)
        self._donated = False
        return self

    def branch(self, name: str | None = None) -> "LatentCache":
        """A cache that goes on from here, or from the end of the segments of that name, without copying.

        Both use the same memory until one of them writes to slots that the other uses; that one then moves to memory of
        its own. So the first to go on from a common end does so in place, where it was `donate()`d or is used inside a
        transformers model, and the next one pays for a copy.

        Raises:
            ValueError: where there is no segment of that name.
        """
        with _SHARING:
            branch = LatentCache.from_buffer(self._buffer, self.gaps)
            for attribute in ("positions", "lengths", "next_position", "prefix_row", "prefix_len", "complete_from"):
                setattr(branch, attribute, getattr(self, attribute).clone())
            branch.segments = list(self.segments)
            branch._sharers = self._sharers
            branch._sharers.add(branch)
        if name is not None:
            branch.rewind(name)
        return branch

    def make_private(self, since: Tensor | None = None) -> None:
        """Move to memory of its own where a branch uses slots that are about to be written.

        Args:
            since: int64 [B], first slot of each row that will be written to. None is all of them: then nothing is borrowed
                any more, either; without branches that takes no second buffer.
        """
        with _SHARING:
            others = self._others()
            if since is not None:
                if any(other._writing or bool((other.lengths > since).any()) for other in others):
                    self._replace_with(self.fork())
            elif others:
                self._replace_with(self.select(range(self.batch_size)))
            elif bool(self.prefix_len.any()):
                from latentmas_kernels.cache.edits import materialize_shared  # it needs LatentCache itself

                materialize_shared(self)

    def begin_write(self) -> None:
        """Begin to write behind the lengths: on memory of its own where a branch uses or writes those slots. Branches see it
        until `_writing` is taken back."""
        with _SHARING:
            self._writing = True
            self.make_private(since=self.lengths)

    def _others(self) -> "list[LatentCache]":
        """The branches that use the same memory."""
        with _SHARING:  # a branch that is made meanwhile would change the set under the loop
            return [other for other in list(self._sharers) if other is not self]

    @property
    def shared(self) -> bool:
        """Whether a branch uses the same memory."""
        return bool(self._others())

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """On any exception, Ctrl-C included, forget what was appended inside the block."""
        before = self.lengths.clone(), self.next_position.clone(), list(self.segments)
        try:
            self.begin_write()  # once more: a branch may have begun to write since `take`
            yield
        except BaseException:
            self.lengths, self.next_position, self.segments = before
            self.device_copy_of = None
            raise
        finally:
            self._writing = False

    def _copy(self, rows: Tensor, capacity: int, *, lending: bool = False) -> "LatentCache":
        """With lending, for all rows in their order, they go on lending each other what they lend now."""
        _, layers, _, heads, _, width = self._buffer.shape
        used = int(self.lengths[rows].max())
        if capacity < used:
            raise LatentMASError(
                f"a copy of {used} slots per row does not fit a capacity of {capacity}; ask for {used} or more"
            )
        copy = LatentCache(
            layers=layers, batch=len(rows), kv_heads=heads, capacity=capacity, head_dim=width,
            dtype=self._buffer.dtype, device=self._buffer.device, gaps=self.gaps,
        )  # fmt: skip
        order = rows.tolist()
        if lending:
            copy.prefix_row, copy.prefix_len = self.prefix_row.clone(), self.prefix_len.clone()
        if bool(self.prefix_len.any()):
            for row, source in enumerate(order):
                own = int(copy.prefix_len[row])
                self.copy_slots(source, own, int(self.lengths[source]), copy, row, own)
        else:
            source = self._buffer[..., :used, :]
            whole = order == list(range(self.batch_size))  # spares the temporary that index_select makes
            index = rows.to(self._buffer.device)
            copy._buffer[..., :used, :] = source if whole else source.index_select(2, index)
        copy.positions[:, :used] = self.positions[rows.to(self._buffer.device), :used]
        copy.lengths, copy.next_position = self.lengths[rows].clone(), self.next_position[rows].clone()
        copy.complete_from = self.complete_from[rows].clone()
        copy.segments = [
            replace(s, start=tuple(s.start[r] for r in order), stop=tuple(s.stop[r] for r in order))
            for s in self.segments
        ]
        return copy

    def copy_slots(self, row: int, start: int, stop: int, to: "LatentCache", to_row: int, at: int) -> None:
        """Copy keys and values of the slots from start to stop - 1 of a row, borrowed or not, to a row of another cache."""
        own = min(max(int(self.prefix_len[row]), start), stop)
        for source, first, last in ((int(self.prefix_row[row]), start, own), (row, own, stop)):
            if first < last:
                target = to._buffer[:, :, to_row, :, at + first - start : at + last - start]
                target.copy_(self._buffer[:, :, source, :, first:last])

    # ---- cutting and merging ----------------------------------------------------------------------------------------

    def keep(self, what: str | Sequence[str] | Tensor) -> None:
        """Keep some slots and forget the others, in place. What is kept moves together and keeps its positions.

        Keys stay as they were rotated: the gaps are recorded in `positions` and `next_position`, every engine here goes on
        behind them exactly, and `rebase` closes them.

        Args:
            what: names of segments ("planner", "planner:latent"), or bool [B, longest row], true for slots to keep.

        Raises:
            ValueError: for no name, a name that there is not, a mask of another shape, or where later positions would see
                slots that `from_hf` found dropped.
        """
        from latentmas_kernels.cache.edits import compact  # it needs LatentCache itself

        width = int(self.lengths.max())
        if not isinstance(what, Tensor):
            what = slots_of(self.named(what), self.batch_size, width)
        elif what.dtype != torch.bool or list(what.shape) != [self.batch_size, width]:
            raise LatentMASError(
                f"keep takes names of segments, or bool {[self.batch_size, width]}; got {what.dtype} {list(what.shape)}"
            )
        compact(self, what.cpu())

    def drop(self, what: str | Sequence[str]) -> None:
        """Forget the segments of these names, in place; as `keep` for all others."""
        self.keep(~slots_of(self.named(what), self.batch_size, int(self.lengths.max())))

    def rewind(self, name: str) -> None:
        """Forget all that was written behind the last segment of that name; nothing moves."""
        self.truncate(torch.tensor(self.named(name)[-1].stop))

    def rebase(self, model: Any) -> None:
        """Give the slots of each row the positions 0, 1, 2, ... and rotate the keys to them, in place.

        Args:
            model: the causal LM that wrote this cache.

        Raises:
            ValueError: where the positions of that model's keys cannot be changed afterwards (anything but plain RoPE).
        """
        from latentmas_kernels.cache.edits import rebase  # it needs LatentCache itself

        rebase(self, model)

    @classmethod
    def concat(cls, parts: "Sequence[LatentCache | Part]", model: Any, *, capacity: int | None = None) -> "LatentCache":
        """One memory out of several of the same rows, one behind the other. Positions are 0, 1, 2, ... in the order of the
        slots, keys are rotated to them; the parts stay as they are.

        Args:
            parts: caches of one model with as many rows each, or runs of their slots (`part`).
            model: the causal LM that wrote them.
            capacity: slots per row of the result; what is in use when None.

        Raises:
            ValueError: where the parts do not fit together, or keys cannot be moved (as `rebase`).
        """
        from latentmas_kernels.cache.edits import concat  # it needs LatentCache itself

        return concat(parts, model, capacity)

    def part(self, rows: Sequence[int], start: Tensor | None = None, agent: str | None = None) -> "Part":
        """Rows of this cache from the slots start[i] of each on, to be merged by `concat`; copies nothing.

        Raises:
            ValueError: where there is no such row or slot.
        """
        from latentmas_kernels.cache.edits import check_part  # it needs LatentCache itself

        index = torch.as_tensor(rows, dtype=torch.int64, device="cpu")
        part = Part(self, index, torch.zeros_like(index) if start is None else start.cpu(), agent)
        check_part(part)
        return part

    def fork_rows(self, times: int, capacity: int) -> "LatentCache":
        """Each row `times` times, one behind the other, for that many ways to go on. The first of them lends the others what
        they have in common, in whole runs of PREFIX_BLOCK slots.

        What is lent is neither computed nor copied, and engines read it where it lies. The buffer has room for it in every row
        all the same: on CUDA that memory is reserved, on the CPU its pages are never touched.
        """
        from latentmas_kernels.cache.edits import fork_rows  # it needs LatentCache itself

        return fork_rows(self, times, capacity)

    def named(self, names: str | Sequence[str]) -> list[Segment]:
        """The segments of these names in the order of the names given, those of one name in the order of the slots; ValueError
        where there is none of a name, or no name."""
        names = [names] if isinstance(names, str) else names
        if not len(names):
            raise LatentMASError("got no name of a segment; name one or more, or reset() to forget everything")
        return [s for name in names for s in named(self.segments, name)]

    def truncate(self, lengths: Tensor) -> None:
        """Forget what lies behind lengths[b] slots of row b; nothing moves. Shorter rows stay as they are.

        Raises:
            ValueError: where later positions would see slots that `from_hf` found dropped.
        """
        lengths = torch.minimum(lengths, self.lengths)
        if bool((lengths == self.lengths).all()):
            return
        self.check_complete(lengths < self.complete_from, "cut")
        lent = torch.zeros_like(self.lengths).scatter_reduce(0, self.prefix_row, self.prefix_len, "amax")
        if bool((lengths < torch.maximum(self.prefix_len, lent)).any()):
            self.make_private()
        self.segments = up_to(self.segments, lengths.tolist())
        self._measure(lengths)

    def check_complete(self, broken: Tensor, what: str) -> None:
        """Raise ValueError for the rows, bool [B], that would see slots which a sliding window dropped before `from_hf`."""
        if bool(broken.any()):
            row = int(broken.nonzero()[0])
            raise LatentMASError(
                f"{what}: row {row} was read from a transformers cache whose sliding windows had dropped what lay outside of "
                f"them at {int(self.complete_from[row])} tokens, so later positions would see slots that are not there. Let "
                "the model read the text into a LatentCache (latent_generate(..., latent_steps=0)), which keeps all slots, "
                "or edit only what was added behind them"
            )

    def _measure(self, lengths: Tensor) -> None:
        """Set lengths, and next positions behind the last slot of each row; what an engine mirrors is another content."""
        last = (lengths - 1).clamp_min(0)[:, None].to(self.positions.device)
        ends = self.positions.gather(1, last)[:, 0].cpu() + 1
        self.lengths, self.next_position = lengths.clone(), torch.where(lengths > 0, ends, 0)
        self.device_copy_of = None

    # ---- kept on disk -----------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], model: Any) -> None:
        """Write what is in use to a safetensors file, which `load` reads again, in another process too.

        Args:
            path: takes the place of a file that is there, once all is written; missing folders are made.
            model: the causal LM that wrote this cache; its fingerprint goes into the file, and no weights.

        Raises:
            ValueError: where this cannot be the cache of that model.
            OSError: where the file cannot be written.
        """
        from latentmas_kernels.cache.file import save_cache  # it needs LatentCache itself

        save_cache(self.select(range(self.batch_size)) if bool(self.prefix_len.any()) else self, path, model)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any) -> "LatentCache":
        """The cache of a file that `save` wrote, for the same model. Its capacity is what is in use.

        On the CPU the file is mapped: keys and values are read when a call gets to them, and writing to the cache does
        not change the file. Nothing in the file is trusted but the numbers that keys and values are; nothing is executed.
        While the cache lives, the file may be replaced or deleted, but not be cut short by another program.

        Args:
            model: the causal LM that wrote the cache, in evaluation mode; the cache goes to its device.

        Raises:
            FileNotFoundError: where there is no such file.
            ValueError: for a file that is damaged or not of this format, or that another model wrote.
        """
        from latentmas_kernels.cache.file import load_cache  # it needs LatentCache itself

        return load_cache(path, model)

    # ---- writing (engines) ------------------------------------------------------------------------------------------

    def reserve(self, counts: Tensor, columns: int) -> Slots:
        """Plan one forward that appends counts[b] positions to row b from inputs left-padded to `columns`.

        Writes the new positions into `positions`; lengths move with `advance()`, after the forward.
        """
        assert int((self.lengths + counts).max()) <= self.capacity, "callers check the capacity before any work"
        padding = (columns - counts)[:, None]
        column = torch.arange(columns)[None, :]
        offset = (column - padding).clamp_min(0)
        # A row that brings nothing repeats its last position, which is inside every table of positions.
        positions = self.next_position[:, None] + torch.where(counts[:, None] > 0, offset, -1)
        rows, cols = (column >= padding).nonzero(as_tuple=True)
        slots = (self.lengths[:, None] + offset)[rows, cols]
        stop = self.lengths + counts
        width = int(stop.max())
        ragged = bool((stop != width).any() or (counts != columns).any())
        device = self._buffer.device
        rows, cols, slots, positions, stop = (t.to(device) for t in (rows, cols, slots, positions, stop))
        self.positions[rows, slots] = positions[rows, cols]
        return Slots(rows, cols, slots, positions, width, stop, ragged)

    def write(self, layer: int, keys: Tensor, values: Tensor, slots: Slots) -> None:
        """Store one layer's new keys and values, [B, kv_heads, T, head_dim] after RoPE, without the padding."""
        self.device_copy_of = None
        for store, new in ((self.keys[layer], keys), (self.values[layer], values)):
            store[slots.rows, :, slots.slots] = new[slots.rows, :, slots.columns].to(store.device)

    def advance(self, counts: Tensor) -> None:
        """Count the appended positions in, once all layers have written them."""
        self.lengths = self.lengths + counts
        self.next_position = self.next_position + counts
        self.device_copy_of = None

    def add_segment(self, kind: Kind, start: Tensor) -> None:
        """Record that the slots from start[b] to the present length of each row hold `kind`.

        Goes on with the last segment where that has no agent yet, is of the same kind and ends there.
        """
        new = Segment(None, kind, tuple(start.tolist()), tuple(self.lengths.tolist()))
        last = self.segments[-1] if self.segments else None
        if last and (last.agent, last.kind, last.stop) == (None, kind, new.start):
            self.segments[-1] = replace(last, stop=new.stop)
        else:
            self.segments.append(new)

    def name_segments(self, agent: str) -> None:
        """Give the segments that have no agent yet this one's name."""
        self.segments = [s if s.agent is not None else replace(s, agent=agent) for s in self.segments]

    # ---- to and from transformers -----------------------------------------------------------------------------------

    def attention_mask(self, new: Tensor | None = None) -> Tensor:
        """int64 [B, longest row (+ T)]: the mask of what `to_hf()` gives, followed by the mask [B, T] of new tokens."""
        width = int(self.lengths.max())
        mask = (torch.arange(width)[None, :] >= width - self.lengths[:, None]).long().to(self._buffer.device)
        return mask if new is None else torch.cat([mask, new.to(mask)], dim=1)

    def to_hf(self) -> PaddedCache:
        """A transformers DynamicCache with the same keys and values, left-padded, which knows its padding.

        This package's calls take it without a mask. transformers counts positions from the mask, so plain `generate()` needs
        `attention_mask(new)`, and a plain forward its `position_ids` too: a mask or positions that do not fit the padding are a
        ValueError there (see `PaddedCache`). Every layer is kept in full, sliding windows included, so the model's own masks
        are right. But transformers counts a window in columns: new tokens with padding between them and the past, which would
        use it up, are refused as well. The places of layers that the model does not run stay empty, as the model leaves them in
        a cache of transformers, but the first, by which transformers counts.

        Raises:
            ValueError: where positions have gaps, which a transformers cache cannot express.
        """
        self._check_counted("to_hf")
        if bool(self.prefix_len.any()):
            return self.select(range(self.batch_size)).to_hf()
        width = int(self.lengths.max())
        slot = torch.arange(width)[None, :] - (width - self.lengths[:, None])
        index = slot.clamp_min(0).to(self._buffer.device)[:, None, :, None]

        def placed(store: Tensor) -> Tensor:
            used = store[:, :, :width]
            return used.gather(2, index.expand_as(used))

        cache = PaddedCache()
        cache.expect((slot >= 0).to(self._buffer.device))
        for layer in range(self._buffer.shape[1]):
            if layer == 0 or layer not in self.gaps:
                cache.update(placed(self.keys[layer]), placed(self.values[layer]), layer)
        return cache

    @classmethod
    def from_hf(
        cls, cache: Cache, attention_mask: Tensor | None = None, *, capacity: int | None = None
    ) -> "LatentCache":
        """Copy a transformers cache, without its padding.

        Args:
            cache: dynamic, static or quantized layers of keys and values; it is not changed. Layers that hold nothing, or
                fewer columns than the others and only zeros, are places in which the model runs none (`gaps`). Layers that
                kept only their sliding window are fine: what they dropped lies outside the window of every later query, as
                long as the row is not cut below what it holds now (`complete_from`). Quantized ones (quanto, HQQ, FP8) are
                dequantized; offloaded ones go back to the device that wrote them.
            attention_mask: [B, cached tokens], 0 marks padding anywhere. It is believed, columns of zeros included, which
                calls like `generate` do not always do: convert a cache here where it holds tokens whose embedding is zero.
                Only of a PaddedCache (`to_hf`), which knows its padding, it must be the padding.
                None: padding are the columns that hold zeros in place of keys and values, as `to_hf` writes them; for other
                caches than a PaddedCache a warning says which (see `padded_cache.real_columns`).
            capacity: slots per row; what is in use when None.

        Raises:
            ValueError: for other kinds of layers, an empty cache, and a mask of the wrong shape or at odds with the padding
                that a PaddedCache holds.
        """
        from latentmas_kernels.cache.from_hf import cache_from_hf  # it needs LatentCache itself

        return cache_from_hf(cache, attention_mask, capacity)

    def check_fits(self, architecture: Architecture, batch: int) -> None:
        """Raise ValueError where this cannot be the past of `batch` rows of that model."""
        _, layers, rows, heads, _, width = self._buffer.shape
        missing = sorted(set(architecture.slots) & set(self.gaps))
        got = {"layers": layers, "kv_heads": heads, "head_dim": width, "dtype": self._buffer.dtype}
        want = {k: getattr(architecture, k) for k in got}
        wrong = [f"{k} {got[k]} instead of {want[k]}" for k in got if got[k] != want[k]]
        if wrong:
            raise LatentMASError(
                f"past_key_values is the cache of another model: {', '.join(wrong)} ({architecture.name}). "
                "Pass a cache that this model wrote, or None."
            )
        if missing:
            raise LatentMASError(
                f"past_key_values holds nothing in the places {missing} of layers that {architecture.name} runs; pass a cache "
                "that this model wrote, or None"
            )
        if self._buffer.device != architecture.device:
            raise LatentMASError(
                f"past_key_values is on {self._buffer.device}, {architecture.name} on {architecture.device}; move one"
            )
        if rows != batch:
            raise LatentMASError(
                f"past_key_values has {rows} rows, the inputs have {batch}; use select(rows) to match them"
            )

    # ---- as a transformers Cache, while rows are uniform ------------------------------------------------------------

    def uniform_length(self) -> int:
        """The length of all rows; ValueError where they differ or where positions have gaps."""
        self._check_counted("use inside a transformers model")
        length = int(self.lengths[0])
        if bool((self.lengths != length).any()):
            raise LatentMASError(
                f"this LatentCache has ragged rows (lengths {self.lengths.tolist()}), which a transformers model cannot "
                "tell apart; pass to_hf() with attention_mask(), or use latentmas_kernels.generate()"
            )
        return length

    def _check_counted(self, what: str) -> None:
        if bool((self.next_position != self.lengths).any()):
            raise LatentMASError(
                f"{what}: the slots of this LatentCache do not have the positions 0, 1, 2, ... (lengths "
                f"{self.lengths.tolist()}, next positions {self.next_position.tolist()}), which transformers would assume"
            )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.uniform_length()

    def look_at(self, mask: Any, columns: int, positions: Tensor | None, window: int | None = None) -> Any:
        """The mask of a plain forward, as `PaddedCache.look_at`; ValueError where it marks padding, which is never stored."""
        if isinstance(mask, Tensor) and mask.dim() == 2 and not bool((mask != 0).all()):
            raise LatentMASError(
                f"attention_mask has {(mask != 0).sum(1).tolist()} ones in {mask.shape[1]} columns, but the "
                f"{int(self.lengths[0])} slots of each row of this LatentCache are tokens, and it takes no padding from a "
                "transformers model. Use latentmas_kernels.generate(), or pass to_hf() with attention_mask(new). (transformers "
                "takes ids that equal pad_token_id for padding where it gets no mask.)"
            )
        return mask

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove slots of every row (transformers' sign)."""
        count = -tokens_to_remove
        if not 0 <= count <= int(self.lengths.min()):
            raise LatentMASError(
                f"crop takes minus the number of tokens to remove, at most {int(self.lengths.min())} here; "
                f"got {tokens_to_remove}"
            )
        self.truncate(self.lengths - count)

    def reset(self) -> None:
        """Forget everything; the buffer stays."""
        self.lengths, self.next_position = torch.zeros_like(self.lengths), torch.zeros_like(self.lengths)
        self.prefix_len, self.complete_from = torch.zeros_like(self.lengths), torch.zeros_like(self.lengths)
        self.segments = []
        self.device_copy_of = None

    def batch_select_indices(self, indices: Tensor) -> None:
        self._replace_with(self.select(indices))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._replace_with(self.select(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._replace_with(self.select(torch.arange(self.batch_size).repeat_interleave(repeats)))

    def _replace_with(self, other: "LatentCache") -> None:
        with _SHARING:
            for name in (
                "_buffer", "lengths", "next_position", "positions", "segments", "prefix_row", "prefix_len", "complete_from",
                "gaps", "device_copy_of",
            ):  # fmt: skip
                setattr(self, name, getattr(other, name))
            self._sharers.discard(self)
            self._sharers = weakref.WeakSet([self])
