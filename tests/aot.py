"""Compiles the launches of a decode step, ahead of time and without a GPU, and reads the cubins: `python tests/aot.py 90`.

The launches are recorded from the engine's own step on meta tensors of a real model's shapes, so the kernels are those that a
device would run: the same arguments, specialised as Triton does (divisibility by 16, values of 1), with the same warps
and stages. Needs a process without TRITON_INTERPRET.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
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
        report = subprocess.run(
            [tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        )
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


# ---- the launches of a step ----------------------------------------------------------------------------------------

SHAPES = {
    # Qwen3-0.6B: norms per head, tied. One layer stands for all.
    "qwen3": {
        "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "intermediate_size": 3072, "vocab_size": 151936,
    },
    # SmolLM2-135M as a Mistral with a window: heads of 64, widths that are no powers of two.
    "mistral": {
        "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        "intermediate_size": 1536, "vocab_size": 49152, "sliding_window": 512,
    },
}  # fmt: skip


def launches_of(family: str, dtype: torch.dtype, batch: int, capability: int, inside: Any = None) -> dict:
    """The launches of a latent step with W_a, a sampled token and a greedy one, made inside a context where one is given."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from latentmas_kernels.alignment import Aligner
    from latentmas_kernels.engines.cuda_step import DecodeStep
    from latentmas_kernels.models.architecture import Architecture
    from latentmas_kernels.models.packed_weights import pack_weights
    from latentmas_kernels.ops.triton.launch import LaunchTarget

    config = CONFIG_MAPPING[family](
        **SHAPES[family], num_hidden_layers=1, tie_word_embeddings=True, max_position_embeddings=32768
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    rotary = model.model.rotary_emb
    rotary.inv_freq = torch.ones(rotary.inv_freq.shape)  # the only weight whose values are read
    weights = pack_weights(model, Architecture.of(model))
    target = LaunchTarget("a GPU", 132, enable_pdl=capability >= 90)
    step = DecodeStep(weights, Architecture.of(model), batch, target)
    width = config.hidden_size
    aligner = Aligner("ridge", 1.0, weight=torch.empty(width, width, device="meta"))

    for do_sample in (False, True):
        step.allocate(do_sample=do_sample)

    def body() -> None:
        with inside or nullcontext():
            step.latent(weights, aligner)
            for do_sample in (False, True):
                step.token(weights, do_sample=do_sample)

    return record(body)


def realign_launches(capability: int) -> dict:
    """`realign` as a call of its own, with and without W_a."""
    from latentmas_kernels.ops.triton.launch import LaunchTarget
    from latentmas_kernels.ops.triton.realign import realign

    hidden, out = torch.empty(2, 3, 896, dtype=torch.bfloat16, device="meta")
    target = LaunchTarget("a GPU", 132, enable_pdl=capability >= 90)

    def body() -> None:
        realign(hidden, torch.empty(896, 896, device="meta"), 1.0, out, target=target)
        realign(hidden, None, 1.0, out, target=target)

    return record(body)


def main(capability: int, cases: list[str]) -> None:
    """Cases as family:dtype:batch, or realign; one JSON line per distinct kernel."""
    import json

    seen = set()
    for case in cases:
        if case == "realign":
            launches = realign_launches(capability)
        else:
            family, dtype, batch = case.split(":")
            launches = launches_of(family, getattr(torch, dtype), int(batch), capability)
        for key, launch in launches.items():
            if key in seen:
                continue
            seen.add(key)
            compiled = compile_for(capability, *launch)
            code = instructions(compiled)
            loads = [line for line in code.splitlines() if "LDG.E" in line or "LDGSTS" in line]
            before, _, _ = code.partition("ACQBULK")
            facts = {
                "kernel": launch[0].__name__,
                "constants": {k: v for k, v in launch[2].items() if k.isupper()},
                "wide_loads": sum(".128" in line for line in loads),
                "wide_loads_before_wait": sum(".128" in line for line in before.splitlines() if "LDG" in line),
                "tensor_cores": "HMMA" in code or "HGMMA" in code or "UTCHMMA" in code or "UTCQMMA" in code,
                "waits": "ACQBULK" in code,
            }
            print(json.dumps({**facts, **resources(compiled)}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
