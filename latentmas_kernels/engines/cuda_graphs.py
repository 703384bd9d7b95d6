"""What both graph engines are made of: capture and replay of a step, and the order of the calls that share its tensors.

A CUDA graph keeps addresses and no tensor. What a captured step reads is owned by the state that owns its graph, but for the
model's own weights: those are the model's, and an engine opens a state only while their addresses are what they were.
"""

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef

from latentmas_kernels.alignment import Aligner
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.architecture import in_short
from latentmas_kernels.models.module_settings import state_of

Replay = Callable[[], None]
SYNC_EVERY = 16
"""Steps between two checks whether all rows have ended: a check waits for the device, a step too many changes nothing."""


class CaptureError(RuntimeError):
    """A step could not be captured, for another reason than a lack of memory; the message is the first error in short."""


class GraphCapture(Protocol):
    """Turns launches over static tensors into a `Replay` of them."""

    def __call__(self, body: Callable[..., None], *reads: Any, **constants: Any) -> Replay:
        """Capture `body(*reads, **constants)`. It runs once before, which compiles its kernels: reset the step before.

        Args:
            reads: the objects whose tensors the body reads and writes. The replay keeps none of them alive.

        Raises:
            torch.OutOfMemoryError: where memory does not suffice.
            CaptureError: where the body holds what no graph can.
        """
        ...

    def wait(self) -> None:
        """Wait until the device has done all work. Before tensors that a replay may still use are freed."""
        ...

    def release(self) -> None:
        """Give the memory of freed tensors and graphs back to the device."""
        ...


class CudaGraphs:
    """Captures into CUDA graphs that share one memory pool, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        # Graphs of one pool are captured on one stream: torch hands memory of a pool on within a stream only.
        self.stream = torch.cuda.Stream(device)

    def __call__(self, body: Callable[..., None], *reads: Any, **constants: Any) -> Replay:
        present = torch.cuda.current_stream(self.device)
        # The first error: the end of an invalid capture raises one of its own. Its text only: an error holds the frames that it
        # passed, and so the tensors whose memory the caller wants to give back.
        failure: Exception | None = None
        try:
            # The outer block sets the present stream and device again however the capture ends; that of torch.cuda.graph stays
            # on its own stream where the capture cannot be begun or ended.
            with torch.cuda.stream(self.stream):
                self.stream.wait_stream(present)
                body(*reads, **constants)
                graph = torch.cuda.CUDAGraph()
                # thread_local: other threads may allocate and wait meanwhile.
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                    try:
                        body(*reads, **constants)
                    except Exception as error:
                        failure = _failure(error)
                        raise
        except Exception as error:
            failure = failure or _failure(error)
        finally:
            present.wait_stream(self.stream)
        if failure is None:
            return graph.replay
        # torch may hold on to the pool of a capture that did not end as one that is recorded to, and refuse it from then on.
        self.pool = torch.cuda.graph_pool_handle()
        try:
            raise failure
        finally:
            del failure  # the error and this frame would hold each other

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def release(self) -> None:
        with torch.cuda.device(self.device):
            torch.cuda.empty_cache()


def _failure(error: Exception) -> Exception:
    """Return the error to raise, which holds no frame of the capture."""
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
        return torch.OutOfMemoryError(str(error))
    return CaptureError(in_short(error))


class EagerReplay:
    """Runs the launches anew each time: the tests of the engines without CUDA.

    Like a graph it keeps nothing alive, neither the body nor what that reads: a replay raises where one of them is freed.
    """

    def __call__(self, body: Callable[..., None], *reads: Any, **constants: Any) -> Replay:
        body(*reads, **constants)
        again = weakref.WeakMethod(body) if inspect.ismethod(body) else weakref.ref(body)
        found = [_weakly(value) for value in reads]

        def replay() -> None:
            _alive(again())(*(value() for value in found), **constants)

        return replay

    def wait(self) -> None:
        """Do nothing: plain calls have ended."""

    def release(self) -> None:
        """Do nothing: plain calls keep no memory."""


def _weakly(value: Any) -> Callable[[], Any]:
    """Return what finds a value again without keeping it alive: tensors by their storages, dataclasses by their fields."""
    if isinstance(value, Tensor):
        storage, like = StorageWeakRef(value.untyped_storage()), value.new_empty(0)
        place = value.storage_offset(), value.shape, value.stride()
        return lambda: like.new_empty(0).set_(_alive(UntypedStorage._new_with_weak_ptr(storage.cdata)), *place)
    if is_dataclass(value) and not isinstance(value, type):
        kind, parts = type(value), {field.name: _weakly(getattr(value, field.name)) for field in fields(value)}
        return lambda: kind(**{name: part() for name, part in parts.items()})
    if isinstance(value, tuple) and any(map(is_dataclass, value)):
        items = [_weakly(item) for item in value]
        return lambda: tuple(item() for item in items)
    if type(value).__weakrefoffset__ == 0:  # numbers and the like
        return lambda: value
    reference = weakref.ref(value)
    return lambda: _alive(reference())


def _alive(value: Any) -> Any:
    assert value is not None, (
        "a graph would read memory that was freed: what a step reads is owned by what owns its graph"
    )
    return value


class CallOrder:
    """The order of the calls that share a model's static tensors: one after the other, on whatever threads and streams."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._thread: int | None = None
        self._last: Any = None  # the event at the end of the call before

    @contextmanager
    def call(self, device: torch.device) -> Iterator[None]:
        """Run a call in this block: on this device and behind all that was issued in blocks before.

        The host waits for calls of other threads that are still being issued; the device, on the present stream, waits for
        the call before, which may be on another one. What the call returns is ordered by the present stream, as usual.

        Raises:
            LatentMASError: within another call of the same thread, whose static tensors it would overwrite.
        """
        if self._thread == threading.get_ident():
            raise LatentMASError(
                "got a call of a model from a function that this model's own call has called (on_step or a streamer); "
                "supported is one call at a time: make it once the outer call has returned, or with engine='eager'"
            )
        on_cuda = device.type == "cuda"
        with self.lock, torch.cuda.device(device) if on_cuda else nullcontext():
            self._thread = threading.get_ident()
            try:
                if on_cuda and self._last is not None:
                    torch.cuda.current_stream(device).wait_event(self._last)
                yield
            finally:
                self._thread = None
                if on_cuda:
                    event = torch.cuda.Event()
                    event.record(torch.cuda.current_stream(device))
                    self._last = event


_orders: "weakref.WeakKeyDictionary[Any, CallOrder]" = weakref.WeakKeyDictionary()
_making = threading.Lock()


def order_of(model: Any) -> CallOrder:
    """Return the order of all calls of a model. It stays the same where the model was edited and all else is made anew."""
    with _making:
        return _orders.setdefault(model, CallOrder())


def kind_of(aligner: Aligner) -> tuple:
    """Return what a captured latent step reads of an aligner, to compare: the addresses in it and the numbers."""
    weight = None if aligner.weight is None else (aligner.weight.data_ptr(), aligner.weight.dtype)
    embedding = None if aligner.embedding is None else state_of(aligner.embedding).key
    return "latent", aligner.kind, aligner.target_norm, weight, embedding
