"""decode_attention in Triton: formula and shapes in latentmas_kernels.ops.decode_attention.

The slots of a row are divided into KV splits, one per program, by the row's own length in device memory: a short row in a
large buffer costs what it holds. The query heads of a KV head are rows of one matrix, so that keys and values are read once
for all of them. Each program stores a normalised output and its log-sum-exp (base 2) per query head; the second kernel
combines the splits (as in Flash-Decoding).

The first slots of a row may be stored in another row of the buffer, the shared prefix. A block of slots begins at a multiple
of BLOCK, and the length of the prefix is a multiple of it as well, so every block is in one row.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentmas_kernels.ops.triton.kv_table import keys_pointer, position_pointer, row_offset, values_pointer
from latentmas_kernels.ops.triton.launch import LaunchTarget
from latentmas_kernels.ops.triton.skinny_gemm import pdl_wait

EXACT_SPLITS = 16
"""KV splits in float32, whatever the batch, so that a row's bits do not depend on it."""
BLOCK_SLOTS = {2: 64, 4: 32, 8: 32}
"""Slots that a program reads at once, by the size of an element. A shared prefix ends between two reads (`PREFIX_BLOCK`)."""


@triton.jit(do_not_specialize=["layer"])
def attention_kernel(
    queries_ptr, kv_table_ptr, lengths_ptr, query_positions_ptr, prefix_row_ptr, prefix_len_ptr, split_out_ptr,
    split_lse_ptr, layer, scale, window,
    GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_PREFIX: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Store split_out and split_lse[row, head, split] for the query heads of one KV head over one KV split."""
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.arange(0, GROUP_BLOCK)
    cols = tl.arange(0, DIM_BLOCK)
    dtype = queries_ptr.dtype.element_ty
    if USE_PDL:
        pdl_wait()
    length = tl.load(lengths_ptr + row)
    first = 0
    if HAS_WINDOW:
        # Positions rise from slot to slot: a slot that is a window of slots away is at least as far in positions.
        # Down to the begin of a block; its slots outside the window are masked below.
        first = tl.maximum(length - window, 0) // BLOCK * BLOCK
    per_split = tl.cdiv(tl.cdiv(length - first, BLOCK), SPLITS) * BLOCK
    start = first + split * per_split
    stop = tl.minimum(start + per_split, length)

    first_head = (row * tl.num_programs(1) + kv_head) * GROUP
    q_mask = (heads < GROUP)[:, None] & (cols < HEAD_DIM)[None, :]
    q = tl.load(queries_ptr + (first_head + heads)[:, None] * HEAD_DIM + cols[None, :], mask=q_mask, other=0.0)
    keys = keys_pointer(kv_table_ptr, layer, row, kv_head, dtype)
    values = values_pointer(kv_table_ptr, layer, row, kv_head, dtype)
    if HAS_PREFIX:
        prefix_len = tl.load(prefix_len_ptr + row)
        prefix_offset = row_offset(kv_table_ptr, tl.load(prefix_row_ptr + row) - row)
    max_score = tl.full([GROUP_BLOCK], float("-inf"), dtype=tl.float32)
    weight_sum = tl.zeros([GROUP_BLOCK], dtype=tl.float32)
    out = tl.zeros([GROUP_BLOCK, DIM_BLOCK], dtype=tl.float32)
    for begin in range(start, stop, BLOCK):
        slots = begin + tl.arange(0, BLOCK)
        mask = (slots < stop)[:, None] & (cols < HEAD_DIM)[None, :]
        offsets = slots.to(tl.int64)[:, None] * HEAD_DIM + cols[None, :]
        if HAS_PREFIX:
            offsets += tl.where(begin < prefix_len, prefix_offset, 0)
        k = tl.load(keys + offsets, mask=mask, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = slots < stop
        if HAS_WINDOW:
            positions = tl.load(position_pointer(kv_table_ptr, row) + slots, mask=seen, other=0)
            seen = seen & (tl.load(query_positions_ptr + row) - positions < window)
        score = tl.where(seen[None, :], score, float("-inf"))
        new_max = tl.maximum(max_score, tl.max(score, axis=1))
        base = tl.where(new_max == float("-inf"), 0.0, new_max)  # nothing seen yet: -inf - -inf is NaN
        p = tl.exp2(score - base[:, None])
        rescale = tl.exp2(max_score - base)
        # Where nothing is seen the weight is 0, and 0 x NaN is NaN: such values are not loaded.
        v = tl.load(values + offsets, mask=mask & seen[:, None], other=0.0)
        out = tl.dot(p.to(dtype), v, out * rescale[:, None], input_precision="ieee")
        weight_sum = weight_sum * rescale + tl.sum(p, axis=1)
        max_score = new_max
    has_weight = weight_sum != 0  # also of a NaN, which must come out
    index = (first_head + heads) * SPLITS + split
    lse = tl.where(has_weight, max_score + tl.log2(tl.where(has_weight, weight_sum, 1.0)), float("-inf"))
    tl.store(split_lse_ptr + index, lse, mask=heads < GROUP)
    if start < stop:
        out = out / tl.where(has_weight, weight_sum, 1.0)[:, None]
        tl.store(split_out_ptr + index[:, None] * HEAD_DIM + cols[None, :], out, mask=q_mask)


@triton.jit
def reduce_kernel(
    split_out_ptr, split_lse_ptr, out_ptr,
    HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, SPLITS: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Store out[row, head] = sum of split_out[row, head, i] 2^lse[i] / sum of 2^lse[i]; 0 where nothing was seen."""
    head = tl.program_id(0)
    splits = tl.arange(0, SPLITS)
    cols = tl.arange(0, DIM_BLOCK)
    if USE_PDL:
        pdl_wait()
    lse = tl.load(split_lse_ptr + head * SPLITS + splits)
    has_weight = lse > float("-inf")
    max_lse = tl.max(lse, axis=0)
    weight = tl.where(has_weight, tl.exp2(lse - tl.where(max_lse > float("-inf"), max_lse, 0.0)), 0.0)
    mask = has_weight[:, None] & (cols < HEAD_DIM)[None, :]
    split_out = tl.load(
        split_out_ptr + (head * SPLITS + splits)[:, None] * HEAD_DIM + cols[None, :], mask=mask, other=0.0
    )
    weight_sum = tl.sum(weight, axis=0)
    out = tl.sum(split_out * weight[:, None], axis=0) / tl.where(weight_sum > 0, weight_sum, 1.0)
    # A NaN in a log-sum-exp is neither above nor below anything: it must come out, not vanish.
    out = tl.where(tl.sum((lse != lse).to(tl.int32), axis=0) > 0, float("nan"), out)
    tl.store(out_ptr + head * HEAD_DIM + cols, out.to(out_ptr.dtype.element_ty), mask=cols < HEAD_DIM)


def num_kv_splits(target: LaunchTarget, batch: int, kv_heads: int, itemsize: int) -> int:
    """Return the programs per row and KV head: in all two for each multiprocessor, where the rows alone are fewer."""
    if itemsize == 4:
        return min(EXACT_SPLITS, triton.next_power_of_2(target.multiprocessors))
    return max(1, min(64, triton.next_power_of_2(triton.cdiv(2 * target.multiprocessors, batch * kv_heads))))


class SplitWorkspace:
    """Results of the KV splits of `decode_attention`: out [B, Hq, splits, hd] and lse [B, Hq, splits], float32."""

    def __init__(self, queries: Tensor, splits: int) -> None:
        batch, heads, head_dim = queries.shape
        self.out = torch.empty(batch, heads, splits, head_dim, dtype=torch.float32, device=queries.device)
        self.lse = torch.empty(batch, heads, splits, dtype=torch.float32, device=queries.device)


def decode_attention(
    queries: Tensor,
    kv_table: Tensor,
    layer: int,
    kv_heads: int,
    lengths: Tensor,
    query_positions: Tensor,
    window: int | None,
    scale: float,
    splits: SplitWorkspace,
    out: Tensor,
    *,
    target: LaunchTarget,
    prefix_row: Tensor | None = None,
    prefix_len: Tensor | None = None,
) -> None:
    """Launch on checked arguments. Modifies `out` [B, Hq hd] and `splits`."""
    batch, heads, head_dim = queries.shape
    if batch == 0:
        return
    group, n_splits = heads // kv_heads, splits.lse.shape[2]
    dim_block = triton.next_power_of_2(head_dim)
    target.launch(
        attention_kernel, (n_splits, kv_heads, batch),
        queries, kv_table, lengths, query_positions, prefix_row, prefix_len, splits.out, splits.lse, layer,
        scale * math.log2(math.e), window or 0,
        GROUP=group, GROUP_BLOCK=max(16, triton.next_power_of_2(group)), HEAD_DIM=head_dim,
        DIM_BLOCK=dim_block, BLOCK=BLOCK_SLOTS[queries.element_size()], SPLITS=n_splits, HAS_WINDOW=window is not None,
        HAS_PREFIX=prefix_row is not None, USE_PDL=target.enable_pdl, num_warps=4, num_stages=2,
    )  # fmt: skip
    target.launch(
        reduce_kernel, (batch * heads,),
        splits.out, splits.lse, out,
        HEAD_DIM=head_dim, DIM_BLOCK=dim_block, SPLITS=n_splits, USE_PDL=target.enable_pdl, num_warps=4,
    )  # fmt: skip
