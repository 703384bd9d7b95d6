"""Global memory, the buffers at their addresses, and the shared memory of a block."""

from bisect import bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from emulator.program import Fault
from emulator.races import AccessLog, LaunchLogs, Release, Starts
from emulator.values import ALL, UNSIGNED, Array, Lanes

if TYPE_CHECKING:
    from emulator.warp import Warp

Addresses = NDArray[np.int64]


@dataclass(order=True)
class Buffer:
    """A piece of global memory.

    Attributes:
        base: its address.
        bytes: uint8, the memory itself.
        writable: False where no kernel may write.
        releases: the last one of each byte.
    """

    base: int
    name: str = field(compare=False)
    bytes: NDArray[np.uint8] = field(compare=False)
    writable: bool = field(compare=False)
    reads: LaunchLogs = field(compare=False, default_factory=LaunchLogs)
    writes: LaunchLogs = field(compare=False, default_factory=LaunchLogs)
    releases: dict[int, Release] = field(compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        # Sizes that do not divide leave a rest that no aligned access fits in.
        self.elements: dict[int, Array] = {
            size: self.bytes[: len(self.bytes) // size * size].view(kind) for size, kind in UNSIGNED.items()
        }

    @property
    def end(self) -> int:
        return self.base + len(self.bytes)

    def forget(self) -> None:
        """Begin anew: what happened to the buffer so far is ordered in front of what comes."""
        self.reads, self.writes, self.releases = LaunchLogs(), LaunchLogs(), {}


class GlobalMemory:
    """All buffers. An address outside of them is a fault."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self._bases: list[int] = []

    def add(self, buffer: Buffer) -> None:
        assert buffer.base % 16 == 0, f"{buffer.name} begins at {buffer.base:#x}"
        insort(self.buffers, buffer)
        insort(self._bases, buffer.base)

    def at(self, address: int) -> Buffer | None:
        """Return the buffer of an address."""
        index = bisect_right(self._bases, address) - 1
        return self.buffers[index] if index >= 0 and address < self.buffers[index].end else None

    def spans(
        self, warp: "Warp", lanes: Lanes, addresses: Addresses, width: int
    ) -> Iterator[tuple[Buffer, Lanes, Addresses]]:
        """Yield each buffer that the lanes access, these lanes, and the byte in the buffer for every lane."""
        active = addresses if lanes is ALL else addresses[lanes]
        check_alignment(warp, active, width)
        low, high = int(active.min()), int(active.max())
        buffer = self.at(low)
        if buffer is not None and high + width <= buffer.end:
            yield buffer, lanes, addresses - buffer.base
            return
        left = lanes.copy()
        while left.any():
            address = int(addresses[left][0])
            buffer = self.at(address)
            if buffer is None or address + width > buffer.end:
                raise Fault(f"{warp.where()} accesses {width} bytes at {self.place(address)}")
            here = left & (addresses >= buffer.base) & (addresses + width <= buffer.end)
            yield buffer, here, addresses - buffer.base
            left &= ~here

    def place(self, address: int) -> str:
        """Say where an address is, or which buffer ends in front of it."""
        index = bisect_right(self._bases, address) - 1
        if index < 0:
            return f"{address:#x}, outside of every buffer"
        buffer = self.buffers[index]
        return f"{address:#x}, byte {address - buffer.base} of {buffer.name}, which has {len(buffer.bytes)}"


def check_alignment(warp: "Warp", addresses: Addresses, width: int) -> None:
    if int(np.bitwise_or.reduce(addresses)) & (width - 1):
        raise Fault(f"misaligned for {width} bytes: {warp.where()}")


def note_read(
    warp: "Warp", buffer: Buffer, starts: Starts, width: int, *, atomic: bool, pending: bool = False
) -> int | None:
    """Check a read of a buffer for a write that it is not ordered behind.

    Returns:
        Its place in the buffer's reads; None where no kernel may write the buffer.
    """
    if not buffer.writable:
        return None
    if buffer.writes.launches & ~warp.ended_launches:
        other = buffer.writes.unordered(warp, starts, width, atomic)
        if other:
            warp.report(f"race on {buffer.name}", "read", other)
    return buffer.reads.add(warp, starts, width, atomic, pending)


def note_write(warp: "Warp", buffer: Buffer, starts: Starts, width: int, *, atomic: bool) -> None:
    """Check a write to a buffer for a read or a write that it is not ordered behind."""
    if not buffer.writable:
        raise Fault(f"{buffer.name} is read only: {warp.where()}")
    for log in (buffer.writes, buffer.reads):
        if log.launches & ~warp.ended_launches:
            other = log.unordered(warp, starts, width, atomic)
            if other:
                warp.report(f"race on {buffer.name}", "write", other)
    buffer.writes.add(warp, starts, width, atomic)


class SharedMemory:
    """Of one block; NaN in every type until it is written."""

    def __init__(self, size: int, first_warp: int, warps: int) -> None:
        self.size = size
        self.bytes = np.full(-(-max(size, 16) // 16) * 16, 0xFF, np.uint8)
        self.elements: dict[int, Array] = {width: self.bytes.view(kind) for width, kind in UNSIGNED.items()}
        self.reads, self.writes = AccessLog(first_warp, warps), AccessLog(first_warp, warps)

    def ordered(self) -> None:
        """All warps of the block met at a barrier: what was before is ordered in front of what comes."""
        self.reads.clear()
        self.writes.clear()

    def read(self, warp: "Warp", starts: Starts, width: int) -> None:
        """Check and note a read."""
        self._check_bounds(warp, starts, width)
        other = self.writes.unordered(warp, starts, width, atomic=False)
        if other:
            warp.report("race in shared memory", "read", other)
        self.reads.add(warp, starts, width, atomic=False)

    def reserve(self, warp: "Warp", starts: Starts, width: int) -> None:
        """Check and note a write that is still on its way: from here on nobody else may touch these bytes."""
        self._check_bounds(warp, starts, width)
        self._note_write(warp, starts, width, self._conflict(warp, starts, width))

    def write(self, warp: "Warp", starts: Starts, data: NDArray[np.uint8]) -> None:
        """Write `data` uint8 [lanes, width].

        Warps may store the bytes that are there already: Triton has warps store copies of a value that all of them hold.
        """
        width = data.shape[1]
        self._check_bounds(warp, starts, width)
        conflict = self._conflict(warp, starts, width)
        places = starts[:, None] + np.arange(width)
        before = self.bytes[places] if conflict else None
        self.bytes[places] = data
        if before is not None and (self.bytes[places] == before).all():
            conflict = self.reads.unordered(warp, starts, width, atomic=False)
        self._note_write(warp, starts, width, conflict)

    def _conflict(self, warp: "Warp", starts: Starts, width: int) -> str | None:
        reads = self.reads.unordered(warp, starts, width, atomic=False)
        return reads or self.writes.unordered(warp, starts, width, atomic=False)

    def _note_write(self, warp: "Warp", starts: Starts, width: int, conflict: str | None) -> None:
        if conflict:
            warp.report("race in shared memory", "write", conflict)
        self.writes.add(warp, starts, width, atomic=False)

    def _check_bounds(self, warp: "Warp", starts: Starts, width: int) -> None:
        check_alignment(warp, starts, width)
        if starts.min() < 0 or starts.max() + width > self.size:
            raise Fault(f"byte {starts.max()} of {self.size} bytes of shared memory: {warp.where()}")
