"""The device of a launch: whether Triton runs there, how many multiprocessors it has, and programmatic dependent launch."""

import functools
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

CPU = torch.device("cpu")


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def runs_on(tensor: Tensor) -> bool:
    """Return whether the Triton kernels run on this tensor: CUDA, or anything in the interpreter."""
    return tensor.is_cuda or (interpreted() and tensor.device.type == "cpu")


@dataclass(frozen=True)
class LaunchTarget:
    """A device as the launchers see it.

    Attributes:
        name: of the device; tuned tiles are stored under it.
        multiprocessors: a launch should have at least one program for each.
        enable_pdl: programmatic dependent launch (sm_90 and later): a kernel starts while the one before it ends, loads its
            first weights, and waits before it reads anything that the kernel before writes. Only where no kernel before it can
            have written what it reads ahead of the wait: inside of a captured step.
        device: where the kernels run. Triton launches on the current device, which may be another one.
    """

    name: str
    multiprocessors: int
    enable_pdl: bool
    device: torch.device = CPU

    def guard(self) -> AbstractContextManager[Any]:
        """Make this device the current one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        """Launch a Triton kernel on this device, on its current stream."""
        # Sums are fused multiply-adds, whatever the version of Triton makes of it by default: off from 3.10 on.
        options = {"enable_fp_fusion": True}
        if self.enable_pdl:  # Triton refuses the option where the hardware has no such launch
            options["launch_pdl"] = True
        with self.guard():
            kernel[grid](*args, **constants, **options)


INTERPRETER = LaunchTarget("interpreter", 2, enable_pdl=False)


@functools.cache
def target_of(device: torch.device, *, captured: bool = False) -> LaunchTarget:
    """Return the target of a device; the interpreter for anything but CUDA.

    Args:
        captured: whether the launches are those of a captured step, whose weights no kernel of the step writes.
    """
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    enable_pdl = captured and properties.major >= 9 and hasattr(tl.extra.cuda, "gdc_wait")
    return LaunchTarget(properties.name, properties.multi_processor_count, enable_pdl, device)
