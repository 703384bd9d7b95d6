"""gate_up_swiglu, more than half of a step's bytes, beside the norm, the product and the activation of torch."""

from functools import partial

import torch
from shapes import sizes_of
from sweeps import Race, cold, require_correct

from latentmas_kernels.ops.gate_up_swiglu import gate_up_swiglu_reference
from latentmas_kernels.ops.triton.launch import target_of
from latentmas_kernels.ops.triton.skinny_gemm import Workspace, skinny_gemm
from latentmas_kernels.ops.triton.tiles import tile_for

EPS = 1e-6


def test_gate_up_swiglu(race: Race, device: str, shape: str, batch: int, dtype: torch.dtype) -> None:
    s, target = sizes_of(shape), target_of(torch.device(device))
    n, k = s["intermediate_size"], s["hidden_size"]
    weights = cold(device, dtype, 2 * n, k)
    # Small inputs: products of these weights are large, and silu of them would be 0 or the identity.
    x = torch.randn(batch, k, device=device).to(dtype)
    gain = (torch.randn(k, device=device) / k**0.5).to(dtype)
    out = torch.full((batch, n), float("nan"), dtype=dtype, device=device)
    workspace = Workspace(x)
    workspace.reserve(tile_for(target, batch, n, k, dtype.itemsize, gated=True), batch, n, gated=True)
    ours = [
        partial(skinny_gemm, x, w, out, norm_weight=gain, eps=EPS, gated=True, target=target, workspace=workspace)
        for w in weights
    ]
    theirs = [partial(gate_up_swiglu_reference, x, gain, EPS, w) for w in weights]
    ours[0]()
    require_correct(out, theirs[0](), gate_up_swiglu_reference(x.double(), gain.double(), EPS, weights[0].double()))
    race(
        ours, theirs, moved=weights[0].nbytes + x.nbytes + gain.nbytes + out.nbytes,
        kernel="Triton", batch=batch, dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
