"""Leases of the model: one at a time, in order, released while a coroutine runs, and ended with their request."""

import threading
from typing import Any

import anyio
import pytest
import torch
from anyio import CapacityLimiter, Semaphore
from latentmas.serving.model_lease import ModelLease
from served_gateway import SECONDS, until


class Model:
    """What leases share."""

    def __init__(self) -> None:
        self.semaphore, self.threads = Semaphore(1), CapacityLimiter(4)

    def lease(self, seed: int = 0) -> ModelLease:
        return ModelLease(self.semaphore, self.threads, seed)


async def nothing() -> None:
    pass


def test_leases_are_granted_one_at_a_time_in_order() -> None:
    order: list[int] = []

    async def main() -> None:
        model = Model()

        def work(number: int) -> None:
            assert model.semaphore.value == 0
            order.append(number)

        async with anyio.create_task_group() as group:
            for number in range(4):
                group.start_soon(model.lease().run, lambda number=number: work(number))
                await anyio.sleep(0.01)
        assert model.semaphore.value == 1

    anyio.run(main)
    assert order == [0, 1, 2, 3]


def test_the_model_is_free_while_a_lease_waits() -> None:
    """And what is drawn after that is as without the other lease."""

    async def main() -> None:
        model, arrived = Model(), anyio.Event()

        def slow(other: Any) -> tuple[float, float]:
            first = float(torch.rand(()))
            lease.wait(other())
            return first, float(torch.rand(()))

        async def until_arrived() -> None:
            assert model.semaphore.value == 1
            await arrived.wait()

        def fast() -> None:
            torch.rand(7)
            anyio.from_thread.run_sync(arrived.set)

        lease = model.lease(seed=5)
        alone = await lease.run(lambda: slow(nothing))
        async with anyio.create_task_group() as group:

            async def run() -> None:
                assert await lease.run(lambda: slow(until_arrived)) == alone

            group.start_soon(run)
            await anyio.sleep(0.05)
            group.start_soon(model.lease(seed=6).run, fast)
        assert model.semaphore.value == 1

    anyio.run(main)


@pytest.mark.parametrize("waits", [False, True])
def test_a_cancelled_lease_ends_its_thread_first(waits: bool) -> None:
    ended = threading.Event()

    async def main() -> None:
        model, working = Model(), anyio.Event()

        def work() -> None:
            anyio.from_thread.run_sync(working.set)
            try:
                if waits:
                    ModelLease.wait(anyio.sleep(SECONDS))
                until(ModelLease.check_cancelled)
            finally:
                ended.set()

        async with anyio.create_task_group() as group:
            group.start_soon(model.lease().run, work)
            await working.wait()
            await anyio.sleep(0.05)
            group.cancel_scope.cancel()
        assert ended.is_set()
        assert model.semaphore.value == 1

    anyio.run(main)


def test_a_lease_that_was_cancelled_waits_for_nothing() -> None:
    """Also where the coroutine comes after the cancellation."""
    ran: list[bool] = []

    async def main() -> None:
        model, working = Model(), anyio.Event()
        cancelled = threading.Event()

        async def coroutine() -> None:
            ran.append(True)
            await anyio.sleep(SECONDS)

        def work() -> None:
            anyio.from_thread.run_sync(working.set)
            assert cancelled.wait(SECONDS)
            ModelLease.wait(coroutine())

        async with anyio.create_task_group() as group:
            group.start_soon(model.lease().run, work)
            await working.wait()
            group.cancel_scope.cancel()
            cancelled.set()
        assert model.semaphore.value == 1

    anyio.run(main)
    assert ran == []


def test_a_coroutine_that_fails_leaves_the_model_to_others() -> None:
    async def main() -> None:
        model = Model()

        async def fail() -> None:
            raise KeyError("odd")

        with pytest.raises(KeyError, match="odd"):
            await model.lease().run(lambda: ModelLease.wait(fail()))
        assert model.semaphore.value == 1

    anyio.run(main)
