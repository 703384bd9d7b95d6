"""doctor(): which fast paths are on here, and why the others are not."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from latentmas_kernels import native
from latentmas_kernels.engines import ENGINES


@dataclass(frozen=True)
class Report:
    """One line of text per topic; `print(doctor())` shows them."""

    lines: dict[str, str]

    def __str__(self) -> str:
        width = max(map(len, self.lines))
        return "\n".join(f"{topic:<{width}}  {state}" for topic, state in self.lines.items())


def doctor() -> Report:
    """Look at versions, devices, the native extension and Triton."""
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    triton = _version("triton")
    if triton == "not installed":
        kernels = "off: triton is not installed"
    elif not gpus:
        kernels = f"off: {triton} is installed, but there is no CUDA device"
    else:
        kernels = f"on ({triton}): realign"
    return Report(
        {
            "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
            "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
            "transformers": _version("transformers"),
            "devices": ", ".join(["cpu", *gpus]),
            "native kernels": native.extension_state(),
            "triton kernels": kernels,
            "engines": ", ".join(ENGINES[1:]),
        }
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
