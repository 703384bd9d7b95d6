"""A warning where other processes keep the cores busy that the threads of a run need."""

import os
import time

import psutil

SECONDS = 1.0
"""Shortest time to measure over: the system counts processor time in ticks of 10 ms or so, too coarse for less."""


class OtherProcesses:
    """The time that other processes use, from now on, of the cores that this process may run on."""

    def __init__(self) -> None:
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(psutil.cpu_count() or 1)
        self._allowed = sorted(allowed)
        self._began = self._clocks()

    def cores(self) -> float:
        """Return the cores that they kept busy: measured, and at most the load average, which a short burst does not raise.

        The load average alone counts what this process did, and for a minute what one before it did.
        """
        elapsed, busy, own = (now - then for now, then in zip(self._clocks(), self._began, strict=True))
        if elapsed < SECONDS:
            return 0.0
        return max(0.0, min((busy - own) / elapsed, psutil.getloadavg()[0]))

    def warning(self, threads: int) -> str | None:
        """Return one line where a run on so many threads has to share cores; None where there are enough."""
        cores = len(self._allowed)
        others = self.cores()
        free = cores - others
        if threads <= 1 or threads <= free + 0.5:
            return None
        fewer = max(1, int(free))
        return (
            f"other processes keep {others:.1f} of {cores} cores busy, and this run has {threads} threads, which wait for each "
            f"other: fewer may be faster (LATENTMAS_NUM_THREADS={fewer}, and OMP_NUM_THREADS for what runs on torch)"
        )

    def _clocks(self) -> tuple[float, float, float]:
        """Return seconds: of the wall clock, of the allowed cores at work, and of this process and its children at work."""
        idle = ("idle", "iowait", "guest", "guest_nice")  # guests are in user and nice already
        cores = [times._asdict() for times in psutil.cpu_times(percpu=True)]
        busy = sum(
            seconds for core in self._allowed if core < len(cores)
            for name, seconds in cores[core].items() if name not in idle
        )  # fmt: skip
        return time.monotonic(), busy, sum(os.times()[:4])
