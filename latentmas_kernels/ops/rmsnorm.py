"""rmsnorm: the norm of Llama, Qwen and Mistral decoders.

    y[b] = g * cast(x[b] / sqrt(mean(x[b]^2) + eps))          x [B, D], g [D], y [B, D] in x's dtype

The mean is float32. The reference casts before the product with g, as transformers does; the kernel casts last.
"""

import torch
from torch import Tensor

from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.ops.triton.launch import runs_on, target_of


def rmsnorm_reference(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    scale = x.float().square().mean(-1, keepdim=True).add(eps).rsqrt()
    return gain * (x.float() * scale).to(x.dtype)


@torch.library.custom_op("latentmas::rmsnorm", mutates_args=())
def _rmsnorm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    if not runs_on(x):
        return rmsnorm_reference(x, gain, eps)
    from latentmas_kernels.ops.triton.rmsnorm import rmsnorm as kernel

    out = torch.empty_like(x)
    kernel(x, gain, eps, out, target=target_of(x.device))
    return out


@_rmsnorm.register_fake
def _(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


def rmsnorm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Normalise rows.

    Args:
        x: [B, D], rows contiguous.
        gain: [D], the weight of the norm.
        eps: added to the mean square.

    Raises:
        ValueError: where the shapes do not fit together.
    """
    check_norm("rmsnorm", x, gain)
    return _rmsnorm(x.contiguous(), gain.contiguous(), eps)


def check_norm(op: str, x: Tensor, gain: Tensor) -> None:
    if x.dim() != 2 or list(gain.shape) != [x.shape[1]] or gain.device != x.device:
        raise LatentMASError(
            f"{op}: x must be [B, D] and the norm's weight [D] on the same device; got {list(x.shape)} on {x.device} and "
            f"{list(gain.shape)} on {gain.device}"
        )
