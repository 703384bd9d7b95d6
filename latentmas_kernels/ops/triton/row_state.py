"""What the device knows of the rows of a batch: int32 [9, B], one line per field.

0 active      1 while the row takes part; a row that has ended, or only fills up a batch, has 0 and stores nothing. Latent
              steps decide early in a step about the next one, so of the present step only `slot` tells.
1 length      slots in use, that of the present step included
2 position    of the present step's input
3 slot        of the present step's input, -1 for none: the row takes no part in this step
4 step        steps written to the trace
5 limit       latent steps that the row takes at most
6 settle      the cosine to the step before that ends its latent steps, float32 by its bits; above 1 for none
7 lender      the row that its first slots lie in, counted from the first row that the launches are about: it may be none of
              theirs, and negative
8 borrowed    how many slots those are, a multiple of what attention reads at once

Token steps know nothing of 5 and 6; a table for `sample` alone may end with 4.
"""

import triton
import triton.language as tl

from latentmas_kernels.ops.triton.kv_table import position_pointer

ACTIVE, LENGTH, POSITION, SLOT, STEP, LIMIT, SETTLE, PREFIX_ROW, PREFIX_LEN = range(9)
FIELDS = 9
NEVER = 2.0
"""A cosine that is never reached, for `settle`."""


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


@triton.jit
def latent_step(rows, stride, row):
    """Of the present latent step: whether the row takes part, the number of the step, and what ends the row (5 and 6)."""
    active = tl.load(rows + row)
    step = tl.load(rows + 4 * stride + row)
    limit = tl.load(rows + 5 * stride + row)
    settle = tl.load(rows + 6 * stride + row).to(tl.float32, bitcast=True)
    return active, step, limit, settle


@triton.jit
def finished_latent_step(rows, stride, row):
    """Of the present latent step, once `end_latent_step` has counted it: whether the row takes part in it, and its number."""
    slot = tl.load(rows + 3 * stride + row)
    step = tl.load(rows + 4 * stride + row)
    return slot >= 0, step - 1


@triton.jit
def end_latent_step(rows, stride, row, step, goes_on):
    """Count the step, and say whether the row takes part in the next one. Behind `advance`, which reads that of this."""
    tl.store(rows + 4 * stride + row, step + 1)
    tl.store(rows + row, goes_on.to(tl.int32))
