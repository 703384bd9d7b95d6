"""cp.async: copies from global to shared memory, which land as late as they may: when they are waited for."""

from typing import Any, NamedTuple

import numpy as np

from emulator.memory import Addresses, note_read
from emulator.program import Instruction, Program
from emulator.values import ALL, Lanes, constant
from emulator.warp import Warp


class Copy(NamedTuple):
    """A copy on its way: `size` bytes for each of `lanes`, of which `taken` are read and the others are zeros."""

    to: Addresses
    source: Addresses
    taken: Addresses
    lanes: Lanes
    size: int
    instruction: str


def decode_copy(program: Program, instruction: Instruction) -> Any:
    parts, operands = instruction.parts, instruction.operands
    if parts[1] != "async" or "bulk" in parts or "mbarrier" in parts:
        return None
    if parts[2] == "commit_group":
        return commit
    if parts[2] == "wait_group":
        left = int(operands[0])
        return lambda warp, lanes: land(warp, left)
    if parts[2] == "wait_all":
        return wait_all
    if parts[2] not in ("ca", "cg"):
        return None
    to, to_offset = program.address(operands[0], 4)
    source, source_offset = program.address(operands[1], 8)
    size = constant(operands[2], 4)
    # Behind the size: how many bytes are read, and a cache policy.
    rest = operands[3:-1] if "L2::cache_hint" in parts else operands[3:]
    taken = program.register(rest[0], 4) if rest else None

    def execute(warp: Warp, lanes: Lanes) -> None:
        targets = warp.registers[to].astype(np.int64) + to_offset
        sources = warp.registers[source].view(np.int64) + source_offset
        count = np.full(32, size) if taken is None else warp.registers[taken].astype(np.int64)
        # From here on nobody else may touch what it writes.
        warp.shared.reserve(warp, targets[lanes], size)
        warp.copies.append(Copy(targets, sources, count, lanes, size, warp.instruction))

    return execute


def commit(warp: Warp, lanes: Lanes) -> None:
    warp.copy_groups.append(warp.copies)
    warp.copies = []


def wait_all(warp: Warp, lanes: Lanes) -> None:
    commit(warp, lanes)
    land(warp, 0)


def land(warp: Warp, left: int) -> None:
    """Make the copies of all but the `left` latest groups."""
    while len(warp.copy_groups) > left:
        for copy in warp.copy_groups.pop(0):
            running, warp.instruction = warp.instruction, copy.instruction
            data = np.zeros((32, copy.size), np.uint8)
            reading = copy.lanes & (copy.taken > 0)
            if reading.any():
                lanes = ALL if reading.all() else reading
                for buffer, here, offsets in warp.memory.spans(warp, lanes, copy.source, copy.size):
                    note_read(warp, buffer, offsets[here], copy.size, atomic=False)
                    data[here] = buffer.bytes[offsets[here][:, None] + np.arange(copy.size)]
            data[np.arange(copy.size) >= copy.taken[:, None]] = 0
            warp.shared.write(warp, copy.to[copy.lanes], data[copy.lanes])
            warp.instruction = running


DECODERS = {"cp": decode_copy}
