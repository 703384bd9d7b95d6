"""Which accesses are ordered. Two accesses of the same bytes, one of them a write, must be.

Each warp has a clock for every warp of its launch: how far it knows that one to be. A barrier, or an acquire of what another
released, brings it up to date. Launches are ordered as a whole: a warp knows which launches before its own have ended. So
a release in one launch that another acquires orders nothing; no kernel here does that.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from emulator.warp import Warp

Starts = NDArray[np.int64]

PENDING = np.iinfo(np.int32).max
"""The clock of an asynchronous access until it is done: no warp knows it to have happened, not even the one that issued it."""


class AccessLog:
    """Accesses of some warps to one buffer, in the order of the run: of a launch, or of a block to its shared memory.

    Attributes:
        first: number of the first of these warps in their launch.
        latest: the clock of each of them at its last access; PENDING while one is.
    """

    def __init__(self, first: int, warps: int) -> None:
        self.first = first
        self.latest = np.zeros(warps, np.int32)
        self._table = np.empty((64, 5), np.int64)  # warp, clock, atomic, lowest byte, end
        self._accesses: list[tuple[Starts, int, str]] = []

    def add(self, warp: "Warp", starts: Starts, width: int, atomic: bool, pending: bool = False) -> int:
        """Note an access of `width` bytes at each of `starts`; return its place, for `finish` of a pending one."""
        count = len(self._accesses)
        if count == len(self._table):
            self._table = np.concatenate([self._table, np.empty_like(self._table)])
        number, clock = warp.number - self.first, PENDING if pending else warp.clock[warp.number]
        self._table[count] = number, clock, atomic, starts.min(), starts.max() + width
        self._accesses.append((starts, width, warp.instruction))
        self.latest[number] = max(self.latest[number], clock)
        return count

    def finish(self, warp: "Warp", place: int) -> None:
        """A pending access is done: it is ordered as if `warp` made it now."""
        number = warp.number - self.first
        self._table[place, 1] = warp.clock[warp.number]
        table = self._table[: len(self._accesses)]
        self.latest[number] = table[table[:, 0] == number, 1].max()

    def unordered(self, warp: "Warp", starts: Starts, width: int, atomic: bool) -> str | None:
        """Return an access of the same bytes that `warp` does not know to have happened, None where there is none.

        Atomic accesses need no order among each other.
        """
        clocks = warp.clock[self.first : self.first + len(self.latest)]
        if (self.latest <= clocks).all():
            return None
        table = self._table[: len(self._accesses)]
        suspect = table[:, 1] > clocks[table[:, 0]]
        suspect &= (table[:, 0] != warp.number - self.first) | (table[:, 1] == PENDING)
        return self._overlapping(suspect, starts, width, atomic)

    def any(self, starts: Starts, width: int, atomic: bool) -> str | None:
        """Return an access of the same bytes, whenever it was."""
        return self._overlapping(np.ones(len(self._accesses), bool), starts, width, atomic)

    def clear(self) -> None:
        """Forget the accesses: all that follows is ordered behind them."""
        self._accesses.clear()

    def _overlapping(self, suspect: NDArray[np.bool_], starts: Starts, width: int, atomic: bool) -> str | None:
        table = self._table[: len(self._accesses)]
        suspect = suspect & (table[:, 3] < starts.max() + width) & (table[:, 4] > starts.min())
        if atomic:
            suspect &= table[:, 2] == 0
        for at in np.flatnonzero(suspect):
            others, other_width, instruction = self._accesses[at]
            apart = (others[:, None] + other_width <= starts) | (starts + width <= others[:, None])
            if not apart.all():
                return f"warp {table[at, 0]}: {instruction}"
        return None


class Release(NamedTuple):
    """What a warp knew when it released an address: the number of its launch, its clock, the launches that had ended."""

    launch: int
    clock: NDArray[np.int32]
    ended_launches: int

    @classmethod
    def by(cls, warp: "Warp", earlier: "Release | None" = None) -> "Release":
        """Return what a warp knows; an atomic update hands on what was released at its address before."""
        launch = warp.block.launch.number
        if earlier is None or earlier.launch != launch:
            return cls(launch, warp.clock.copy(), warp.ended_launches)
        return cls(launch, np.maximum(warp.clock, earlier.clock), warp.ended_launches | earlier.ended_launches)

    def teach(self, warp: "Warp") -> None:
        """Let a warp of the same launch know it."""
        if self.launch == warp.block.launch.number:
            np.maximum(warp.clock, self.clock, out=warp.clock)
            warp.ended_launches |= self.ended_launches


class LaunchLogs:
    """Reads, or writes, of one buffer by all launches."""

    def __init__(self) -> None:
        self.launches = 0
        """Bit i for launch i."""
        self._logs: dict[int, AccessLog] = {}

    def add(self, warp: "Warp", starts: Starts, width: int, atomic: bool, pending: bool = False) -> int:
        launch = warp.block.launch
        if launch.number not in self._logs:
            self._logs[launch.number] = AccessLog(0, launch.warps)
            self.launches |= 1 << launch.number
        return self._logs[launch.number].add(warp, starts, width, atomic, pending)

    def finish(self, warp: "Warp", place: int) -> None:
        """A pending access of the warp's launch is done."""
        self._logs[warp.block.launch.number].finish(warp, place)

    def unordered(self, warp: "Warp", starts: Starts, width: int, atomic: bool) -> str | None:
        """Return an access of the same bytes that is not ordered in front of this one."""
        open_launches = self.launches & ~warp.ended_launches
        number = 0
        while open_launches >> number:
            if open_launches >> number & 1:
                log, mine = self._logs[number], number == warp.block.launch.number
                found = log.unordered(warp, starts, width, atomic) if mine else log.any(starts, width, atomic)
                if found:
                    return f"{found} (launch {number})"
            number += 1
        return None
