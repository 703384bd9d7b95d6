"""rmsnorm_linear: the Triton kernel (in the interpreter where there is no GPU) against the torch reference and float64."""

import pytest
import torch
from numerics import DEVICE, DOT_DTYPES, DTYPES, TARGET, TILE_NAMES, TILES, assert_as_good_as_torch, normal, poisoned

from latentmas_kernels.ops.rmsnorm_linear import rmsnorm_linear, rmsnorm_linear_reference
from latentmas_kernels.ops.triton.launch import INTERPRETER
from latentmas_kernels.ops.triton.skinny_gemm import Workspace, skinny_gemm

SIZES = [(1, 576, 96), (3, 100, 70), (19, 77, 65), (5, 1, 3), (2, 33, 1)]
EPS = 1e-5


def inputs(rows, width_in, width_out, dtype, seed=0):
    """x, norm_weight, weight, bias."""
    return (
        normal(rows, width_in, dtype=dtype, seed=seed),
        1 + normal(width_in, dtype=dtype, seed=seed + 1, scale=0.3),
        normal(width_out, width_in, dtype=dtype, seed=seed + 2, scale=width_in**-0.5),
        normal(width_out, dtype=dtype, seed=seed + 3),
    )


def exact(x, norm_weight, weight, bias=None):
    """In float64, and the sum of the magnitudes."""
    x = x.double()
    h = norm_weight.double() * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    b = 0 if bias is None else bias.double()
    return h @ weight.double().T + b, h.abs() @ weight.double().abs().T


