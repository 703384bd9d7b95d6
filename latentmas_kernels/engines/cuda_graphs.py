"""Capture and replay of a step: as a CUDA graph, or, without CUDA, as plain calls."""

from collections.abc import Callable
from typing import Protocol

import torch

Replay = Callable[[], None]
SYNC_EVERY = 16
"""Steps between two checks whether all rows have ended: a check waits for the device, a step too many changes nothing."""


class GraphCapture(Protocol):
    """Turns launches over static tensors into a `Replay` of them."""

    def __call__(self, body: Callable[[], None]) -> Replay: ...

    def release(self) -> None:
        """Free the memory of a capture that failed."""
        ...


class CudaGraphs:
    """Captures into CUDA graphs that share one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, body: Callable[[], None]) -> Replay:
        """Capture `body`. It runs once before the capture, which compiles and loads its kernels: reset the step before."""
        with torch.cuda.device(self.device):
            present, side_stream = torch.cuda.current_stream(), torch.cuda.Stream()
            side_stream.wait_stream(present)
            with torch.cuda.stream(side_stream):
                body()
            present.wait_stream(side_stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                body()
        return graph.replay

    def release(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()


class EagerReplay:
    """Runs the launches anew each time: the tests of the engine in Triton's interpreter."""

    def __call__(self, body: Callable[[], None]) -> Replay:
        body()
        return body

    def release(self) -> None:
        """Do nothing: plain calls keep no memory."""
