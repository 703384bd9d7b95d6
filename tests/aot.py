"""Compiles what a decode step launches, ahead of time and without a GPU, and reads the cubins: `python tests/aot.py 90`.

The launches are recorded from the engine's own step on meta tensors of a real model's shapes, so what is compiled is what
a device would run: the same arguments, specialised as Triton does (divisibility by 16, values of 1), with the same warps
and stages. Needs a process without TRITON_INTERPRET.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


def record(body: Callable[[], None]) -> dict[str, tuple[Any, dict, dict, dict, dict]]:
    """Run `body` with launches recorded instead of run: per distinct launch the arguments of `compile_for`."""
    launches = {}

    def launcher(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
            options = {name: given.pop(name) for name in list(given) if name not in kernel.arg_names}
            source = describe(kernel, given)
            launches[f"{kernel.__name__} {source[1]} {options}"] = (kernel, *source, options)

        return launch

    original = JITFunction.__getitem__
    JITFunction.__getitem__ = launcher
    try:
        body()
    finally:
        JITFunction.__getitem__ = original
    return launches


def describe(kernel: Any, given: dict[str, Any]) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes, as a launch with these arguments is specialised."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and free):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[index,] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
            if value % 16 == 0 and free:
                attributes[index,] = [["tt.divisibility", 16]]
        else:
            assert isinstance(value, float), (parameter.name, value)
            signature[parameter.name] = "fp32"
    return signature, constants, attributes


def compile_for(capability: int, kernel: Any, signature: dict, constants: dict, attributes: dict, options: dict) -> Any:
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def resources(compiled: Any) -> dict[str, int]:
    """REG (registers per thread), STACK and LOCAL (bytes of local memory per thread) and SHARED (bytes), of the cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report.stdout)
    assert found, report.stdout
    used = dict(zip(("REG", "STACK", "SHARED", "LOCAL"), map(int, found.groups()), strict=True))
    return used | {"SHARED": max(used["SHARED"], compiled.metadata.shared), "THREADS": 32 * compiled.metadata.num_warps}


def instructions(compiled: Any) -> str:
    """The machine code, disassembled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool("nvdisasm"), file.name], capture_output=True, text=True, check=True).stdout
