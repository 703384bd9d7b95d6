"""linear_residual as attention's output and as the MLP's down projection, beside the product and the sum of torch."""

from functools import partial

import pytest
import torch
from shapes import sizes_of
from sweeps import Race, cold, require_correct

from latentmas_kernels.ops.linear_residual import linear_residual_reference
from latentmas_kernels.ops.triton.launch import target_of
from latentmas_kernels.ops.triton.skinny_gemm import Workspace, skinny_gemm
from latentmas_kernels.ops.triton.tiles import tile_for


@pytest.mark.parametrize("part", ["output", "down"])
def test_linear_residual(race: Race, device: str, shape: str, batch: int, dtype: torch.dtype, part: str) -> None:
    s, target = sizes_of(shape), target_of(torch.device(device))
    n = s["hidden_size"]
    k = s["intermediate_size"] if part == "down" else s["num_attention_heads"] * s["head_dim"]
    weights = cold(device, dtype, n, k)
    x, residual = (torch.randn(batch, size, device=device).to(dtype) for size in (k, n))
    out = torch.full_like(residual, float("nan"))
    workspace = Workspace(x)
    workspace.reserve(tile_for(target, batch, n, k, dtype.itemsize), batch, n, gated=False)
    ours = [partial(skinny_gemm, x, w, out, residual=residual, target=target, workspace=workspace) for w in weights]
    theirs = [partial(linear_residual_reference, x, w, residual) for w in weights]
    ours[0]()
    require_correct(out, theirs[0](), linear_residual_reference(x.double(), weights[0].double(), residual.double()))
    race(
        ours, theirs, moved=weights[0].nbytes + x.nbytes + 2 * out.nbytes,
        kernel="Triton", batch=batch, dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
