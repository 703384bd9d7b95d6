"""Exclusive use of the model, granted to one request at a time in the order of arrival."""

import math
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from anyio import CapacityLimiter, Semaphore, current_effective_deadline, from_thread, to_thread

T = TypeVar("T")


class ModelLease:
    """One request's use of the model."""

    def __init__(self, model: Semaphore, threads: CapacityLimiter, seed: int) -> None:
        """Prepare a lease that `run` acquires.

        Args:
            model: of value 1, shared by all leases on the model. Not a Lock, which only the task that acquired it may release.
            threads: as many as there may be leases at a time, since a lease keeps its thread while it waits.
            seed: of all that is drawn during the lease, whatever other leases draw in between.
        """
        self._model, self._threads, self._seed, self._held = model, threads, seed, False

    async def run(self, work: Callable[[], T]) -> T:
        """Acquire the model and return the result of `work`, which runs in a thread.

        Where the caller is cancelled, `check_cancelled` and `wait` raise in the thread, and this ends once the thread has.
        The caller must run in a task group: a bare Task.cancel() would not wait for the thread.
        """
        await self._acquire()
        try:
            return await to_thread.run_sync(self._begin, work, limiter=self._threads)
        finally:
            self._release()

    @staticmethod
    def check_cancelled() -> None:
        """End the thread where its request was cancelled; do nothing in the event loop, where `wait` reports progress."""
        with suppress(RuntimeError):
            from_thread.check_cancelled()

    @staticmethod
    def wait(work: Coroutine[Any, Any, T]) -> T:
        """Release the model until the event loop has run a coroutine, whose result is returned; called in a lease's thread."""
        seed = int(torch.randint(2**62, ()))  # what is drawn next must not depend on the leases in between
        try:
            result = from_thread.run(_current.get()._run_released, work)
        except CancelledError:
            from_thread.check_cancelled()
            raise
        torch.manual_seed(seed)  # only now: the generator is that of the lease that holds the model
        return result

    def _begin(self, work: Callable[[], T]) -> T:
        _current.set(self)
        torch.manual_seed(self._seed)
        return work()

    async def _run_released(self, work: Coroutine[Any, Any, T]) -> T:
        if current_effective_deadline() == -math.inf:  # anyio delivers a cancellation to tasks that exist at that time
            work.close()
            raise CancelledError
        self._release()
        result = await work
        await self._acquire()
        return result

    async def _acquire(self) -> None:
        await self._model.acquire()
        self._held = True

    def _release(self) -> None:
        if self._held:
            self._held = False
            self._model.release()


_current: ContextVar[ModelLease] = ContextVar("the lease that this thread works for")
