"""rmsnorm in Triton: formula and shapes in latentmas_kernels.ops.rmsnorm. One program per row."""

import triton
import triton.language as tl
from torch import Tensor

from latentmas_kernels.ops.triton.product import wait_for_inputs
from latentmas_kernels.ops.triton.target import Target


@triton.jit
def rmsnorm_kernel(x, gain, out, width, eps, OVERLAP: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    g = tl.load(gain + cols, mask=inside, other=0.0).to(tl.float32)
    if OVERLAP:
        wait_for_inputs()
    values = tl.load(x + row * width + cols, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
    tl.store(out + row * width + cols, (values * scale * g).to(out.dtype.element_ty), mask=inside)


def rmsnorm(x: Tensor, gain: Tensor, eps: float, out: Tensor, *, target: Target) -> None:
    """Launch on contiguous arguments; `out` is written."""
    rows, width = x.shape
    if rows == 0:
        return
    block = triton.next_power_of_2(width)
    rmsnorm_kernel[(rows,)](
        x, gain, out, width, eps,
        OVERLAP=target.overlap, BLOCK=block, num_warps=4 if block <= 4096 else 8, **target.options,
    )  # fmt: skip
