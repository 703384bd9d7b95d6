"""atom and red: one lane after the other."""

from collections.abc import Callable
from typing import Any

import numpy as np

from emulator.memory import note_write
from emulator.program import Instruction, Program
from emulator.races import Release
from emulator.values import NUMBERS, SIZES, UNSIGNED, Lanes
from emulator.warp import Warp

UPDATES: dict[str, Callable[..., Any]] = {
    "add": lambda old, value: old + value,
    "exch": lambda old, value: value,
    "max": max,
    "min": min,
    "and": lambda old, value: old & value,
    "or": lambda old, value: old | value,
    "cas": lambda old, compare, value: value if old == compare else old,
}


def decode_atomic(program: Program, instruction: Instruction) -> Any:
    parts = instruction.parts
    update = next((UPDATES[part] for part in parts if part in UPDATES), None)
    if update is None or {"shared", "cta"} & set(parts) or parts[-1] not in NUMBERS:
        return None
    operands = instruction.operands if parts[0] == "atom" else ["_", *instruction.operands]
    size, number = SIZES[parts[-1]], NUMBERS[parts[-1]]
    target = program.register(operands[0], size)
    base, offset = program.address(operands[1], 8)
    sources = [program.register(text, size) for text in operands[2:]]
    acquires = bool({"acquire", "acq_rel"} & set(parts))
    releases = bool({"release", "acq_rel"} & set(parts))

    def execute(warp: Warp, lanes: Lanes) -> None:
        addresses = warp.registers[base].view(np.int64) + offset
        found = np.zeros(32, UNSIGNED[size])
        for lane in np.flatnonzero(lanes):
            only = np.zeros(32, bool)
            only[lane] = True
            ((buffer, _, offsets),) = warp.memory.spans(warp, only, addresses, size)
            start = int(offsets[lane])
            note_write(warp, buffer, offsets[only], size, atomic=True)
            cell = buffer.elements[size][start // size : start // size + 1]
            found[lane] = cell[0]
            operand = [warp.registers[s].view(number)[lane] for s in sources]
            cell.view(number)[0] = update(cell.view(number)[0], *operand)
            earlier = buffer.releases.get(start)
            if acquires and earlier:
                earlier.teach(warp)
            if releases:
                buffer.releases[start] = Release.by(warp, earlier)
                warp.tick()
        warp.write(lanes, target, found)

    return execute


DECODERS = {"atom": decode_atomic, "red": decode_atomic}
