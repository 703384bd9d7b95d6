"""decode_attention in Triton: formula and shapes in latentmas_kernels.ops.decode_attention. One launch.

The slots of a row are divided into KV splits, one per program, by the row's own length in device memory: a short row in a
large buffer costs what it holds. The query heads of a KV head are rows of one matrix, so that keys and values are read once
for all of them. Every program normalises and rotates the queries of its own group, a few KB that are in the L2. The first
split does the same with the new key, stores it and the new value, and begins its softmax with them; memory is read for the
slots before them only, so no program reads what another one of the launch writes.

Each program stores a normalised output and its log-sum-exp (base 2) per query head (as in Flash-Decoding). The last one of a
row and KV head to finish combines them in the order of the splits, so that the bits do not depend on which one is last, and
resets the counter to 0 for the next launch.

The first slots of a row may be stored in another row of the buffer, the shared prefix.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentmas_kernels.ops.triton.kv_table import keys_pointer, position_pointer, row_offset, values_pointer
from latentmas_kernels.ops.triton.launch import LaunchTarget
from latentmas_kernels.ops.triton.sincos import cosine_sine
from latentmas_kernels.ops.triton.skinny_gemm import pdl_wait

EXACT_SPLITS = 16
"""KV splits in float32, whatever the batch, so that a row's bits do not depend on it."""
RUN_SLOTS: tl.constexpr = tl.constexpr(16)
"""Slots that are given to a split at once: few slots still make work for many programs, 128 at KV 256 and 8 KV heads."""
BLOCK_SLOTS = {2: 32, 4: 16}
"""Slots that a program reads at once, by the size of an element. 32 spill registers in float32 from heads of 128 on."""
COMBINED_FLOATS = 4096
"""Elements of the splits' outputs that the last program reads at once: 32 registers in each of 128 threads."""


