"""realign: C++ on every instruction set, Triton in the interpreter and ahead of time, against the torch reference."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DEVICE, poisoned

from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.extension import extension, extension_state
from latentmas_kernels.ops.realign import realign, realign_reference
from latentmas_kernels.ops.triton.launch import target_of

SIZES = [(1, 576, 576), (3, 100, 130), (19, 77, 64), (8, 960, 1000), (5, 1, 3), (2, 33, 1)]
DTYPES = [torch.float32, torch.bfloat16]
needs_extension = pytest.mark.skipif(extension() is None, reason=extension_state())


def triton_realign(hidden, weight, target_norm, *, out=None):
    from latentmas_kernels.ops.triton.realign import realign as kernel

    width = hidden.shape[1] if weight is None else weight.shape[0]
    out = hidden.new_full((hidden.shape[0], width), float("nan")) if out is None else out
    kernel(hidden, weight, target_norm, out, target=target_of(hidden.device))
    return out


def exact(hidden, weight, target_norm):
    y = hidden.double() if weight is None else hidden.double() @ weight.double().T
    return y * target_norm / y.norm(dim=-1, keepdim=True)


def assert_as_good_as_torch(op, hidden, weight, target_norm, slack=1.0):
    """Error against float64 at most twice that of plain torch in the same dtype, times `slack`; and one bit of grace.

    A bit of the products that are summed: where they cancel, it is more of the sum (hypothesis found two outputs of which
    torch's were right by chance, ours not).
    """
    want = exact(hidden, weight, target_norm)
    plain = (realign_reference(hidden, weight, target_norm).double() - want).norm()
    ours = (op(hidden, weight, target_norm).double() - want).norm()
    y, size = hidden.double(), hidden.double().abs()
    if weight is not None:
        y, size = y @ weight.double().T, size @ weight.double().abs().T
    grace = torch.finfo(torch.float32).eps * target_norm * (size.norm(dim=-1) / y.norm(dim=-1)).norm()
    assert ours <= 2 * slack * plain + grace, f"{ours:.3e} against {plain:.3e} of plain torch"


def inputs(rows, width_in, width_out, dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width_in, generator=draw).to(dtype), torch.randn(width_out, width_in, generator=draw)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@needs_extension
def test_native_equals_reference(size, dtype):
    hidden, weight = inputs(*size, dtype)
    assert_as_good_as_torch(realign, hidden, weight, 2.5)
    assert_as_good_as_torch(realign, hidden, None, 0.7)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512bf16", "amx"])
@needs_extension
def test_every_instruction_set(isa):
    """The tests above once more in a process with LATENTMAS_ISA set to each instruction set."""
    from latentmas_kernels import _C

    if isa not in _C.available_isas().split():
        pytest.skip(f"this processor has {_C.available_isas()}")
    command = [
        sys.executable,
        "-m",
        "pytest",
        __file__,
        "-q",
        "-p",
        "no:xdist",
        "-o",
        "addopts=",
        "-k",
        "native_equals or hypothesis_native",
    ]
    done = subprocess.run(
        command, env={**os.environ, "LATENTMAS_ISA": isa, "LATENTMAS_NUM_THREADS": "2"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


def test_unknown_instruction_set_says_what_there_is():
    if extension() is None:
        pytest.skip(extension_state())
    code = "from latentmas_kernels import extension; extension.extension()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "LATENTMAS_ISA": "sse9"}, capture_output=True, text=True
    )
    assert "LATENTMAS_ISA=sse9 cannot run on this processor; it has:" in done.stderr


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 70), st.sampled_from(DTYPES), st.integers(0, 3))
@needs_extension
def test_hypothesis_native_on_strided_rows_writes_every_element_and_no_other(rows, width_in, width_out, dtype, pad):
    hidden, weight = inputs(rows, width_in + pad, width_out, dtype)
    hidden, weight = hidden[:, :width_in], weight[:, :width_in]
    board = torch.full((rows, width_out + 2 * pad + 1), float("nan"), dtype=dtype)
    out = board[:, pad : pad + width_out]
    assert realign(hidden, weight, 1.5, out=out) is out
    assert out.isfinite().all()
    assert board[:, :pad].isnan().all()
    assert board[:, pad + width_out :].isnan().all()
    assert_as_good_as_torch(realign, hidden, weight, 1.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the device here, not in the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_triton_interpreter_equals_reference(size, dtype):
    # The interpreter truncates when it rounds to bfloat16, which makes up to twice the error of rounding to nearest.
    slack = 2.0 if dtype == torch.bfloat16 else 1.0
    hidden, weight = inputs(*size, dtype)
    assert_as_good_as_torch(triton_realign, hidden, weight, 2.5, slack)
    assert_as_good_as_torch(triton_realign, hidden, None, 0.7, slack)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [*SIZES, (1, 4096, 4096), (16, 5120, 5120)])
def test_triton_device_equals_reference(size, dtype):
    hidden, weight = (t.cuda() for t in inputs(*size, dtype))
    assert_as_good_as_torch(realign, hidden, weight, 2.5)
    assert_as_good_as_torch(realign, hidden, None, 0.7)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton_compiles_ahead_of_time_aot(capability):
    """In a process of its own: where the interpreter is on, nothing compiles. Within a step: see engines/test_cuda_step.py."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "tests/aot.py", str(capability), "realign"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert [k["kernel"] for k in kernels] == ["skinny_gemm_kernel", "rescale_kernel", "rescale_kernel"]
    if capability >= 90:  # rows of W_a are on their way before the product waits for the hidden states
        assert kernels[0]["wide_loads_before_wait"], kernels[0]
    for kernel in kernels:
        assert kernel["STACK"] == kernel["LOCAL"] == 0, kernel
        assert kernel["SHARED"] <= 48 * 1024, kernel


@pytest.mark.parametrize("op", [realign, realign_reference, triton_realign])
def test_zero_stays_zero_and_nan_stays_nan(op):
    hidden = torch.stack([torch.zeros(40), torch.full((40,), float("nan")), torch.ones(40)])
    if torch.cuda.is_available() and op is triton_realign:
        hidden = hidden.cuda()
    out = op(hidden, None, 2.0)
    assert torch.equal(out[0].cpu(), torch.zeros(40))
    assert out[1].isnan().all()
    assert out[2].norm().item() == pytest.approx(2.0)


@pytest.mark.parametrize("with_weight", [True, False])
def test_opcheck(with_weight):
    hidden, weight = (t.to(DEVICE) for t in inputs(3, 40, 24, torch.float32))
    out = poisoned(3, 24 if with_weight else 40)
    torch.library.opcheck(torch.ops.latentmas.realign, (hidden, weight if with_weight else None, 1.5, out))


def test_empty_batch():
    assert realign(torch.zeros(0, 8), None, 1.0).shape == (0, 8)


@pytest.mark.parametrize(
    ("hidden", "weight", "out", "words"),
    [
        (torch.zeros(4), None, None, r"hidden must be floating point \[B, D_in\]"),
        (torch.zeros(2, 4, dtype=torch.int64), None, None, "hidden must be floating point"),
        (torch.zeros(2, 4), torch.zeros(4, 5), None, r"weight must be float32 \[D_out, 4\]"),
        (torch.zeros(2, 4), torch.zeros(4, 4, dtype=torch.bfloat16), None, "weight must be float32"),
        (torch.zeros(2, 4), torch.zeros(4, 6).T, None, "contiguous rows"),
        (torch.zeros(2, 4), None, torch.zeros(2, 5), r"out must be torch.float32 \[2, 4\]"),
        (torch.zeros(2, 4), None, torch.zeros(2, 4).bfloat16(), "out must be torch.float32"),
        (torch.zeros(2, 4), torch.zeros(4, 4, device="meta"), None, "one device"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(hidden, weight, out, words):
    with pytest.raises(ValueError, match=words):
        realign(hidden, weight, 1.0, out=out)


@needs_extension
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden": 1}, "realign: hidden must be a torch tensor; got int"),
        ({"hidden": torch.zeros(1, 4).half()}, r"realign: hidden must be float32 or bfloat16; got float16 \[1, 4\]"),
        (
            {"hidden": torch.zeros(4)},
            r"realign: hidden must be float32 \[any, any\] with contiguous rows; got float32 \[4\]",
        ),
        ({"hidden": torch.zeros(4, 2).T}, r"with contiguous rows; got float32 \[2, 4\] with strides \[1, 2\] on cpu"),
        (
            {"hidden": torch.zeros(7).as_strided((2, 4), (3, 1)), "out": torch.zeros(2, 4)},
            "rows of hidden or out overlap",
        ),
        ({"hidden": torch.zeros(1, 4, device="meta")}, "realign: hidden must be on the CPU; got .* on meta"),
        (
            {"weight": torch.zeros(4, 4).bfloat16()},
            r"realign: weight must be float32 \[any, 4\], contiguous; got bfloat16",
        ),
        ({"weight": torch.zeros(4, 3)}, r"realign: weight must be float32 \[any, 4\]"),
        (
            {"out": torch.zeros(1, 5)},
            r"realign: out must be float32 \[1, 4\] with contiguous rows; got float32 \[1, 5\]",
        ),
        ({"out": None}, "realign: out must be a torch tensor; got NoneType"),
        ({"hidden": torch.zeros(0, 0), "out": torch.zeros(0, 0)}, "realign: rows must not be empty"),
    ],
)
def test_the_border_checks_its_arguments(change, words):
    from latentmas_kernels import _C

    good = {"hidden": torch.zeros(1, 4), "weight": None, "target_norm": 1.0, "out": torch.zeros(1, 4)}
    _C.realign(**good)
    with pytest.raises(LatentMASError, match=words):
        _C.realign(**{**good, **change})


@pytest.mark.parametrize("with_weight", [False, True])
def test_an_output_in_the_memory_of_the_input_is_refused(with_weight):
    """Where rows overlap, one program would store what another one still reads."""
    rows = torch.randn(4, 16)
    weight = torch.eye(16) if with_weight else None
    with pytest.raises(ValueError, match="out shares memory with hidden"):
        realign(rows[:3], weight, 1.0, out=rows[1:])
