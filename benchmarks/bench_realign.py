"""realign, C++ on the CPU and Triton on CUDA, beside the same formula in plain torch: `pytest benchmarks/bench_realign.py`.

On the CPU the Python of the op is part of the call, as it is in use; the C++ runs on OpenMP's threads and torch on its
own, which are as many. Without W_a (identity) one call touches a few KB and the numbers say what a call costs, not what
memory gives.
"""

from functools import partial

import pytest
import torch
from sweeps import MOST_CALLS, Race, cold, require_correct
from torch import Tensor

from latentmas_kernels.extension import extension, extension_state
from latentmas_kernels.ops.realign import realign, realign_reference

TARGET_NORM = 2.5


def check(hidden: Tensor, weight: Tensor | None) -> None:
    y = hidden.double() if weight is None else hidden.double() @ weight.double().T
    require_correct(
        realign(hidden, weight, TARGET_NORM, out=torch.full_like(hidden, float("nan"))),
        realign_reference(hidden, weight, TARGET_NORM),
        y * TARGET_NORM / y.norm(dim=-1, keepdim=True),
    )


@pytest.mark.parametrize("kind", ["weight", "identity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("width", [576, 896, 1024, 2048, 4096])
def test_realign(race: Race, device: str, width: int, rows: int, dtype: torch.dtype, kind: str) -> None:
    if device == "cpu" and extension() is None:
        pytest.skip(extension_state())
    weights: list[Tensor | None] = [None] * MOST_CALLS
    if kind == "weight":
        weights = list(cold(device, torch.float32, width, width))
    hidden = torch.randn(rows, width, device=device).to(dtype)
    for weight in (weights[0], weights[-1]):
        check(hidden, weight)
    race(
        *([partial(op, hidden, weight, TARGET_NORM) for weight in weights] for op in (realign, realign_reference)),
        moved=2 * hidden.nbytes + (0 if kind == "identity" else width * width * 4),
        kernel="Triton" if device == "cuda" else "C++", batch=rows, dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