def assert_right(got, x, norm_weight, weight, bias=None):
    want, size = exact(x, norm_weight, weight, bias)
    plain = rmsnorm_linear_reference(x, norm_weight, EPS, weight, bias, got.dtype)
    assert_as_good_as_torch(got, plain, want, size=size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_interpreter_equals_reference(size, dtype):
    x, norm_weight, weight, bias = inputs(*size, dtype)
    assert_right(rmsnorm_linear(x, norm_weight, EPS, weight, bias), x, norm_weight, weight, bias)
    assert_right(rmsnorm_linear(x, norm_weight, EPS, weight), x, norm_weight, weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_interpreter_gives_logits_in_float32(dtype):
    """They carry what a cast to the dtype of the weights would lose."""
    x, norm_weight, weight, _ = inputs(3, 100, 70, dtype)
    out = rmsnorm_linear(x, norm_weight, EPS, weight, out_dtype=torch.float32)
    assert out.dtype == torch.float32
    assert_right(out, x, norm_weight, weight)
    assert not torch.equal(out, out.to(dtype).float())


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(("rows", "config"), TILES, ids=TILE_NAMES)
def test_interpreter_every_tile_writes_every_element_and_no_other(rows, config, dtype):
    width_out = 70
    x, norm_weight, weight, bias = inputs(rows, 100, width_out, dtype)
    board = poisoned(rows + 1, width_out + 5, dtype=dtype)
    out = board[:rows, 2 : 2 + width_out]
    skinny_gemm(x, weight, out, norm_weight=norm_weight, eps=EPS, bias=bias, target=INTERPRETER, config=config)
    assert_right(out, x, norm_weight, weight, bias)
    assert board[:, :2].isnan().all()
    assert board[:, 2 + width_out :].isnan().all()
    assert board[rows].isnan().all()


@pytest.mark.parametrize(("rows", "config"), [TILES[2], TILES[4]], ids=[TILE_NAMES[2], TILE_NAMES[4]])
def test_interpreter_scratch_serves_launch_after_launch(rows, config):
    """The counters are 0 again after each, also where the second product needs fewer of them than the first."""
    workspace = Workspace(normal(1))
    workspace.reserve(config, rows, 70, gated=False)
    workspace.split_k_partials.fill_(float("nan"))
    for size in [(rows, 77, 70), (rows, 77, 70), (3, 40, 33)]:
        x, norm_weight, weight, bias = inputs(*size, torch.float32, seed=size[0])
        out = poisoned(size[0], size[2])
        skinny_gemm(
            x,
            weight,
            out,
            norm_weight=norm_weight,
            eps=EPS,
            bias=bias,
            target=INTERPRETER,
            config=config,
            workspace=workspace,
        )
        assert_right(out, x, norm_weight, weight, bias)
        assert not workspace.tile_counters.any()


def test_scratch_must_have_been_reserved_interpreter():
    x, norm_weight, weight, _ = inputs(3, 100, 70, torch.float32)
    with pytest.raises(AssertionError, match=r"reserve\(\) comes first"):
        skinny_gemm(
            x,
            weight,
            poisoned(3, 70),
            norm_weight=norm_weight,
            target=INTERPRETER,
            config=TILES[1][1],
            workspace=Workspace(x),
        )


@pytest.mark.parametrize("target", [INTERPRETER, TARGET], ids=["interpreter", "target"])
def test_interpreter_float32_rows_are_the_same_alone_and_in_a_batch(target):
    x, norm_weight, weight, bias = inputs(19, 200, 70, torch.float32)

    def run(rows):
        out = poisoned(len(rows), 70)
        skinny_gemm(rows, weight, out, norm_weight=norm_weight, eps=EPS, bias=bias, target=target)
        return out

    together = run(x)
    for row in range(0, 19, 6):
        assert torch.equal(run(x[row : row + 1]), together[row : row + 1])
    assert torch.equal(run(x[:3]), together[:3])


def test_interpreter_takes_weights_of_strided_rows():
    x, norm_weight, _, bias = inputs(3, 100, 70, torch.float32)
    weight = normal(70, 111, seed=9)[:, 3:103]
    assert torch.equal(
        rmsnorm_linear(x, norm_weight, EPS, weight, bias),
        rmsnorm_linear(x, norm_weight, EPS, weight.contiguous(), bias),
    )


def test_interpreter_nan_stays_in_its_row():
    x, norm_weight, weight, _ = inputs(5, 100, 70, torch.float32)
    clean = rmsnorm_linear(x, norm_weight, EPS, weight)
    x[2, 7] = float("nan")
    out = rmsnorm_linear(x, norm_weight, EPS, weight)
    assert out[2].isnan().all()
    assert torch.equal(out[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize(("rows", "width_out"), [(0, 70), (3, 0), (0, 0)])
def test_empty_products_interpreter(rows, width_out):
    x, norm_weight, weight, _ = inputs(rows, 100, width_out, torch.float32)
    assert rmsnorm_linear(x, norm_weight, EPS, weight).shape == (rows, width_out)


def test_float64_is_refused():
    x, norm_weight, weight, _ = inputs(2, 100, 70, torch.float64)
    with pytest.raises(ValueError, match=r"x must be float32, float16 or bfloat16; got torch.float64"):
        rmsnorm_linear(x, norm_weight, EPS, weight)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on the device the kernel always runs")
def test_without_the_interpreter_the_reference_runs(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x, norm_weight, weight, bias = inputs(3, 100, 70, torch.float16)
    expected = rmsnorm_linear_reference(x, norm_weight, EPS, weight, bias)
    assert torch.equal(rmsnorm_linear(x, norm_weight, EPS, weight, bias), expected)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16])
def test_opcheck_interpreter(out_dtype):
    x, norm_weight, weight, bias = inputs(2, 33, 10, torch.float16)
    torch.library.opcheck(torch.ops.latentmas.rmsnorm_linear.default, (x, norm_weight, EPS, weight, bias, out_dtype))


@pytest.mark.parametrize(
    ("x", "norm_weight", "weight", "bias", "words"),
    [
        (torch.zeros(4), torch.zeros(4), torch.zeros(3, 4), None, r"rmsnorm_linear: x must be \[B, D\]"),
        (torch.zeros(2, 4), torch.zeros(5), torch.zeros(3, 4), None, r"norm's weight \[D\] on the same device"),
        (torch.zeros(2, 4), torch.zeros(4), torch.zeros(3, 5), None, r"must be torch.float32 \[3, 4\] on cpu"),
        (torch.zeros(2, 4), torch.zeros(4), torch.zeros(4), None, r"must be torch.float32 \[4, 4\]"),
        (torch.zeros(2, 4), torch.zeros(4), torch.zeros(3, 4).half(), None, r"got torch.float16 \[3, 4\]"),
        (torch.zeros(2, 4), torch.zeros(4), torch.zeros(4, 3).T, None, r"with contiguous rows; .* strides \(1, 3\)"),
        (torch.zeros(2, 4), torch.zeros(4), torch.zeros(3, 4, device="meta"), None, "on meta"),
        (torch.zeros(2, 4), torch.zeros(4), torch.zeros(3, 4), torch.zeros(4), r"the bias must be \[3\] on cpu"),
        (torch.zeros(2, 4), torch.zeros(4), torch.zeros(3, 4), torch.zeros(6)[::2], "the bias must be"),
        (torch.zeros(2, 4), torch.zeros(4), torch.zeros(3, 4), torch.zeros(3, device="meta"), r"got \[3\] on meta"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(x, norm_weight, weight, bias, words):
    with pytest.raises(ValueError, match=words):
        rmsnorm_linear(x, norm_weight, EPS, weight, bias)
