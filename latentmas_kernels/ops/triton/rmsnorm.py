"""rmsnorm in Triton: formula and shapes in latentmas_kernels.ops.rmsnorm. One program per row."""

import triton
import triton.language as tl
from torch import Tensor

from latentmas_kernels.ops.triton.kv_table import records_states, states_pointer
from latentmas_kernels.ops.triton.launch import LaunchTarget
from latentmas_kernels.ops.triton.row_state import finished_latent_step
from latentmas_kernels.ops.triton.skinny_gemm import pdl_wait


@triton.jit
def rmsnorm_kernel(
    x_ptr, norm_weight_ptr, out_ptr, row_state_ptr, kv_table_ptr, state_stride, n_cols, eps,
    STEP: tl.constexpr, USE_PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < n_cols
    norm_weight = tl.load(norm_weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if USE_PDL:
        pdl_wait()
    store_mask = mask
    records = False
    if STEP:
        takes_part, step = finished_latent_step(row_state_ptr, state_stride, row)
        store_mask = cols < tl.where(takes_part, n_cols, 0)
        records = records_states(kv_table_ptr)
    x = tl.load(x_ptr + row * n_cols + cols, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / n_cols + eps)
    y = (x * scale * norm_weight).to(out_ptr.dtype.element_ty)
    if STEP and records:
        states = states_pointer(kv_table_ptr, row, out_ptr.dtype.element_ty) + step.to(tl.int64) * n_cols
        tl.store(states + cols, y, mask=store_mask)
    tl.store(out_ptr + row * n_cols + cols, y, mask=store_mask)


def rmsnorm(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    out: Tensor,
    *,
    target: LaunchTarget,
    row_state: Tensor | None = None,
    kv_table: Tensor | None = None,
) -> None:
    """Launch on contiguous arguments. Modifies `out`.

    Inside a step, with the tables of the rows (row_state.py) and of the KV buffer (kv_table.py), a row that took no part keeps
    its `out`, the state behind its own last step; the states of the other rows are also recorded where the table has room.
    """
    batch, n_cols = x.shape
    if batch == 0:
        return
    block = triton.next_power_of_2(n_cols)
    target.launch(
        rmsnorm_kernel, (batch,),
        x, norm_weight, out, row_state, kv_table, 0 if row_state is None else row_state.stride(0), n_cols, eps,
        STEP=row_state is not None, USE_PDL=target.enable_pdl, BLOCK=block, num_warps=4 if block <= 4096 else 8,
    )  # fmt: skip
