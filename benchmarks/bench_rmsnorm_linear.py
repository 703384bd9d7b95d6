"""rmsnorm_linear as QKV and as lm_head, beside the norm and the product of torch."""

from functools import partial

import pytest
import torch
from shapes import sizes_of
from sweeps import Race, cold, require_correct

from latentmas_kernels.ops.rmsnorm_linear import rmsnorm_linear_reference
from latentmas_kernels.ops.triton.launch import target_of
from latentmas_kernels.ops.triton.skinny_gemm import Workspace, skinny_gemm
from latentmas_kernels.ops.triton.tiles import tile_for

EPS = 1e-6


@pytest.mark.parametrize("part", ["qkv", "lm_head"])
def test_rmsnorm_linear(race: Race, device: str, shape: str, batch: int, dtype: torch.dtype, part: str) -> None:
    s, target = sizes_of(shape), target_of(torch.device(device))
    k = s["hidden_size"]
    n = (
        s["vocab_size"]
        if part == "lm_head"
        else (s["num_attention_heads"] + 2 * s["num_key_value_heads"]) * s["head_dim"]
    )
    weights, out_dtype = cold(device, dtype, n, k), torch.float32 if part == "lm_head" else dtype
    x, gain = (torch.randn(*size, device=device).to(dtype) for size in ((batch, k), (k,)))
    out = torch.full((batch, n), float("nan"), dtype=out_dtype, device=device)
    workspace = Workspace(x)
    workspace.reserve(tile_for(target, batch, n, k, dtype.itemsize), batch, n, gated=False)
    ours = [
        partial(skinny_gemm, x, w, out, norm_weight=gain, eps=EPS, target=target, workspace=workspace) for w in weights
    ]
    theirs = [partial(rmsnorm_linear_reference, x, gain, EPS, w, None, out_dtype) for w in weights]
    ours[0]()
    require_correct(out, theirs[0](), rmsnorm_linear_reference(x.double(), gain.double(), EPS, weights[0].double()))
    race(
        ours, theirs, moved=weights[0].nbytes + x.nbytes + gain.nbytes + out.nbytes,
        kernel="Triton", batch=batch, dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
