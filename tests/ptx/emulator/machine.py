"""Which warp runs next, and when launches start and end."""

import random

import numpy as np

from emulator.barriers import release
from emulator.memory import GlobalMemory
from emulator.program import Fault
from emulator.values import ALL, NONE, Lanes
from emulator.warp import Block, Faults, Launch, State, Warp

EVERY_LANE, NO_LANE = bytes([1] * 32), bytes(32)


class Machine:
    """A device that runs launches in the order of one stream.

    Warps take turns at random. How often, and whether some of them come last at every turn, the seed decides as well: faults of
    order show in few interleavings only.

    Attributes:
        resident: blocks that run at once.
        faults: races that were found, in words; empty is what a test wants.
        instructions: number of instructions that warps have run.
    """

    def __init__(self, memory: GlobalMemory, *, seed: int = 0, resident: int = 24, limit: int = 5_000_000) -> None:
        self.memory, self.resident, self.limit = memory, resident, limit
        self.faults = Faults()
        self.instructions = 0
        self._random = random.Random(seed)
        self._longest_turn = self._random.choice([3, 20, 200])
        self._share_of_late = self._random.choice([0.0, 0.3])
        self._resident: list[Block] = []
        self._ready: list[Warp] = []
        self._late: list[Warp] = []
        """Ready as well; they rarely run while another warp is ready."""

    def run(self, launches: list[Launch]) -> None:
        """Run the launches to their end. Modifies memory, `faults` and `instructions`.

        Raises:
            Fault: for what stops a device: an address outside of every buffer, a deadlock, an instruction of the whole warp
                where lanes diverge.
        """
        for number, launch in enumerate(launches):
            places = [
                (x, y, z) for z in range(launch.grid[2]) for y in range(launch.grid[1]) for x in range(launch.grid[0])
            ]
            self._random.shuffle(places)
            launch.number, launch.todo = number, places
        with np.errstate(all="ignore"):
            while not all(launch.ended for launch in launches):
                self._start(launches)
                warp = self._next(launches)
                self._turn(warp, self._random.randint(1, self._longest_turn))
                self._settle(warp, launches)

    # ---- launches and blocks ---------------------------------------------------------------------------------------

    def _start(self, launches: list[Launch]) -> None:
        """Start launches that may, and as many of their blocks as there is room for."""
        for launch in launches:
            if not launch.started:
                before = launches[: launch.number]
                early = launch.pdl and before and before[-1].started and before[-1].triggered == before[-1].blocks
                if not early and not all(other.ended for other in before):
                    return
                launch.started = True
            while launch.todo and len(self._resident) < self.resident:
                block = Block(launch, launch.todo.pop(), self.memory, self.faults)
                launch.dispatched += 1
                self._resident.append(block)
                for warp in block.warps:
                    if not launch.pdl:
                        warp.ended_launches = (1 << launch.number) - 1
                    warp.copies_at_issue = self._random.random() < 0.5
                    self._enqueue(warp)

    def _enqueue(self, warp: Warp) -> None:
        (self._late if self._random.random() < self._share_of_late else self._ready).append(warp)

    def _next(self, launches: list[Launch]) -> Warp:
        """Take a warp that can run."""
        # Late ones have a turn now and then: others may spin until they do something.
        queue = self._late if self._late and (not self._ready or self._random.random() < 0.02) else self._ready
        if not queue:
            waiting = [w for b in self._resident for w in b.warps if w.state is not State.DONE]
            raise Fault("deadlock: " + "; ".join(f"{w.where()} ({w.state.name})" for w in waiting[:6]))
        at = self._random.randrange(len(queue))
        queue[at], queue[-1] = queue[-1], queue[at]
        return queue.pop()

    def _settle(self, warp: Warp, launches: list[Launch]) -> None:
        """Put the warp where it belongs after its turn, and those that it freed."""
        block = warp.block
        if warp.state is State.WAITING_FOR_LAUNCH:
            before = launches[block.launch.number - 1] if block.launch.number else None
            if before is None or before.ended:
                self._pass_wait(warp, before)
        if warp.state is State.DONE:
            release(block)
            if all(w.state is State.DONE for w in block.warps):
                self._end(block, launches)
        for freed in block.released:
            if freed is not warp:
                self._enqueue(freed)
        block.released.clear()
        if warp.state is State.RUNNING:
            self._enqueue(warp)

    def _end(self, block: Block, launches: list[Launch]) -> None:
        """The block is through; where it was the last of its launch, warps that wait for that go on."""
        launch = block.launch
        block.trigger()
        launch.exited += 1
        self._resident.remove(block)
        for warp in block.warps:
            launch.ended_launches |= warp.ended_launches
        if launch.ended:
            launch.ended_launches |= 1 << launch.number
            for other in self._resident:
                for warp in other.warps:
                    if warp.state is State.WAITING_FOR_LAUNCH and other.launch.number == launch.number + 1:
                        self._pass_wait(warp, launch)
                        self._enqueue(warp)

    def _pass_wait(self, warp: Warp, before: Launch | None) -> None:
        """The launch before has ended: what it did, and what its warps had waited for, is ordered in front of this."""
        if before is not None:
            warp.ended_launches |= before.ended_launches
        warp.state = State.RUNNING

    # ---- instructions ----------------------------------------------------------------------------------------------

    def _turn(self, warp: Warp, visible: int) -> None:
        """Run a warp for a number of instructions that others can see, or until it waits."""
        steps, registers, groups = warp.block.launch.kernel.steps, warp.registers, warp.groups
        while visible > 0 and warp.state is State.RUNNING:
            group = groups[0] if len(groups) == 1 else min(groups, key=lambda g: g[0])
            execute, instruction, predicate, negated, is_visible = steps[group[0]]
            lanes: Lanes = group[1]
            if predicate is not None:
                lanes = guarded(lanes, registers[predicate], negated)
            self.instructions += 1
            if self.instructions > self.limit:
                raise Fault(f"no end after {self.limit} instructions: {warp.where()}")
            if execute is None:
                jump(warp, group, lanes, instruction.parts[0], instruction.target)
                if warp.state is State.DONE:
                    return
            else:
                group[0] += 1
                if lanes is not NONE:
                    warp.instruction = instruction.text
                    execute(warp, lanes)
                visible -= is_visible
            if len(groups) > 1:
                reconverge(groups)


