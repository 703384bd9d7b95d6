"""rmsnorm_linear: a norm and the product behind it (QKV, lm_head) in one pass over the weights.

    y = rmsnorm(x, g, eps) W^T + bias             x [B, K], g [K], W [N, K], bias [N], y [B, N]

Accumulation is float32. In the kernel the norm is a factor per row, applied to the sums: x g is rounded only where
tensor cores need the dtype of W (two-byte dtypes from 5 rows on).
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.ops.rmsnorm import check_norm, rmsnorm_reference
from latentmas_kernels.ops.triton.launch import runs_on, target_of
from latentmas_kernels.ops.triton.skinny_gemm import skinny_gemm


def rmsnorm_linear_reference(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute the formula in plain torch."""
    return linear(rmsnorm_reference(x, norm_weight, eps), weight, bias).to(out_dtype or x.dtype)


@torch.library.custom_op("latentmas::rmsnorm_linear", mutates_args=())
def _rmsnorm_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    if not runs_on(x):
        return rmsnorm_linear_reference(x, norm_weight, eps, weight, bias, out_dtype)
    out = x.new_empty(x.shape[0], weight.shape[0], dtype=out_dtype)
    skinny_gemm(x, weight, out, norm_weight=norm_weight, eps=eps, bias=bias, target=target_of(x.device))
    return out


@_rmsnorm_linear.register_fake
def _(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=out_dtype)


def rmsnorm_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalise rows and multiply them with a weight.

    Runs the Triton kernel on CUDA and the torch reference elsewhere.

    Args:
        x: [B, K].
        norm_weight: [K], the weight of the norm. In float16 x * norm_weight must be below 65504.
        eps: added to the mean square.
        weight: [N, K] with contiguous rows, as in `torch.nn.Linear`, in x's dtype.
        bias: [N].
        out_dtype: x's dtype when None; float32 for logits.

    Returns:
        [B, N] in out_dtype.

    Raises:
        LatentMASError: where shapes, dtypes or devices do not fit together.
    """
    check_norm("rmsnorm_linear", x, norm_weight)
    check_linear("rmsnorm_linear", x, weight, bias, weight.shape[0])
    return _rmsnorm_linear(x.contiguous(), norm_weight.contiguous(), eps, weight, bias, out_dtype or x.dtype)


def check_linear(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, n_out: int) -> None:
    """Raise a LatentMASError unless weight [n_out, K] and bias [n_out] fit x [B, K] of a dtype that the kernels have."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise LatentMASError(f"{op}: x must be float32, float16 or bfloat16; got {x.dtype}")
    if (
        weight.dim() != 2
        or list(weight.shape) != [n_out, x.shape[-1]]
        or weight.dtype != x.dtype
        or weight.device != x.device
        or weight.stride(1) != 1
    ):
        raise LatentMASError(
            f"{op}: the weight must be {x.dtype} {[n_out, x.shape[-1]]} on {x.device} with contiguous rows; got "
            f"{weight.dtype} {list(weight.shape)} on {weight.device} with strides {weight.stride()}"
        )
    if bias is not None and (list(bias.shape) != [n_out] or bias.device != x.device or not bias.is_contiguous()):
        raise LatentMASError(f"{op}: the bias must be [{n_out}] on {x.device}; got {list(bias.shape)} on {bias.device}")
