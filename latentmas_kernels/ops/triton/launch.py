"""The device of a launch: whether Triton runs there, how many multiprocessors it has, and programmatic dependent launch."""

import functools
import os
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor


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
            first weights, and waits before it reads anything that the kernel before writes.
    """

    name: str
    multiprocessors: int
    enable_pdl: bool

    @property
    def options(self) -> dict[str, bool]:
        """Options that a launch passes to Triton; none where the hardware has no such launch, since Triton refuses it there."""
        return {"launch_pdl": True} if self.enable_pdl else {}


INTERPRETER = LaunchTarget("interpreter", 2, enable_pdl=False)


@functools.cache
def target_of(device: torch.device) -> LaunchTarget:
    """Return the target of a device; the interpreter for anything but CUDA."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    enable_pdl = properties.major >= 9 and hasattr(tl.extra.cuda, "gdc_wait")
    return LaunchTarget(properties.name, properties.multi_processor_count, enable_pdl)
