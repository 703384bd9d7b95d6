"""decode_attention: append one new position per row to its KV cache, and attend from it over the row's own slots.

    q, k, v = the heads of qkv[b]; with norm weights q = rmsnorm(q), k = rmsnorm(k), each head by itself
    q, k = rope(q), rope(k) at query_positions[b]
    keys[b, :, slots[b]], values[b, :, slots[b]] = k, v                                     nothing where slots[b] is -1
    o[b, h] = sum over slots j of softmax_j(scale q[h] . keys[b, g, j]) values[b, g, j]     g = h // (Hq / Hkv)

over the slots j < lengths[b] and, with a window, those with query_positions[b] - positions[b, j] < window. qkv
[B, (Hq + 2 Hkv) hd] is the product of the QKV projection: queries, keys and values of all heads; keys and values
[B, Hkv, S, hd], o [B, Hq hd].

RoPE takes (x1, x2), the halves of a head, to (x1 c - x2 s, x2 c + x1 s), with c and s the cosine and sine of
query_positions[b] inv_freq, times attention_scaling. inv_freq and the scaling are those of the model's rotary module, so
they include linear, yarn and llama3 scaling. Norm, rotation, scores, softmax and sums are float32; queries and keys are
rounded to the dtype of the cache before their product, and the probabilities before that with the values, as in torch's
fused attention. A row without a slot gives zeros. The first slots of a row, its prefix, may be stored in another row, so
that a prefix that rows share is stored once.
"""

import math

import torch
from torch import Tensor

from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.ops.rmsnorm import rmsnorm_reference
from latentmas_kernels.ops.rope import rotate
from latentmas_kernels.ops.triton.decode_attention import SplitWorkspace, num_kv_splits
from latentmas_kernels.ops.triton.decode_attention import decode_attention as decode_attention_kernel
from latentmas_kernels.ops.triton.kv_table import KVTable
from latentmas_kernels.ops.triton.launch import runs_on, target_of


def decode_attention_reference(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    lengths: Tensor,
    query_positions: Tensor,
    inv_freq: Tensor,
    attention_scaling: float = 1.0,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
    scale: float | None = None,
    window: int | None = None,
    positions: Tensor | None = None,
    prefix_row: Tensor | None = None,
    prefix_len: Tensor | None = None,
) -> Tensor:
    """Compute the formula in plain torch. Modifies `keys` and `values`."""
    batch, kv_heads, capacity, head_dim = keys.shape
    heads = qkv.view(batch, -1, head_dim)
    queries, new_keys, new_values = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if query_norm is not None and key_norm is not None:
        queries, new_keys = rmsnorm_reference(queries, query_norm, eps), rmsnorm_reference(new_keys, key_norm, eps)
    angle = (query_positions.float()[:, None] * inv_freq)[:, None]
    stored = (slots >= 0).nonzero()[:, 0]
    where = slots[stored].long()
    keys[stored, :, where] = rotate(new_keys, angle, attention_scaling).to(keys.dtype)[stored]
    values[stored, :, where] = new_values[stored]
    queries = rotate(queries, angle, attention_scaling).to(keys.dtype)

    if prefix_row is not None and prefix_len is not None:
        keys, values = (_with_prefix(t, prefix_row, prefix_len) for t in (keys, values))
    seen = torch.arange(capacity, device=keys.device) < lengths[:, None]
    if window is not None:
        assert positions is not None
        seen = seen & (query_positions[:, None] - positions < window)
    unseen = ~seen[:, None, :, None]
    group = queries.shape[1] // kv_heads
    k, v = (t.masked_fill(unseen, 0).repeat_interleave(group, dim=1) for t in (keys, values))
    scores = torch.einsum("bhd,bhsd->bhs", queries, k).float() * (head_dim**-0.5 if scale is None else scale)
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    probabilities = scores.softmax(-1).masked_fill(~seen.any(1)[:, None, None], 0)
    return torch.einsum("bhs,bhsd->bhd", probabilities.to(v.dtype), v).flatten(1)


