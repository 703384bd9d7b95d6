"""gate_up_swiglu: the first half of a gated MLP, with the norm before it.

    h = rmsnorm(x, g, eps)                        x [B, K], g [K]
    y = silu(h W_gate^T + b_gate) * (h W_up^T + b_up)              W = [W_gate; W_up] [2 I, K], bias [2 I], y [B, I]

Accumulation, silu and the product are float32; the cast to x's dtype comes last. silu(z) = z / (1 + exp(-z)).
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.ops.rmsnorm import check_norm
from latentmas_kernels.ops.rmsnorm_linear import check_linear, rmsnorm_linear_reference
from latentmas_kernels.ops.triton.launch import runs_on, target_of
from latentmas_kernels.ops.triton.skinny_gemm import skinny_gemm


def gate_up_swiglu_reference(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Compute the formula in plain torch."""
    gate, up = rmsnorm_linear_reference(x, norm_weight, eps, weight, bias).chunk(2, dim=-1)
    return silu(gate) * up


@torch.library.custom_op("latentmas::gate_up_swiglu", mutates_args=())
def _gate_up_swiglu(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not runs_on(x):
        return gate_up_swiglu_reference(x, norm_weight, eps, weight, bias)
    out = x.new_empty(x.shape[0], weight.shape[0] // 2)
    skinny_gemm(x, weight, out, norm_weight=norm_weight, eps=eps, bias=bias, gated=True, target=target_of(x.device))
    return out


@_gate_up_swiglu.register_fake
def _(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // 2)


def gate_up_swiglu(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Normalise rows, then compute gate, up projection and SwiGLU.

    Runs the Triton kernel on CUDA and the torch reference elsewhere.

    Args:
        x: [B, K].
        norm_weight: [K], the weight of the norm. In float16 x * norm_weight must be below 65504.
        eps: added to the mean square.
        weight: [2 I, K] with contiguous rows, the gate's rows first, in x's dtype.
        bias: [2 I].

    Returns:
        [B, I].

    Raises:
        LatentMASError: where shapes, dtypes or devices do not fit together.
    """
    check_norm("gate_up_swiglu", x, norm_weight)
    check_linear("gate_up_swiglu", x, weight, bias, weight.shape[0])
    if weight.shape[0] % 2:
        raise LatentMASError(
            f"gate_up_swiglu: the weight holds gate and up, an even number of rows; got {weight.shape[0]}"
        )
    return _gate_up_swiglu(x.contiguous(), norm_weight.contiguous(), eps, weight, bias)
