"""decode_attention beside torch's scaled_dot_product_attention over exactly the slots in use (`--kv` of them)."""

from functools import partial

import torch
from shapes import sizes_of
from sweeps import Race, cold, require_correct
from torch.nn.functional import scaled_dot_product_attention

from latentmas_kernels.ops.decode_attention import decode_attention_reference
from latentmas_kernels.ops.triton.decode_attention import SplitWorkspace, decode_attention, num_kv_splits
from latentmas_kernels.ops.triton.kv_table import KVTable
from latentmas_kernels.ops.triton.launch import target_of


def test_decode_attention(race: Race, device: str, shape: str, batch: int, kv: int, dtype: torch.dtype) -> None:
    s, target = sizes_of(shape), target_of(torch.device(device))
    heads, kv_heads, width = s["num_attention_heads"], s["num_key_value_heads"], s["head_dim"]
    stores = cold(device, dtype, 2, batch, kv_heads, kv, width)
    queries = torch.randn(batch, heads, width, device=device).to(dtype)
    lengths = torch.full((batch,), kv, dtype=torch.int32, device=device)
    splits = SplitWorkspace(queries, num_kv_splits(target, batch, kv_heads, dtype.itemsize))
    out = torch.full((batch, heads * width), float("nan"), dtype=dtype, device=device)
    scale = width**-0.5
    ours = [
        partial(
            decode_attention, queries, KVTable.of_layer(*store).tensor(device), 0, kv_heads, lengths, lengths, None, scale,
            splits, out, target=target,
        )
        for store in stores
    ]  # fmt: skip
    # The query heads of a KV head as so many queries: keys and values are read once for all of them.
    grouped = queries.view(batch, kv_heads, heads // kv_heads, width)
    theirs = [partial(scaled_dot_product_attention, grouped, *store) for store in stores]
    ours[0]()
    exact = decode_attention_reference(queries.double(), *stores[0].double(), lengths, scale)
    require_correct(out, theirs[0]().reshape(batch, -1), exact)
    race(
        ours, theirs, moved=stores[0].nbytes + queries.nbytes + out.nbytes,
        kernel="Triton", batch=batch, dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
