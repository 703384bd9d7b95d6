"""gate_up_swiglu: the Triton kernel (in the interpreter where there is no GPU) against the torch reference and float64."""

import pytest
import torch
from numerics import DEVICE, DOT_DTYPES, DTYPES, TARGET, TILE_NAMES, TILES, assert_as_good_as_torch, normal, poisoned

from latentmas_kernels.ops.gate_up_swiglu import gate_up_swiglu, gate_up_swiglu_reference
from latentmas_kernels.ops.triton.launch import INTERPRETER
from latentmas_kernels.ops.triton.skinny_gemm import Workspace, skinny_gemm

SIZES = [(1, 576, 48), (3, 100, 70), (19, 77, 33), (5, 1, 3), (2, 33, 1)]
EPS = 1e-5


def inputs(rows, width_in, width_out, dtype, seed=0):
    """x, norm_weight, weight [2 I, K], bias [2 I]."""
    return (
        normal(rows, width_in, dtype=dtype, seed=seed),
        1 + normal(width_in, dtype=dtype, seed=seed + 1, scale=0.3),
        normal(2 * width_out, width_in, dtype=dtype, seed=seed + 2, scale=width_in**-0.5),
        normal(2 * width_out, dtype=dtype, seed=seed + 3),
    )


def assert_right(got, x, norm_weight, weight, bias=None):
    wide = x.double()
    h = norm_weight.double() * wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()
    b = 0 if bias is None else bias.double()
    gate, up = (h @ weight.double().T + b).chunk(2, dim=-1)
    gate_size, up_size = (h.abs() @ weight.double().abs().T).chunk(2, dim=-1)
    want = gate / (1 + (-gate).exp()) * up
    plain = gate_up_swiglu_reference(x, norm_weight, EPS, weight, bias)
    assert_as_good_as_torch(got, plain, want, size=gate_size * up.abs() + up_size * gate.abs())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_interpreter_equals_reference(size, dtype):
    x, norm_weight, weight, bias = inputs(*size, dtype)
    assert_right(gate_up_swiglu(x, norm_weight, EPS, weight, bias), x, norm_weight, weight, bias)
    assert_right(gate_up_swiglu(x, norm_weight, EPS, weight), x, norm_weight, weight)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(("rows", "config"), TILES, ids=TILE_NAMES)
def test_interpreter_every_tile_writes_every_element_and_no_other(rows, config, dtype):
    """The rows of the gate's last block end where those of the up projection begin."""
    width_out = 41
    x, norm_weight, weight, bias = inputs(rows, 100, width_out, dtype)
    board = poisoned(rows + 1, width_out + 5, dtype=dtype)
    out = board[:rows, 2 : 2 + width_out]
    skinny_gemm(
        x, weight, out, norm_weight=norm_weight, eps=EPS, bias=bias, gated=True, target=INTERPRETER, config=config
    )
    assert_right(out, x, norm_weight, weight, bias)
    assert board[:, :2].isnan().all()
    assert board[:, 2 + width_out :].isnan().all()
    assert board[rows].isnan().all()


def test_interpreter_scratch_serves_launch_after_launch():
    """Also a product that is not gated after one that is: both use the same buffers."""
    rows, config = TILES[5]
    workspace = Workspace(normal(1))
    workspace.reserve(config, rows, 70, gated=True)
    workspace.split_k_partials.fill_(float("nan"))
    x, norm_weight, weight, bias = inputs(rows, 100, 70, torch.float32)
    options = {
        "norm_weight": norm_weight,
        "eps": EPS,
        "bias": bias,
        "target": INTERPRETER,
        "config": config,
        "workspace": workspace,
    }
    pairs = [poisoned(rows, 70) for _ in range(2)]
    for out in pairs:
        skinny_gemm(x, weight, out, gated=True, **options)
        assert not workspace.tile_counters.any()
        single = poisoned(rows, 70)
        skinny_gemm(x, weight[:70], single, **options)
        assert not workspace.tile_counters.any()
        assert single.isfinite().all()
    assert_right(pairs[0], x, norm_weight, weight, bias)
    assert torch.equal(*pairs)


