"""decode_attention: attention of one new position per row over that row's own slots.

    o[b, h] = sum over slots j of softmax_j(scale q[b, h] . k[b, g, j]) v[b, g, j]          g = h // (Hq / Hkv)

over the slots j < lengths[b] and, with a window, those with p_b - positions[b, j] < window. q [B, Hq, hd], keys and
values [B, Hkv, S, hd], o [B, Hq hd]. Scores, softmax and sums are float32; the probabilities are rounded to the dtype of
the values before the product with them, as in torch's fused attention. A row of length 0 gives zeros. The first slots
of a row, its prefix, may be stored in another row, so that a prefix that rows share is stored once.
"""

import torch
from torch import Tensor

from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.ops.rope_append import check_buffers
from latentmas_kernels.ops.triton.decode_attention import SplitWorkspace, num_kv_splits
from latentmas_kernels.ops.triton.decode_attention import decode_attention as decode_attention_kernel
from latentmas_kernels.ops.triton.kv_table import KVTable
from latentmas_kernels.ops.triton.launch import runs_on, target_of


def decode_attention_reference(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None = None,
    positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    prefix_row: Tensor | None = None,
    prefix_len: Tensor | None = None,
) -> Tensor:
    """Compute the formula in plain torch."""
    slots = keys.shape[2]
    if prefix_row is not None and prefix_len is not None:
        keys, values = (_with_prefix(t, prefix_row, prefix_len) for t in (keys, values))
    seen = torch.arange(slots, device=keys.device) < lengths[:, None]
    if window is not None:
        assert positions is not None
        assert query_positions is not None
        seen = seen & (query_positions[:, None] - positions < window)
    unseen = ~seen[:, None, :, None]
    group = queries.shape[1] // keys.shape[1]
    k, v = (t.masked_fill(unseen, 0).repeat_interleave(group, dim=1) for t in (keys, values))
    scores = torch.einsum("bhd,bhsd->bhs", queries, k).float() * scale
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    probabilities = scores.softmax(-1).masked_fill(~seen.any(1)[:, None, None], 0)
    return torch.einsum("bhs,bhsd->bhd", probabilities.to(v.dtype), v).flatten(1)


def _with_prefix(store: Tensor, prefix_row: Tensor, prefix_len: Tensor) -> Tensor:
    """Copy keys or values into a buffer where every row holds its prefix itself."""
    rows, slots = (torch.arange(n, device=store.device) for n in (store.shape[0], store.shape[2]))
    source = torch.where(slots < prefix_len[:, None], prefix_row[:, None].long(), rows[:, None])
    return store.transpose(1, 2)[source, slots].transpose(1, 2)


@torch.library.custom_op("latentmas::decode_attention", mutates_args=())
def _decode_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
    positions: Tensor | None,
    query_positions: Tensor | None,
    prefix_row: Tensor | None,
    prefix_len: Tensor | None,
) -> Tensor:
    if not runs_on(queries):
        return decode_attention_reference(
            queries, keys, values, lengths, scale, window, positions, query_positions, prefix_row, prefix_len
        ).contiguous()
    target = target_of(queries.device)
    out = torch.empty_like(queries).flatten(1)
    splits = num_kv_splits(target, len(queries), keys.shape[1], queries.element_size())
    decode_attention_kernel(
        queries, KVTable.of_layer(keys, values, positions).tensor(keys.device), 0, keys.shape[1], lengths,
        lengths if query_positions is None else query_positions, window, scale, SplitWorkspace(queries, splits), out,
        target=target, prefix_row=prefix_row, prefix_len=prefix_len,
    )  # fmt: skip
    return out


@_decode_attention.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
    positions: Tensor | None,
    query_positions: Tensor | None,
    prefix_row: Tensor | None,
    prefix_len: Tensor | None,
) -> Tensor:
    return queries.new_empty(queries.shape[0], queries.shape[1] * queries.shape[2])


def decode_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    prefix_row: Tensor | None = None,
    prefix_len: Tensor | None = None,
) -> Tensor:
    """Attend from one position per row.

    Runs the Triton kernels on CUDA and the torch reference elsewhere.

    Args:
        queries: [B, Hq, hd], after RoPE.
        keys, values: [B, Hkv, S, hd] in queries' dtype, of equal strides, slots contiguous. Slots behind a row's length are
            never used.
        lengths: int32 [B], slots in use.
        scale: of the scores; hd ** -0.5 when None.
        window: positions that a query sees, its own included; needs the two below.
        positions: int64 [B, S], of the slots, rising along each row.
        query_positions: int32 [B].
        prefix_row, prefix_len: int32 [B], both or none. The first prefix_len[b] slots of row b, a multiple of 64 and no more
            than its length, are stored in row prefix_row[b] of keys and values; the positions are the row's own.

    Returns:
        [B, Hq hd].

    Raises:
        LatentMASError: where shapes, dtypes or strides do not fit together.
    """
    check_buffers("decode_attention", keys, values, queries.dtype)
    batch, kv_heads, slots, head_dim = keys.shape
    if queries.dim() != 3 or len(queries) != batch or queries.shape[2] != head_dim or queries.shape[1] % kv_heads:
        raise LatentMASError(
            f"decode_attention: queries must be [{batch}, a multiple of {kv_heads} heads, {head_dim}]; got "
            f"{list(queries.shape)}"
        )
    if list(lengths.shape) != [batch] or lengths.dtype != torch.int32:
        raise LatentMASError(
            f"decode_attention: lengths must be int32 [{batch}]; got {lengths.dtype} {list(lengths.shape)}"
        )
    if window is not None:
        if positions is None or query_positions is None:
            raise LatentMASError("decode_attention: a window needs positions and query_positions")
        if list(positions.shape) != [batch, slots] or positions.dtype != torch.int64 or positions.stride(1) != 1:
            raise LatentMASError(
                f"decode_attention: positions must be int64 {[batch, slots]}; got {positions.dtype} {list(positions.shape)}"
            )
        if list(query_positions.shape) != [batch] or query_positions.dtype != torch.int32:
            raise LatentMASError(
                f"decode_attention: query_positions must be int32 [{batch}]; got {query_positions.dtype} "
                f"{list(query_positions.shape)}"
            )
    if (prefix_row is None) != (prefix_len is None):
        raise LatentMASError("decode_attention: pass both prefix_row and prefix_len, or neither")
    for name, rows in (("prefix_row", prefix_row), ("prefix_len", prefix_len)):
        if rows is not None and (list(rows.shape) != [batch] or rows.dtype != torch.int32):
            raise LatentMASError(
                f"decode_attention: {name} must be int32 [{batch}]; got {rows.dtype} {list(rows.shape)}"
            )
    query_positions, prefix_row, prefix_len = (
        None if t is None else t.contiguous() for t in (query_positions, prefix_row, prefix_len)
    )
    return _decode_attention(
        queries.contiguous(), keys, values, lengths.contiguous(), head_dim**-0.5 if scale is None else scale, window, positions,
        query_positions, prefix_row, prefix_len,
    )  # fmt: skip
