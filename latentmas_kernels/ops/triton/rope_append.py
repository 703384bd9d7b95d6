"""rope_append in Triton: formula and shapes in latentmas_kernels.ops.rope_append. One program per row and head."""

import triton
import triton.language as tl
from torch import Tensor

from latentmas_kernels.ops.triton.kv_table import head_pointer
from latentmas_kernels.ops.triton.launch import Target
from latentmas_kernels.ops.triton.sincos import cosine_sine
from latentmas_kernels.ops.triton.skinny_gemm import pdl_wait


@triton.jit(do_not_specialize=["layer"])
def rope_append_kernel(
    qkv, queries, query_gain, key_gain, inv_freq, memory, slots, positions, layer, eps, attention_scaling,
    QUERY_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    HAS_NORM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    cols = tl.arange(0, BLOCK)
    inside = cols < HALF
    frequency = tl.load(inv_freq + cols, mask=inside, other=0.0)
    if OVERLAP:
        pdl_wait()
    source = qkv + (row * (QUERY_HEADS + 2 * KV_HEADS) + head) * (2 * HALF) + cols
    low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    slot = tl.load(slots + row)
    if head < QUERY_HEADS + KV_HEADS:
        if HAS_NORM:
            scale = tl.rsqrt(tl.sum(low * low + high * high, axis=0) / (2 * HALF) + eps)
            gain = query_gain + cols
            if head >= QUERY_HEADS:
                gain = key_gain + cols
            low = low * scale * tl.load(gain, mask=inside, other=0.0).to(tl.float32)
            high = high * scale * tl.load(gain + HALF, mask=inside, other=0.0).to(tl.float32)
        cosine, sine = cosine_sine(tl.load(positions + row).to(tl.float32) * frequency)
        cosine, sine = cosine * attention_scaling, sine * attention_scaling
        low, high = low * cosine - high * sine, high * cosine + low * sine
    if head < QUERY_HEADS:
        out = queries + (row * QUERY_HEADS + head) * (2 * HALF) + cols
        tl.store(out, low.to(queries.dtype.element_ty), mask=inside)
        tl.store(out + HALF, high.to(queries.dtype.element_ty), mask=inside)
    elif slot >= 0:
        dtype = queries.dtype.element_ty
        if head < QUERY_HEADS + KV_HEADS:
            store = head_pointer(memory, 0, layer, row, head - QUERY_HEADS, dtype)
        else:
            store = head_pointer(memory, 1, layer, row, head - QUERY_HEADS - KV_HEADS, dtype)
        store += slot.to(tl.int64) * (2 * HALF) + cols
        tl.store(store, low.to(dtype), mask=inside)
        tl.store(store + HALF, high.to(dtype), mask=inside)


def rope_append(
    qkv: Tensor,
    queries: Tensor,
    query_gain: Tensor | None,
    key_gain: Tensor | None,
    eps: float,
    inv_freq: Tensor,
    attention_scaling: float,
    memory: Tensor,
    layer: int,
    slots: Tensor,
    positions: Tensor,
    *,
    target: Target,
) -> None:
    """Launch on checked arguments; `queries` [B, query_heads, head_dim] and the buffer behind `memory` are written."""
    rows, query_heads, width = queries.shape
    if rows == 0:
        return
    heads = qkv.shape[1] // width
    rope_append_kernel[(rows, heads)](
        qkv, queries, query_gain, key_gain, inv_freq, memory, slots, positions, layer, eps, attention_scaling,
        QUERY_HEADS=query_heads, KV_HEADS=(heads - query_heads) // 2, HALF=width // 2,
        BLOCK=triton.next_power_of_2(width // 2), HAS_NORM=query_gain is not None, OVERLAP=target.overlap,
        num_warps=1, **target.options,
    )  # fmt: skip
