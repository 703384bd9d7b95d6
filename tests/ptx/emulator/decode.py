"""One function per instruction. Unknown instructions are refused when a kernel is decoded, not when it gets there."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from emulator import arithmetic, async_copies, atomics, barriers, conversions, tensor_cores, transfers, warp_wide
from emulator.program import Fault, Instruction, Program, parse
from emulator.values import Lanes
from emulator.warp import Warp

Execute = Callable[[Warp, Lanes], None]

DECODERS: dict[str, Callable[[Program, Instruction], Execute | None]] = {
    **arithmetic.DECODERS,
    **conversions.DECODERS,
    **transfers.DECODERS,
    **atomics.DECODERS,
    **async_copies.DECODERS,
    **warp_wide.DECODERS,
    **tensor_cores.DECODERS,
    **barriers.DECODERS,
}
"""By the first part of the opcode. None: the decoder does not know this variant."""
JUMPS = ("bra", "ret", "exit")
INTERLEAVED = {"ld", "st", "atom", "red", "cp", "ldmatrix", "stmatrix", "bar", "barrier", "griddepcontrol", "wgmma"}
"""Instructions that others can see: behind each of them another warp may run."""


class Step(NamedTuple):
    """An instruction as the machine runs it. `execute` is None for jumps."""

    execute: Execute | None
    instruction: Instruction
    predicate: int | None
    negated: bool
    visible: bool


@dataclass(frozen=True)
class Kernel:
    """A program and what its instructions do."""

    program: Program
    steps: list[Step]


@functools.lru_cache(maxsize=64)
def decode(ptx: str) -> Kernel:
    """Return the kernel of a PTX text.

    Raises:
        Fault: for an instruction that is not known.
    """
    program = parse(ptx)
    return Kernel(program, [step_of(program, instruction) for instruction in program.instructions])


def step_of(program: Program, instruction: Instruction) -> Step:
    first = instruction.parts[0]
    execute = None
    if first not in JUMPS:
        decoder = DECODERS.get(first)
        execute = decoder(program, instruction) if decoder else None
        if execute is None:
            raise Fault(f"unknown instruction: {instruction.text}")
    visible = first in INTERLEAVED and "param" not in instruction.parts
    return Step(execute, instruction, instruction.predicate, instruction.negated, visible)
