"""rope_append beside its formula in torch: on CUDA one graph too, but a dozen kernels."""

from functools import partial

import torch
from shapes import sizes_of
from sweeps import Race, cold, require_correct
from torch import Tensor
from torch.nn.functional import rms_norm

from latentmas_kernels.ops.rope_append import rotate
from latentmas_kernels.ops.triton.kv_table import KVTable
from latentmas_kernels.ops.triton.launch import target_of
from latentmas_kernels.ops.triton.rope_append import rope_append

EPS = 1e-6


def test_rope_append(race: Race, device: str, shape: str, batch: int, kv: int, dtype: torch.dtype) -> None:
    s, target = sizes_of(shape), target_of(torch.device(device))
    heads, kv_heads, width = s["num_attention_heads"], s["num_key_value_heads"], s["head_dim"]
    inputs = cold(device, dtype, batch, (heads + 2 * kv_heads) * width)
    gains = (1 + torch.randn(2, width, device=device) / 8).to(dtype)
    inv_freq = 1e6 ** -(torch.arange(0, width, 2, device=device) / width)
    positions = torch.full((batch,), kv, dtype=torch.int32, device=device)
    keys, values = torch.full((2, batch, kv_heads, kv + 1, width), float("nan"), dtype=dtype, device=device)
    queries = torch.full((batch, heads, width), float("nan"), dtype=dtype, device=device)
    kv_table = KVTable.of_layer(keys, values).tensor(device)

    def plain(qkv: Tensor, gains: Tensor) -> Tensor:
        # Stores at one slot for all rows, which plain torch does without a wait; the slots of a ragged batch need one.
        q, k, v = qkv.view(batch, -1, width).split([heads, kv_heads, kv_heads], dim=1)
        q, k = (rms_norm(t, (width,), gain, EPS) for t, gain in ((q, gains[0]), (k, gains[1])))
        angle = positions.float()[:, None, None] * inv_freq
        keys[:, :, kv], values[:, :, kv] = rotate(k, angle).to(keys.dtype), v.to(values.dtype)
        return rotate(q, angle).to(qkv.dtype)

    def ours(qkv: Tensor) -> None:
        rope_append(
            qkv, queries, gains[0], gains[1], EPS, inv_freq, 1.0, kv_table, 0, positions, positions, target=target
        )  # fmt: skip

    def stored() -> Tensor:
        return torch.cat([keys[:, :, kv], values[:, :, kv]], dim=1)

    results = []
    for run in (lambda: [ours(inputs[0]), queries][1], lambda: plain(inputs[0], gains)):
        keys[:, :, kv] = values[:, :, kv] = float("nan")
        results.append(torch.cat([run(), stored()], dim=1))
    q, k, v = inputs[0].double().view(batch, -1, width).split([heads, kv_heads, kv_heads], dim=1)
    angle = (positions.float()[:, None, None] * inv_freq).double()
    exact = []
    for t, gain in ((q, gains[0]), (k, gains[1])):
        low, high = rms_norm(t, (width,), gain.double(), EPS).chunk(2, dim=-1)
        exact += [torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()], dim=-1)]
    require_correct(*results, torch.cat([*exact, v], dim=1))
    race(
        [partial(ours, qkv) for qkv in inputs], [partial(plain, qkv, gains) for qkv in inputs],
        moved=2 * inputs[0].nbytes, kernel="Triton", batch=batch, dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
