"""linear_residual: the last product of a sublayer (attention's output, the MLP's down projection) and its residual.

    y = residual + x W^T + bias                   x [B, K], W [N, K], bias [N], residual and y [B, N]

Accumulation is float32; the sum with the residual is rounded once, where plain torch rounds twice.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.ops.rmsnorm_linear import check_linear
from latentmas_kernels.ops.triton.launch import runs_on, target_of
from latentmas_kernels.ops.triton.skinny_gemm import skinny_gemm


def linear_residual_reference(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute the formula in plain torch."""
    return residual + linear(x, weight, bias)


@torch.library.custom_op("latentmas::linear_residual", mutates_args=())
def _linear_residual(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None) -> Tensor:
    if not runs_on(x):
        return linear_residual_reference(x, weight, residual, bias)
    out = torch.empty_like(residual)
    skinny_gemm(x, weight, out, bias=bias, residual=residual, target=target_of(x.device))
    return out


@_linear_residual.register_fake
def _(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty_like(residual)


def linear_residual(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply rows with a weight and add the residual.

    Runs the Triton kernel on CUDA and the torch reference elsewhere.

    Args:
        x: [B, K].
        weight: [N, K] with contiguous rows, in x's dtype.
        residual: [B, N] in x's dtype.
        bias: [N].

    Returns:
        [B, N].

    Raises:
        LatentMASError: where shapes, dtypes or devices do not fit together.
    """
    if x.dim() != 2 or residual.dim() != 2 or len(residual) != len(x) or residual.dtype != x.dtype:
        raise LatentMASError(
            f"linear_residual: x must be [B, K] and residual [B, N] of one dtype; got {x.dtype} {list(x.shape)} and "
            f"{residual.dtype} {list(residual.shape)}"
        )
    check_linear("linear_residual", x, weight, bias, residual.shape[1])
    return _linear_residual(x.contiguous(), weight, residual.contiguous(), bias)
