"""embed in Triton: the first kernel of a token step. Looks a token up and advances its row."""

import triton
import triton.language as tl
from torch import Tensor

from latentmas_kernels.ops.triton.launch import LaunchTarget
from latentmas_kernels.ops.triton.row_state import advance
from latentmas_kernels.ops.triton.skinny_gemm import pdl_wait


@triton.jit
def embed_kernel(
    token_ids_ptr, embedding_ptr, out_ptr, row_state_ptr, kv_table_ptr, embedding_stride, state_stride, hidden_size,
    BLOCK: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < hidden_size
    if USE_PDL:
        pdl_wait()
    advance(row_state_ptr, state_stride, row, kv_table_ptr)
    e = tl.load(embedding_ptr + tl.load(token_ids_ptr + row) * embedding_stride + cols, mask=mask, other=0.0)
    tl.store(out_ptr + row * hidden_size + cols, e, mask=mask)


def embed(
    token_ids: Tensor, embedding: Tensor, out: Tensor, row_state: Tensor, kv_table: Tensor, *, target: LaunchTarget
) -> None:
    """Store embedding[token_ids[b]] in out[b]. Modifies `out` [B, D], `row_state` and the positions behind `kv_table`."""
    batch, hidden_size = out.shape
    target.launch(
        embed_kernel, (batch,),
        token_ids, embedding, out, row_state, kv_table, embedding.stride(0), row_state.stride(0), hidden_size,
        BLOCK=triton.next_power_of_2(hidden_size), USE_PDL=target.enable_pdl,
    )  # fmt: skip
