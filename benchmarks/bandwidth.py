"""What all benchmarks share: the clock, the read bandwidth of this process, the conditions, and the file of results.

A step of a small model reads every weight once and computes little, so its floor is weight bytes / read bandwidth. The
datasheet's bandwidth is no measure of that (a container, a virtual machine and a neighbour all take their part), so every
benchmark measures it beside its own numbers.
"""

import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

CPU_BYTES = 1 << 29  # five times the last-level cache of a large server processor
CUDA_BYTES = 1 << 31
DATASHEET = {  # GB/s, the first name that is in the GPU's
    "H100 PCIe": 2000, "H100 NVL": 3900, "H100": 3350, "H200": 4800, "A100-SXM4-80GB": 2039, "A100 80GB": 2039,
}  # fmt: skip
OUT_OF_TIME = 75
"""Exit status of a benchmark that has left something for its next run, because its seconds were spent."""


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has nothing left to do; on the CPU that is always so."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(call: Callable[[], Any], device: torch.device | str, *, repeats: int = 9, warmup: int = 2) -> float:
    """Median milliseconds of `call`: events on CUDA, the host's clock elsewhere.

    Callers that compare alternate short calls of this one between the sides, so that a machine that slows down or speeds
    up meanwhile does so for all of them.
    """
    on_cuda = torch.device(device).type == "cuda"
    for _ in range(warmup):
        call()
    times = []
    for _ in range(repeats):
        synchronize(device)
        if on_cuda:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            synchronize(device)
            times.append(start.elapsed_time(stop))
        else:
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


@functools.cache
def _large_buffer(device: str) -> torch.Tensor:
    size = CUDA_BYTES if torch.device(device).type == "cuda" else CPU_BYTES
    return torch.empty(size // 4, device=device).uniform_()


def read_bandwidth(device: torch.device | str, *, repeats: int = 15) -> float:
    """GB/s (10^9 bytes) at which this process reads a buffer that no cache holds, with torch's threads.

    The faster of a sum and a matrix-vector product: on one core a sum waits more than it reads, and a ceiling that a
    kernel can break is none. On a shared machine it moves from minute to minute: measure it close to what is compared.
    """
    buffer = _large_buffer(str(device))
    matrix, vector = buffer.view(-1, 4096), buffer[:4096].clone()
    fastest = min(median_ms(call, device, repeats=repeats) for call in (buffer.sum, lambda: matrix.mv(vector)))
    return buffer.nbytes / fastest / 1e6


def device_name(device: torch.device | str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def datasheet(device: torch.device | str) -> int | None:
    """GB/s of the datasheet; None for the CPU and for a GPU that is not known here."""
    if torch.device(device).type != "cuda":
        return None
    return next((gb_s for name, gb_s in DATASHEET.items() if name in device_name(device)), None)


def conditions(device: torch.device | str) -> dict[str, Any]:
    """Everything that a number depends on and that does not show in it."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": date.today().isoformat(),
        "device": device_name(device),
        "versions": versions,
        "torch_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def load_json(path: str | Path | None, section: str) -> dict[str, Any]:
    """A section of a results file; empty where there is none, or no file."""
    return json.loads(Path(path).read_text()).get(section, {}) if path and Path(path).exists() else {}


def merge_json(path: str | Path, section: str, records: dict[str, Any]) -> None:
    """Put `records` into a section of a results file; what else the file holds stays. It appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(path.read_text()) if path.exists() else {}
    content.setdefault(section, {}).update(records)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    for name in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        print(f"{device_name(name)}: {read_bandwidth(name):.1f} GB/s")
