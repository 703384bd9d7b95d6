"""Launches, blocks and warps: what each of them holds while a machine runs."""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

import numpy as np

from emulator.memory import GlobalMemory, SharedMemory
from emulator.program import Fault
from emulator.values import ALL, LANES, Array, Lanes

if TYPE_CHECKING:
    from emulator.decode import Kernel


class State(Enum):
    RUNNING = auto()
    AT_BARRIER = auto()
    WAITING_FOR_LAUNCH = auto()
    DONE = auto()


@dataclass
class Launch:
    """A kernel and its arguments.

    Attributes:
        arguments: addresses and numbers, by parameter; those that Triton adds for itself are 0.
        shared: bytes of shared memory of a block.
        pdl: whether it may start before the launch ahead of it has ended.
        number: its place in the stream.
        todo: the blocks that are not dispatched yet.
        triggered: blocks that let the next launch start.
        ended_launches: bit i where some warp that has ended knew that launch i had.
    """

    kernel: "Kernel"
    grid: tuple[int, int, int]
    arguments: list[int | float]
    shared: int = 0
    pdl: bool = False
    name: str = ""
    number: int = 0
    todo: list[tuple[int, int, int]] = field(default_factory=list)
    dispatched: int = 0
    triggered: int = 0
    exited: int = 0
    started: bool = False
    ended_launches: int = 0

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def warps(self) -> int:
        return self.blocks * self.warps_per_block

    @property
    def warps_per_block(self) -> int:
        return -(-self.kernel.program.threads // 32)

    @property
    def ended(self) -> bool:
        return self.exited == self.blocks

    def parameter_values(self) -> dict[int, Array]:
        """Return the registers of the parameters and what they hold in every lane."""
        program = self.kernel.program
        missing = len(program.parameters) - len(self.arguments)
        if not 0 <= missing <= 3:
            raise Fault(f"{program.name} has {len(program.parameters)} parameters; got {len(self.arguments)} arguments")
        values = {}
        for kind, register, value in zip(
            program.parameters, program.parameter_registers, [*self.arguments, *[0] * missing], strict=True
        ):
            like = program.initial[register]
            whole = int(np.float32(value).view(np.uint32)) if kind == "f32" else int(value)
            bits = whole & ((1 << 8 * like.itemsize) - 1)
            values[register] = np.full(32, bits, like.dtype)
        return values


class Block:
    """A block of a launch.

    Attributes:
        first_warp: number of its first warp in the launch.
        triggered: whether it let the next launch start, or ended.
        released: warps that left a barrier and do not run yet.
    """

    def __init__(self, launch: Launch, place: tuple[int, int, int], memory: GlobalMemory, faults: "Faults") -> None:
        self.launch, self.place = launch, place
        self.first_warp = launch.dispatched * launch.warps_per_block
        self.shared = SharedMemory(launch.shared, self.first_warp, launch.warps_per_block)
        self.triggered = False
        self.released: list[Warp] = []
        program = launch.kernel.program
        registers = program.initial.copy()
        for register, value in launch.parameter_values().items():
            registers[register] = value
        self.warps = [Warp(self, i, registers.copy(), memory, faults) for i in range(launch.warps_per_block)]
        for warp in self.warps:
            for register, value in program.values_of(warp.axes()).items():
                warp.registers[register] = value

    def trigger(self) -> None:
        """Let the next launch start as far as this block is concerned."""
        if not self.triggered:
            self.triggered = True
            self.launch.triggered += 1


class Faults(list[str]):
    """Races that were found, one of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self._kinds: set[tuple[str, ...]] = set()

    def add(self, text: str, *kind: str) -> None:
        if kind not in self._kinds:
            self._kinds.add(kind)
            self.append(text)


class Warp:
    """32 lanes.

    Attributes:
        number: in the launch.
        registers: 32 lanes each; replaced, never changed in place.
        groups: [program counter, lanes] of the lanes that are together; more than one while they diverge.
        clock: how far this warp knows each warp of the launch to be, itself included.
        ended_launches: bit i where it knows that launch i has ended.
        instruction: the text of the one that runs.
        barrier: number and threads of the barrier that it is at.
        copies_at_issue: whether its cp.async take their bytes when they are issued, or when they land.
        copies, copy_groups: cp.async that are not committed yet, and committed ones that are not waited for.
        products, product_groups: the same of wgmma.
    """

    def __init__(self, block: Block, index: int, registers: list[Array], memory: GlobalMemory, faults: Faults) -> None:
        self.block, self.index, self.registers, self.memory, self.faults = block, index, registers, memory, faults
        self.shared = block.shared
        self.number = block.first_warp + index
        threads = block.launch.kernel.program.threads - 32 * index
        self.groups: list[list] = [[0, ALL if threads >= 32 else threads > LANES]]
        self.clock = np.zeros(block.launch.warps, np.int32)
        self.clock[self.number] = 1
        self.ended_launches = 0
        self.state = State.RUNNING
        self.instruction = ""
        self.barrier = (0, 0)
        self.copies_at_issue = False
        self.copies: list = []
        self.copy_groups: list[list] = []
        self.products: list = []
        self.product_groups: list[list] = []

    def axes(self) -> dict[str, Array]:
        """Return the special registers that this warp's place decides, by name."""
        launch = self.block.launch
        ones = np.ones(32, np.int64)
        found = {"%tid.x": self.index * 32 + LANES, "%ntid.x": ones * launch.kernel.program.threads, "%laneid": LANES}
        for i, axis in enumerate("xyz"):
            found[f"%ctaid.{axis}"] = ones * self.block.place[i]
            found[f"%nctaid.{axis}"] = ones * launch.grid[i]
            found.setdefault(f"%tid.{axis}", ones * 0)
            found.setdefault(f"%ntid.{axis}", ones)
        return found

    def write(self, lanes: Lanes, register: int, value: Array) -> None:
        """Replace a register in some lanes."""
        registers = self.registers
        registers[register] = value if lanes is ALL else np.where(lanes, value, registers[register])

    def tick(self) -> None:
        """What this warp does from here on is later than what others were told."""
        self.clock[self.number] += 1

    def whole(self) -> None:
        """Refuse an instruction of all lanes where they diverge.

        Raises:
            Fault: where they do.
        """
        if len(self.groups) > 1:
            raise Fault(f"lanes diverge at an instruction of the whole warp: {self.where()}")

    def where(self) -> str:
        return f"{self.block.launch.name}{list(self.block.place)} warp {self.index}: {self.instruction}"

    def report(self, what: str, access: str, other: str) -> None:
        """Note an access that is not ordered behind another."""
        text = f"{what}: {access} by {self.where()} is not ordered behind {other}"
        self.faults.add(text, what, access, self.block.launch.name, self.instruction, other.partition(": ")[2])
