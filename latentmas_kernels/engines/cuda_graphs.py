"""How a step is made to run again and again: as a CUDA graph, or, without CUDA, as plain calls."""

from collections.abc import Callable
from typing import Protocol

import torch

Replay = Callable[[], None]
SYNC_EVERY = 16
"""Steps between two looks at whether all rows have ended: a look waits for the device, a step too many does not show."""


class Capture(Protocol):
    """Turns launches over static tensors into something that runs them again."""

    def __call__(self, body: Callable[[], None]) -> Replay: ...

    def release(self) -> None:
        """Give back what a capture that failed has taken."""
        ...


class CudaGraphs:
    """Captures into CUDA graphs that share one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, body: Callable[[], None]) -> Replay:
        """`body` runs once before the capture, which compiles and loads its kernels: let it find an idle step."""
        with torch.cuda.device(self.device):
            present, beside = torch.cuda.current_stream(), torch.cuda.Stream()
            beside.wait_stream(present)
            with torch.cuda.stream(beside):
                body()
            present.wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                body()
        return graph.replay

    def release(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()


class EagerReplay:
    """Runs the launches each time anew: how the engine is tested in Triton's interpreter."""

    def __call__(self, body: Callable[[], None]) -> Replay:
        body()
        return body

    def release(self) -> None:
        """Nothing is held."""
