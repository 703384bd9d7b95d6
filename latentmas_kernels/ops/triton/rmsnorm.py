"""rmsnorm in Triton: formula and shapes in latentmas_kernels.ops.rmsnorm. One program per row."""

import triton
import triton.language as tl
from torch import Tensor

from latentmas_kernels.ops.triton.kv_table import keeps_states, states_pointer
from latentmas_kernels.ops.triton.launch import Target
from latentmas_kernels.ops.triton.row_state import finished_latent_step
from latentmas_kernels.ops.triton.skinny_gemm import pdl_wait


@triton.jit
def rmsnorm_kernel(
    x, gain, out, rows, memory, rows_stride, width, eps,
    STEP: tl.constexpr, OVERLAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    g = tl.load(gain + cols, mask=inside, other=0.0).to(tl.float32)
    if OVERLAP:
        pdl_wait()
    stored = inside
    keeps = False
    if STEP:
        takes_part, step = finished_latent_step(rows, rows_stride, row)
        stored = cols < tl.where(takes_part, width, 0)
        keeps = keeps_states(memory)
    values = tl.load(x + row * width + cols, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
    y = (values * scale * g).to(out.dtype.element_ty)
    if STEP and keeps:
        states = states_pointer(memory, row, out.dtype.element_ty) + step.to(tl.int64) * width
        tl.store(states + cols, y, mask=stored)
    tl.store(out + row * width + cols, y, mask=stored)


def rmsnorm(
    x: Tensor,
    gain: Tensor,
    eps: float,
    out: Tensor,
    *,
    target: Target,
    rows: Tensor | None = None,
    memory: Tensor | None = None,
) -> None:
    """Launch on contiguous arguments; `out` is written.

    Inside a step, with the table of rows (rows.py) and the KV buffer (memory.py), a row that took no part keeps what it
    has in `out`, its state behind its own last step; and the others' are also written down where states are kept.
    """
    batch, width = x.shape
    if batch == 0:
        return
    block = triton.next_power_of_2(width)
    rmsnorm_kernel[(batch,)](
        x, gain, out, rows, memory, 0 if rows is None else rows.stride(0), width, eps, STEP=rows is not None,
        OVERLAP=target.overlap, BLOCK=block, num_warps=4 if block <= 4096 else 8, **target.options,
    )  # fmt: skip
