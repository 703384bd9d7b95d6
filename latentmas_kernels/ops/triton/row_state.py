"""The device table of a batch's rows: int32 [9, B], one line per field of `RowField`.

Every thread of a program loads a row's fields, and one thread stores them. A barrier lies in between, in the functions that
store: without it a late warp reads fields of the next step.
"""

from enum import IntEnum

import triton
import triton.language as tl

from latentmas_kernels.ops.triton.kv_table import position_pointer


class RowField(IntEnum):
    """Lines of the table. Token steps use neither LIMIT nor STOP_COSINE.

    Attributes:
        ACTIVE: 1 while the row takes part; a row that has ended, or only fills up a batch, has 0 and stores nothing. Latent
            steps decide early in a step about the next one, so of the present step only SLOT tells.
        LENGTH: slots in use, that of the present step included.
        POSITION: of the present step's input.
        SLOT: of the present step's input; -1 where the row takes no part in this step.
        STEP: steps written to the step log.
        LIMIT: latent steps that the row takes at most.
        STOP_COSINE: the cosine to the step before that ends the row's latent steps, float32 by its bits; NEVER_COSINE for none.
        PREFIX_ROW: the row that holds the row's first slots, counted from the first row that the launches are about: it may be
            outside of them, and negative.
        PREFIX_LEN: the number of these slots, fewer than LENGTH.
    """

    ACTIVE = 0
    LENGTH = 1
    POSITION = 2
    SLOT = 3
    STEP = 4
    LIMIT = 5
    STOP_COSINE = 6
    PREFIX_ROW = 7
    PREFIX_LEN = 8


NEVER_COSINE = 2.0
"""A cosine that is never reached, for STOP_COSINE."""

# Triton's kernels see globals only where they are constexpr.
_ACTIVE: tl.constexpr = tl.constexpr(RowField.ACTIVE.value)
_LENGTH: tl.constexpr = tl.constexpr(RowField.LENGTH.value)
_POSITION: tl.constexpr = tl.constexpr(RowField.POSITION.value)
_SLOT: tl.constexpr = tl.constexpr(RowField.SLOT.value)
_STEP: tl.constexpr = tl.constexpr(RowField.STEP.value)
_LIMIT: tl.constexpr = tl.constexpr(RowField.LIMIT.value)
_STOP_COSINE: tl.constexpr = tl.constexpr(RowField.STOP_COSINE.value)


@triton.jit
def _field(row_state_ptr, state_stride, row, FIELD: tl.constexpr):
    """Return the address of a field of a row."""
    return row_state_ptr + state_stride * FIELD + row


@triton.jit
def load_active(row_state_ptr, state_stride, row):
    return tl.load(_field(row_state_ptr, state_stride, row, _ACTIVE))


@triton.jit
def load_step(row_state_ptr, state_stride, row):
    """Return the number of the step to log."""
    return tl.load(_field(row_state_ptr, state_stride, row, _STEP))


@triton.jit
def advance(row_state_ptr, state_stride, row, kv_table_ptr):
    """Give the next input of a row its slot and its position. For one program per row, before the layers run."""
    active = load_active(row_state_ptr, state_stride, row)
    length = tl.load(_field(row_state_ptr, state_stride, row, _LENGTH))
    position = tl.load(_field(row_state_ptr, state_stride, row, _POSITION)) + active
    tl.debug_barrier()
    tl.store(_field(row_state_ptr, state_stride, row, _SLOT), tl.where(active > 0, length, -1))
    tl.store(_field(row_state_ptr, state_stride, row, _LENGTH), length + active)
    tl.store(_field(row_state_ptr, state_stride, row, _POSITION), position)
    if active > 0:
        tl.store(position_pointer(kv_table_ptr, row) + length, position.to(tl.int64))


@triton.jit
def load_latent_state(row_state_ptr, state_stride, row):
    """Return of the present latent step whether the row takes part, the step's number, and what ends the row."""
    active = load_active(row_state_ptr, state_stride, row)
    step = load_step(row_state_ptr, state_stride, row)
    limit = tl.load(_field(row_state_ptr, state_stride, row, _LIMIT))
    stop_cosine = tl.load(_field(row_state_ptr, state_stride, row, _STOP_COSINE)).to(tl.float32, bitcast=True)
    return active, step, limit, stop_cosine


@triton.jit
def finished_latent_step(row_state_ptr, state_stride, row):
    """Return whether the row takes part in the present latent step, and its number, once `end_step` has counted it."""
    slot = tl.load(_field(row_state_ptr, state_stride, row, _SLOT))
    return slot >= 0, load_step(row_state_ptr, state_stride, row) - 1


@triton.jit
def end_step(row_state_ptr, state_stride, row, step, goes_on):
    """Count the step, and store whether the row takes part in the next one. Behind `advance`, which reads that of this one."""
    tl.debug_barrier()
    tl.store(_field(row_state_ptr, state_stride, row, _STEP), step + 1)
    tl.store(_field(row_state_ptr, state_stride, row, _ACTIVE), goes_on.to(tl.int32))
