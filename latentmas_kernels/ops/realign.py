"""realign: the hidden state of one step becomes the input embedding of the next (LatentMAS, section 3.1).

    y = W_a^T h                                       the product is skipped where W_a is the identity
    e = y * target_norm / max(|y|_2, 1e-12)           target_norm: the mean row norm of the input embeddings

Accumulation, norm and rescale are float32 on every path; the cast to the output's dtype comes last. `weight` is W_a
transposed, [D_out, D_in], so that one output element reads one contiguous row, as in `torch.nn.Linear`. It stays
float32 whatever the model's dtype: up to four rows it is 0.5 % of the bytes of a latent step (67 MB of 14 GB at 8B), of
which bfloat16 would save half, and that would raise the error of an embedding in bfloat16 from 1.6e-3 to 2.3e-3
(benchmarks/LOG.md).
"""

import torch
from torch import Tensor

from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.extension import extension
from latentmas_kernels.ops.triton.launch import target_of
from latentmas_kernels.ops.triton.realign import realign as realign_kernel
from latentmas_kernels.ops.triton.skinny_gemm import share_memory

MIN_NORM = 1e-12
"""Smallest divisor of the rescale: a zero vector stays zero. csrc/cpu/kernels.h and ops/triton/realign.py have it as well."""


def realign_reference(hidden: Tensor, weight: Tensor | None, target_norm: float) -> Tensor:
    """Compute the formula in plain torch: the specification of `realign`, for tests and for devices without a kernel."""
    y = hidden.float()
    if weight is not None:
        y = y @ weight.T
    scale = target_norm / y.norm(dim=-1, keepdim=True).clamp_min(MIN_NORM)
    return (y * scale).to(hidden.dtype)


@torch.library.custom_op("latentmas::realign", mutates_args=("out",))
def _realign(hidden: Tensor, weight: Tensor | None, target_norm: float, out: Tensor) -> None:
    if share_memory(hidden, out):
        raise LatentMASError(
            "realign: out shares memory with hidden, which other rows still read; pass a tensor of its own"
        )
    if hidden.device.type == "cuda":
        realign_kernel(hidden, weight, target_norm, out, target=target_of(hidden.device))
    elif hidden.device.type == "cpu" and extension() and hidden.dtype in (torch.float32, torch.bfloat16):
        extension().realign(
            hidden=hidden, weight=None if weight is None else weight.contiguous(), target_norm=target_norm, out=out
        )
    else:
        out.copy_(realign_reference(hidden, weight, target_norm))


@_realign.register_fake
def _(hidden: Tensor, weight: Tensor | None, target_norm: float, out: Tensor) -> None:
    return None


def realign(hidden: Tensor, weight: Tensor | None, target_norm: float, *, out: Tensor | None = None) -> Tensor:
    """Map hidden states to input embeddings and rescale them to the embeddings' mean norm.

    Runs the C++ kernel on the CPU (float32, bfloat16), the Triton kernel on CUDA (float32, bfloat16, float16), and
    plain torch elsewhere.

    Args:
        hidden: [B, D_in], the states after the final norm.
        weight: float32 [D_out, D_in], W_a transposed, on the same device; None is the identity.
        target_norm: the norm of every output row.
        out: [B, D_out] of hidden's dtype, modified and returned; its rows may be strided. No memory of hidden's. Allocated when
            None.

    Returns:
        [B, D_out] in hidden's dtype.

    Raises:
        LatentMASError: where shapes, dtypes or devices do not fit together.
    """
    width = check(hidden, weight, out)
    if hidden.stride(-1) != 1:
        hidden = hidden.contiguous()
    if out is None:
        out = hidden.new_empty(hidden.shape[0], width)
    _realign(hidden, weight, target_norm, out)
    return out


def check(hidden: Tensor, weight: Tensor | None, out: Tensor | None) -> int:
    """Check that the arguments fit together, and return the width of the output."""
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise LatentMASError(
            f"realign: hidden must be floating point [B, D_in]; got {hidden.dtype} {list(hidden.shape)}"
        )
    width = hidden.shape[1]
    if weight is not None:
        if weight.dtype != torch.float32 or weight.dim() != 2 or weight.shape[1] != width or weight.stride(1) != 1:
            raise LatentMASError(
                f"realign: weight must be float32 [D_out, {width}] with contiguous rows; "
                f"got {weight.dtype} {list(weight.shape)} with strides {weight.stride()}"
            )
        width = weight.shape[0]
    if out is not None and (
        list(out.shape) != [hidden.shape[0], width] or out.dtype != hidden.dtype or out.stride(1) != 1
    ):
        raise LatentMASError(
            f"realign: out must be {hidden.dtype} {[hidden.shape[0], width]} with contiguous rows; "
            f"got {out.dtype} {list(out.shape)} with strides {out.stride()}"
        )
    devices = {t.device for t in (hidden, weight, out) if t is not None}
    if len(devices) > 1:
        raise LatentMASError(f"realign: all tensors must be on one device; got {sorted(map(str, devices))}")
    return width
