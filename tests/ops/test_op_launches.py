"""Every launch of the ops compiles for GPUs, over the sizes of their tests, which the interpreter runs and does not compile.

All dtypes, sm_80 and other versions of Triton: tests/ptx/test_op_launches.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

KERNELS = {
    "skinny_gemm_kernel", "rescale_kernel", "decode_attention_kernel", "rmsnorm_kernel", "maxima_kernel", "greedy_kernel",
    "sample_kernel", "rerotate_kernel",
}  # fmt: skip
FUSED = {"decode_attention_kernel", "rescale_kernel", "rmsnorm_kernel"}
"""Kernels with sums of products that are written as `*` and `+`. skinny_gemm asks for each fused multiply-add itself."""
SCRIPT = Path(__file__).parents[1] / "op_launches.py"


def assert_compile(capability, *dtypes):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # The default of Triton 3.10: what is fused is so because a launch asks for it.
    environment["TRITON_DEFAULT_FP_FUSION"] = "0"
    command = [sys.executable, SCRIPT, str(capability), *dtypes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    launches = [json.loads(line) for line in done.stdout.splitlines()]
    assert {launch["kernel"] for launch in launches} == KERNELS
    failed = [launch for launch in launches if launch["error"]]
    assert not failed, "\n".join(map(str, failed))
    plain = [launch for launch in launches if launch["kernel"] in FUSED and not launch["fused"]]
    assert not plain, "\n".join(map(str, plain))


def test_every_size_of_the_tests_compiles_aot():
    assert_compile(90, "bfloat16")
