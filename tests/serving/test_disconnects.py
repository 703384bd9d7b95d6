"""Requests that end before their answer: the client disconnects, or the gateway stops."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from latentmas.serving.model_lease import ModelLease
from served_gateway import QUESTION, SECONDS, ServedGateway, error_of, until


def test_a_client_that_leaves_ends_the_text(served: ServedGateway) -> None:
    async def wait(number: int, body: dict[str, Any]) -> None:
        await asyncio.sleep(60 if number >= 2 else 0)

    served.fake.on_token = wait
    body = {"model": "thinks", "messages": QUESTION, "stream": True}
    with served.client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        while "w1" not in next(lines):
            pass
        assert not served.empty()
    until(lambda: served.fake.disconnected == 1)
    until(served.empty)
    for model, writing in (("thinks", 2), ("mixes", 3)):
        line = served.send(model=model)
        until(lambda: len(served.fake.seen) == writing)  # noqa: B023
        assert not served.empty()
        line.close()
        until(lambda: served.fake.disconnected == writing)  # noqa: B023
        until(served.empty)
    served.fake.on_token = None
    assert served.ask(model="mixes").status_code == 200


def test_clients_that_leave_end_the_thinking_and_never_begin_it(served: ServedGateway) -> None:
    """The first thinks for ever, a step at a time; the second waits for its turn."""
    begun, ended = [], []
    prepare = served.chains["thinks"].prepare

    def thinking(questions: list[str], *, on_progress: Any, **options: Any) -> Any:
        begun.append(questions)
        try:
            while questions == ["Forever"]:
                on_progress(None)
                time.sleep(0.01)
        finally:
            ended.append(questions)
        return prepare(questions, on_progress=on_progress, **options)

    served.chains["thinks"].prepare = thinking  # type: ignore[method-assign]
    first = served.send(messages=[{"role": "user", "content": "Forever"}])
    until(lambda: begun)
    second = served.send()
    until(lambda: served.gateway._model.statistics().tasks_waiting)
    second.close()
    until(lambda: served.gateway.requests == 1)
    assert ended == []
    first.close()
    until(served.empty)
    assert begun == ended == [["Forever"]]
    assert served.ask().status_code == 200


def test_a_client_that_leaves_as_the_thinking_ends_leaves_no_file(served: ServedGateway) -> None:
    pack, packing = served.vllm.pack, threading.Event()

    def cancelled() -> bool:
        try:
            ModelLease.check_cancelled()
        except asyncio.CancelledError:
            return True
        return False

    def waiting(*given: Any) -> Any:
        packing.set()
        until(cancelled)
        return pack(*given)

    served.vllm.pack = waiting  # type: ignore[method-assign]
    line = served.send()
    assert packing.wait(SECONDS)
    line.close()
    until(lambda: served.gateway.requests == 0)
    assert served.empty()


@pytest.mark.parametrize("chain", ["thinks", "mixes"])
def test_a_gateway_that_stops_ends_requests_wherever_they_are(served: ServedGateway, chain: str) -> None:
    """In latent steps, and in a text in the middle of a chain; those that come later have the same error."""
    begun = threading.Event()
    prepare = served.chains[chain].prepare

    def thinking(questions: list[str], *, on_progress: Any, **options: Any) -> Any:
        while chain == "thinks":
            begun.set()
            on_progress(None)
            time.sleep(0.01)
        return prepare(questions, on_progress=on_progress, **options)

    async def wait(number: int, body: dict[str, Any]) -> None:
        begun.set()
        await asyncio.sleep(60)

    served.chains[chain].prepare = thinking  # type: ignore[method-assign]
    served.fake.on_token = wait
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(served.ask, model=chain)
        assert begun.wait(SECONDS)
        served.gateway_app.loop.call_soon_threadsafe(served.gateway.stop)
        error = error_of(answer.result(SECONDS), 503)
    assert error["code"] == "server_ending"
    assert error_of(served.ask(), 503) == error
    until(served.empty)
    until(lambda: served.fake.disconnected == len(served.fake.seen))
