"""Who uses the model: one request at a time, in the order in which they came; let go while others work for it."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from contextlib import suppress
from contextvars import ContextVar, copy_context
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Gone(Exception):
    """Nobody waits for this request any more."""


class Turn:
    """One request's use of the model.

    Attributes:
        gone: whether nobody waits for it; what runs in the turn looks at it at each step.
    """

    def __init__(self, lock: asyncio.Lock, threads: Executor, seed: int) -> None:
        """A turn that is still to come.

        Args:
            lock: that all turns on the model share.
            threads: one for each turn that there may be at a time; with fewer, turns would wait for each other for ever.
            seed: of all that is drawn in it, whatever other turns come in between.
        """
        self.gone = False
        self._lock, self._holds, self._threads, self._seed = lock, False, threads, seed
        self._loop = asyncio.get_running_loop()
        self._waits_for: Future[Any] | None = None

    async def run(self, work: Callable[[], T], undo: Callable[[T], None]) -> T:
        """Wait for the turn and run `work` in a thread.

        Where the caller is cancelled, `work` is told by `gone`, and has ended when this does.

        Args:
            undo: of what it gave, where nobody takes that any more.
        """
        await self._take()
        try:
            thread = self._loop.run_in_executor(self._threads, copy_context().run, self._begin, work)
            try:
                return await asyncio.shield(thread)
            except asyncio.CancelledError:
                self.gone = True
                if self._waits_for is not None:
                    self._waits_for.cancel()
                while not thread.done():  # whoever else loses patience: the model is in use until then
                    with suppress(asyncio.CancelledError):
                        await asyncio.wait({thread})
                if not thread.cancelled() and thread.exception() is None:
                    undo(thread.result())
                raise
        finally:
            self._give()

    def look(self) -> None:
        """Raise Gone where nobody waits for the request."""
        if self.gone:
            raise Gone

    @staticmethod
    def wait_for(work: Coroutine[Any, Any, T]) -> T:
        """In the thread of a turn: let others use the model until the event loop has done some work.

        Raises:
            Gone: where nobody waits for the request.
            What the work raises.
        """
        return _current.get()._wait_for(work)

    def _begin(self, work: Callable[[], T]) -> T:
        _current.set(self)
        torch.manual_seed(self._seed)
        return work()

    def _wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        seed = int(torch.randint(2**62, ()))  # what is drawn next must not depend on the turns in between
        self._waits_for = asyncio.run_coroutine_threadsafe(self._without(work), self._loop)
        try:
            self.look()
            done = self._waits_for.result()
        except BaseException:
            self._waits_for.cancel()
            self.look()
            raise
        finally:
            self._waits_for = None
        torch.manual_seed(seed)  # only now that the turn is held again: the generator is that of whoever holds it
        return done

    async def _without(self, work: Coroutine[Any, Any, T]) -> T:
        self._give()
        done = await work
        await self._take()
        return done

    async def _take(self) -> None:
        await self._lock.acquire()
        self._holds = True

    def _give(self) -> None:
        if self._holds:
            self._holds = False
            self._lock.release()


_current: ContextVar[Turn] = ContextVar("the turn that this thread works in")
