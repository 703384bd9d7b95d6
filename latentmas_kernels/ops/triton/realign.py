"""realign in Triton: formula, shapes and accumulation dtype in latentmas_kernels.ops.realign.

Two launches where there is a product, since the norm needs all of its elements: skinny_gemm, which reads W_a once for all
rows of a tile and its first loads ahead of the wait, stores W_a^T h in float32, and the second launch rescales. With the
identity the second launch does all the work; inside a step it also advances the row, writes the embedding to the step log
and decides whether the row takes part in the next step.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentmas_kernels.ops.triton.kv_table import step_log_pointer
from latentmas_kernels.ops.triton.launch import LaunchTarget
from latentmas_kernels.ops.triton.row_state import advance, end_step, load_latent_state
from latentmas_kernels.ops.triton.skinny_gemm import Workspace, pdl_wait, skinny_gemm

BLOCK_SCALE = 1024
MIN_NORM: tl.constexpr = tl.constexpr(1e-12)
"""Smallest divisor of the rescale; as in ops/realign.py and csrc/cpu/kernels.h (tests/ops/test_constants.py)."""


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
    source_ptr, out_ptr, target_norm, row_state_ptr, kv_table_ptr, source_stride, out_stride, state_stride, n_cols,
    STEP: tl.constexpr, BLOCK: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Store out[b] = source[b] * target_norm / max(|source[b]|, 1e-12), the sums float32."""
    row = tl.program_id(0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    if USE_PDL:
        pdl_wait()
    if STEP:
        active, step, limit, stop_cosine = load_latent_state(row_state_ptr, state_stride, row)
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
        end_step(row_state_ptr, state_stride, row, step, goes_on)
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
        workspace: with room for the product.
    """

    row_state: Tensor
    kv_table: Tensor
    product: Tensor
    workspace: Workspace


def realign(
    hidden: Tensor,
    weight: Tensor | None,
    target_norm: float,
    out: Tensor,
    *,
    target: LaunchTarget,
    step: StepBuffers | None = None,
) -> None:
    """Launch the kernels on checked arguments. Modifies `out`, with `step` also its buffers, row state and the step log."""
    batch, n_cols = out.shape
    if batch == 0:
        return
    source = hidden
    if weight is not None:
        source = hidden.new_empty(batch, n_cols, dtype=torch.float32) if step is None else step.product
        workspace = None if step is None else step.workspace
        skinny_gemm(hidden, weight, source, target=target, workspace=workspace)
    target.launch(
        rescale_kernel, (batch,),
        source, out, target_norm, None if step is None else step.row_state, None if step is None else step.kv_table,
        source.stride(0), out.stride(0), 0 if step is None else step.row_state.stride(0), n_cols,
        STEP=step is not None, BLOCK=BLOCK_SCALE, USE_PDL=target.enable_pdl,
    )  # fmt: skip
