"""What the device knows of the rows of a batch: int32 [5, B], one line per field.

0 active      1 while the row takes part; a row that has ended, or only fills up a batch, has 0 and stores nothing
1 length      slots in use, that of the present step included
2 position    of the present step's input
3 slot        of the present step's input, -1 for none
4 step        steps written to the trace
"""

import triton
import triton.language as tl

from latentmas_kernels.ops.triton.memory import position_pointer

ACTIVE, LENGTH, POSITION, SLOT, STEP = range(5)


@triton.jit
def advance(rows, stride, row, memory):
    """Give the next input of a row its slot and its position. For one program per row, before the layers run."""
    active = tl.load(rows + row)
    length = tl.load(rows + stride + row)
    position = tl.load(rows + 2 * stride + row) + active
    tl.store(rows + 3 * stride + row, tl.where(active > 0, length, -1))
    tl.store(rows + stride + row, length + active)
    tl.store(rows + 2 * stride + row, position)
    if active > 0:
        tl.store(position_pointer(memory, row) + length, position.to(tl.int64))


@triton.jit
def next_step(rows, stride, row):
    """The number of the step to trace; counts it."""
    step = tl.load(rows + 4 * stride + row)
    tl.store(rows + 4 * stride + row, step + 1)
    return step
