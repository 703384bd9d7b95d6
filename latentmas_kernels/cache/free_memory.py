"""Check that a buffer fits the free memory of its device before it is allocated."""

import psutil
import torch

from latentmas_kernels.errors import LatentMASError


class InsufficientMemoryError(LatentMASError):
    """A buffer is larger than the memory that is free."""


def check_free_memory(need: int, device: torch.device, what: str, detail: str = "") -> None:
    """Raise InsufficientMemoryError where fewer than `need` bytes are free on a CPU or CUDA device.

    Without the check a CPU allocation succeeds, and the process is killed when it writes to the last pages.

    Args:
        what, detail: of the message: "what needs so many MB (detail)".
    """
    if device.type == "cpu":
        free = psutil.virtual_memory().available
    elif device.type == "cuda":
        # torch can also use what it has reserved and not allocated.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
    else:
        return
    if need > free:
        suffix = f" ({detail})" if detail else ""
        raise InsufficientMemoryError(
            f"{what} needs {need / 2**20:,.0f} MB{suffix}; free on {device} are {free / 2**20:,.0f} MB: take fewer rows at a "
            "time (a smaller batch), or shorter ones"
        )
