"""linear_residual: the Triton kernel (in the interpreter where there is no GPU) against the torch reference and float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DEVICE, DOT_DTYPES, DTYPES, TARGET, TILE_NAMES, TILES, assert_as_good_as_torch, normal, poisoned

from latentmas_kernels.ops.linear_residual import linear_residual, linear_residual_reference
from latentmas_kernels.ops.triton.launch import INTERPRETER
from latentmas_kernels.ops.triton.skinny_gemm import Workspace, skinny_gemm
from latentmas_kernels.ops.triton.tiles import GemmConfig

SIZES = [(1, 576, 96), (3, 100, 70), (19, 77, 65), (5, 1, 3), (2, 33, 1)]


def inputs(rows, width_in, width_out, dtype, seed=0):
    """x, weight, residual, bias."""
    return (
        normal(rows, width_in, dtype=dtype, seed=seed),
        normal(width_out, width_in, dtype=dtype, seed=seed + 1, scale=width_in**-0.5),
        normal(rows, width_out, dtype=dtype, seed=seed + 2),
        normal(width_out, dtype=dtype, seed=seed + 3),
    )


def assert_right(got, x, weight, residual, bias=None):
    b = 0 if bias is None else bias.double()
    want = residual.double() + (x.double() @ weight.double().T + b)
    size = x.double().abs() @ weight.double().abs().T + residual.double().abs()
    assert_as_good_as_torch(got, linear_residual_reference(x, weight, residual, bias), want, size=size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_interpreter_equals_reference(size, dtype):
    x, weight, residual, bias = inputs(*size, dtype)
    before = residual.clone()
    assert_right(linear_residual(x, weight, residual, bias), x, weight, residual, bias)
    assert_right(linear_residual(x, weight, residual), x, weight, residual)
    assert torch.equal(residual, before)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(("rows", "config"), TILES, ids=TILE_NAMES)
def test_interpreter_every_tile_writes_every_element_and_no_other(rows, config, dtype):
    x, weight, residual, bias = inputs(rows, 100, 70, dtype)
    board = poisoned(rows + 1, 75, dtype=dtype)
    out = board[:rows, 2:72]
    skinny_gemm(x, weight, out, bias=bias, residual=residual, target=INTERPRETER, config=config)
    assert_right(out, x, weight, residual, bias)
    assert board[:, :2].isnan().all()
    assert board[:, 72:].isnan().all()
    assert board[rows].isnan().all()


def test_inputs_that_share_memory_with_the_output_are_refused_interpreter():
    """A program reads x and residual where another one, or another of its own threads, may have written out already."""
    stream = normal(3, 2 * 64)
    weight = normal(64, 64)
    apart = {"x": normal(3, 64), "out": normal(3, 64), "residual": normal(3, 64)}
    for name, other in [("residual", stream), ("x", stream), ("residual", stream.view(6, 64)[1:4])]:
        given = apart | {"out": stream[:, :64], name: other[:, :64]}
        with pytest.raises(AssertionError, match=f"{name} shares memory with out"):
            skinny_gemm(given["x"], weight, given["out"], residual=given["residual"], target=INTERPRETER)
    skinny_gemm(apart["x"], weight, apart["out"], residual=apart["residual"], target=INTERPRETER)
    halves = stream.view(-1)[: 6 * 64].view(2, 3, 64)
    skinny_gemm(apart["x"], weight, halves[0], residual=halves[1], target=INTERPRETER)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [INTERPRETER, TARGET], ids=["interpreter", "target"])
def test_interpreter_takes_inputs_of_another_dtype_than_the_weight(target, dtype):
    """W_a is float32 where the hidden states are not."""
    x, weight = normal(3, 100, dtype=dtype), normal(70, 100, seed=1)
    out = poisoned(3, 70)
    skinny_gemm(x, weight, out, target=target)
    exact = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    assert_as_good_as_torch(out, x.float() @ weight.T, exact, size=size)


def test_interpreter_scratch_serves_launch_after_launch():
    rows, config = TILES[1]
    workspace = Workspace(normal(1))
    workspace.reserve(config, rows, 70, gated=False)
    workspace.split_k_partials.fill_(float("nan"))
    x, weight, residual, bias = inputs(rows, 100, 70, torch.float32)
    outs = [poisoned(rows, 70) for _ in range(2)]
    for out in outs:
        skinny_gemm(
            x, weight, out, bias=bias, residual=residual, target=INTERPRETER, config=config, workspace=workspace
        )
        assert not workspace.tile_counters.any()
    assert_right(outs[0], x, weight, residual, bias)
    assert torch.equal(*outs)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 70), st.integers(1, 40), st.sampled_from([torch.float32, torch.float16]),
    st.sampled_from([1, 2, 4]), st.sampled_from([16, 32]), st.integers(1, 4), st.integers(0, 99),
)  # fmt: skip
def test_hypothesis_interpreter_any_tile(rows, width_in, width_out, dtype, block_m, block, split, seed):
    x, weight, residual, bias = inputs(rows, width_in, width_out, dtype, seed)
    config = GemmConfig(block_m, block, 48 - block, split, dot=False, num_warps=4, num_stages=1)
    out = poisoned(rows, width_out, dtype=dtype)
    skinny_gemm(x, weight, out, bias=bias, residual=residual, target=INTERPRETER, config=config)
    assert_right(out, x, weight, residual, bias)


@pytest.mark.parametrize("target", [INTERPRETER, TARGET], ids=["interpreter", "target"])
def test_interpreter_float32_rows_are_the_same_alone_and_in_a_batch(target):
    x, weight, residual, bias = inputs(11, 200, 70, torch.float32)

    def run(rows):
        out = poisoned(*residual[rows].shape)
        skinny_gemm(x[rows], weight, out, bias=bias, residual=residual[rows], target=target)
        return out

    together = run(slice(0, 11))
    for row in range(0, 11, 5):
        assert torch.equal(run(slice(row, row + 1)), together[row : row + 1])


def test_interpreter_rounds_the_sum_once():
    """1 + 2^-11 + 2^-11 in float16 is 1 where every sum is rounded."""
    x = torch.full((1, 1), 2.0**-11, dtype=torch.float16, device=DEVICE)
    one = torch.ones(1, 1, dtype=torch.float16, device=DEVICE)
    assert linear_residual_reference(x, one, one + linear_residual_reference(x, one, 0 * one)).item() == 1
    assert linear_residual(x, one, one, bias=x[0]).item() == 1 + 2**-10


def test_interpreter_takes_strided_rows():
    x, _, residual, _ = inputs(3, 100, 70, torch.float32)
    weight = normal(70, 111, seed=9)[:, 3:103]
    expected = linear_residual(x, weight.contiguous(), residual)
    wide_x, wide_residual = poisoned(3, 200), poisoned(3, 80)
    wide_x[:, ::2], wide_residual[:, 5:75] = x, residual
    assert torch.equal(linear_residual(wide_x[:, ::2], weight, wide_residual[:, 5:75]), expected)


def test_interpreter_nan_stays_in_its_row():
    x, weight, residual, _ = inputs(5, 100, 70, torch.float32)
    clean = linear_residual(x, weight, residual)
    x[2, 7], residual[3, 5] = float("nan"), float("nan")
    out = linear_residual(x, weight, residual)
    assert out[2].isnan().all()
    assert out[3].isnan().nonzero().tolist() == [[5]]
    assert torch.equal(out[[0, 1, 4]], clean[[0, 1, 4]])


def test_empty_batch_interpreter():
    x, weight, residual, _ = inputs(0, 100, 70, torch.float32)
    assert linear_residual(x, weight, residual).shape == (0, 70)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on the device the kernel always runs")
def test_without_the_interpreter_the_reference_runs(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    given = inputs(3, 100, 70, torch.float16)
    assert torch.equal(linear_residual(*given), linear_residual_reference(*given))


def test_opcheck_interpreter():
    torch.library.opcheck(torch.ops.latentmas.linear_residual.default, inputs(2, 33, 10, torch.float32))


@pytest.mark.parametrize(
    ("x", "weight", "residual", "bias", "words"),
    [
        (
            torch.zeros(4),
            torch.zeros(3, 4),
            torch.zeros(2, 3),
            None,
            r"linear_residual: x must be \[B, K\] and residual",
        ),
        (torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(3), None, r"residual \[B, N\] of one dtype"),
        (torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(1, 3), None, r"\[2, 4\] and torch.float32 \[1, 3\]"),
        (torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, 3).half(), None, "and torch.float16"),
        (torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, 5), None, r"must be torch.float32 \[5, 4\]"),
        (torch.zeros(2, 4), torch.zeros(3, 4).half(), torch.zeros(2, 3), None, r"got torch.float16 \[3, 4\]"),
        (torch.zeros(2, 4), torch.zeros(4, 3).T, torch.zeros(2, 3), None, r"with strides \(1, 3\)"),
        (torch.zeros(2, 4), torch.zeros(3, 4, device="meta"), torch.zeros(2, 3), None, "on meta"),
        (torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, 3), torch.zeros(1, 3), r"the bias must be \[3\] on cpu"),
        (torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, 3), torch.zeros(2), r"got \[2\] on cpu"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(x, weight, residual, bias, words):
    with pytest.raises(ValueError, match=words):
        linear_residual(x, weight, residual, bias)


def test_no_columns_interpreter():
    x, weight, residual, _ = inputs(2, 8, 0, torch.float32)
    assert linear_residual(x, weight, residual).shape == (2, 0)
