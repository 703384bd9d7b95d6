"""rope_append in Triton: formula and shapes in latentmas_kernels.ops.rope_append. One program per row and head."""

import triton
import triton.language as tl
from torch import Tensor

from latentmas_kernels.ops.triton.kv_table import keys_pointer, values_pointer
from latentmas_kernels.ops.triton.launch import LaunchTarget
from latentmas_kernels.ops.triton.sincos import cosine_sine
from latentmas_kernels.ops.triton.skinny_gemm import pdl_wait


@triton.jit(do_not_specialize=["layer"])
def rope_append_kernel(
    qkv_ptr, queries_ptr, query_norm_ptr, key_norm_ptr, inv_freq_ptr, kv_table_ptr, slots_ptr, positions_ptr, layer, eps,
    attention_scaling,
    QUERY_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    HAS_NORM: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    cols = tl.arange(0, BLOCK)
    mask = cols < HALF
    frequency = tl.load(inv_freq_ptr + cols, mask=mask, other=0.0)
    if USE_PDL:
        pdl_wait()
    source = qkv_ptr + (row * (QUERY_HEADS + 2 * KV_HEADS) + head) * (2 * HALF) + cols
    low = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    slot = tl.load(slots_ptr + row)
    if head < QUERY_HEADS + KV_HEADS:
        if HAS_NORM:
            scale = tl.rsqrt(tl.sum(low * low + high * high, axis=0) / (2 * HALF) + eps)
            norm_weight = query_norm_ptr + cols
            if head >= QUERY_HEADS:
                norm_weight = key_norm_ptr + cols
            low = low * scale * tl.load(norm_weight, mask=mask, other=0.0).to(tl.float32)
            high = high * scale * tl.load(norm_weight + HALF, mask=mask, other=0.0).to(tl.float32)
        cosine, sine = cosine_sine(tl.load(positions_ptr + row).to(tl.float32) * frequency)
        cosine, sine = cosine * attention_scaling, sine * attention_scaling
        low, high = low * cosine - high * sine, high * cosine + low * sine
    if head < QUERY_HEADS:
        out = queries_ptr + (row * QUERY_HEADS + head) * (2 * HALF) + cols
        tl.store(out, low.to(queries_ptr.dtype.element_ty), mask=mask)
        tl.store(out + HALF, high.to(queries_ptr.dtype.element_ty), mask=mask)
    elif slot >= 0:
        dtype = queries_ptr.dtype.element_ty
        if head < QUERY_HEADS + KV_HEADS:
            store = keys_pointer(kv_table_ptr, layer, row, head - QUERY_HEADS, dtype)
        else:
            store = values_pointer(kv_table_ptr, layer, row, head - QUERY_HEADS - KV_HEADS, dtype)
        store += slot.to(tl.int64) * (2 * HALF) + cols
        tl.store(store, low.to(dtype), mask=mask)
        tl.store(store + HALF, high.to(dtype), mask=mask)


def rope_append(
    qkv: Tensor,
    queries: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    inv_freq: Tensor,
    attention_scaling: float,
    kv_table: Tensor,
    layer: int,
    slots: Tensor,
    positions: Tensor,
    *,
    target: LaunchTarget,
) -> None:
    """Launch on checked arguments. Modifies `queries` [B, query_heads, head_dim] and the buffer behind `kv_table`."""
    batch, query_heads, head_dim = queries.shape
    if batch == 0:
        return
    heads = qkv.shape[1] // head_dim
    target.launch(
        rope_append_kernel, (batch, heads),
        qkv, queries, query_norm, key_norm, inv_freq, kv_table, slots, positions, layer, eps, attention_scaling,
        QUERY_HEADS=query_heads, KV_HEADS=(heads - query_heads) // 2, HALF=head_dim // 2,
        BLOCK=triton.next_power_of_2(head_dim // 2), HAS_NORM=query_norm is not None, USE_PDL=target.enable_pdl,
        num_warps=1,
    )  # fmt: skip
