"""rope_append: head norms and RoPE of a new position, between its QKV and attention, and its keys and values in the cache.

    q, k, v = qkv[b] by heads                     qkv [B, (Hq + 2 Hkv) hd], query heads first, then keys, then values
    q, k = rmsnorm per head                       where the model has it (Qwen3)
    q, k = rope(q, p_b), rope(k, p_b)             (x1, x2) -> (x1 c - x2 s, x2 c + x1 s), halves x1, x2 of a head,
                                                  c, s = scaling cos, scaling sin of p_b inv_freq
    keys[b, :, slot_b], values[b, :, slot_b] = k, v                keys, values [B, Hkv, S, hd]; slot -1 stores nothing

Angles, norm and rotation are float32; one cast at the end. inv_freq and the scaling are those of the model's rotary
module, so they include linear, yarn and llama3 scaling.
"""

import torch
from torch import Tensor

from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.ops.rmsnorm import rmsnorm_reference
from latentmas_kernels.ops.triton.kv_table import KVTable
from latentmas_kernels.ops.triton.launch import runs_on, target_of
from latentmas_kernels.ops.triton.rope_append import rope_append as rope_append_kernel


def rotate(x: Tensor, angle: Tensor, scaling: float = 1.0) -> Tensor:
    """Apply RoPE to x [..., hd] by angles [..., hd / 2], in float32."""
    low, high = x.float().chunk(2, dim=-1)
    cosine, sine = angle.cos() * scaling, angle.sin() * scaling
    return torch.cat([low * cosine - high * sine, high * cosine + low * sine], dim=-1)


def rope_append_reference(
    qkv: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    inv_freq: Tensor,
    attention_scaling: float,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
) -> Tensor:
    """Compute the formula in plain torch. Modifies `keys` and `values`."""
    batch, kv_heads, _, head_dim = keys.shape
    heads = qkv.view(batch, -1, head_dim)
    queries, new_keys, new_values = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if query_norm is not None and key_norm is not None:
        queries, new_keys = rmsnorm_reference(queries, query_norm, eps), rmsnorm_reference(new_keys, key_norm, eps)
    angle = (positions.float()[:, None] * inv_freq)[:, None]
    stored = (slots >= 0).nonzero()[:, 0]
    where = slots[stored].long()
    keys[stored, :, where] = rotate(new_keys, angle, attention_scaling).to(keys.dtype)[stored]
    values[stored, :, where] = new_values[stored]
    return rotate(queries, angle, attention_scaling).to(qkv.dtype)


@torch.library.custom_op("latentmas::rope_append", mutates_args=("keys", "values"))
def _rope_append(
    qkv: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    inv_freq: Tensor,
    attention_scaling: float,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
) -> Tensor:
    if not runs_on(qkv):
        return rope_append_reference(
            qkv, query_norm, key_norm, eps, inv_freq, attention_scaling, keys, values, slots, positions
        )
    queries = _queries(qkv, keys)
    rope_append_kernel(
        qkv, queries, query_norm, key_norm, eps, inv_freq, attention_scaling,
        KVTable.of_layer(keys, values).tensor(keys.device), 0, slots, positions, target=target_of(qkv.device),
    )  # fmt: skip
    return queries


def _queries(qkv: Tensor, keys: Tensor) -> Tensor:
    _, kv_heads, _, head_dim = keys.shape
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // head_dim - 2 * kv_heads, head_dim)


@_rope_append.register_fake
def _(
    qkv: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    inv_freq: Tensor,
    attention_scaling: float,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
) -> Tensor:
    return _queries(qkv, keys)


def rope_append(
    qkv: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    inv_freq: Tensor,
    attention_scaling: float,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
) -> Tensor:
    """Rotate queries and keys of one new position per row, and store its keys and values.

    This modifies `keys` and `values`. Runs the Triton kernel on CUDA and the torch reference elsewhere.

    Args:
        qkv: [B, (Hq + 2 Hkv) hd].
        query_norm, key_norm: [hd], the weights of the norms per head, or both None.
        eps: of those norms.
        inv_freq: float32 [hd / 2].
        attention_scaling: factor on cosine and sine.
        keys, values: [B, Hkv, S, hd] in qkv's dtype, of equal strides, slots contiguous. Written at slots[b].
        slots: int32 [B], below S; -1 stores nothing.
        positions: int32 [B].

    Returns:
        The queries, [B, Hq, hd].

    Raises:
        LatentMASError: where shapes, dtypes or strides do not fit together.
    """
    check_buffers("rope_append", keys, values, qkv.dtype)
    batch, kv_heads, _, head_dim = keys.shape
    if head_dim % 2:
        raise LatentMASError(f"rope_append: rotation needs an even head_dim; got {head_dim}")
    if qkv.dim() != 2 or len(qkv) != batch or qkv.shape[1] % head_dim or qkv.shape[1] // head_dim <= 2 * kv_heads:
        raise LatentMASError(
            f"rope_append: qkv must be [{batch}, (query heads + {2 * kv_heads}) * {head_dim}]; got {list(qkv.shape)}"
        )
    if list(inv_freq.shape) != [head_dim // 2] or inv_freq.dtype != torch.float32:
        raise LatentMASError(
            f"rope_append: inv_freq must be float32 [{head_dim // 2}]; got {inv_freq.dtype} {list(inv_freq.shape)}"
        )
    if (query_norm is None) != (key_norm is None):
        raise LatentMASError("rope_append: pass the weights of both norms per head, or of none")
    if query_norm is not None and key_norm is not None:
        shapes = [list(query_norm.shape), list(key_norm.shape)]
        if shapes != [[head_dim], [head_dim]]:
            raise LatentMASError(
                f"rope_append: the weights of the norms per head must be [{head_dim}]; got {shapes[0]} and {shapes[1]}"
            )
        query_norm, key_norm = query_norm.contiguous(), key_norm.contiguous()
    for name, given in (("slots", slots), ("positions", positions)):
        if list(given.shape) != [batch] or given.dtype != torch.int32:
            raise LatentMASError(f"rope_append: {name} must be int32 [{batch}]; got {given.dtype} {list(given.shape)}")
    return _rope_append(
        qkv.contiguous(), query_norm, key_norm, eps, inv_freq.contiguous(), attention_scaling, keys, values,
        slots.contiguous(), positions.contiguous(),
    )  # fmt: skip


def check_buffers(op: str, keys: Tensor, values: Tensor, dtype: torch.dtype) -> None:
    """Raise a LatentMASError unless keys and values are buffers of this dtype that the kernels can address."""
    fits = keys.dim() == 4 and keys.shape == values.shape and keys.stride() == values.stride()
    if not fits or keys.dtype != dtype or values.dtype != dtype or keys.stride()[2:] != (keys.shape[3], 1):
        raise LatentMASError(
            f"{op}: keys and values must be {dtype} [B, kv_heads, S, head_dim] of equal strides with contiguous slots; got "
            f"{keys.dtype} {list(keys.shape)} with strides {keys.stride()} and {values.dtype} {list(values.shape)} with "
            f"{values.stride()}"
        )
