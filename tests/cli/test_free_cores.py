"""Whether a run has to share its cores: measured on clocks that the test sets."""

import os
from types import SimpleNamespace

import psutil
import pytest
from latentmas.cli import free_cores
from latentmas.cli.free_cores import OtherProcesses


class Machine:
    """Its clocks: seconds that passed, that the allowed cores worked, and that this process and its children did.

    It has four cores more, all of them busy, which this process may not use: 0, 2, 4 and 6.
    """

    def __init__(self, monkeypatch, cores, load):
        self.now, self.user, self.system, self.own, self.children = 100.0, 0.0, 0.0, 0.0, 0.0
        monkeypatch.setattr(free_cores.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(psutil, "cpu_times", self.times)
        monkeypatch.setattr(os, "times", lambda: (self.own, 0.0, self.children, 0.0, self.now))
        self.allowed = [1, 3, 5, *range(7, cores + 4)][:cores]
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(self.allowed), raising=False)
        monkeypatch.setattr(psutil, "cpu_count", lambda: cores + 7)
        monkeypatch.setattr(psutil, "getloadavg", lambda: (load, 0.0, 0.0))

    def times(self, percpu=False):
        share = 1 / len(self.allowed)
        idle = {"idle": 7 * self.now, "iowait": self.now, "guest": self.user}
        ours = {"user": self.user * share, "system": self.system * share, **idle}
        busy = {"user": self.now, "system": 0.0, **idle}
        cores = [ours if core in self.allowed else busy for core in range(max(self.allowed) + 1)]
        if percpu:
            return [SimpleNamespace(_asdict=lambda core=core: core) for core in cores]
        sums = {name: sum(core[name] for core in cores) for name in ours}
        return SimpleNamespace(_asdict=lambda: sums)

    def work(self, seconds, *, others, own=1.0, children=0.0):
        """Let time pass in which so many cores work for others, for this process and for its children."""
        self.now += seconds
        self.own += seconds * own
        self.children += seconds * children
        self.user += seconds * (others + own + children) / 2
        self.system += seconds * (others + own + children) / 2


@pytest.mark.parametrize(
    ("cores", "load", "others", "threads", "fewer"),
    [
        (2, 3.0, 1.5, 2, 1),
        (8, 9.0, 6.0, 8, 2),
        (8, 9.0, 6.0, 2, None),  # threads for the cores that are free
        (2, 3.0, 2.0, 1, None),  # there is nothing to take away
        (2, 3.0, 0.2, 2, None),  # a load average that this machine's last run left behind
        (2, 0.2, 2.0, 2, None),  # a burst
        (64, 40.0, 30.0, 8, None),
    ],
)
def test_threads_are_held_against_what_others_leave(monkeypatch, cores, load, others, threads, fewer):
    machine = Machine(monkeypatch, cores, load)
    look = OtherProcesses()
    machine.work(4.0, others=others, own=0.7, children=0.3)
    assert look.cores() == pytest.approx(min(others, load))
    said = look.warning(threads)
    assert (said is not None) == (fewer is not None)
    if said:
        assert said.startswith(
            f"other processes keep {others:.1f} of {cores} cores busy, and this run has {threads} threads"
        )
        assert f"LATENTMAS_NUM_THREADS={fewer}," in said
        assert "\n" not in said


def test_a_short_look_says_nothing(monkeypatch):
    machine = Machine(monkeypatch, 2, 9.0)
    look = OtherProcesses()
    machine.work(0.5, others=2.0)
    assert look.warning(2) is None


def test_the_clocks_of_this_machine_can_be_read():
    look = OtherProcesses()
    before, after = look._clocks(), look._clocks()
    assert all(second >= first for first, second in zip(before, after, strict=True))
    assert look.cores() == 0.0