@pytest.mark.parametrize("target", [INTERPRETER, TARGET], ids=["interpreter", "target"])
def test_interpreter_float32_rows_are_the_same_alone_and_in_a_batch(target):
    x, norm_weight, weight, bias = inputs(11, 150, 40, torch.float32)

    def run(rows):
        out = poisoned(len(rows), 40)
        skinny_gemm(rows, weight, out, norm_weight=norm_weight, eps=EPS, bias=bias, gated=True, target=target)
        return out

    together = run(x)
    for row in range(0, 11, 5):
        assert torch.equal(run(x[row : row + 1]), together[row : row + 1])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_interpreter_gates_far_from_zero(dtype):
    """silu of -200 is 0 and of 200 is 200, whatever exp does on the way."""
    x = torch.ones(1, 16, dtype=dtype, device=DEVICE)
    weight = torch.zeros(4, 16, dtype=dtype, device=DEVICE)
    bias = torch.tensor([-200.0, 200.0, 3.0, 3.0], dtype=dtype, device=DEVICE)
    assert gate_up_swiglu(x, x[0], EPS, weight, bias).tolist() == [[0.0, 600.0]]


def test_interpreter_nan_stays_in_its_row():
    x, norm_weight, weight, _ = inputs(5, 100, 33, torch.float32)
    clean = gate_up_swiglu(x, norm_weight, EPS, weight)
    x[2, 7] = float("nan")
    out = gate_up_swiglu(x, norm_weight, EPS, weight)
    assert out[2].isnan().all()
    assert torch.equal(out[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_interpreter_takes_weights_of_strided_rows():
    x, norm_weight, _, bias = inputs(3, 100, 35, torch.float32)
    weight = normal(70, 111, seed=9)[:, 3:103]
    expected = gate_up_swiglu(x, norm_weight, EPS, weight.contiguous(), bias)
    assert torch.equal(gate_up_swiglu(x, norm_weight, EPS, weight, bias), expected)


def test_empty_batch_interpreter():
    x, norm_weight, weight, _ = inputs(0, 100, 33, torch.float32)
    assert gate_up_swiglu(x, norm_weight, EPS, weight).shape == (0, 33)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on the device the kernel always runs")
def test_without_the_interpreter_the_reference_runs(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x, norm_weight, weight, bias = inputs(3, 100, 33, torch.float16)
    expected = gate_up_swiglu_reference(x, norm_weight, EPS, weight, bias)
    assert torch.equal(gate_up_swiglu(x, norm_weight, EPS, weight, bias), expected)


def test_opcheck_interpreter():
    x, norm_weight, weight, bias = inputs(2, 33, 10, torch.float32)
    torch.library.opcheck(torch.ops.latentmas.gate_up_swiglu.default, (x, norm_weight, EPS, weight, bias))


@pytest.mark.parametrize(
    ("x", "norm_weight", "weight", "bias", "words"),
    [
        (torch.zeros(4), torch.zeros(4), torch.zeros(6, 4), None, r"gate_up_swiglu: x must be \[B, D\]"),
        (torch.zeros(2, 4), torch.zeros(3), torch.zeros(6, 4), None, r"norm's weight \[D\]"),
        (torch.zeros(2, 4), torch.zeros(4), torch.zeros(5, 4), None, "an even number of rows; got 5"),
        (torch.zeros(2, 4), torch.zeros(4), torch.zeros(6, 5), None, r"must be torch.float32 \[6, 4\]"),
        (torch.zeros(2, 4), torch.zeros(4), torch.zeros(6, 4).half(), None, r"got torch.float16 \[6, 4\]"),
        (torch.zeros(2, 4), torch.zeros(4), torch.zeros(4, 6).T, None, r"with strides \(1, 6\)"),
        (torch.zeros(2, 4), torch.zeros(4), torch.zeros(6, 4, device="meta"), None, "on meta"),
        (
            torch.zeros(2, 4),
            torch.zeros(4),
            torch.zeros(6, 4),
            torch.zeros(3),
            r"the bias must be \[6\] on cpu; got \[3\]",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(x, norm_weight, weight, bias, words):
    with pytest.raises(ValueError, match=words):
        gate_up_swiglu(x, norm_weight, EPS, weight, bias)
