"""realign in Triton: formula, shapes and accumulation dtype in latentmas_kernels.ops.realign.

Two launches where there is a product, since the norm needs all of its elements: the first computes W_a^T h and one
partial sum of squares per block, the second adds the partial sums and rescales. No atomics: the same input gives the
same bits. With the identity the second launch does all the work; inside a step it also advances the row, writes the
embedding to the step log and decides whether the row takes part in the next step.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentmas_kernels.ops.triton.kv_table import step_log_pointer
from latentmas_kernels.ops.triton.launch import LaunchTarget
from latentmas_kernels.ops.triton.row_state import advance, end_latent_step, load_latent_state
from latentmas_kernels.ops.triton.skinny_gemm import pdl_wait

BLOCK_OUT = 16  # weight rows per program: 128 programs from D_out = 2048 on, which is about what fills an H100
BLOCK_IN = 256
BLOCK_SCALE = 1024
MIN_NORM: tl.constexpr = tl.constexpr(1e-12)
"""Smallest divisor of the rescale; as in ops/realign.py and csrc/cpu/kernels.h (tests/ops/test_constants.py)."""


@triton.jit
def realign_gemv_kernel(
    hidden_ptr, weight_ptr, product_ptr, squares_ptr,
    hidden_stride, weight_stride, n_cols_in, n_cols_out, n_blocks,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Store product[b, o] = sum_i weight[o, i] hidden[b, i]; squares[b, block] = sum of product[b, o]^2 over the block."""
    block, row = tl.program_id(0), tl.program_id(1)
    outs = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    partial = tl.zeros([BLOCK_OUT, BLOCK_IN], dtype=tl.float32)
    if USE_PDL:
        pdl_wait()
    for start in range(0, n_cols_in, BLOCK_IN):
        ins = start + tl.arange(0, BLOCK_IN)
        x = tl.load(hidden_ptr + row * hidden_stride + ins, mask=ins < n_cols_in, other=0.0).to(tl.float32)
        mask = (outs < n_cols_out)[:, None] & (ins < n_cols_in)[None, :]
        w = tl.load(weight_ptr + outs[:, None].to(tl.int64) * weight_stride + ins[None, :], mask=mask, other=0.0)
        partial += w * x[None, :]
    y = tl.sum(partial, axis=1)
    tl.store(product_ptr + row * n_cols_out + outs, y, mask=outs < n_cols_out)
    tl.store(squares_ptr + row * n_blocks + block, tl.sum(y * y, axis=0))


@triton.jit
def cosine_to_last(source_ptr, scale, last_ptr, n_cols, BLOCK: tl.constexpr):
    """Return the cosine, float32, of the embedding source * scale to that of the step before, both in the dtype that is fed."""
    dot = tl.zeros([BLOCK], dtype=tl.float32)
    now = tl.zeros([BLOCK], dtype=tl.float32)
    before = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(source_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
        e = (x * scale).to(last_ptr.dtype.element_ty).to(tl.float32)
        f = tl.load(last_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
        dot += e * f
        now += e * e
        before += f * f
    # The root of a square is exact, so that of a vector to itself is 1. Zero vectors are like no other: 0.
    size = tl.sqrt_rn(tl.sum(now, axis=0) * tl.sum(before, axis=0))
    cosine = tl.sum(dot, axis=0) / tl.where(size > 0, size, 1.0)
    return tl.where(cosine < -1.0, -1.0, cosine)


@triton.jit
def rescale_kernel(
    source_ptr, squares_ptr, out_ptr, target_norm, row_state_ptr, kv_table_ptr,
    source_stride, out_stride, state_stride, n_cols, n_blocks,
    HAS_SQUARES: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Store out[b] = source[b] * target_norm / max(|source[b]|, 1e-12), the norm from the partial sums where there are any."""
    row = tl.program_id(0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    if USE_PDL:
        pdl_wait()
    if STEP:
        # All threads read these and one of them writes below; the sum in between is a barrier.
        active, step, limit, stop_cosine = load_latent_state(row_state_ptr, state_stride, row)
    if HAS_SQUARES:
        for start in range(0, n_blocks, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            total += tl.load(squares_ptr + row * n_blocks + cols, mask=cols < n_blocks, other=0.0)
    else:
        for start in range(0, n_cols, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = tl.load(source_ptr + row * source_stride + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
            total += x * x
    norm = tl.sqrt(tl.sum(total, axis=0))
    # Not a maximum: that would turn a NaN norm into 1e-12 and hide it.
    scale = target_norm / tl.where(norm < MIN_NORM, MIN_NORM, norm)
    if STEP:
        step_log = step_log_pointer(kv_table_ptr, row, out_ptr.dtype.element_ty) + step.to(tl.int64) * n_cols
        n_logged = tl.where(active > 0, n_cols, 0)
        goes_on = (active > 0) & (step + 1 < limit)
        if goes_on & (step > 0) & (stop_cosine <= 1.0):
            cosine = cosine_to_last(source_ptr + row * source_stride, scale, step_log - n_cols, n_cols, BLOCK)
            goes_on = (cosine < stop_cosine) | (cosine != cosine)
        advance(row_state_ptr, state_stride, row, kv_table_ptr)
        end_latent_step(row_state_ptr, state_stride, row, step, goes_on)
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(source_ptr + row * source_stride + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
        e = (x * scale).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * out_stride + cols, e, mask=cols < n_cols)
        if STEP:
            tl.store(step_log + cols, e, mask=cols < n_logged)


class StepBuffers(NamedTuple):
    """Buffers of `realign` inside a step.

    Attributes:
        row_state, kv_table: the tables of row_state.py and kv_table.py.
        product: float32 [B, D].
        squares: float32 [B, squares_per_row(D)].
    """

    row_state: Tensor
    kv_table: Tensor
    product: Tensor
    squares: Tensor


def squares_per_row(n_cols: int) -> int:
    """Return the number of partial sums of squares that the product leaves for each row."""
    return triton.cdiv(n_cols, BLOCK_OUT)


def realign(
    hidden: Tensor,
    weight: Tensor | None,
    target_norm: float,
    out: Tensor,
    *,
    target: LaunchTarget,
    step: StepBuffers | None = None,
) -> None:
    """Launch the kernels on checked arguments. Modifies `out`, with `step` also its row state and the step log."""
    batch, n_cols = out.shape
    if batch == 0:
        return
    if weight is None:
        source, squares, n_blocks = hidden, hidden, 0
    else:
        n_blocks = squares_per_row(n_cols)
        if step is None:
            source = torch.empty(batch, n_cols, dtype=torch.float32, device=hidden.device)
            squares = torch.empty(batch, n_blocks, dtype=torch.float32, device=hidden.device)
        else:
            source, squares = step.product, step.squares
        target.launch(
            realign_gemv_kernel, (n_blocks, batch),
            hidden, weight, source, squares,
            hidden.stride(0), weight.stride(0), hidden.shape[1], n_cols, n_blocks,
            BLOCK_OUT=BLOCK_OUT, BLOCK_IN=BLOCK_IN, USE_PDL=target.enable_pdl,
        )  # fmt: skip
    target.launch(
        rescale_kernel, (batch,),
        source, squares, out, target_norm, None if step is None else step.row_state,
        None if step is None else step.kv_table, source.stride(0), out.stride(0),
        0 if step is None else step.row_state.stride(0), n_cols, n_blocks,
        HAS_SQUARES=weight is not None, STEP=step is not None, BLOCK=BLOCK_SCALE, USE_PDL=target.enable_pdl,
    )  # fmt: skip
