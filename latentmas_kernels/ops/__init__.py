"""The fused operations as functions of torch tensors, each with its formula in plain torch (`<op>_reference`).

    op                  formula                                                                    on CUDA   on the CPU
    realign             e = y target_norm / max(|y|, 1e-12), y = W_a^T h                           Triton    C++
    rmsnorm             y = g x / sqrt(mean(x^2) + eps)                                            Triton    torch
    rmsnorm_linear      y = rmsnorm(x) W^T + b                                                     Triton    torch
    linear_residual     y = residual + x W^T + b                                                   Triton    torch
    gate_up_swiglu      y = silu(h W_gate^T + b) (h W_up^T + b), h = rmsnorm(x)                    Triton    torch
    decode_attention    q, k = rope(rmsnorm(q)), rope(rmsnorm(k)); keys[slot], values[slot] = k, v;
                        o = softmax(scale q keys^T) values over the slots in use                   Triton    torch
    rerotate_keys       k = rope(k, shift), in place                                               Triton    torch
    sample              argmax of the logits, or a draw with temperature, top-k and top-p          Triton    torch

Shapes, dtypes and accumulation are in the files of the ops. The functions check their arguments, allocate their outputs and
are custom ops of torch. C++ is the native extension, which covers float32 and bfloat16; without it and on other devices the
reference runs. The engines do not call these functions: the CUDA engine launches the kernels of ops/triton on static buffers,
and the native engine runs the ops of a step in C++ (csrc/cpu/step.cpp).
"""

from latentmas_kernels.ops.decode_attention import decode_attention, decode_attention_reference
from latentmas_kernels.ops.gate_up_swiglu import gate_up_swiglu, gate_up_swiglu_reference
from latentmas_kernels.ops.linear_residual import linear_residual, linear_residual_reference
from latentmas_kernels.ops.realign import realign, realign_reference
from latentmas_kernels.ops.rerotate_keys import rerotate_keys, rerotate_keys_reference
from latentmas_kernels.ops.rmsnorm import rmsnorm, rmsnorm_reference
from latentmas_kernels.ops.rmsnorm_linear import rmsnorm_linear, rmsnorm_linear_reference
from latentmas_kernels.ops.sample import sample, sample_reference

__all__ = [
    "decode_attention",
    "decode_attention_reference",
    "gate_up_swiglu",
    "gate_up_swiglu_reference",
    "linear_residual",
    "linear_residual_reference",
    "realign",
    "realign_reference",
    "rerotate_keys",
    "rerotate_keys_reference",
    "rmsnorm",
    "rmsnorm_linear",
    "rmsnorm_linear_reference",
    "rmsnorm_reference",
    "sample",
    "sample_reference",
]
