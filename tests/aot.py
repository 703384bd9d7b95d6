"""Compiles the launches of a decode step, ahead of time and without a GPU, and reads the cubins: `python tests/aot.py 90`.

The launches are recorded from the engine's own step on meta tensors of a real model's shapes, so the kernels are those that a
device would run: the same arguments, specialised as Triton does (divisibility by 16, values of 1), with the same warps
and stages. Needs a process without TRITON_INTERPRET.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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


@contextmanager
def intercepted(launch: Callable[[Any, Any, dict[str, Any], dict[str, Any]], None]) -> Iterator[None]:
    """Call `launch` with kernel, grid, arguments by name and options, in place of every launch of a Triton kernel."""

    def launcher(kernel: Any, grid: Any) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
            options = {name: given.pop(name) for name in list(given) if name not in kernel.arg_names}
            launch(kernel, grid, given, options)

        return call

    original = JITFunction.__getitem__
    JITFunction.__getitem__ = launcher
    try:
        yield
    finally:
        JITFunction.__getitem__ = original


def record(body: Callable[[], None]) -> dict[str, tuple[Any, dict, dict, dict, dict]]:
    """Run `body` with launches recorded instead of run: per distinct launch the arguments of `compile_for`."""
    launches = {}

    def launch(kernel: Any, grid: Any, given: dict[str, Any], options: dict[str, Any]) -> None:
        source = describe(kernel, given)
        launches[f"{kernel.__name__} {source} {options}"] = (kernel, *source, options)

    with intercepted(launch):
        body()
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


def loops(code: str) -> list[list[str]]:
    """The lines of each loop of a disassembled kernel: from a label to a branch back to it."""
    lines, labels, found = code.splitlines(), {}, []
    for number, line in enumerate(lines):
        if label := re.match(r"(\.L_\w+):", line.strip()):
            labels[label[1]] = number
        branch = re.search(r"BRA.*`\((\.L_\w+)\)", line)
        if branch and labels.get(branch[1], number) < number - 1:  # a branch to itself is the end of the code
            found.append(lines[labels[branch[1]] : number + 1])
    return found


def wide_loads(lines: list[str]) -> int:
    return sum(bool(re.search(r"\b(LDG|LDGSTS)\S*\.128\b", line)) for line in lines)


SHARED_OF_MULTIPROCESSOR = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}


def blocks_per_multiprocessor(capability: int, used: dict[str, int]) -> int:
    """By registers, which a warp gets in units of 256, shared memory, of which a block takes 1 KB more, and threads."""
    registers = -(-used["REG"] // 8) * 8 * used["THREADS"]
    shared = used["SHARED"] + 1024
    return min(65536 // registers, SHARED_OF_MULTIPROCESSOR[capability] // shared, 2048 // used["THREADS"], 32)


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


def product_launch(
    sizes: tuple[int, int, int], kind: str, dtype: torch.dtype, capability: int, weight_dtype: torch.dtype | None = None
) -> tuple[Any, dict[str, Any]]:
    """The launch of a product of rows, inputs and outputs, and its tile, programs and bytes, one program's where staged.

    Args:
        kind: "norm", "residual", "pair" (gate and up) or "plain", as in benchmarks/tune_products.py.
    """
    from latentmas_kernels.ops.triton.launch import LaunchTarget
    from latentmas_kernels.ops.triton.skinny_gemm import skinny_gemm
    from latentmas_kernels.ops.triton.tiles import tile_for

    (m, k, n), gated = sizes, kind == "pair"
    weight_dtype = dtype if weight_dtype is None else weight_dtype

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weight = empty(2 * n if gated else n, k).to(weight_dtype)
    target = LaunchTarget("a GPU", 132, enable_pdl=capability >= 90)
    options = {"norm_weight": empty(k), "eps": 1e-6} if kind in ("norm", "pair") else {}
    out = empty(m, n).to(weight_dtype)
    if kind == "residual":
        options["residual"] = empty(m, n)
    (launch,) = record(lambda: skinny_gemm(empty(m, k), weight, out, gated=gated, target=target, **options)).values()
    tile = tile_for(target, m, n, k, weight_dtype.itemsize, gated=gated)
    columns = tile.block_n * (2 if gated else 1)
    return launch, {
        "tile": tile,
        "programs": triton.cdiv(n, tile.block_n) * tile.split * triton.cdiv(m, tile.block_m),
        "weight_bytes": weight.nbytes,
        "bytes_staged": columns * tile.block_k * weight.itemsize * (tile.num_stages - 1),
    }


def products(capability: int, sizes: str, dtypes: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The launches of the products of a size, rows x inputs x outputs, or of a shape of benchmarks/shapes.py at some rows."""
    dtype, _, weight_dtype = dtypes.partition("-")
    given = getattr(torch, dtype), capability, getattr(torch, weight_dtype or dtype)
    if "x" in sizes:
        size = tuple(map(int, sizes.split("x")))
        kinds = ["plain"] if weight_dtype else ["norm", "residual", "pair"]
        return {f"{kind} {sizes} {dtypes}": product_launch(size, kind, *given) for kind in kinds}
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    from tune_products import products_of

    shape, rows = sizes.split("@")
    return {
        f"{item.name} {sizes} {dtypes}": product_launch(
            (int(rows), item.k, item.n), item.kind.replace("logits", "norm"), *given
        )
        for item in products_of(shape)
    }


def facts(capability: int, launch: tuple) -> dict[str, Any]:
    """What the machine code of a launch says."""
    compiled = compile_for(capability, *launch)
    code = instructions(compiled)
    before, _, _ = code.partition("ACQBULK")
    loading = [loop for loop in loops(code) if wide_loads(loop)]
    used = resources(compiled)
    return {
        "kernel": launch[0].__name__,
        "constants": {k: v for k, v in launch[2].items() if k.isupper()},
        "wide_loads": wide_loads(code.splitlines()),
        "wide_copies": sum("LDGSTS" in line and ".128" in line for line in code.splitlines()),
        "narrow_loads": code.count("LDG.E.U16"),
        "wide_loads_before_wait": wide_loads(before.splitlines()) if "ACQBULK" in code else 0,
        "loops_with_loads": len(loading),
        "barriers_in_loops": max((sum("BAR." in line for line in loop) for loop in loading), default=0),
        "blocks": blocks_per_multiprocessor(capability, used),
        "tensor_cores": "HMMA" in code or "HGMMA" in code or "UTCHMMA" in code or "UTCQMMA" in code,
        "waits": "ACQBULK" in code,
        **used,
    }


def main(capability: int, cases: list[str]) -> None:
    """Print one JSON line per distinct kernel of the cases family:dtype:batch and realign, or per product of the cases
    product:sizes:dtypes, with sizes as 5x1x3 (rows, inputs, outputs) or qwen3-0.6b@5 (shape, rows), and dtypes of x and of
    the weights as bfloat16 or bfloat16-float32."""
    import json

    known: dict[str, dict[str, Any]] = {}
    for case in cases:
        if case.startswith("product:"):
            for name, (launch, described) in products(capability, *case.split(":")[1:]).items():
                key = f"{launch[1:]}"
                known[key] = known.get(key) or facts(capability, launch)
                print(json.dumps({"product": name, **described, **known[key]}), flush=True)
            continue
        if case == "realign":
            launches = realign_launches(capability)
        else:
            family, dtype, batch = case.split(":")
            launches = launches_of(family, getattr(torch, dtype), int(batch), capability)
        for key, launch in launches.items():
            if key not in known:
                known[key] = facts(capability, launch)
                print(json.dumps(known[key]), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