@triton.jit
def rotated(
    source_ptr, norm_weight_ptr, cosine, sine, cols, mask, eps, attention_scaling,
    HEAD_DIM: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Return rope(rmsnorm(x)), float32 [heads, DIM_BLOCK], of the heads at source_ptr [heads, 1]."""
    # x1, x2 -> x1 c - x2 s, x2 c + x1 s: each column with the one half a head away, its partner.
    first_half = cols < HEAD_DIM // 2
    partners = tl.where(first_half, cols + HEAD_DIM // 2, cols - HEAD_DIM // 2)
    x = tl.load(source_ptr + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    partner = tl.load(source_ptr + partners[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)[:, None]
        in_head = cols < HEAD_DIM
        x = x * scale * tl.load(norm_weight_ptr + cols, mask=in_head, other=0.0).to(tl.float32)[None, :]
        weight = tl.load(norm_weight_ptr + partners, mask=in_head, other=0.0).to(tl.float32)
        partner = partner * scale * weight[None, :]
    signed_sine = tl.where(first_half, -sine, sine) * attention_scaling
    return x * (cosine * attention_scaling)[None, :] + partner * signed_sine[None, :]


@triton.jit
def load_block(
    keys, values, kv_table_ptr, row, query_position, begin, stop, prefix_len, prefix_offset, window,
    HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, BLOCK: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_PREFIX: tl.constexpr,
):  # fmt: skip
    """Return keys and values of the slots from `begin` to `stop`, [BLOCK, DIM_BLOCK], and which of them the row sees."""
    slots = begin + tl.arange(0, BLOCK)
    cols = tl.arange(0, DIM_BLOCK)
    seen = slots < stop
    mask = seen[:, None] & (cols < HEAD_DIM)[None, :]
    slot_offset = slots.to(tl.int64) * HEAD_DIM
    if HAS_PREFIX:
        # Said again, since Triton forgets it in a `where`: without it every load is of two bytes.
        slot_offset += tl.multiple_of(tl.where(slots < prefix_len, prefix_offset, 0), 8)
    offsets = slot_offset[:, None] + cols[None, :]
    k = tl.load(keys + offsets, mask=mask, other=0.0)
    if HAS_WINDOW:
        positions = tl.load(position_pointer(kv_table_ptr, row) + slots, mask=seen, other=0)
        seen = seen & (query_position - positions < window)
    # Where nothing is seen the weight is 0, and 0 x NaN is NaN: such values are not loaded.
    v = tl.load(values + offsets, mask=mask & seen[:, None], other=0.0)
    return k, v, seen


@triton.jit
def attend(q, k, v, seen, max_score, weight_sum, out, scale):
    """Return largest score, sum of weights and weighted sum of values, per query head, after a block more of slots."""
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    score = tl.where(seen[None, :], score, float("-inf"))
    new_max = tl.maximum(max_score, tl.max(score, axis=1))
    base = tl.where(new_max == float("-inf"), 0.0, new_max)  # nothing seen yet: -inf - -inf is NaN
    p = tl.exp2(score - base[:, None])
    rescale = tl.exp2(max_score - base)
    out = tl.dot(p.to(v.dtype), v, out * rescale[:, None], input_precision="ieee")
    return new_max, weight_sum * rescale + tl.sum(p, axis=1), out


@triton.jit
def combine_splits(
    split_out_ptr, split_lse_ptr, out_ptr, first_head, busy,
    GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Store out[head] = sum of split_out[head, i] 2^lse[i] / sum of 2^lse[i] over the busy splits; 0 where nothing was seen."""
    heads, cols = tl.arange(0, GROUP_BLOCK), tl.arange(0, DIM_BLOCK)
    in_group, in_head = heads < GROUP, cols < HEAD_DIM
    rows = (first_head + heads) * SPLITS
    splits = tl.arange(0, SPLITS)
    # .cg: past the L1, which does not see the stores of other multiprocessors.
    every_lse = tl.load(
        split_lse_ptr + rows[:, None] + splits[None, :], mask=in_group[:, None] & (splits < busy)[None, :],
        other=float("-inf"), cache_modifier=".cg",
    )  # fmt: skip
    max_lse = tl.max(every_lse, axis=1)
    base = tl.where(max_lse > float("-inf"), max_lse, 0.0)
    weight_sum = tl.zeros([GROUP_BLOCK], dtype=tl.float32)
    out = tl.zeros([GROUP_BLOCK, DIM_BLOCK], dtype=tl.float32)
    for begin in range(0, busy, CHUNK):
        at = begin + tl.arange(0, CHUNK)
        index = rows[:, None] + at[None, :]
        valid = in_group[:, None] & (at < busy)[None, :]
        lse = tl.load(split_lse_ptr + index, mask=valid, other=float("-inf"), cache_modifier=".cg")
        # Every busy split has stored an output, zeros where it saw nothing: no load waits for a weight.
        split_out = tl.load(
            split_out_ptr + index[:, :, None] * HEAD_DIM + cols[None, None, :],
            mask=valid[:, :, None] & in_head[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        weight = tl.exp2(lse - base[:, None])  # 0 of -inf; a NaN goes into the sums and comes out
        out += tl.sum(split_out * weight[:, :, None], axis=1)
        weight_sum += tl.sum(weight, axis=1)
    out = out / tl.where(weight_sum == 0, 1.0, weight_sum)[:, None]
    at = out_ptr + (first_head + heads)[:, None] * HEAD_DIM + cols[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=in_group[:, None] & in_head[None, :])


@triton.jit(do_not_specialize=["layer", "window"])
def decode_attention_kernel(
    qkv_ptr, query_norm_ptr, key_norm_ptr, inv_freq_ptr, kv_table_ptr, slots_ptr, lengths_ptr, query_positions_ptr,
    prefix_row_ptr, prefix_len_ptr, split_out_ptr, split_lse_ptr, split_counters_ptr, out_ptr,
    layer, eps, attention_scaling, scale, window,
    GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, DOT_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_PREFIX: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Append the new position of a row and attend from it, for the query heads of one KV head over one KV split."""
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads = tl.num_programs(1)
    heads, cols = tl.arange(0, DOT_ROWS), tl.arange(0, DIM_BLOCK)
    in_head = cols < HEAD_DIM
    dtype = qkv_ptr.dtype.element_ty
    # No `%`: a division by what is no power of two, for heads of 96.
    angles = tl.where(cols < HEAD_DIM // 2, cols, cols - HEAD_DIM // 2)
    frequency = tl.load(inv_freq_ptr + angles, mask=in_head, other=0.0)
    if USE_PDL:
        pdl_wait()
    slot = tl.load(slots_ptr + row)
    position = tl.load(query_positions_ptr + row)
    # Slots to read: those before the new one. A row that takes no part has no new one.
    length = tl.where(slot >= 0, slot, tl.load(lengths_ptr + row))
    first = 0
    if HAS_WINDOW:
        # Positions rise from slot to slot: a slot that is a window of slots away is at least as far in positions.
        # Down to the begin of a run; its slots outside the window are masked below.
        in_use = length + (slot >= 0).to(tl.int32)
        first = tl.maximum(in_use - window, 0) // RUN_SLOTS * RUN_SLOTS
    runs = tl.cdiv(length - first, RUN_SLOTS)
    runs_per_split = tl.maximum(tl.cdiv(runs, SPLITS), 1)
    busy = tl.maximum(tl.cdiv(runs, runs_per_split), 1)
    if split < busy:
        start = first + split * runs_per_split * RUN_SLOTS
        stop = tl.minimum(start + runs_per_split * RUN_SLOTS, length)
        keys = keys_pointer(kv_table_ptr, layer, row, kv_head, dtype)
        values = values_pointer(kv_table_ptr, layer, row, kv_head, dtype)
        prefix_len, prefix_offset = 0, 0
        if HAS_PREFIX:
            prefix_len = tl.load(prefix_len_ptr + row)
            prefix_offset = row_offset(kv_table_ptr, tl.load(prefix_row_ptr + row) - row)
        # The first block is on its way while the queries are rotated: with few slots there is no second one.
        k, v, seen = load_block(
            keys, values, kv_table_ptr, row, position, start, stop, prefix_len, prefix_offset, window, HEAD_DIM, DIM_BLOCK,
            BLOCK, HAS_WINDOW, HAS_PREFIX,
        )  # fmt: skip
        cosine, sine = cosine_sine(position.to(tl.float32) * frequency)
        # Of the row: GROUP query heads for each KV head, then the keys, then the values.
        row_ptr = qkv_ptr + row * ((GROUP + 2) * kv_heads * HEAD_DIM)
        first_head = kv_head * GROUP
        q_mask = (heads < GROUP)[:, None] & in_head[None, :]
        q = rotated(
            row_ptr + ((first_head + heads) * HEAD_DIM)[:, None], query_norm_ptr, cosine, sine, cols, q_mask, eps,
            attention_scaling, HEAD_DIM, HAS_NORM,
        ).to(dtype)  # fmt: skip

        max_score = tl.full([DOT_ROWS], float("-inf"), dtype=tl.float32)
        weight_sum = tl.zeros([DOT_ROWS], dtype=tl.float32)
        out = tl.zeros([DOT_ROWS, DIM_BLOCK], dtype=tl.float32)
        if (split == 0) & (slot >= 0):
            key_ptr = row_ptr + (GROUP * kv_heads + kv_head) * HEAD_DIM
            one = tl.arange(0, 1)
            new_key = rotated(
                key_ptr + one[:, None], key_norm_ptr, cosine, sine, cols, in_head[None, :], eps, attention_scaling, HEAD_DIM,
                HAS_NORM,
            ).to(dtype)  # fmt: skip
            new_value = tl.load(key_ptr + kv_heads * HEAD_DIM + cols[None, :], mask=in_head[None, :], other=0.0)
            at = slot.to(tl.int64) * HEAD_DIM + cols[None, :]
            tl.store(keys + at, new_key, mask=in_head[None, :])
            tl.store(values + at, new_value, mask=in_head[None, :])
            max_score = tl.sum(q.to(tl.float32) * new_key.to(tl.float32), axis=1) * scale
            base = tl.where(max_score == float("-inf"), 0.0, max_score)
            weight_sum = tl.exp2(max_score - base)  # 1, and NaN of a NaN
            out = weight_sum[:, None] * new_value.to(tl.float32)

        max_score, weight_sum, out = attend(q, k, v, seen, max_score, weight_sum, out, scale)
        for begin in range(start + BLOCK, stop, BLOCK):
            k, v, seen = load_block(
                keys, values, kv_table_ptr, row, position, begin, stop, prefix_len, prefix_offset, window, HEAD_DIM, DIM_BLOCK,
                BLOCK, HAS_WINDOW, HAS_PREFIX,
            )  # fmt: skip
            max_score, weight_sum, out = attend(q, k, v, seen, max_score, weight_sum, out, scale)
        has_weight = weight_sum != 0  # also of a NaN, which must come out
        out = out / tl.where(has_weight, weight_sum, 1.0)[:, None]

        first_head += row * kv_heads * GROUP
        if busy == 1:
            at = out_ptr + (first_head + heads)[:, None] * HEAD_DIM + cols[None, :]
            tl.store(at, out.to(dtype), mask=q_mask)
        else:
            index = (first_head + heads) * SPLITS + split
            lse = tl.where(has_weight, max_score + tl.log2(tl.where(has_weight, weight_sum, 1.0)), float("-inf"))
            tl.store(split_lse_ptr + index, lse, mask=heads < GROUP)
            tl.store(split_out_ptr + index[:, None] * HEAD_DIM + cols[None, :], out, mask=q_mask)
            tl.debug_barrier()  # every thread's results are stored before one thread counts
            counter = split_counters_ptr + row * kv_heads + kv_head
            finished = tl.atomic_add(counter, 1, sem="acq_rel")
            if finished == busy - 1:
                combine_splits(
                    split_out_ptr, split_lse_ptr, out_ptr, first_head, busy, GROUP, GROUP_BLOCK, HEAD_DIM, DIM_BLOCK, SPLITS,
                    CHUNK,
                )  # fmt: skip
                tl.store(counter, 0)


def num_kv_splits(target: LaunchTarget, batch: int, kv_heads: int, itemsize: int) -> int:
    """Return the programs per row and KV head, at most 64: in all one or two for each multiprocessor, where the rows alone are
    fewer. In float32 always as many (EXACT_SPLITS)."""
    if itemsize == 4:
        return min(EXACT_SPLITS, triton.next_power_of_2(target.multiprocessors))
    most = 2 * target.multiprocessors // max(1, batch * kv_heads)
    return min(64, 1 << max(0, most.bit_length() - 1))


class SplitWorkspace:
    """Results of the KV splits of `decode_attention`, and the counters of those that have finished.

    Attributes:
        out: float32 [B, Hq, splits, hd].
        lse: float32 [B, Hq, splits].
        split_counters: int32 [B, Hkv], all 0 between launches.
    """

    def __init__(
        self, batch: int, query_heads: int, kv_heads: int, head_dim: int, splits: int, device: torch.device
    ) -> None:
        self.out = torch.empty(batch, query_heads, splits, head_dim, dtype=torch.float32, device=device)
        self.lse = torch.empty(batch, query_heads, splits, dtype=torch.float32, device=device)
        self.split_counters = torch.zeros(batch, kv_heads, dtype=torch.int32, device=device)


def decode_attention(
    qkv: Tensor,
    kv_table: Tensor,
    layer: int,
    slots: Tensor,
    lengths: Tensor,
    query_positions: Tensor,
    inv_freq: Tensor,
    attention_scaling: float,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    scale: float,
    window: int | None,
    workspace: SplitWorkspace,
    out: Tensor,
    *,
    target: LaunchTarget,
    prefix_row: Tensor | None = None,
    prefix_len: Tensor | None = None,
) -> None:
    """Launch on checked arguments. Modifies `out` [B, Hq hd], `workspace` and the buffer behind `kv_table`."""
    batch, query_heads, splits, head_dim = workspace.out.shape
    if batch == 0:
        return
    kv_heads = workspace.split_counters.shape[1]
    group = query_heads // kv_heads
    # A matrix of tensor cores has 16 rows and 16 columns or more.
    group_block, dim_block = triton.next_power_of_2(group), max(16, triton.next_power_of_2(head_dim))
    target.launch(
        decode_attention_kernel, (splits, kv_heads, batch),
        qkv, query_norm, key_norm, inv_freq, kv_table, slots, lengths, query_positions, prefix_row, prefix_len, workspace.out,
        workspace.lse, workspace.split_counters, out, layer, eps, attention_scaling, scale * math.log2(math.e), window or 0,
        GROUP=group, GROUP_BLOCK=group_block, DOT_ROWS=max(16, group_block), HEAD_DIM=head_dim, DIM_BLOCK=dim_block,
        BLOCK=BLOCK_SLOTS[qkv.element_size()], SPLITS=splits,
        CHUNK=min(splits, max(1, COMBINED_FLOATS // (group_block * dim_block))),
        HAS_NORM=query_norm is not None, HAS_WINDOW=window is not None, HAS_PREFIX=prefix_row is not None,
        USE_PDL=target.enable_pdl, num_warps=4, num_stages=3,
    )  # fmt: skip
