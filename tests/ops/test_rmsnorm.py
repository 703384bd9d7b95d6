"""rmsnorm: the Triton kernel (in the interpreter where there is no GPU) against the torch reference and float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DEVICE, DTYPES, TARGET, assert_as_good_as_torch, integers, normal, poisoned
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from latentmas_kernels.ops.rmsnorm import rmsnorm, rmsnorm_reference
from latentmas_kernels.ops.triton.kv_table import KVTable
from latentmas_kernels.ops.triton.rmsnorm import rmsnorm as kernel
from latentmas_kernels.ops.triton.row_state import RowField

SIZES = [(1, 576), (3, 100), (19, 77), (8, 1000), (5, 1), (2, 33)]
EPS = 1e-5


def exact(x, norm_weight, eps):
    x = x.double()
    return norm_weight.double() * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def inputs(rows, width, dtype, seed=0):
    return normal(rows, width, dtype=dtype, seed=seed), 1 + normal(width, dtype=dtype, seed=seed + 1, scale=0.3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_interpreter_equals_reference_and_writes_its_rows_only(size, dtype):
    x, norm_weight = inputs(*size, dtype)
    board = poisoned(size[0] + 1, size[1], dtype=dtype)
    kernel(x, norm_weight, EPS, board[: size[0]], target=TARGET)
    assert board[size[0] :].isnan().all()
    assert_as_good_as_torch(board[: size[0]], rmsnorm_reference(x, norm_weight, EPS), exact(x, norm_weight, EPS))
    assert torch.equal(rmsnorm(x, norm_weight, EPS), board[: size[0]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_the_norm_of_transformers(dtype):
    x, norm_weight = inputs(3, 100, dtype)
    module = LlamaRMSNorm(100, eps=EPS).to(DEVICE, dtype)
    module.weight.data.copy_(norm_weight)
    assert torch.equal(rmsnorm_reference(x, norm_weight, EPS), module(x))


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 70), st.sampled_from(DTYPES), st.sampled_from([1e-6, 1e-2]), st.integers(0, 99)
)
def test_hypothesis_interpreter_equals_reference(rows, width, dtype, eps, seed):
    x, norm_weight = inputs(rows, width, dtype, seed)
    assert_as_good_as_torch(
        rmsnorm(x, norm_weight, eps), rmsnorm_reference(x, norm_weight, eps), exact(x, norm_weight, eps)
    )


def test_interpreter_rows_are_the_same_alone_and_in_a_batch():
    x, norm_weight = inputs(19, 77, torch.float32)
    together = rmsnorm(x, norm_weight, EPS)
    for row in range(0, 19, 6):
        assert torch.equal(rmsnorm(x[row : row + 1], norm_weight, EPS), together[row : row + 1])


def test_interpreter_zero_stays_zero_nan_stays_in_its_row_and_huge_does_not_overflow():
    x, norm_weight = inputs(4, 40, torch.float16)
    x[0], x[1], x[2] = 0, float("nan"), 60000.0
    out = rmsnorm(x, norm_weight, EPS)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert out[1].isnan().all()
    torch.testing.assert_close(out[2], norm_weight)  # equal elements are 1 after the norm
    assert torch.equal(out[3:], rmsnorm(x[3:], norm_weight, EPS))


@pytest.mark.parametrize("records", [False, True])
def test_interpreter_inside_a_step_rows_that_take_no_part_keep_their_state(records):
    x, norm_weight = inputs(3, 77, torch.float32)
    row_state = torch.zeros(len(RowField), 3, dtype=torch.int32, device=DEVICE)
    row_state[RowField.SLOT], row_state[RowField.STEP] = integers(4, -1, 0), 2
    step_log, states, out = poisoned(3, 3, 77), poisoned(3, 3, 77), poisoned(3, 77)
    buffer = torch.zeros(1, 3, 1, 1, 8, device=DEVICE)
    kv_table = KVTable.of(buffer, buffer, None, step_log, states if records else None).tensor(DEVICE)
    kernel(x, norm_weight, EPS, out, target=TARGET, row_state=row_state, kv_table=kv_table)
    want = rmsnorm(x, norm_weight, EPS)
    assert torch.equal(out[[0, 2]], want[[0, 2]])
    assert out[1].isnan().all()
    assert step_log.isnan().all()
    if records:
        assert torch.equal(states[[0, 2], 1], want[[0, 2]])
        states[[0, 2], 1] = float("nan")
    assert states.isnan().all()


def test_interpreter_takes_strided_rows_and_strided_gains():
    x, norm_weight = inputs(3, 80, torch.float32)
    expected = rmsnorm(x[:, ::2].contiguous(), norm_weight[::2].contiguous(), EPS)
    assert torch.equal(rmsnorm(x[:, ::2], norm_weight[::2], EPS), expected)


def test_empty_batch_interpreter():
    assert rmsnorm(normal(0, 8), normal(8), EPS).shape == (0, 8)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on the device the kernel always runs")
def test_without_the_interpreter_the_reference_runs(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x, norm_weight = inputs(3, 100, torch.float16)
    assert torch.equal(rmsnorm(x, norm_weight, EPS), rmsnorm_reference(x, norm_weight, EPS))


def test_opcheck_interpreter():
    torch.library.opcheck(torch.ops.latentmas.rmsnorm.default, (*inputs(3, 33, torch.float32), EPS))


@pytest.mark.parametrize(
    ("x", "norm_weight", "words"),
    [
        (torch.zeros(4), torch.zeros(4), r"rmsnorm: x must be \[B, D\] and the norm's weight \[D\].*got \[4\] on cpu"),
        (torch.zeros(2, 3, 4), torch.zeros(4), r"got \[2, 3, 4\]"),
        (torch.zeros(2, 4), torch.zeros(5), r"\[2, 4\] on cpu and \[5\] on cpu"),
        (torch.zeros(2, 4), torch.zeros(1, 4), r"and \[1, 4\] on cpu"),
        (torch.zeros(2, 4), torch.zeros(4, device="meta"), "on the same device; .* on meta"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(x, norm_weight, words):
    with pytest.raises(ValueError, match=words):
        rmsnorm(x, norm_weight, EPS)
