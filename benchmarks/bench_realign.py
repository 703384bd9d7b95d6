"""realign, C++ on the CPU and Triton on CUDA, beside the same formula in plain torch: `pytest benchmarks/bench_realign.py`.

In a step W_a is cold: the whole model was read since the last time. So one round sweeps over as many copies of W_a as no
cache holds. The kernel's rounds and torch's alternate. On CUDA both sides replay a CUDA graph of their sweep, which
times the device and not the host's launches. On the CPU the Python of the op is part of the call, as it is in use; the
C++ runs on OpenMP's threads and torch on its own, which are as many.

Without W_a (identity) one call touches a few KB and the numbers say what a call costs, not what memory gives.
"""

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bandwidth import median_ms, synchronize
from torch import Tensor

from latentmas_kernels import native
from latentmas_kernels.ops.realign import realign, realign_reference

BUFFER_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
MOST_CALLS = 512  # in a sweep; at a width of 576 those are 680 MB of weights
ROUNDS = 15
TARGET_NORM = 2.5


@pytest.fixture(scope="module")
def weights(device: str) -> Tensor:
    """The random numbers that all weights are views of."""
    torch.manual_seed(0)
    return torch.randn(BUFFER_BYTES[device] // 4, device=device)


def require_correct(hidden: Tensor, weight: Tensor | None) -> None:
    """At most twice the error of plain torch against float64, and every element of a poisoned output written."""
    y = hidden.double() if weight is None else hidden.double() @ weight.double().T
    want = y * TARGET_NORM / y.norm(dim=-1, keepdim=True)
    ours = realign(hidden, weight, TARGET_NORM, out=torch.full_like(hidden, float("nan")))
    error = (ours.double() - want).norm().item()
    plain = (realign_reference(hidden, weight, TARGET_NORM).double() - want).norm().item()
    limit = 2 * plain + torch.finfo(torch.float32).eps * want.norm().item()
    if not error <= limit:
        pytest.fail(f"wrong result, so no time: error {error:.2e} against float64, allowed are {limit:.2e}")


def sweep_of(op: Callable[..., Tensor], hidden: Tensor, sweep: list[Tensor | None]) -> Callable[[], None]:
    """One call of `op` per weight; on CUDA as a captured graph."""

    def run() -> None:
        for weight in sweep:
            op(hidden, weight, TARGET_NORM)

    if hidden.device.type != "cuda":
        return run
    op(hidden, sweep[0], TARGET_NORM)  # compiles, loads and warms up before the capture
    synchronize(hidden.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@pytest.mark.parametrize("kind", ["weight", "identity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("width", [576, 896, 1024, 2048, 4096])
def test_realign(
    benchmark: Any,
    device: str,
    bandwidth: float,
    weights: Tensor,
    width: int,
    batch: int,
    dtype: torch.dtype,
    kind: str,
) -> None:
    if device == "cpu" and native.extension() is None:
        pytest.skip(native.extension_state())
    sweep: list[Tensor | None] = [None] * MOST_CALLS
    if kind == "weight":
        copies = min(weights.numel() // width**2, MOST_CALLS)
        sweep = list(weights[: copies * width**2].view(copies, width, width))
    hidden = torch.randn(batch, width, device=device).to(dtype)
    for weight in (sweep[0], sweep[-1]):
        require_correct(hidden, weight)

    ours, theirs = sweep_of(realign, hidden, sweep), sweep_of(realign_reference, hidden, sweep)
    torch_ms: list[float] = []

    def torch_round() -> None:
        torch_ms.append(median_ms(theirs, device, repeats=1, warmup=0))

    def round_of_ours() -> None:
        ours()
        synchronize(device)

    benchmark.group = "sweeps of many calls; per call see the last table"
    benchmark.pedantic(round_of_ours, setup=torch_round, rounds=ROUNDS, warmup_rounds=2)
    if benchmark.stats is None:  # --benchmark-disable: checked, not timed
        return
    calls = len(sweep)
    ms = benchmark.stats.stats.median * 1e3 / calls
    reference_ms = statistics.median(torch_ms[-ROUNDS:]) / calls
    moved = 2 * hidden.nbytes + (0 if kind == "identity" else width * width * 4)
    gb_s = moved / ms / 1e6
    benchmark.extra_info.update(
        kernel="Triton" if device == "cuda" else "C++",
        width=width,
        batch=batch,
        dtype=str(dtype).removeprefix("torch."),
        ms=ms,
        gb_s=gb_s,
        bandwidth_gb_s=bandwidth,
        percent_of_bandwidth=100 * gb_s / bandwidth,
        torch_ms=reference_ms,
        faster_than_torch=reference_ms / ms,
    )
