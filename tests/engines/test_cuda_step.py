"""A decode step as a whole: its launches compile for real GPUs within their limits, and it makes no call of torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = {
    80: ["qwen3:bfloat16:1", "mistral:bfloat16:16"],
    90: ["qwen3:bfloat16:1", "qwen3:bfloat16:4", "qwen3:bfloat16:16", "qwen3:bfloat16:64", "mistral:float32:3"],
    100: ["qwen3:bfloat16:1", "mistral:bfloat16:16"],
}
REGISTERS_OF_MULTIPROCESSOR = 65536
SHARED_OF_MULTIPROCESSOR = 160 * 1024  # of sm_80, the smallest of the three
LARGE = ("skinny_gemm_kernel", "realign_gemv_kernel", "attention_kernel", "sample_kernel")


def without_interpreter(*command):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}:{environment.get('PYTHONPATH', '')}", "TRITON_DEFAULT_FP_FUSION": "1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("capability", CASES)
def test_every_launch_of_a_step_compiles_aot(capability):
    """No local memory (spills, stack frames), and room for the programs that should run side by side."""
    done = without_interpreter("tests/aot.py", str(capability), *CASES[capability])
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    names = {k["kernel"] for k in kernels}
    assert names == {
        "skinny_gemm_kernel", "realign_gemv_kernel", "rescale_kernel", "rope_append_kernel", "attention_kernel",
        "reduce_kernel", "rmsnorm_kernel", "embed_kernel", "maxima_kernel", "greedy_kernel", "sample_kernel",
    }  # fmt: skip
    for kernel in kernels:
        # Two of the large programs per multiprocessor, so that one loads while the other computes; four of the others.
        programs = 2 if kernel["kernel"] in LARGE else 4
        assert kernel["STACK"] == kernel["LOCAL"] == 0, kernel
        assert programs * kernel["REG"] * kernel["THREADS"] <= REGISTERS_OF_MULTIPROCESSOR, kernel
        assert programs * kernel["SHARED"] <= SHARED_OF_MULTIPROCESSOR, kernel
        assert kernel["waits"] == (capability >= 90), kernel

    products = [k for k in kernels if k["kernel"] == "skinny_gemm_kernel"]
    assert all(k["wide_loads"] for k in products)
    assert all(k["tensor_cores"] for k in products if k["constants"]["DOT"])
    assert {k["constants"]["DOT"] for k in products} == {True, False}
    if capability >= 90:  # weights are on their way before the kernel waits for its inputs
        assert all(k["wide_loads_before_wait"] for k in products if not k["constants"]["DOT"])
    two_bytes = [k for k in kernels if k["kernel"] == "attention_kernel" and k["constants"]["BLOCK"] == 64]
    assert two_bytes
    assert all(k["tensor_cores"] and k["wide_loads"] for k in two_bytes)


NOTHING_OF_TORCH = """
import sys
sys.path.insert(0, "tests")
import torch
from aot import launches_of
from torch.utils._python_dispatch import TorchDispatchMode

class Refuse(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"a step called {func}")

print(len(launches_of("qwen3", torch.bfloat16, 4, 90, inside=Refuse())), "kinds of launches")
"""


def test_a_step_neither_allocates_nor_copies_nor_waits():
    """Every one of these would be a call of torch, and between its launches a step makes none."""
    done = without_interpreter("-c", NOTHING_OF_TORCH)
    assert "kinds of launches" in done.stdout, done.stderr[-2000:]
