"""rmsnorm, the final norm of a latent step, beside torch's rms_norm. A few KB: what a launch costs."""

from functools import partial

import torch
from shapes import sizes_of
from sweeps import Race, cold, require_correct
from torch.nn.functional import rms_norm

from latentmas_kernels.ops.triton.launch import target_of
from latentmas_kernels.ops.triton.rmsnorm import rmsnorm

EPS = 1e-6


def test_rmsnorm(race: Race, device: str, shape: str, batch: int, dtype: torch.dtype) -> None:
    width = sizes_of(shape)["hidden_size"]
    inputs, target = cold(device, dtype, batch, width), target_of(torch.device(device))
    gain = torch.randn(width, device=device).to(dtype)
    out = torch.full_like(inputs[0], float("nan"))
    rmsnorm(inputs[0], gain, EPS, out, target=target)
    exact = rms_norm(inputs[0].double(), (width,), gain.double(), EPS)
    require_correct(out, rms_norm(inputs[0], (width,), gain, EPS), exact)
    race(
        [partial(rmsnorm, x, gain, EPS, out, target=target) for x in inputs],
        [partial(rms_norm, x, (width,), gain, EPS) for x in inputs],
        moved=2 * out.nbytes + gain.nbytes, kernel="Triton", batch=batch, dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
