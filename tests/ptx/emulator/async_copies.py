"""cp.async: copies from global to shared memory, which land as late as they may: when they are waited for.

The source is read at any time from issue to landing: it must be ordered in front of the issue, and nobody may write it until
the copy has landed. Which of the two ends the bytes are taken at, the seed decides for each warp.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from emulator.memory import Addresses, Buffer, note_read
from emulator.program import Instruction, Program
from emulator.values import ALL, Lanes, constant
from emulator.warp import Warp


class Source(NamedTuple):
    """What a copy reads of one buffer: in which lanes, at which bytes of it, and the read's place in the buffer's log."""

    buffer: Buffer
    lanes: Lanes
    offsets: Addresses
    place: int | None


@dataclass
class Copy:
    """A copy on its way: `size` bytes for each of `lanes`, of which `taken` are read and the others are zeros.

    Attributes:
        data: uint8 [32, size]; None where the bytes are taken when the copy lands.
    """

    to: Addresses
    sources: list[Source]
    taken: Addresses
    lanes: Lanes
    size: int
    instruction: str
    data: NDArray[np.uint8] | None = None

    def take(self) -> NDArray[np.uint8]:
        data = np.zeros((32, self.size), np.uint8)
        for buffer, lanes, offsets, _ in self.sources:
            data[lanes] = buffer.bytes[offsets[lanes][:, None] + np.arange(self.size)]
        data[np.arange(self.size) >= self.taken[:, None]] = 0
        return data


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
        addresses = warp.registers[source].view(np.int64) + source_offset
        count = np.full(32, size) if taken is None else warp.registers[taken].astype(np.int64)
        # From here on nobody else may touch what it writes.
        warp.shared.reserve(warp, targets[lanes], size)
        reading = lanes & (count > 0)
        spans = warp.memory.spans(warp, ALL if reading.all() else reading, addresses, size) if reading.any() else ()
        sources = [
            Source(buffer, here, at, note_read(warp, buffer, at[here], size, atomic=False, pending=True))
            for buffer, here, at in spans
        ]
        copy = Copy(targets, sources, count, lanes, size, warp.instruction)
        if warp.copies_at_issue:
            copy.data = copy.take()
        warp.copies.append(copy)

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
            data = copy.take() if copy.data is None else copy.data
            for source in copy.sources:
                if source.place is not None:
                    source.buffer.reads.finish(warp, source.place)
            warp.shared.write(warp, copy.to[copy.lanes], data[copy.lanes])
            warp.instruction = running


DECODERS = {"cp": decode_copy}
