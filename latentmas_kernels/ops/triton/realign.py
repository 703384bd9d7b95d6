"""realign in Triton: formula, shapes and accumulation dtype in latentmas_kernels.ops.realign.

Two launches where there is a product, since the norm needs all of its elements: the first computes W_a^T h and one
partial sum of squares per block, the second adds the partial sums and rescales. No atomics: the same input gives the
same bits. With the identity the second launch does all the work; inside a step it also advances the row, writes the
embedding down in the trace and decides whether the row takes part in the next step.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentmas_kernels.ops.triton.kv_table import trace_pointer
from latentmas_kernels.ops.triton.launch import Target
from latentmas_kernels.ops.triton.row_state import advance, end_latent_step, latent_step
from latentmas_kernels.ops.triton.skinny_gemm import pdl_wait

BLOCK_OUT = 16  # weight rows per program: 128 programs from D_out = 2048 on, which is about what fills an H100
BLOCK_IN = 256
BLOCK_SCALE = 1024


@triton.jit
def product_kernel(
    hidden, weight, product, squares,
    hidden_stride, weight_stride, width_in, width_out, blocks,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """product[b, o] = sum_i weight[o, i] hidden[b, i]; squares[b, block] = sum of product[b, o]^2 over the block."""
    block, row = tl.program_id(0), tl.program_id(1)
    outs = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    partial = tl.zeros([BLOCK_OUT, BLOCK_IN], dtype=tl.float32)
    if OVERLAP:
        pdl_wait()
    for start in range(0, width_in, BLOCK_IN):
        ins = start + tl.arange(0, BLOCK_IN)
        x = tl.load(hidden + row * hidden_stride + ins, mask=ins < width_in, other=0.0).to(tl.float32)
        inside = (outs < width_out)[:, None] & (ins < width_in)[None, :]
        w = tl.load(weight + outs[:, None].to(tl.int64) * weight_stride + ins[None, :], mask=inside, other=0.0)
        partial += w * x[None, :]
    y = tl.sum(partial, axis=1)
    tl.store(product + row * width_out + outs, y, mask=outs < width_out)
    tl.store(squares + row * blocks + block, tl.sum(y * y, axis=0))


@triton.jit
def cosine_to_last(source, scale, last, width, BLOCK: tl.constexpr):
    """The cosine of the embedding source * scale to that of the step before, both as they are fed, in float32."""
    dot = tl.zeros([BLOCK], dtype=tl.float32)
    now = tl.zeros([BLOCK], dtype=tl.float32)
    before = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(source + cols, mask=cols < width, other=0.0).to(tl.float32)
        e = (x * scale).to(last.dtype.element_ty).to(tl.float32)
        f = tl.load(last + cols, mask=cols < width, other=0.0).to(tl.float32)
        dot += e * f
        now += e * e
        before += f * f
    # The root of a square is exact, so that of a vector to itself is 1. Zero vectors are like no other: 0.
    size = tl.sqrt_rn(tl.sum(now, axis=0) * tl.sum(before, axis=0))
    cosine = tl.sum(dot, axis=0) / tl.where(size > 0, size, 1.0)
    return tl.where(cosine < -1.0, -1.0, cosine)


@triton.jit
def rescale_kernel(
    source, squares, out, target_norm, rows, memory,
    source_stride, out_stride, rows_stride, width, blocks,
    HAS_SQUARES: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out[b] = source[b] * target_norm / max(|source[b]|, 1e-12), the norm from the partial sums where there are any."""
    row = tl.program_id(0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    if OVERLAP:
        pdl_wait()
    if STEP:
        # All threads read these and one of them writes below; the sum in between is a barrier.
        active, step, limit, settle = latent_step(rows, rows_stride, row)
    if HAS_SQUARES:
        for start in range(0, blocks, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            total += tl.load(squares + row * blocks + cols, mask=cols < blocks, other=0.0)
    else:
        for start in range(0, width, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = tl.load(source + row * source_stride + cols, mask=cols < width, other=0.0).to(tl.float32)
            total += x * x
    norm = tl.sqrt(tl.sum(total, axis=0))
    # Not a maximum: that would turn a NaN norm into 1e-12 and hide it.
    scale = target_norm / tl.where(norm < 1e-12, 1e-12, norm)
    if STEP:
        trace = trace_pointer(memory, row, out.dtype.element_ty) + step.to(tl.int64) * width
        traced = tl.where(active > 0, width, 0)
        goes_on = (active > 0) & (step + 1 < limit)
        if goes_on & (step > 0) & (settle <= 1.0):
            cosine = cosine_to_last(source + row * source_stride, scale, trace - width, width, BLOCK)
            goes_on = (cosine < settle) | (cosine != cosine)
        advance(rows, rows_stride, row, memory)
        end_latent_step(rows, rows_stride, row, step, goes_on)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(source + row * source_stride + cols, mask=cols < width, other=0.0).to(tl.float32)
        e = (x * scale).to(out.dtype.element_ty)
        tl.store(out + row * out_stride + cols, e, mask=cols < width)
        if STEP:
            tl.store(trace + cols, e, mask=cols < traced)


class Step(NamedTuple):
    """What `realign` needs inside a step: the table of rows (rows.py), the KV buffer (memory.py), and room for a product."""

    rows: Tensor
    memory: Tensor
    product: Tensor
    squares: Tensor


def squares_per_row(width: int) -> int:
    """Partial sums that the product leaves for each row."""
    return triton.cdiv(width, BLOCK_OUT)


def realign(
    hidden: Tensor, weight: Tensor | None, target_norm: float, out: Tensor, *, target: Target, step: Step | None = None
) -> None:
    """Launch the kernels on checked arguments; `out` is written, with `step` also its rows and the trace."""
    rows, width = out.shape
    if rows == 0:
        return
    if weight is None:
        source, squares, blocks = hidden, hidden, 0
    else:
        blocks = squares_per_row(width)
        if step is None:
            source = torch.empty(rows, width, dtype=torch.float32, device=hidden.device)
            squares = torch.empty(rows, blocks, dtype=torch.float32, device=hidden.device)
        else:
            source, squares = step.product, step.squares
        product_kernel[(blocks, rows)](
            hidden, weight, source, squares,
            hidden.stride(0), weight.stride(0), hidden.shape[1], width, blocks,
            BLOCK_OUT=BLOCK_OUT, BLOCK_IN=BLOCK_IN, OVERLAP=target.overlap, **target.options,
        )  # fmt: skip
    rescale_kernel[(rows,)](
        source, squares, out, target_norm, None if step is None else step.rows, None if step is None else step.memory,
        source.stride(0), out.stride(0), 0 if step is None else step.rows.stride(0), width, blocks,
        HAS_SQUARES=weight is not None, STEP=step is not None, BLOCK=BLOCK_SCALE, OVERLAP=target.overlap,
        **target.options,
    )  # fmt: skip
