"""Compiles the launches of the ops over the sizes of their tests, ahead of time: `python tests/op_launches.py 90 bfloat16`.

The size lists are those of the test modules, so that a size added there is compiled here. Triton makes a constant of an
argument of 1 and other code of one that 16 divides, so each size may be a kernel of its own. Needs a process without
TRITON_INTERPRET.
"""

import json
import sys
from collections.abc import Iterator

import torch
from aot import compile_for, record
from numerics import poisoned
from ops import (
    test_decode_attention,
    test_decode_attention_append,
    test_gate_up_swiglu,
    test_linear_residual,
    test_realign,
    test_rerotate_keys,
    test_rmsnorm,
    test_rmsnorm_linear,
    test_sample,
)

from latentmas_kernels.ops.decode_attention import decode_attention
from latentmas_kernels.ops.gate_up_swiglu import gate_up_swiglu
from latentmas_kernels.ops.linear_residual import linear_residual
from latentmas_kernels.ops.rerotate_keys import rerotate_keys
from latentmas_kernels.ops.rmsnorm import rmsnorm
from latentmas_kernels.ops.rmsnorm_linear import rmsnorm_linear
from latentmas_kernels.ops.sample import sample
from latentmas_kernels.ops.triton import launch
from latentmas_kernels.ops.triton.realign import realign


def products(dtype: torch.dtype) -> Iterator[None]:
    for size in test_rmsnorm_linear.SIZES:
        x, norm_weight, weight, bias = test_rmsnorm_linear.inputs(*size, dtype)
        for given in (bias, None):
            yield rmsnorm_linear(x, norm_weight, 1e-5, weight, given)
    for size in test_gate_up_swiglu.SIZES:
        x, norm_weight, weight, bias = test_gate_up_swiglu.inputs(*size, dtype)
        yield gate_up_swiglu(x, norm_weight, 1e-5, weight, bias)
    for size in test_linear_residual.SIZES:
        x, weight, residual, bias = test_linear_residual.inputs(*size, dtype)
        yield linear_residual(x, weight, residual, bias)
    for rows, width_in, width_out in test_realign.SIZES:
        hidden, weight = test_realign.inputs(rows, width_in, width_out, dtype)
        target = launch.target_of(hidden.device)
        yield realign(hidden, weight, 1.0, poisoned(rows, width_out, dtype=dtype), target=target)
        yield realign(hidden, None, 1.0, poisoned(rows, width_in, dtype=dtype), target=target)


def attention(dtype: torch.dtype) -> Iterator[None]:
    for heads in test_decode_attention.HEADS:
        given = test_decode_attention.inputs(heads, dtype=dtype)
        positions, query_positions = test_decode_attention.gapped(test_decode_attention.LENGTHS)
        yield test_decode_attention.attend(*given)
        yield test_decode_attention.attend(*given, window=9, positions=positions, query_positions=query_positions)
    for size in test_decode_attention_append.SIZES:
        qkv, norm_weights, *cache = test_decode_attention_append.inputs(*size, dtype)
        for norms in ((None, None), norm_weights):
            frequency = test_decode_attention_append.frequencies(size[3])
            yield test_decode_attention_append.run(decode_attention, qkv, norms, *cache, frequency)


def others(dtype: torch.dtype) -> Iterator[None]:
    for size in test_rmsnorm.SIZES:
        yield rmsnorm(*test_rmsnorm.inputs(*size, dtype), 1e-5)
    for size in test_rerotate_keys.SIZES:
        yield rerotate_keys(*test_rerotate_keys.inputs(*size, dtype))
    if dtype == torch.bfloat16:  # logits are float32 whatever the dtype
        for vocabulary in (1, 97, 1024, 1500, 2500):
            for do_sample in (False, True):
                yield sample(test_sample.logits_of(2, vocabulary), do_sample=do_sample)


def launches(dtype: torch.dtype) -> dict:
    """The distinct launches of the ops, on a GPU of 132 multiprocessors."""

    def body() -> None:
        for calls in (products, attention, others):
            for _ in calls(dtype):
                pass

    # As if the interpreter were on, so that the ops launch on CPU tensors; but what they launch is that of a GPU.
    launch.interpreted = lambda: True
    launch.INTERPRETER = launch.LaunchTarget("a GPU", 132, enable_pdl=False)
    launch.target_of.cache_clear()
    return record(body)


def main(capability: int, dtypes: list[str]) -> None:
    """Print a JSON line per distinct launch: the kernel, the error or None, the fused multiply-adds of its PTX."""
    for dtype in dtypes:
        for kernel, signature, constants, attributes, options in launches(getattr(torch, dtype)).values():
            error, fused = None, 0
            try:
                compiled = compile_for(capability, kernel, signature, constants, attributes, options)
                fused = compiled.asm["ptx"].count("fma.rn.f32")
            except Exception as failed:  # of whatever kind: each kernel that does not compile is reported
                error = str(failed).strip().splitlines()[-1]
            sizes = {name: value for name, value in constants.items() if value is not None}
            facts = {"kernel": kernel.__name__, "dtype": dtype, "constants": sizes, "error": error, "fused": fused}
            print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
