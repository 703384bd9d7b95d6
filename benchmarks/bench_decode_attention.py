"""decode_attention beside torch's scaled_dot_product_attention over exactly the slots in use (`--kv` of them).

The op normalises, rotates and appends besides; torch gets its queries, keys and values ready, and does none of it.
"""

from functools import partial

import torch
from shapes import sizes_of
from sweeps import Race, cold, require_correct
from torch.nn.functional import scaled_dot_product_attention

from latentmas_kernels.ops.decode_attention import decode_attention_reference
from latentmas_kernels.ops.triton.decode_attention import SplitWorkspace, decode_attention, num_kv_splits
from latentmas_kernels.ops.triton.kv_table import KVTable
from latentmas_kernels.ops.triton.launch import target_of

EPS = 1e-6


def test_decode_attention(race: Race, device: str, shape: str, batch: int, kv: int, dtype: torch.dtype) -> None:
    s, target = sizes_of(shape), target_of(torch.device(device))
    heads, kv_heads, width = s["num_attention_heads"], s["num_key_value_heads"], s["head_dim"]
    stores = cold(device, dtype, 2, batch, kv_heads, kv, width)
    qkv = torch.randn(batch, (heads + 2 * kv_heads) * width, device=device).to(dtype)
    norm_weights = (1 + torch.randn(2, width, device=device) / 8).to(dtype)
    inv_freq = 1e6 ** -(torch.arange(0, width, 2, device=device) / width)
    lengths = torch.full((batch,), kv, dtype=torch.int32, device=device)
    slots, positions = lengths - 1, lengths - 1
    splits = num_kv_splits(target, batch, kv_heads, dtype.itemsize)
    workspace = SplitWorkspace(batch, heads, kv_heads, width, splits, qkv.device)
    out = torch.full((batch, heads * width), float("nan"), dtype=dtype, device=device)
    scale = width**-0.5
    ours = [
        partial(
            decode_attention, qkv, KVTable.of_layer(*store).tensor(device), 0, slots, lengths, positions, inv_freq, 1.0,
            *norm_weights, EPS, scale, None, workspace, out, target=target,
        )
        for store in stores
    ]  # fmt: skip
    # The query heads of a KV head as so many queries: keys and values are read once for all of them.
    queries = torch.randn(batch, kv_heads, heads // kv_heads, width, device=device).to(dtype)
    theirs = [partial(scaled_dot_product_attention, queries, *store) for store in stores]
    ours[0]()

    def in_torch(dtype: torch.dtype) -> torch.Tensor:
        return decode_attention_reference(
            qkv.to(dtype), *stores[0].to(dtype, copy=True), slots, lengths, positions, inv_freq, 1.0, *norm_weights.to(dtype),
            EPS, scale,
        )  # fmt: skip

    require_correct(out, in_torch(dtype), in_torch(torch.float64))
    race(
        ours, theirs, moved=stores[0].nbytes + qkv.nbytes + out.nbytes,
        kernel="Triton", batch=batch, dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