def guarded(lanes: Lanes, predicate: Lanes, negated: bool) -> Lanes:
    """Return the lanes whose predicate holds; ALL or NONE where it is all or none of them."""
    taken = ~predicate if negated else predicate
    if lanes is not ALL:
        taken = taken & lanes
    packed = taken.tobytes()
    return ALL if packed == EVERY_LANE else NONE if packed == NO_LANE else taken


def jump(warp: Warp, group: list, lanes: Lanes, kind: str, target: int) -> None:
    """bra, ret or exit for some of a group's lanes; the others go on."""
    everyone = group[1]
    stay = NONE if lanes is everyone else guarded(everyone, lanes, negated=True)
    group[0], group[1] = group[0] + 1, stay
    if kind == "bra" and stay is NONE:
        group[0], group[1] = target, everyone
    elif kind == "bra" and lanes is not NONE:
        warp.groups.append([target, lanes])
    elif stay is NONE:
        warp.groups[:] = [other for other in warp.groups if other is not group]
        if not warp.groups:
            warp.state = State.DONE


def reconverge(groups: list[list]) -> None:
    """Join groups that are at the same instruction."""
    groups.sort(key=lambda g: g[0])
    for i in range(len(groups) - 1, 0, -1):
        if groups[i][0] == groups[i - 1][0]:
            joined = groups[i - 1][1] | groups[i][1]
            groups[i - 1][1] = ALL if joined.all() else joined
            del groups[i]
