"""skinny_gemm as compiled: every tile, gated or not, norms, biases, residuals; sums of K in parts; launches in a row."""

from itertools import pairwise

import pytest
import torch
from launches import Recording, gpu
from numerics import DTYPES, TILE_NAMES, TILES, normal, poisoned
from ops import test_gate_up_swiglu, test_linear_residual, test_rmsnorm_linear

from latentmas_kernels.ops.triton.skinny_gemm import Workspace, skinny_gemm
from latentmas_kernels.ops.triton.tiles import GemmConfig, default_tile

EPS = 1e-5
LARGE_TILE = (40, GemmConfig(64, 16, 64, 2, dot=True, num_warps=4, num_stages=4))  # wgmma, on sm_90


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "config"), [*TILES, LARGE_TILE], ids=[*TILE_NAMES, "rows40-split2-wgmma"])
@pytest.mark.parametrize("capability", [90, 80])
def test_every_tile_writes_every_element_and_no_other(capability, rows, config, dtype):
    width_out = 70
    x, norm_weight, weight, bias = test_rmsnorm_linear.inputs(rows, 100, width_out, dtype)
    board = poisoned(rows + 1, width_out + 5, dtype=dtype)
    out = board[:rows, 2 : 2 + width_out]
    with Recording(capability) as recording:
        skinny_gemm(x, weight, out, norm_weight=norm_weight, eps=EPS, bias=bias, target=gpu(capability), config=config)
    recording.run_seeds(2)
    test_rmsnorm_linear.assert_right(out, x, norm_weight, weight, bias)
    assert board[:, :2].isnan().all()
    assert board[:, 2 + width_out :].isnan().all()
    assert board[rows].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", test_rmsnorm_linear.SIZES)
@pytest.mark.parametrize("multiprocessors", [4, 132])
def test_default_tiles(multiprocessors, size, dtype):
    """Also of one row, one input, one output: Triton makes constants of sizes of 1."""
    rows, width_in, width_out = size
    x, norm_weight, weight, bias = test_rmsnorm_linear.inputs(*size, dtype)
    target, out = gpu(90, multiprocessors), poisoned(rows, width_out, dtype=dtype)
    config = default_tile(target, rows, width_out, width_in, x.element_size())
    with Recording(90) as recording:
        skinny_gemm(x, weight, out, norm_weight=norm_weight, eps=EPS, bias=bias, target=target, config=config)
    recording.run_seeds(2)
    test_rmsnorm_linear.assert_right(out, x, norm_weight, weight, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [(1, 576, 48), (3, 100, 70), (8, 260, 33)])
def test_gated(size, dtype):
    x, norm_weight, weight, bias = test_gate_up_swiglu.inputs(*size, dtype)
    out = poisoned(size[0], size[2], dtype=dtype)
    with Recording(90) as recording:
        skinny_gemm(x, weight, out, norm_weight=norm_weight, eps=EPS, bias=bias, gated=True, target=gpu(90))
    recording.run_seeds(2)
    test_gate_up_swiglu.assert_right(out, x, norm_weight, weight, bias)


@pytest.mark.parametrize("size", [(1, 576, 48), (3, 520, 33), (16, 300, 64)])
def test_residual(size):
    x, weight, residual, bias = test_linear_residual.inputs(*size, torch.bfloat16)
    out = poisoned(size[0], size[2], dtype=torch.bfloat16)
    with Recording(90) as recording:
        skinny_gemm(x, weight, out, bias=bias, residual=residual, target=gpu(90))
    recording.run_seeds(3)
    test_linear_residual.assert_right(out, x, weight, residual, bias)


@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("rows", [1, 3])
def test_launches_in_a_row_share_a_workspace(rows, split):
    """Each reads what the one before wrote, and starts while that one ends."""
    config = GemmConfig(4, 8, 64, split, dot=False, num_warps=4, num_stages=1)
    widths, dtype = [512, 40, 264, 24], torch.bfloat16
    states = [normal(rows, widths[0], dtype=dtype), *[poisoned(rows, width, dtype=dtype) for width in widths[1:]]]
    weights = [normal(n, k, dtype=dtype, seed=k, scale=k**-0.5) for k, n in pairwise(widths)]
    workspace = Workspace(states[0])
    workspace.reserve(config, rows, max(widths), gated=False)
    workspace.split_k_partials.fill_(float("nan"))
    with Recording(90) as recording:
        for x, weight, out in zip(states[:-1], weights, states[1:], strict=True):
            skinny_gemm(x, weight, out, target=gpu(90), workspace=workspace, config=config)
    recording.run_seeds(4)
    for x, weight, out in zip(states[:-1], weights, states[1:], strict=True):
        residual = torch.zeros_like(out)
        test_linear_residual.assert_right(out, x, weight, residual)
    assert not workspace.tile_counters.any()
