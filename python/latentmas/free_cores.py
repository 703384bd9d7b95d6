"""Whether other processes leave the cores that the threads of a run need."""

import os
import time

import psutil

SECONDS = 1.0
"""Shorter looks see the ticks of the clock that processor time is counted in."""


class OtherProcesses:
    """What the other processes of this machine took of its cores, from when this is made on."""

    def __init__(self) -> None:
        self._began = self._clocks()

    def cores(self) -> float:
        """Cores that they kept busy: measured, and at most the load average, which a short burst does not raise.

        The load average alone counts what this process did, and for a minute what one before it did.
        """
        elapsed, busy, own = (now - then for now, then in zip(self._clocks(), self._began, strict=True))
        if elapsed < SECONDS:
            return 0.0
        return max(0.0, min((busy - own) / elapsed, psutil.getloadavg()[0]))

    def warning(self, threads: int) -> str | None:
        """One line where a run on so many threads has to share cores; None where there are enough."""
        cores = psutil.cpu_count() or 1
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
        """Seconds: of the wall clock, of all cores at work, and of this process and its children at work."""
        times = psutil.cpu_times()._asdict()
        idle = ("idle", "iowait", "guest", "guest_nice")  # guests are in user and nice already
        return time.monotonic(), sum(times.values()) - sum(times.get(name, 0.0) for name in idle), sum(os.times()[:4])
