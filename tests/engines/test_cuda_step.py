"""A decode step as a whole: its launches compile for real GPUs within their limits, and it makes no call of torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from latentmas_kernels.ops.triton.decode_attention import BLOCK_SLOTS
from latentmas_kernels.ops.triton.tiles import DOT_REGISTERS, GEMV_REGISTERS

ROOT = Path(__file__).parents[2]
CASES = {
    80: ["qwen3:bfloat16:1", "mistral:bfloat16:16"],
    90: ["qwen3:bfloat16:1", "qwen3:bfloat16:4", "qwen3:bfloat16:16", "qwen3:bfloat16:64", "mistral:float32:3"],
    100: ["qwen3:bfloat16:1", "mistral:bfloat16:16"],
}
REGISTERS_OF_MULTIPROCESSOR = 65536
SHARED_OF_MULTIPROCESSOR = 160 * 1024  # of sm_80, the smallest of the three
PROGRAMS = {"skinny_gemm_kernel": 2, "sample_kernel": 2, "decode_attention_kernel": 3}


def without_interpreter(*command):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}:{environment.get('PYTHONPATH', '')}"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("capability", CASES)
def test_every_launch_of_a_step_compiles_aot(capability):
    """No local memory (spills, stack frames), and room for the programs that should run side by side."""
    done = without_interpreter("tests/aot.py", str(capability), *CASES[capability])
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    names = {k["kernel"] for k in kernels}
    assert names == {
        "skinny_gemm_kernel", "rescale_kernel", "decode_attention_kernel", "rmsnorm_kernel", "embed_kernel", "maxima_kernel",
        "greedy_kernel", "sample_kernel",
    }  # fmt: skip
    for kernel in kernels:
        # Two of the large programs per multiprocessor, so that one loads while the other computes; four of the others.
        programs = PROGRAMS.get(kernel["kernel"], 4)
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
    attention = [k for k in kernels if k["kernel"] == "decode_attention_kernel"]
    two_bytes = [k for k in attention if k["constants"]["BLOCK"] == BLOCK_SLOTS[2]]
    assert two_bytes
    assert all(k["tensor_cores"] for k in two_bytes)
    # Keys and values go to shared memory by 16 bytes. Two bytes at once are the halves of a head of the new position.
    assert all(k["wide_copies"] >= 8 and k["narrow_loads"] <= 16 for k in two_bytes), two_bytes


SHAPES = ["qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "llama-3.2-1b"]  # of benchmarks/shapes.py
ROWS = [1, 2, 4, 8, 16]


def products_for(capability, cases):
    done = without_interpreter("tests/aot.py", str(capability), *(f"product:{case}" for case in cases))
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_products_stream_their_weights_aot():
    """In the machine code for sm_90: what is on its way before the wait, how many programs run side by side, and no exchange
    between threads while a product of few rows runs."""
    products = products_for(90, [f"{shape}@{rows}:bfloat16" for shape in SHAPES for rows in ROWS])
    assert len(products) == len(SHAPES) * len(ROWS) * 5
    for product in products:
        block_m, dot, blocks = product["constants"]["BLOCK_M"], product["constants"]["DOT"], product["blocks"]
        assert product["STACK"] == product["LOCAL"] == 0, product
        assert product["loops_with_loads"] == 1, product
        assert blocks >= 5, product
        assert product["programs"] >= 132, product
        if dot:
            assert product["REG"] <= DOT_REGISTERS[block_m], product
            assert product["tensor_cores"], product
            ahead = product["bytes_staged"]
        else:
            vectors = product["constants"]["BLOCK_K"] // (8 * product["THREADS"])  # of a row of x, per thread
            assert product["REG"] <= GEMV_REGISTERS[block_m, vectors], product
            assert product["wide_loads_before_wait"] >= 8, product
            assert product["barriers_in_loops"] == 0, product
            ahead = 8 * 16 * product["THREADS"]
        running = min(product["programs"] / 132, blocks)
        assert min(running * ahead, product["weight_bytes"] / 132) >= 0.9 * min(48_000, product["weight_bytes"] / 132)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_products_compile_aot(capability):
    """One column and one term, W_a in float32, and the rows of tensor cores; the sizes of the ops' tests are compiled by
    tests/ops/test_op_launches.py."""
    cases = ["2x33x1:bfloat16", "3x896x896:bfloat16-float32", "1x1x1:bfloat16-float32", "1x1x1:float16"]
    cases += [f"llama-3.2-1b@{rows}:{dtype}" for rows, dtype in [(1, "bfloat16"), (64, "bfloat16"), (3, "float32")]]
    for product in products_for(capability, cases):
        if "llama" in product["product"]:  # sizes that are no whole vectors may spill
            # For sm_100, ptxas spills 8 bytes of 64 rows of the lm_head, to have three programs side by side.
            assert product["STACK"] <= (8 if capability == 100 else 0), product
        assert product["LOCAL"] == 0, product
        assert product["waits"] == (capability >= 90), product


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
