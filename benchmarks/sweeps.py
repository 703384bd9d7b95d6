"""What the microbenchmarks of the ops share: cold inputs, the check before the clock, and sweeps of two sides in turns.

In a step every weight is cold: the whole model was read since the last time. So one round of a benchmark sweeps over as
many copies of what an op reads as no cache holds. On CUDA both sides replay a CUDA graph of their sweep, which times the
device and not the host's launches.
"""

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from bandwidth import median_ms, synchronize
from torch import Tensor

from latentmas_kernels.engines.cuda_graphs import CudaGraphs
from latentmas_kernels.ops.triton.launch import interpreted

BUFFER_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
MOST_CALLS = 2 if interpreted() else 512  # in a sweep; a program takes milliseconds in the interpreter
ROUNDS = 1 if interpreted() else 15
Call = Callable[[], Any]


@functools.cache
def _numbers(device: str, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(BUFFER_BYTES[device] // dtype.itemsize, device=device, dtype=dtype)


def cold(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """[copies, *shape] of random numbers: so many copies that no cache holds them, or MOST_CALLS."""
    numbers, size = _numbers(device, dtype), torch.Size(shape).numel()
    copies = max(1, min(numbers.numel() // size, MOST_CALLS))
    if copies * size > numbers.numel():
        raise ValueError(f"one copy of {list(shape)} in {dtype} does not fit into {numbers.nbytes} bytes")
    return numbers[: copies * size].view(copies, *shape)


def require_correct(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """At most twice the error of plain torch in the same dtype against float64, and a bit of float32."""
    error, limit = ((t.double() - exact).norm().item() for t in (ours, plain))
    limit = 2 * limit + torch.finfo(torch.float32).eps * exact.norm().item()
    if not error <= limit:
        pytest.fail(f"wrong result, so no time: error {error:.2e} against float64, allowed are {limit:.2e}")


def sweep_of(calls: Sequence[Call], device: str) -> Call:
    """All calls, one after the other; on CUDA as a captured graph."""

    def run() -> None:
        for call in calls:
            call()

    return CudaGraphs(torch.device(device))(run) if device == "cuda" else run


class Race:
    """Rounds of one op and of plain torch in turns; pytest-benchmark takes the time of the op."""

    def __init__(self, benchmark: Any, device: str, bandwidth: float) -> None:
        self.benchmark, self.device, self.bandwidth = benchmark, device, bandwidth

    def __call__(self, ours: Sequence[Call], theirs: Sequence[Call], *, moved: int, **about: Any) -> None:
        """Both sides are calls of one sweep; `moved` are the bytes that one of them has to read and write."""
        our_sweep, their_sweep = (sweep_of(calls, self.device) for calls in (ours, theirs))
        torch_ms: list[float] = []

        def torch_round() -> None:
            torch_ms.append(median_ms(their_sweep, self.device, repeats=1, warmup=0))

        def round_of_ours() -> None:
            our_sweep()
            synchronize(self.device)

        self.benchmark.group = "sweeps of many calls; per call see the last table"
        self.benchmark.pedantic(round_of_ours, setup=torch_round, rounds=ROUNDS, warmup_rounds=2)
        if self.benchmark.stats is None:  # --benchmark-disable: checked, not timed
            return
        ms = self.benchmark.stats.stats.median * 1e3 / len(ours)
        plain_ms = statistics.median(torch_ms[-ROUNDS:]) / len(theirs)
        gb_s = moved / ms / 1e6
        self.benchmark.extra_info.update(
            **about, ms=ms, gb_s=gb_s, bandwidth_gb_s=self.bandwidth, percent_of_bandwidth=100 * gb_s / self.bandwidth,
            torch_ms=plain_ms, faster_than_torch=plain_ms / ms,
        )  # fmt: skip
