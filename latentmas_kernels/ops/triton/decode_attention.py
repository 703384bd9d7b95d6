"""decode_attention in Triton: formula and shapes in latentmas_kernels.ops.decode_attention.

The slots of a row are cut into as many runs as there are programs for it, by the row's own length as it stands in device
memory: a short row in a large buffer costs what it holds. The query heads of a KV head are rows of one matrix, so that
keys and values are read once for all of them. Each program leaves a normalised sum and its log-sum-exp (base 2) per
query head; the second kernel weighs them together.

The first slots of a row may lie in another row of the buffer. What is read at once begins at a multiple of BLOCK, and the
number of slots that are borrowed is one as well, so what is read at once lies in one row.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentmas_kernels.ops.triton.kv_table import head_pointer, position_pointer, row_offset
from latentmas_kernels.ops.triton.launch import Target
from latentmas_kernels.ops.triton.skinny_gemm import pdl_wait

EXACT_SPLITS = 16
"""In float32, whatever the batch, so that a row's bits do not depend on it."""
BLOCK_SLOTS = {2: 64, 4: 32}
"""Slots of one load, by the bytes of an element. A shared prefix ends between two loads (`cache.buffer.PREFIX_BLOCK`)."""


@triton.jit(do_not_specialize=["layer"])
def attention_kernel(
    queries, memory, lengths, positions, prefix_row, prefix_len, sums, weights, layer, scale, window,
    GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_PREFIX: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """sums[row, head, split] and weights[row, head, split] for the query heads of one KV head over one run of slots."""
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.arange(0, GROUP_BLOCK)
    cols = tl.arange(0, WIDTH_BLOCK)
    dtype = queries.dtype.element_ty
    if OVERLAP:
        pdl_wait()
    length = tl.load(lengths + row)
    first = 0
    if HAS_WINDOW:
        # Positions rise from slot to slot: what is a window of slots away is at least as far in positions.
        # Down to where a block begins; what of it is outside the window is masked below.
        first = tl.maximum(length - window, 0) // BLOCK * BLOCK
    per_split = tl.cdiv(tl.cdiv(length - first, BLOCK), SPLITS) * BLOCK
    start = first + split * per_split
    stop = tl.minimum(start + per_split, length)

    first_head = (row * tl.num_programs(1) + kv_head) * GROUP
    q_inside = (heads < GROUP)[:, None] & (cols < WIDTH)[None, :]
    q = tl.load(queries + (first_head + heads)[:, None] * WIDTH + cols[None, :], mask=q_inside, other=0.0)
    keys = head_pointer(memory, 0, layer, row, kv_head, dtype)
    values = head_pointer(memory, 1, layer, row, kv_head, dtype)
    if HAS_PREFIX:
        lent = tl.load(prefix_len + row)
        to_lender = row_offset(memory, tl.load(prefix_row + row) - row)
    top = tl.full([GROUP_BLOCK], float("-inf"), dtype=tl.float32)
    total = tl.zeros([GROUP_BLOCK], dtype=tl.float32)
    mixed = tl.zeros([GROUP_BLOCK, WIDTH_BLOCK], dtype=tl.float32)
    for begin in range(start, stop, BLOCK):
        slots = begin + tl.arange(0, BLOCK)
        inside = (slots < stop)[:, None] & (cols < WIDTH)[None, :]
        at = slots.to(tl.int64)[:, None] * WIDTH + cols[None, :]
        if HAS_PREFIX:
            at += tl.where(begin < lent, to_lender, 0)
        k = tl.load(keys + at, mask=inside, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = slots < stop
        if HAS_WINDOW:
            stored = tl.load(position_pointer(memory, row) + slots, mask=seen, other=0)
            seen = seen & (tl.load(positions + row) - stored < window)
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: -inf - -inf is NaN
        p = tl.exp2(score - base[:, None])
        fade = tl.exp2(top - base)
        # Where nothing is seen the share is 0, and 0 x NaN is NaN: such values are not loaded.
        v = tl.load(values + at, mask=inside & seen[:, None], other=0.0)
        mixed = tl.dot(p.to(dtype), v, mixed * fade[:, None], input_precision="ieee")
        total = total * fade + tl.sum(p, axis=1)
        top = higher
    some = total != 0  # also of a NaN, which must come out
    out = (first_head + heads) * SPLITS + split
    tl.store(
        weights + out, tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("-inf")), mask=heads < GROUP
    )
    if start < stop:
        mixed = mixed / tl.where(some, total, 1.0)[:, None]
        tl.store(sums + out[:, None] * WIDTH + cols[None, :], mixed, mask=q_inside)


@triton.jit
def reduce_kernel(
    sums, weights, out, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, SPLITS: tl.constexpr, OVERLAP: tl.constexpr
):
    """out[row, head] = sum of sums[row, head, i] 2^weights[i] / sum of 2^weights[i]; 0 where nothing was seen."""
    head = tl.program_id(0)
    splits = tl.arange(0, SPLITS)
    cols = tl.arange(0, WIDTH_BLOCK)
    if OVERLAP:
        pdl_wait()
    weight = tl.load(weights + head * SPLITS + splits)
    some = weight > float("-inf")
    top = tl.max(weight, axis=0)
    share = tl.where(some, tl.exp2(weight - tl.where(top > float("-inf"), top, 0.0)), 0.0)
    inside = some[:, None] & (cols < WIDTH)[None, :]
    part = tl.load(sums + (head * SPLITS + splits)[:, None] * WIDTH + cols[None, :], mask=inside, other=0.0)
    total = tl.sum(share, axis=0)
    mixed = tl.sum(part * share[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    # A NaN in a weight is neither above nor below anything: it must come out, not vanish.
    mixed = tl.where(tl.sum((weight != weight).to(tl.int32), axis=0) > 0, float("nan"), mixed)
    tl.store(out + head * WIDTH + cols, mixed.to(out.dtype.element_ty), mask=cols < WIDTH)


def num_kv_splits(target: Target, batch: int, kv_heads: int, itemsize: int) -> int:
    """Programs per row and KV head: two for each multiprocessor in all, where the rows do not give as many."""
    if itemsize == 4:
        return min(EXACT_SPLITS, triton.next_power_of_2(target.multiprocessors))
    return max(1, min(64, triton.next_power_of_2(triton.cdiv(2 * target.multiprocessors, batch * kv_heads))))


class Partials:
    """Where the runs of `decode_attention` meet: sums [B, Hq, splits, hd] and weights [B, Hq, splits], float32."""

    def __init__(self, queries: Tensor, splits: int) -> None:
        batch, heads, width = queries.shape
        self.sums = torch.empty(batch, heads, splits, width, dtype=torch.float32, device=queries.device)
        self.weights = torch.empty(batch, heads, splits, dtype=torch.float32, device=queries.device)


def decode_attention(
    queries: Tensor,
    memory: Tensor,
    layer: int,
    kv_heads: int,
    lengths: Tensor,
    positions: Tensor,
    window: int | None,
    scale: float,
    partials: Partials,
    out: Tensor,
    *,
    target: Target,
    prefix_row: Tensor | None = None,
    prefix_len: Tensor | None = None,
) -> None:
    """Launch on checked arguments; `out` [B, Hq hd] and `partials` are written."""
    batch, heads, width = queries.shape
    if batch == 0:
        return
    group, splits = heads // kv_heads, partials.weights.shape[2]
    width_block = triton.next_power_of_2(width)
    attention_kernel[(splits, kv_heads, batch)](
        queries, memory, lengths, positions, prefix_row, prefix_len, partials.sums, partials.weights, layer,
        scale * math.log2(math.e), window or 0,
        GROUP=group, GROUP_BLOCK=max(16, triton.next_power_of_2(group)), WIDTH=width, WIDTH_BLOCK=width_block,
        BLOCK=BLOCK_SLOTS[queries.element_size()], SPLITS=splits, HAS_WINDOW=window is not None,
        HAS_PREFIX=prefix_row is not None, OVERLAP=target.overlap, num_warps=4, num_stages=2, **target.options,
    )  # fmt: skip
    reduce_kernel[(batch * heads,)](
        partials.sums, partials.weights, out,
        WIDTH=width, WIDTH_BLOCK=width_block, SPLITS=splits, OVERLAP=target.overlap, num_warps=4, **target.options,
    )  # fmt: skip