def _with_prefix(store: Tensor, prefix_row: Tensor, prefix_len: Tensor) -> Tensor:
    """Copy keys or values into a buffer where every row holds its prefix itself."""
    rows, slots = (torch.arange(n, device=store.device) for n in (store.shape[0], store.shape[2]))
    source = torch.where(slots < prefix_len[:, None], prefix_row[:, None].long(), rows[:, None])
    return store.transpose(1, 2)[source, slots].transpose(1, 2)


@torch.library.custom_op("latentmas::decode_attention", mutates_args=("keys", "values"))
def _decode_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
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
    positions: Tensor | None,
    prefix_row: Tensor | None,
    prefix_len: Tensor | None,
) -> Tensor:
    if not runs_on(qkv):
        return decode_attention_reference(
            qkv, keys, values, slots, lengths, query_positions, inv_freq, attention_scaling, query_norm, key_norm, eps, scale,
            window, positions, prefix_row, prefix_len,
        ).contiguous()  # fmt: skip
    target, out = target_of(qkv.device), _output(qkv, keys)
    batch, kv_heads, _, head_dim = keys.shape
    _check_alignment(keys)
    _check_alignment(values)
    splits = num_kv_splits(target, batch, kv_heads, qkv.element_size())
    decode_attention_kernel(
        qkv, KVTable.of_layer(keys, values, positions).tensor(keys.device), 0, slots, lengths, query_positions, inv_freq,
        attention_scaling, query_norm, key_norm, eps, scale, window,
        SplitWorkspace(batch, out.shape[1] // head_dim, kv_heads, head_dim, splits, qkv.device), out, target=target,
        prefix_row=prefix_row, prefix_len=prefix_len,
    )  # fmt: skip
    return out


def _output(qkv: Tensor, keys: Tensor) -> Tensor:
    _, kv_heads, _, head_dim = keys.shape
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] - 2 * kv_heads * head_dim)


@_decode_attention.register_fake
def _(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
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
    positions: Tensor | None,
    prefix_row: Tensor | None,
    prefix_len: Tensor | None,
) -> Tensor:
    return _output(qkv, keys)


