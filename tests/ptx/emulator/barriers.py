"""Barriers of a block, and the order of launches that follow each other."""

from typing import Any

import numpy as np

from emulator.program import Instruction, Program
from emulator.values import Lanes, constant
from emulator.warp import Block, State, Warp


def decode_barrier(program: Program, instruction: Instruction) -> Any:
    parts, operands = instruction.parts, instruction.operands
    if parts[:3] == ["bar", "warp", "sync"]:
        return lambda warp, lanes: warp.whole()
    if parts not in (["bar", "sync"], ["barrier", "sync"], ["barrier", "sync", "aligned"]):
        return None
    number, threads = (constant(text, 4) for text in [*operands, "0"][:2])

    def execute(warp: Warp, lanes: Lanes) -> None:
        warp.whole()
        warp.state, warp.barrier = State.AT_BARRIER, (number, threads)
        release(warp.block)

    return execute


def release(block: Block) -> None:
    """Let the warps of a barrier go on where all that it counts are there; without a count those that have not ended."""
    for number, threads in {warp.barrier for warp in block.warps if warp.state is State.AT_BARRIER}:
        here = [w for w in block.warps if w.state is State.AT_BARRIER and w.barrier == (number, threads)]
        unfinished = sum(warp.state is not State.DONE for warp in block.warps)
        if len(here) < (threads // 32 or unfinished):
            continue
        clock = np.maximum.reduce([warp.clock for warp in here])
        ended = 0
        for warp in here:
            ended |= warp.ended_launches
        for warp in here:
            warp.clock[:] = clock
            warp.ended_launches = ended
            warp.tick()
            warp.state = State.RUNNING
        block.released += here
        if len(here) == len(block.warps):
            block.shared.ordered()


def decode_launch_control(program: Program, instruction: Instruction) -> Any:
    """griddepcontrol: let the next launch start, or wait for the end of the one before."""
    if instruction.parts[1] == "launch_dependents":
        return lambda warp, lanes: warp.block.trigger()

    def wait(warp: Warp, lanes: Lanes) -> None:
        if warp.block.launch.pdl:
            warp.state = State.WAITING_FOR_LAUNCH

    return wait


def decode_fence(program: Program, instruction: Instruction) -> Any:
    """Between threads' own accesses and those of wgmma, which see each other here in any case."""
    return (lambda warp, lanes: None) if instruction.parts[1:3] == ["proxy", "async"] else None


DECODERS = {
    "bar": decode_barrier,
    "barrier": decode_barrier,
    "griddepcontrol": decode_launch_control,
    "fence": decode_fence,
}
