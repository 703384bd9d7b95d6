"""Requests that the gateway refuses: status, field and message."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from latentmas.serving.errors import ApiError
from latentmas.serving.protocol import ChatCompletionRequest
from pydantic import ValidationError
from served_gateway import QUESTION, SECONDS, ServedGateway, error_of, until

USER = {"role": "user", "content": "x"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function"}]}, "tools"), ({"n": 2}, "n"), ({"logprobs": True}, "logprobs"),
    ({"n": True}, "n"), ({"n": 1.0}, "n"), ({"logprobs": 0}, "logprobs"), ({"temperature": 2.1}, "temperature"),
    ({"top_logprobs": 2}, "top_logprobs"), ({"repetition_penalty": 1.1}, "repetition_penalty"), ({"top_k": 4}, "top_k"),
    ({"response_format": {"type": "json_object"}}, "response_format.type"), ({"logit_bias": {"1": 1}}, "logit_bias"),
    ({"temperature": -1}, "temperature"), ({"temperature": "1"}, "temperature"), ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 7}, "max_tokens"),
    ({"max_completion_tokens": 7}, "max_completion_tokens"),
    ({"max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens"), ({"stop": [""]}, "stop.0"), ({"stop": 4}, "stop"),
    ({"seed": 2**63}, "seed"), ({"seed": 1.5}, "seed"), ({"presence_penalty": 3}, "presence_penalty"),
    ({"stream_options": {"include_usage": True}}, "stream_options"), ({"model": 3}, "model"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"), ({"messages": []}, "messages"),
    ({"messages": "x"}, "messages"),
    ({"messages": [USER, USER]}, "messages"), ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "assistant", "content": "x"}, USER]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"), ({"messages": [{**USER, "content": " "}]}, "messages"),
    ({"messages": [{**USER, "name": "x"}]}, "messages.0.name"), ({"messages": [{**USER, "content": "long" * 200}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content.0.type"),
]  # fmt: skip


def test_what_does_not_fit_is_refused(served: ServedGateway) -> None:
    for fields, param in REFUSED:
        body = {"model": "thinks", "messages": QUESTION, **fields}
        for content in (json.dumps(body), json.dumps({"stream": "stream_options" not in fields, **body})):
            error = error_of(served.client.post("/v1/chat/completions", content=content), 400)
            assert (error["param"], error["type"]) == (param, "invalid_request_error"), error
            assert param.split(".")[0] in error["message"] or "question" in error["message"], error
    for raw in (b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"model": "thinks"}', b'{"model": "\\ud800"}'):
        error_of(served.client.post("/v1/chat/completions", content=raw), 400)
    assert error_of(served.client.post("/v1/chat/completions", content=b" " * 2**21), 413)["message"]
    assert served.fake.seen == []
    assert served.ask().status_code == 200


def test_what_is_wrong_many_times_is_refused_for_the_first(served: ServedGateway) -> None:
    """Errors hold neither the time for all that is wrong nor what was sent."""
    many, long = 5_000, "x" * 500_000
    part: dict[str, Any] = {"type": "text", "text": "x"}
    for fields in (
        {"messages": [1] * many}, {"stop": [1] * many}, {str(number): 1 for number in range(many)},
        {"messages": [{"role": "user", "content": [1] * many}]},
        {"messages": [{"role": "user", "content": [{**part, **{str(number): 1 for number in range(many)}}]}]},
    ):  # fmt: skip
        with pytest.raises(ValidationError) as caught:
            ChatCompletionRequest.model_validate({"model": "thinks", "messages": QUESTION, **fields})
        assert caught.value.error_count() == 1
    for fields in (
        {"model": long}, {long: 1}, {"user": [long]}, {"messages": [USER] * many}, {"max_tokens": 10**4000},
        {"max_tokens": 10**4000, "max_completion_tokens": 1}, {"messages": [{**USER, long: 1}]},
    ):  # fmt: skip
        response = served.ask(**fields)
        error_of(response, 404 if fields == {"model": long} else 400)
        assert len(response.content) < 1000
    assert len(served.client.get(f"/{long[:50_000]}").content) < 1000
    for depth in range(850, 1000):
        for field in ("user", "model", "x"):
            body = f'{{"model": "m", "messages": [], "{field}": {"[" * depth}{"]" * depth}}}'
            with pytest.raises(ApiError):
                ChatCompletionRequest.read(body.encode())


def test_a_question_is_checked_in_threads_of_the_gateway_unless_it_is_far_too_long(served: ServedGateway) -> None:
    check, threads = served.chains["thinks"].check, list[threading.Thread]()

    def checking(question: str) -> None:
        threads.append(threading.current_thread())
        check(question)

    served.chains["thinks"].check = checking  # type: ignore[method-assign]
    error = error_of(served.ask(messages=[{"role": "user", "content": "x" * 25_601}]), 400)
    assert error["param"] == "messages"
    assert "of 25601 characters" in error["message"]
    assert "more than 25600 characters" in error["message"]
    assert threads == []
    assert served.ask().status_code == 200
    assert len(threads) == 1
    assert threads[0] not in (threading.main_thread(), served.gateway_app.thread)
    assert served.gateway._checks.total_tokens == 2


def test_what_there_is_not(served: ServedGateway) -> None:
    error = error_of(served.ask(model="gpt"), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "thinks, mixes, alone" in error["message"]
    assert "/v1/chat/completions" in error_of(served.client.post("/v1/completions", json={}), 404)["message"]
    other = served.client.get("/v1/chat/completions")
    assert error_of(other, 405)["code"] == "method_not_allowed"
    assert other.headers["allow"] == "POST"


def test_more_requests_than_may_wait(model: Any, tmp_path: Path) -> None:
    with ServedGateway(model, tmp_path, max_waiting=2) as served, ThreadPoolExecutor() as pool:
        go = threading.Event()

        async def wait(number: int, body: dict[str, Any]) -> None:
            while not go.is_set():
                await asyncio.sleep(0.01)

        served.fake.on_token = wait
        waiting = [pool.submit(served.ask) for _ in range(2)]
        until(lambda: len(served.fake.seen) == 2)
        refused = served.ask()
        assert error_of(refused, 429)["code"] == "too_many_requests"
        assert int(refused.headers["retry-after"]) > 0
        go.set()
        assert [of.result(SECONDS).status_code for of in waiting] == [200, 200]
        assert served.ask().status_code == 200
