"""embed in Triton: the first kernel of a token step. Looks a token up and advances its row."""

import triton
import triton.language as tl
from torch import Tensor

from latentmas_kernels.ops.triton.launch import Target
from latentmas_kernels.ops.triton.row_state import advance
from latentmas_kernels.ops.triton.skinny_gemm import pdl_wait


@triton.jit
def embed_kernel(
    tokens, embedding, out, rows, memory, stride, rows_stride, width, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    if OVERLAP:
        pdl_wait()
    advance(rows, rows_stride, row, memory)
    e = tl.load(embedding + tl.load(tokens + row) * stride + cols, mask=cols < width, other=0.0)
    tl.store(out + row * width + cols, e, mask=cols < width)


def embed(tokens: Tensor, embedding: Tensor, out: Tensor, rows: Tensor, memory: Tensor, *, target: Target) -> None:
    """out[b] = embedding[tokens[b]]; `out` [B, D], `rows` and the positions behind `memory` are written."""
    batch, width = out.shape
    embed_kernel[(batch,)](
        tokens, embedding, out, rows, memory, embedding.stride(0), rows.stride(0), width,
        BLOCK=triton.next_power_of_2(width), OVERLAP=target.overlap, **target.options,
    )  # fmt: skip
