"""doctor(): which fast paths are on here, for a model where one is given, and why the others are not."""

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import torch
from packaging.requirements import Requirement

from latentmas_kernels import extension as native
from latentmas_kernels.engines import cuda
from latentmas_kernels.engines import hf_graph as generic
from latentmas_kernels.engines import native as native_engine
from latentmas_kernels.models.architecture import Architecture, UnsupportedModelError, in_short
from latentmas_kernels.models.families import FAMILIES

DISTRIBUTION = "latentmas-kernels"
PACKAGES = ("torch", "transformers", "triton")


@dataclass(frozen=True)
class Path:
    """A fast path: whether it is on, and with what, or why not."""

    on: bool
    why: str

    def __str__(self) -> str:
        return f"{'on' if self.on else 'off'}: {self.why}"


@dataclass(frozen=True)
class Report:
    """What was found; `print(doctor())` shows it, a line per topic.

    Attributes:
        python: version and platform.
        packages: versions by name, with a word on one that this package was not tested with; or "not installed".
        devices: "cpu" and each accelerator by its name.
        instruction_sets: of the C++ kernels, those that this processor runs; the one in use comes first.
        threads: of torch on the CPU; the native engine's are in its line.
        kernels, engines: the fast paths by name.
        model: shape of the given model, None without one.
    """

    python: str
    packages: dict[str, str]
    devices: list[str]
    instruction_sets: list[str]
    threads: int
    kernels: dict[str, Path]
    engines: dict[str, Path]
    model: str | None

    @property
    def lines(self) -> dict[str, str]:
        """One line of text per topic."""
        lines = {
            "python": self.python,
            **self.packages,
            "devices": ", ".join(self.devices),
            "instruction sets": ", ".join(self.instruction_sets) or "none: there are no C++ kernels here",
            "threads": str(self.threads),
        }
        lines |= {f"{name} kernels": str(path) for name, path in self.kernels.items()}
        if self.model is not None:
            lines["model"] = self.model
        return lines | {f"{name} engine": str(path) for name, path in self.engines.items()}

    def __str__(self) -> str:
        lines = self.lines
        width = max(map(len, lines))
        return "\n".join(f"{topic:<{width}}  {state}" for topic, state in lines.items())

    def to_dict(self) -> dict[str, Any]:
        """For `json.dumps`."""
        return asdict(self)


def doctor(model: Any = None) -> Report:
    """Look at versions, devices, the native extension and Triton.

    Args:
        model: a causal LM of transformers, on any device ("meta" will do); None looks at the machine only.
    """
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    extension = native.extension()
    sets: list[str] = []
    if extension is not None:
        active = extension.active_isa()
        sets = [active, *(isa for isa in extension.available_isas().split() if isa != active)]
    return Report(
        python=f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        packages={package: _judged(package) for package in PACKAGES},
        devices=["cpu", *gpus],
        instruction_sets=sets,
        threads=torch.get_num_threads(),
        kernels={"native": Path(extension is not None, native.extension_state()), "triton": _triton(bool(gpus))},
        engines={
            "native": _native(model),
            "cuda": _cuda(model, bool(gpus)),
            "generic": _generic(model, bool(gpus)),
            "eager": _eager(model),
        },
        model=None if model is None else _shape(model),
    )


def _triton(gpu: bool) -> Path:
    found = _version("triton")
    if found == "not installed":
        return Path(False, "triton is not installed")
    if not gpu:
        return Path(False, f"triton {found} is installed, but there is no CUDA device")
    return Path(True, f"the ops of a decode step (triton {found})")


def _native(model: Any) -> Path:
    """The C++ engine on the CPU."""
    on = f"whole calls in C++ on {_threads()} threads"
    if model is None:
        if native.extension() is None:
            return Path(False, native.extension_state())
        return Path(True, f"{on}, for {', '.join(FAMILIES)}")
    reason = _reason(model, native_engine.unsupported_reason)
    if reason is not None:
        return Path(False, reason)
    kept = ", ".join(f"{what} {size / 2**20:.1f} MB" for what, size in native_engine.memory_report(model).items())
    return Path(True, on + (f"; kept: {kept}" if kept else ""))


def _threads() -> int:
    return native.extension().threads() if native.extension() is not None else 1


def _cuda(model: Any, gpu: bool) -> Path:
    """The packed engine: kernels and graphs of our own."""
    if model is None:
        if not gpu:
            return Path(False, "there is no CUDA device")
        return Path(True, f"whole steps as CUDA graphs, for {', '.join(FAMILIES)}")
    reason = _reason(model, cuda.unsupported_reason)
    if reason is not None:
        return Path(False, reason)
    kept = ", ".join(f"{what} {size / 2**20:.1f} MB" for what, size in cuda.memory_report(model).items())
    return Path(True, "whole steps as CUDA graphs" + (f"; kept: {kept}" if kept else ""))


def _generic(model: Any, gpu: bool) -> Path:
    """transformers' forward as a graph."""
    if model is None:
        if not gpu:
            return Path(False, "there is no CUDA device")
        return Path(True, "transformers' own forward as a CUDA graph, for what the cuda engine does not cover")
    reason = _reason(model, generic.unsupported_reason)
    return Path(reason is None, reason or "transformers' own forward as a CUDA graph")


def _eager(model: Any) -> Path:
    reason = None if model is None else _reason(model, lambda *_: None)
    return Path(reason is None, reason or "transformers' own forward on our cache")


def _reason(model: Any, unsupported_reason: Callable[[Any, Architecture], str | None]) -> str | None:
    """Why an engine does not run the model, an error on the way included."""
    try:
        return unsupported_reason(model, Architecture.of(model))
    except UnsupportedModelError as error:
        return str(error)
    except Exception as error:
        return f"looking at the model ended in {in_short(error)}"


def _shape(model: Any) -> str:
    name = type(model).__name__
    try:
        it = Architecture.of(model)
    except UnsupportedModelError:
        return name
    windows = sorted({window for window in it.windows if window is not None})
    per_token = 2 * it.layers * it.kv_heads * it.head_dim * it.dtype.itemsize
    dtype = str(it.dtype).removeprefix("torch.")
    parts = [
        name,
        f"{it.layers} layers of width {it.hidden_size}",
        f"{it.kv_heads} KV heads of {it.head_dim}, {per_token / 1024:.1f} KB a token in {dtype}",
        "no limit of positions" if it.max_positions is None else f"{it.max_positions} positions",
    ]
    return ", ".join(parts + [f"windows of {window}" for window in windows])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _judged(package: str) -> str:
    """Return the installed version and, where it is outside of the range that this package was tested with, that range."""
    found = _version(package)
    try:
        ranges = {one.name: one.specifier for one in map(Requirement, requires(DISTRIBUTION) or [])}
    except PackageNotFoundError:  # run from its source
        return found
    if found == "not installed" or package not in ranges or ranges[package].contains(found, prereleases=True):
        return found
    fitting = f"{package}{ranges[package]}"
    return f"{found}, which {DISTRIBUTION} was not tested with; install one that fits: pip install '{fitting}'"
