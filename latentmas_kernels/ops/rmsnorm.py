"""rmsnorm: the norm of Llama, Qwen and Mistral decoders.

    y[b] = g * cast(x[b] / sqrt(mean(x[b]^2) + eps))          x [B, D], g [D], y [B, D] in x's dtype

The mean is float32. The reference casts before the product with g, as transformers does; the kernel casts last.
"""

import torch
from torch import Tensor

from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.ops.triton.launch import runs_on, target_of
from latentmas_kernels.ops.triton.rmsnorm import rmsnorm as rmsnorm_kernel


def rmsnorm_reference(x: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
    """Compute the formula in plain torch."""
    scale = x.float().square().mean(-1, keepdim=True).add(eps).rsqrt()
    return norm_weight * (x.float() * scale).to(x.dtype)


@torch.library.custom_op("latentmas::rmsnorm", mutates_args=())
def _rmsnorm(x: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
    if not runs_on(x):
        return rmsnorm_reference(x, norm_weight, eps)
    out = torch.empty_like(x)
    rmsnorm_kernel(x, norm_weight, eps, out, target=target_of(x.device))
    return out


@_rmsnorm.register_fake
def _(x: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


def rmsnorm(x: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
    """Normalise rows.

    Runs the Triton kernel on CUDA and the torch reference elsewhere.

    Args:
        x: [B, D], rows contiguous.
        norm_weight: [D], the weight of the norm.
        eps: added to the mean square.

    Returns:
        [B, D] in x's dtype.

    Raises:
        LatentMASError: where the shapes do not fit together.
    """
    check_norm("rmsnorm", x, norm_weight)
    return _rmsnorm(x.contiguous(), norm_weight.contiguous(), eps)


def check_norm(op: str, x: Tensor, norm_weight: Tensor) -> None:
    """Raise a LatentMASError unless the weight of a norm fits x [B, D]."""
    if x.dim() != 2 or list(norm_weight.shape) != [x.shape[1]] or norm_weight.device != x.device:
        raise LatentMASError(
            f"{op}: x must be [B, D] and the norm's weight [D] on the same device; got {list(x.shape)} on {x.device} and "
            f"{list(norm_weight.shape)} on {norm_weight.device}"
        )