def decode_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    lengths: Tensor,
    query_positions: Tensor,
    inv_freq: Tensor,
    *,
    attention_scaling: float = 1.0,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
    scale: float | None = None,
    window: int | None = None,
    positions: Tensor | None = None,
    prefix_row: Tensor | None = None,
    prefix_len: Tensor | None = None,
) -> Tensor:
    """Append one new position per row and attend from it. This modifies `keys` and `values`.

    Runs the Triton kernel on CUDA and the torch reference elsewhere.

    Args:
        qkv: [B, (Hq + 2 Hkv) hd], before norm and RoPE.
        keys, values: [B, Hkv, S, hd] in qkv's dtype, of equal strides, slots contiguous. Written at slots[b]. Slots behind a
            row's length are never used.
        slots: int32 [B], lengths[b] - 1: the slot of the new position. -1 for a row that takes no part: it stores nothing
            and attends to the slots that it has.
        lengths: int32 [B], slots in use, the new one included.
        query_positions: int32 [B], of the new position.
        inv_freq: float32 [hd / 2].
        attention_scaling: factor on cosine and sine.
        query_norm, key_norm: [hd], the weights of the norms per head, or both None.
        eps: of those norms.
        scale: of the scores; hd ** -0.5 when None.
        window: positions that a query sees, its own included; needs `positions`.
        positions: int64 [B, S], of the slots, rising along each row.
        prefix_row, prefix_len: int32 [B], both or none. The first prefix_len[b] slots of row b, fewer than its length, are
            stored in row prefix_row[b] of keys and values; the positions are the row's own.

    Returns:
        [B, Hq hd].

    Raises:
        LatentMASError: where shapes, dtypes or strides do not fit together.
    """
    _check_buffers(keys, values, qkv.dtype)
    batch, kv_heads, capacity, head_dim = keys.shape
    if head_dim % 2:
        raise LatentMASError(f"decode_attention: rotation needs an even head_dim; got {head_dim}")
    heads = qkv.shape[-1] // head_dim - 2 * kv_heads
    if qkv.dim() != 2 or len(qkv) != batch or qkv.shape[1] % head_dim or heads <= 0 or heads % kv_heads:
        raise LatentMASError(
            f"decode_attention: qkv must be [{batch}, (a multiple of {kv_heads} + {2 * kv_heads}) * {head_dim}]; got "
            f"{list(qkv.shape)}"
        )
    for name, given in (("slots", slots), ("lengths", lengths), ("query_positions", query_positions)):
        if list(given.shape) != [batch] or given.dtype != torch.int32:
            raise LatentMASError(
                f"decode_attention: {name} must be int32 [{batch}]; got {given.dtype} {list(given.shape)}"
            )
    if list(inv_freq.shape) != [head_dim // 2] or inv_freq.dtype != torch.float32:
        raise LatentMASError(
            f"decode_attention: inv_freq must be float32 [{head_dim // 2}]; got {inv_freq.dtype} {list(inv_freq.shape)}"
        )
    if (query_norm is None) != (key_norm is None):
        raise LatentMASError("decode_attention: pass the weights of both norms per head, or of none")
    if query_norm is not None and key_norm is not None:
        shapes = [list(query_norm.shape), list(key_norm.shape)]
        if shapes != [[head_dim], [head_dim]]:
            raise LatentMASError(
                f"decode_attention: the weights of the norms per head must be [{head_dim}]; got {shapes[0]} and {shapes[1]}"
            )
    if window is not None:
        if positions is None:
            raise LatentMASError("decode_attention: a window needs positions")
        if list(positions.shape) != [batch, capacity] or positions.dtype != torch.int64 or positions.stride(1) != 1:
            raise LatentMASError(
                f"decode_attention: positions must be int64 {[batch, capacity]}; got {positions.dtype} "
                f"{list(positions.shape)}"
            )
    if (prefix_row is None) != (prefix_len is None):
        raise LatentMASError("decode_attention: pass both prefix_row and prefix_len, or neither")
    for name, rows in (("prefix_row", prefix_row), ("prefix_len", prefix_len)):
        if rows is not None and (list(rows.shape) != [batch] or rows.dtype != torch.int32):
            raise LatentMASError(
                f"decode_attention: {name} must be int32 [{batch}]; got {rows.dtype} {list(rows.shape)}"
            )
    query_norm, key_norm, prefix_row, prefix_len = (
        None if t is None else t.contiguous() for t in (query_norm, key_norm, prefix_row, prefix_len)
    )
    return _decode_attention(
        qkv.contiguous(), keys, values, slots.contiguous(), lengths.contiguous(), query_positions.contiguous(),
        inv_freq.contiguous(), attention_scaling, query_norm, key_norm, eps, head_dim**-0.5 if scale is None else scale, window,
        positions, prefix_row, prefix_len,
    )  # fmt: skip


def _check_buffers(keys: Tensor, values: Tensor, dtype: torch.dtype) -> None:
    """Raise a LatentMASError unless keys and values are buffers of this dtype that the kernel can address."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise LatentMASError(f"decode_attention: qkv must be float32, float16 or bfloat16; got {dtype}")
    fits = keys.dim() == 4 and keys.shape == values.shape and keys.stride() == values.stride()
    if not fits or keys.dtype != dtype or values.dtype != dtype or keys.stride()[2:] != (keys.shape[3], 1):
        raise LatentMASError(
            f"decode_attention: keys and values must be {dtype} [B, kv_heads, S, head_dim] of equal strides with contiguous "
            f"slots; got {keys.dtype} {list(keys.shape)} with strides {keys.stride()} and {values.dtype} "
            f"{list(values.shape)} with {values.stride()}"
        )


def _check_alignment(store: Tensor) -> None:
    """Raise a LatentMASError where loads of 16 bytes, or of whole heads that are smaller, would not be aligned."""
    step = math.gcd(store.shape[3], 8)
    if store.numel() and (store.data_ptr() % 16 or any(stride % step for stride in store.stride()[:2])):
        raise LatentMASError(
            f"decode_attention: keys and values must begin at a multiple of 16 bytes, with strides of rows and heads that are "
            f"multiples of {step}; got {store.data_ptr() % 16} bytes behind one and strides {store.stride()}. Copy them with "
            "clone(memory_format=torch.contiguous_format)"
        )
