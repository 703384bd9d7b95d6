"""The gateway of `latentmas serve` in front of a server that misbehaves on demand; the model is a tiny one."""

import asyncio
import base64
import contextlib
import errno
import gc
import io
import json
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from fake_vllm import Fake, Served
from latentmas import Agent, Chain
from latentmas.backends.vllm.server import Upstream
from latentmas.serving import model_lease as turns
from latentmas.serving.gateway import Gateway
from latentmas.serving.protocol import ApiError, ChatRequest
from latentmas.serving.server import Serving, _listening, _Server, serve
from latentmas.serving.vllm_process import Child
from pydantic import ValidationError
from rich.console import Console
from tokenizers_offline import character_tokenizer

from latentmas_kernels.cache.free_memory import InsufficientMemoryError

SECONDS = 20.0
QUESTION = [{"role": "user", "content": "Why?"}]
THINKER, JUDGER = Agent("planner", "{question} Plan.", latent_steps=3), Agent("judger", "Answer.", max_new_tokens=6)
WRITER, ASKED = Agent("writer", "Draft.", max_new_tokens=4), Agent("judger", "{question} Answer.", max_new_tokens=6)


class House:
    """A gateway in front of a fake server."""

    def __init__(
        self, model: Any, folder: Path, *, kv_transfer: str = "kv", timeout: float = 60.0, **options: Any
    ) -> None:
        self.tokenizer = character_tokenizer()
        self.upstream = Upstream(model, self.tokenizer, kv_transfer=kv_transfer, folder=folder, timeout=timeout)
        self.fake, self.folder = Fake(next(iter(self.upstream._probe.likely))), folder
        self.chains = {
            name: Chain(model, self.tokenizer, agents, aligner="identity", decoder=self.upstream)
            for name, agents in {
                "thinks": [THINKER, JUDGER], "mixes": [THINKER, WRITER, JUDGER], "alone": [ASKED],
            }.items()
        }  # fmt: skip
        self.options = options

    def __enter__(self) -> "House":
        async def fake() -> Any:
            return self.fake.app

        async def gateway() -> Any:
            self.upstream.at(self.below.url)
            await self.upstream.connect()
            self.gateway = Gateway(self.chains, self.upstream, **self.options)
            return self.gateway.app

        with contextlib.ExitStack() as stack:
            self.below = stack.enter_context(Served(fake))
            self.front = stack.enter_context(Served(gateway))
            self.client = stack.enter_context(httpx.Client(base_url=self.front.url, timeout=SECONDS, trust_env=False))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def ask(self, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/chat/completions", json={"model": "thinks", "messages": QUESTION, **fields})

    def call(self, **fields: Any) -> socket.socket:
        """Ask, and do not wait; closing it is how a client goes away."""
        body = json.dumps({"model": "thinks", "messages": QUESTION, **fields})
        line = socket.create_connection(("127.0.0.1", self.front.port), SECONDS)
        line.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        return line

    def events(self, **fields: Any) -> list[tuple[str, Any]]:
        """(name, data) of each event of a stream."""
        response = self.ask(stream=True, **fields)
        assert response.status_code == 200, response.text
        found = []
        for block in response.text.removesuffix("\n\n").split("\n\n"):
            *name, data = block.split("\n")
            said = data.removeprefix("data: ")
            found.append((name[0] if name else "", said if said == "[DONE]" else json.loads(said)))
        return found

    def empty(self) -> bool:
        """Nothing is left of any request."""
        return not list(self.folder.iterdir()) and self.gateway.requests == 0


@pytest.fixture
def house(model: Any, tmp_path: Path) -> Iterator[House]:
    with House(model, tmp_path) as house:
        yield house


def until(true: Callable[[], Any], seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_an_answer(house: House) -> None:
    response = house.ask()
    assert response.status_code == 200, response.text
    answer = response.json()
    assert (answer["object"], answer["model"]) == ("chat.completion", "thinks")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": " w0 w1 w2 w3 w4 w5", "refusal": None}
    assert choice["finish_reason"] == "length"
    prompts = [len(house.tokenizer(text).input_ids) for text in ("Why? Plan.\n\n", "\n\nAnswer.\n\n")]
    prompts[1] -= 1  # the beginning of a text is there once
    assert answer["usage"] == {
        "prompt_tokens": sum(prompts), "completion_tokens": 6, "total_tokens": sum(prompts) + 6,
        "completion_tokens_details": {"reasoning_tokens": 0}, "latent_steps": 3,
        "latentmas": [
            {"agent": "planner", "prompt_tokens": prompts[0], "latent_steps": 3, "new_tokens": 0},
            {"agent": "judger", "prompt_tokens": prompts[1], "latent_steps": 0, "new_tokens": 6},
        ],
    }  # fmt: skip
    (body,) = house.fake.seen
    slots = prompts[0] + 3
    assert body["prompt"][:slots] == [0] * slots
    assert house.tokenizer.decode(body["prompt"][slots:]) == "\n\nAnswer.\n\n"
    assert body["kv_transfer_params"]["latentmas_slots"] == slots
    assert body["cache_salt"] == body["kv_transfer_params"]["latentmas_file"] + ":0"
    sampling = {
        "temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0,
        "frequency_penalty": 0, "max_tokens": 6, "min_tokens": 0, "stop": [], "ignore_eos": True, "stop_token_ids": [2],
        "skip_special_tokens": True, "return_token_ids": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert {name: body[name] for name in sampling} == sampling
    assert house.empty()


def test_a_stream_is_the_answer_in_pieces(house: House) -> None:
    house.fake.only = 3
    (role, *words, ending, usage, done) = house.events(stream_options={"include_usage": True})
    assert role[1]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [event["choices"][0]["delta"] for _, event in words] == [{"content": f" w{n}"} for n in range(3)]
    assert (ending[1]["choices"][0]["delta"], ending[1]["choices"][0]["finish_reason"]) == ({}, "stop")
    whole = house.ask().json()
    assert (
        "".join(event["choices"][0]["delta"]["content"] for _, event in words)
        == (whole["choices"][0]["message"]["content"])
    )
    assert (usage[1]["choices"], usage[1]["usage"]) == ([], whole["usage"])
    assert done[1] == "[DONE]"
    assert len({event["id"] for _, event in (role, *words, ending, usage)}) == 1
    assert not any("usage" in event for _, event in house.events()[:-1])
    assert house.empty()


def test_what_a_request_asks_of_the_text(house: House) -> None:
    response = house.ask(
        temperature=0.7, top_p=0.9, max_tokens=2, stop="x", presence_penalty=0.5, frequency_penalty=-1, n=1, logprobs=False,
        response_format={"type": "text"}, user="me", metadata={"a": "b"}, tools=None,
        messages=[
            {"role": "developer", "content": "Be"},
            {"role": "user", "content": [{"type": "text", "text": "br"}, {"type": "text", "text": "ief"}]},
        ],
    )  # fmt: skip
    assert response.status_code == 200, response.text
    first, asked = response.json()["usage"]["latentmas"][0], "Be\n\nbrief Plan.\n\n"
    assert first["prompt_tokens"] == len(house.tokenizer(asked).input_ids)
    (body,) = house.fake.seen
    want = {
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 2,
        "stop": ["x"],
        "presence_penalty": 0.5,
        "frequency_penalty": -1,
    }
    assert {name: body[name] for name in want} == want
    assert house.ask(max_completion_tokens=3).json()["usage"]["completion_tokens"] == 3


def test_a_seed_decides_what_is_drawn_whatever_comes_in_between(house: House) -> None:
    """The first writer of one request waits until another request has drawn."""
    drawn = threading.Event()

    async def wait(number: int, body: dict[str, Any]) -> None:
        while body["max_tokens"] == 4 and body["temperature"] == 0.5 and not drawn.is_set():
            await asyncio.sleep(0.01)

    house.fake.on_token = wait
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(house.ask, model="mixes", temperature=0.5, seed=7)
        until(lambda: house.fake.seen)
        assert house.ask(model="mixes", temperature=0.6, seed=8).status_code == 200
        drawn.set()
        assert slow.result(SECONDS).status_code == 200
    assert house.ask(model="mixes", temperature=0.5, seed=7).status_code == 200
    seeds = [body["seed"] for body in house.fake.seen if body["temperature"] == 0.5]
    assert seeds[:2] == seeds[2:]
    assert len(set(seeds)) == 2
    for _ in range(2):
        house.ask(temperature=0.4)
    assert len({body["seed"] for body in house.fake.seen if body["temperature"] == 0.4}) == 2


def test_a_request_that_fails_leaves_what_others_draw_alone(house: House) -> None:
    """The text in the middle of one request fails while another one has the turn and has not drawn yet."""
    thinking, failed = threading.Event(), threading.Event()
    prepare = house.chains["thinks"].prepare

    def waiting(questions: list[str], **options: Any) -> Any:
        thinking.set()
        assert failed.wait(SECONDS)
        return prepare(questions, **options)

    async def fail(number: int, body: dict[str, Any]) -> None:
        while not thinking.is_set():
            await asyncio.sleep(0.01)
        raise ConnectionError

    assert house.ask(temperature=0.5, seed=7).status_code == 200
    house.chains["thinks"].prepare = waiting  # type: ignore[method-assign]
    house.fake.on_token = fail
    with ThreadPoolExecutor() as pool:
        fails = pool.submit(house.ask, model="mixes", temperature=0.4, seed=9)
        until(lambda: len(house.fake.seen) == 2)
        draws = pool.submit(house.ask, temperature=0.5, seed=7)
        assert fails.result(SECONDS).status_code == 502
        house.fake.on_token = None
        failed.set()
        assert draws.result(SECONDS).status_code == 200
    assert len({body["seed"] for body in house.fake.seen if body["temperature"] == 0.5}) == 1


def test_characters_that_some_take_for_ends_of_lines(house: House) -> None:
    house.fake.behind = "\u2028\u2029\x85\x0b\x1c\xe9\U0001f600"
    want = "".join(f" w{number}{house.fake.behind}" for number in range(6))
    assert house.ask().json()["choices"][0]["message"]["content"] == want
    events = house.client.post("/v1/chat/completions", json={"model": "thinks", "messages": QUESTION, "stream": True})
    lines = [line.removeprefix("data: ") for line in events.iter_lines() if line.startswith("data: {")]
    assert "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines) == want


def test_a_memory_is_freed_once_it_is_handed_over(house: House) -> None:
    pack, memories = house.upstream.pack, list[Any]()

    def packing(memory: Any, requests: Any) -> Any:
        memories.append(weakref.ref(memory))
        return pack(memory, requests)

    async def look(number: int, body: dict[str, Any]) -> None:
        gc.collect()
        assert [memory() for memory in memories] == [None]

    house.upstream.pack, house.fake.on_token = packing, look  # type: ignore[method-assign]
    assert house.ask().status_code == 200


def test_agents_that_write_in_the_middle_let_others_think(house: House) -> None:
    """Each text waits until both requests are writing, which is never where one has the model to itself."""

    async def wait(number: int, body: dict[str, Any]) -> None:
        while len(house.fake.seen) < 2:
            await asyncio.sleep(0.01)

    house.fake.on_token = wait
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(house.ask, model="mixes") for _ in range(2)]
        usages = [answer.result(SECONDS).json()["usage"] for answer in answers]
    for usage in usages:
        assert [agent["new_tokens"] for agent in usage["latentmas"]] == [0, 4, 6]
        assert usage["completion_tokens_details"] == {"reasoning_tokens": 4}
        assert usage["completion_tokens"] == 10
    assert house.empty()


def test_embeddings_are_what_the_memory_was_fed(model: Any, tmp_path: Path) -> None:
    with House(model, tmp_path, kv_transfer="embeds") as house:
        assert house.fake.probes == 2
        assert house.ask().status_code == 200
        (body,) = house.fake.seen
        assert "prompt" not in body
        embeds = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])))
        read = house.tokenizer("Why? Plan.\n\n").input_ids
        last = house.tokenizer("\n\nAnswer.\n\n", add_special_tokens=False).input_ids
        assert len(embeds) == len(read) + 3 + len(last)
        table = model.get_input_embeddings().weight
        torch.testing.assert_close(embeds[: len(read)], table[read], rtol=0, atol=0)
        torch.testing.assert_close(embeds[-len(last) :], table[last], rtol=0, atol=0)
        assert house.ask(model="alone").status_code == 200
        assert house.fake.seen[-1]["prompt"] == house.tokenizer("Why? Answer.\n\n").input_ids


def test_models_and_health(house: House) -> None:
    assert [model["id"] for model in house.client.get("/v1/models").json()["data"]] == ["thinks", "mixes", "alone"]
    assert house.client.get("/v1/models/mixes").json()["id"] == "mixes"
    assert error_of(house.client.get("/v1/models/x"), 404)["code"] == "model_not_found"
    assert house.client.get("/health").status_code == 200
    house.below.__exit__()
    assert error_of(house.client.get("/health"), 503)["code"] == "vllm_unreachable"


def test_health_of_a_server_that_hangs(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentmas.backends.vllm.server.HEALTH_SECONDS", 0.1)

    async def hang() -> None:
        await asyncio.sleep(60)

    house.fake.on_question = hang
    assert "its log" in error_of(house.client.get("/health"), 503)["message"]


# ---- refusals --------------------------------------------------------------------------------------------------------

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


def test_what_does_not_fit_is_refused(house: House) -> None:
    for fields, param in REFUSED:
        body = {"model": "thinks", "messages": QUESTION, **fields}
        for content in (json.dumps(body), json.dumps({"stream": "stream_options" not in fields, **body})):
            error = error_of(house.client.post("/v1/chat/completions", content=content), 400)
            assert (error["param"], error["type"]) == (param, "invalid_request_error"), error
            assert param.split(".")[0] in error["message"] or "question" in error["message"], error
    for raw in (b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"model": "thinks"}', b'{"model": "\\ud800"}'):
        error_of(house.client.post("/v1/chat/completions", content=raw), 400)
    assert error_of(house.client.post("/v1/chat/completions", content=b" " * 2**21), 413)["message"]
    assert house.fake.seen == []
    assert house.ask().status_code == 200


def test_what_is_wrong_many_times_is_refused_for_the_first(house: House) -> None:
    """Errors hold neither the time for all that is wrong nor what was sent."""
    many, long = 5_000, "x" * 500_000
    part: dict[str, Any] = {"type": "text", "text": "x"}
    for fields in (
        {"messages": [1] * many}, {"stop": [1] * many}, {str(number): 1 for number in range(many)},
        {"messages": [{"role": "user", "content": [1] * many}]},
        {"messages": [{"role": "user", "content": [{**part, **{str(number): 1 for number in range(many)}}]}]},
    ):  # fmt: skip
        with pytest.raises(ValidationError) as caught:
            ChatRequest.model_validate({"model": "thinks", "messages": QUESTION, **fields})
        assert caught.value.error_count() == 1
    for fields in (
        {"model": long}, {long: 1}, {"user": [long]}, {"messages": [USER] * many}, {"max_tokens": 10**4000},
        {"max_tokens": 10**4000, "max_completion_tokens": 1}, {"messages": [{**USER, long: 1}]},
    ):  # fmt: skip
        response = house.ask(**fields)
        error_of(response, 404 if fields == {"model": long} else 400)
        assert len(response.content) < 1000
    assert len(house.client.get(f"/{long[:50_000]}").content) < 1000
    for depth in range(850, 1000):
        for field in ("user", "model", "x"):
            body = f'{{"model": "m", "messages": [], "{field}": {"[" * depth}{"]" * depth}}}'
            with pytest.raises(ApiError):
                ChatRequest.read(body.encode())


def test_a_question_is_checked_in_threads_of_the_gateway_unless_it_is_far_too_long(house: House) -> None:
    check, threads = house.chains["thinks"].check, list[str]()

    def checking(question: str) -> None:
        threads.append(threading.current_thread().name)
        check(question)

    house.chains["thinks"].check = checking  # type: ignore[method-assign]
    error = error_of(house.ask(messages=[{"role": "user", "content": "x" * 25_601}]), 400)
    assert error["param"] == "messages"
    assert "of 25601 characters" in error["message"]
    assert "more than 25600 characters" in error["message"]
    assert threads == []
    assert house.ask().status_code == 200
    assert [name.partition("_")[0] for name in threads] == ["latentmas-check"]


def test_what_there_is_not(house: House) -> None:
    error = error_of(house.ask(model="gpt"), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "thinks, mixes, alone" in error["message"]
    assert "/v1/chat/completions" in error_of(house.client.post("/v1/completions", json={}), 404)["message"]
    other = house.client.get("/v1/chat/completions")
    assert error_of(other, 405)["code"] == "method_not_allowed"
    assert other.headers["allow"] == "POST"


def test_more_requests_than_may_wait(model: Any, tmp_path: Path) -> None:
    with House(model, tmp_path, max_waiting=2) as house, ThreadPoolExecutor() as pool:
        go = threading.Event()

        async def wait(number: int, body: dict[str, Any]) -> None:
            while not go.is_set():
                await asyncio.sleep(0.01)

        house.fake.on_token = wait
        waiting = [pool.submit(house.ask) for _ in range(2)]
        until(lambda: len(house.fake.seen) == 2)
        refused = house.ask()
        assert error_of(refused, 429)["code"] == "too_many_requests"
        assert int(refused.headers["retry-after"]) > 0
        go.set()
        assert [of.result(SECONDS).status_code for of in waiting] == [200, 200]
        assert house.ask().status_code == 200


# ---- a server that fails ---------------------------------------------------------------------------------------------


def failing(house: House, status: int, code: str, said: str, *, begun: bool) -> None:
    """Without a stream it is that status; in one that has begun, an event in place of the end."""
    error = error_of(house.ask(), status)
    assert error["code"] == code
    assert said in error["message"]
    if begun:
        *words, (name, last) = house.events()
        assert name == "event: error"
        assert last["error"] == error
        assert all(event["choices"][0]["finish_reason"] is None for _, event in words)
    else:
        assert error_of(house.ask(stream=True), status) == error
    assert house.empty()


def test_memory_that_was_not_found_is_no_answer(house: House) -> None:
    house.fake.cached = lambda slots: slots - 1
    failing(house, 502, "vllm_failed", "1 of 16 slots of memory as placeholders", begun=True)
    house.fake.cached = lambda slots: None
    failing(house, 502, "vllm_failed", "--enable-prompt-tokens-details", begun=True)
    assert house.ask(model="alone").status_code == 200  # without a memory there is nothing to find


def test_a_server_that_refuses_or_fails(house: House) -> None:
    house.fake.refuse = 500
    failing(house, 502, "vllm_failed", "status 500", begun=False)
    house.fake.refuse, house.fake.error_at = None, 2
    failing(house, 502, "vllm_failed", "the engine burns", begun=True)
    house.fake.error_at = 0
    failing(house, 502, "vllm_failed", "the engine burns", begun=False)


def test_whether_to_send_a_request_again(house: House) -> None:
    """Clients do so by themselves, and the chain would think again."""
    for status, told, code in ((400, 400, "vllm_refused"), (413, 400, "vllm_refused"), (422, 400, "vllm_refused")):
        house.fake.refuse = status
        failing(house, told, code, f"status {status}", begun=False)
        assert house.ask().headers["x-should-retry"] == "false"
    for status in (429, 503):
        house.fake.refuse = status
        failing(house, 503, "vllm_busy", f"status {status}", begun=False)
        assert int(house.ask().headers["retry-after"]) > 0
    house.fake.refuse = None
    assert house.ask().status_code == 200


def test_no_room(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(error: Exception) -> Any:
        def fail(*_: Any, **__: Any) -> Any:
            raise error

        return fail

    for error in (OSError(errno.ENOSPC, "full"), InsufficientMemoryError("full")):
        with monkeypatch.context() as patch:
            patch.setattr("latentmas.backends.vllm.server.KVFile", raising(error))
            response = house.ask()
        assert "--folder" in error_of(response, 503)["message"]
        assert response.json()["error"]["code"] == "folder_unwritable"
        assert int(response.headers["retry-after"]) > 0
    for error in (MemoryError(), InsufficientMemoryError("none"), torch.OutOfMemoryError("none")):
        with monkeypatch.context() as patch:
            patch.setattr(house.chains["thinks"], "prepare", raising(error))
            response = house.ask()
        assert error_of(response, 503)["code"] == "no_room"
        assert response.json()["error"]["message"]
        assert int(response.headers["retry-after"]) > 0
    with monkeypatch.context() as patch:
        patch.setattr(ChatRequest, "read", raising(KeyError("odd")))
        assert error_of(house.ask(), 500)["code"] == "internal_error"
    assert house.ask().status_code == 200


CHOICE = {"index": 0, "text": "a", "token_ids": [1], "finish_reason": None}
ODD = (
    "[]", "5", "{", "null", "{}", '{"choices": null}', '{"choices": [1]}', json.dumps({"choices": [{**CHOICE, "text": None}]}),
    json.dumps({"choices": [{**CHOICE, "token_ids": 3}]}),
)  # fmt: skip


def test_a_server_that_says_odd_things(house: House) -> None:
    for data in ODD:
        house.fake.raw = f"data: {data}\n\n"
        failing(house, 502, "vllm_failed", "not what vLLM says", begun=False)
    for raw in ("", ": ping\n\ndata: [DONE]\n\n", "x"):
        house.fake.raw = raw
        failing(house, 502, "vllm_failed", "broke off", begun=False)
        assert not house.upstream._connected
    house.fake.raw = None
    assert house.ask().status_code == 200


def test_requests_that_wait_for_a_server_share_one_attempt(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentmas.backends.vllm.server.ASK_SECONDS", 1.0)

    async def hang() -> None:
        await asyncio.sleep(60)

    house.fake.on_question, house.upstream._connected, asked = hang, False, house.fake.asked
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(house.ask) for _ in range(8)]
        until(lambda: house.fake.asked > asked)
        house.call().close()  # who leaves does not end it for the others
        for answer in answers:
            error = error_of(answer.result(SECONDS), 504)
            assert "for 1 s" in error["message"]
            assert "--timeout" not in error["message"]
            assert answer.result().headers["x-should-retry"] == "false"
    assert house.fake.asked == asked + 1
    house.fake.on_question = None
    assert house.ask().status_code == 200


def test_a_server_that_dies_is_tried_out_again(house: House) -> None:
    house.fake.cut_at = 3
    failing(house, 502, "vllm_failed", "broke off", begun=True)
    house.fake.cut_at, probes = None, house.fake.probes
    assert house.ask().status_code == 200
    assert house.fake.probes == probes + 2


def test_a_server_that_dies_for_an_agent_in_the_middle(house: House) -> None:
    house.fake.cut_at = 3
    error = error_of(house.ask(model="mixes"), 502)
    assert error["code"] == "vllm_failed"
    assert len(house.fake.seen) == 1
    assert house.empty()


def test_a_silent_server(model: Any, tmp_path: Path) -> None:
    with House(model, tmp_path, timeout=0.5) as house:
        silent_from = 2

        async def wait(number: int, body: dict[str, Any]) -> None:
            await asyncio.sleep(60 if number >= silent_from else 0)

        house.fake.on_token = wait
        failing(house, 504, "vllm_silent", "0.5 s", begun=True)
        silent_from = 0
        failing(house, 504, "vllm_silent", "0.5 s", begun=False)
        until(lambda: house.fake.left == 4)


def test_a_server_that_is_away_for_a_while(house: House) -> None:
    house.below.__exit__()
    for _ in range(2):
        refused = house.ask(stream=True)
        assert error_of(refused, 503)["code"] == "vllm_unreachable"
        assert int(refused.headers["retry-after"]) > 0
    probes = house.fake.probes

    async def fake() -> Any:
        return house.fake.app

    with Served(fake, house.below.port):
        assert house.ask().status_code == 200
        assert house.fake.probes == probes + 2
        house.fake.cached = lambda slots: 0  # exchanged for one without the connector
        house.upstream._connected = False
        error = error_of(house.ask(), 500)
        assert "--kv-config" in error["message"]
    assert house.empty()


@pytest.mark.parametrize("kv_transfer", ["kv", "embeds"])
def test_other_servers_are_refused_at_once(model: Any, tmp_path: Path, kv_transfer: str) -> None:
    house = House(model, tmp_path, kv_transfer=kv_transfer)
    fake, likely = house.fake, house.fake.probe_token

    async def app() -> Any:
        return fake.app

    async def connect(url: str) -> None:
        house.upstream.at(url)
        await house.upstream.connect()

    with Served(app) as below:
        asyncio.run(connect(below.url + "/v1"))
        fake.probe_token = next(token for token in range(97) if token not in house.upstream._probe.likely)
        with pytest.raises(ValueError, match="another model"):
            asyncio.run(connect(below.url))
        fake.probe_token = likely
        if kv_transfer == "kv":
            fake.cached = lambda slots: 0
            with pytest.raises(ValueError, match="latentmas serve --kv-config"):
                asyncio.run(connect(below.url))
    with Served(app) as below, pytest.raises(ValueError, match="not what vLLM says"):
        asyncio.run(connect(below.url + "/nowhere"))
    assert not list(tmp_path.iterdir())


# ---- clients that go away --------------------------------------------------------------------------------------------


def test_a_client_that_leaves_ends_the_text(house: House) -> None:
    async def wait(number: int, body: dict[str, Any]) -> None:
        await asyncio.sleep(60 if number >= 2 else 0)

    house.fake.on_token = wait
    body = {"model": "thinks", "messages": QUESTION, "stream": True}
    with house.client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        while "w1" not in next(lines):
            pass
        assert not house.empty()
    until(lambda: house.fake.left == 1)
    until(house.empty)
    for model, writing in (("thinks", 2), ("mixes", 3)):
        line = house.call(model=model)
        until(lambda: len(house.fake.seen) == writing)  # noqa: B023
        assert not house.empty()
        line.close()
        until(lambda: house.fake.left == writing)  # noqa: B023
        until(house.empty)
    house.fake.on_token = None
    assert house.ask(model="mixes").status_code == 200


def test_clients_that_leave_end_the_thinking_and_never_begin_it(house: House) -> None:
    """The first thinks for ever, a step at a time; the second waits for its turn."""
    begun, ended = [], []
    prepare = house.chains["thinks"].prepare

    def thinking(questions: list[str], *, on_progress: Any, **options: Any) -> Any:
        begun.append(questions)
        try:
            while questions == ["Forever"]:
                on_progress(None)
                time.sleep(0.01)
        finally:
            ended.append(questions)
        return prepare(questions, on_progress=on_progress, **options)

    house.chains["thinks"].prepare = thinking  # type: ignore[method-assign]
    first = house.call(messages=[{"role": "user", "content": "Forever"}])
    until(lambda: begun)
    second = house.call()
    until(lambda: house.gateway._model._waiters)
    second.close()
    until(lambda: house.gateway.requests == 1)
    assert ended == []
    first.close()
    until(house.empty)
    assert begun == ended == [["Forever"]]
    assert house.ask().status_code == 200


def test_a_client_that_leaves_as_the_thinking_ends_leaves_no_file(house: House) -> None:
    pack, packing = house.upstream.pack, threading.Event()

    def waiting(*given: Any) -> Any:
        packing.set()
        until(lambda: turns._current.get().gone)
        return pack(*given)

    house.upstream.pack = waiting  # type: ignore[method-assign]
    line = house.call()
    assert packing.wait(SECONDS)
    line.close()
    until(lambda: house.gateway.requests == 0)
    assert house.empty()


# ---- vLLM as a child -------------------------------------------------------------------------------------------------


def child_of(model: Any, folder: Path, program: str) -> tuple[Child, list[str]]:
    """One that runs a Python program in place of vLLM's server; its port is the last argument."""
    said: list[str] = []
    upstream = Upstream(model, character_tokenizer(), folder=folder)
    child = Child("model", model, upstream, [], said.append)
    child._command = [sys.executable, "-c", program]
    return child, said


def test_a_child_that_does_not_start_says_why(model: Any, tmp_path: Path) -> None:
    child, said = child_of(model, tmp_path, "import sys; print('no such\\rgpu'); sys.exit(3)")
    with pytest.raises(ValueError, match=r"exit code 3(.|\n)*such\ngpu"):
        asyncio.run(asyncio.wait_for(child.start(), SECONDS))
    assert said == ["vLLM: no such", "vLLM: gpu"]


SERVER = """
import http.server, os, pathlib, subprocess, sys
if pathlib.Path("FOLDER/broken").exists(): sys.exit(4)
subprocess.Popen(["sh", "-c", "trap 'sleep 0.5; touch FOLDER/tidy; exit' TERM; while :; do sleep 0.1; done"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""
"""Has a child that tidies up when it is told to end."""


def running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_child_is_started_again_but_not_for_ever(model: Any, tmp_path: Path) -> None:
    child, said = child_of(model, tmp_path, SERVER.replace("FOLDER", str(tmp_path)))

    async def run() -> None:
        await child.start()
        keeping = asyncio.ensure_future(child.keep())
        try:
            assert child._process is not None
            first = psutil.Process(child._process.pid)
            group = [first, *first.children()]
            assert len(group) == 2
            os.kill(first.pid, signal.SIGKILL)
            while not any("answers again" in line for line in said):
                await asyncio.sleep(0.05)
            assert not any(running(process) for process in group)
            assert (tmp_path / "tidy").exists()
            (tmp_path / "broken").touch()
            os.kill(child._process.pid, signal.SIGKILL)
            with pytest.raises(ValueError, match="did not start 3 times in a row"):
                await keeping
        finally:
            keeping.cancel()
            await child.end()

    asyncio.run(asyncio.wait_for(run(), 2 * SECONDS))


def test_a_child_leaves_nothing_behind(model: Any, tmp_path: Path) -> None:
    child, _ = child_of(model, tmp_path, SERVER.replace("FOLDER", str(tmp_path)))

    async def run() -> None:
        try:
            await child.start()
            assert child._process is not None
            first = psutil.Process(child._process.pid)
            group = [first, *first.children()]
        finally:
            await child.end()
        assert not any(running(process) for process in group)
        assert (tmp_path / "tidy").exists()

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_options_that_the_gateway_sets_are_refused(model: Any, tmp_path: Path) -> None:
    upstream = Upstream(model, character_tokenizer(), folder=tmp_path)
    for option in (
        "--port=1", "--kv_transfer_config", "--host", "--dtype", "--kv-transfer-config.kv_role=x", "--kv-tr", "--por=1",
        "--no-enable-prompt-tokens-details", "--ssl-keyfile", "--ssl_certfile=x", "--root-path", "--config=x", "--api-k",
    ):  # fmt: skip
        with pytest.raises(ValueError, match="--vllm-url"):
            Child("model", model, upstream, ["--max-num-seqs", "4", option], print)
    free = [
        "--max-model-len", "-1", "--no-enable-prefix-caching", "--api-server-count=1", "-tp", "1", "--kv-cache-dtype", "auto",
        "--model-impl=auto", "--uvicorn-log-level", "info",
    ]  # fmt: skip
    Child("model", model, upstream, free, print)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_what_the_command_refuses_before_it_loads_anything(tmp_path: Path) -> None:
    chain = "agents: [{name: a, output: text, prompt: '{question}'}]"
    (tmp_path / "one.yaml").write_text(chain)
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "one.yaml").write_text(chain)
    console = Console(stderr=True)
    missing = str(tmp_path / "no-model")
    with pytest.raises(ValueError, match="both called 'one'"):
        serve(Serving(missing, [str(tmp_path / "one.yaml"), str(tmp_path / "deeper" / "one.yaml")]), console)
    with pytest.raises(ValueError, match="is no file"):
        serve(Serving(missing, ["nothing.yaml"]), console)
    with pytest.raises(ValueError, match="--vllm-url and options"):
        serve(Serving(missing, vllm_url="http://x", vllm_options=["--seed", "1"]), console)
    with pytest.raises(ValueError, match="behind --"):
        serve(Serving(missing, vllm_options=["chain.yaml"]), console)
    with pytest.raises(ValueError, match="--max-waiting"):
        serve(Serving(missing, max_waiting=0), console)
    for url in ("localhost:8001", "ftp://x", "http://x:bad", "127.0.0.1:8001", "", "http://", "http://:80"):
        with pytest.raises(ValueError, match="supported is the address"):
            serve(Serving(missing, vllm_url=url), console)

    async def nothing() -> Any:
        return None

    taken = Served(nothing)
    taken.socket.listen()
    with taken.socket, pytest.raises(ValueError, match=f"port {taken.port}"):
        serve(Serving(missing, port=taken.port), console)


def test_two_servers_at_one_address() -> None:
    with _listening("127.0.0.1", 0) as first, pytest.raises(ValueError, match="--port"):
        _listening("127.0.0.1", first.getsockname()[1])


def test_one_client_for_one_address(model: Any, tmp_path: Path) -> None:
    upstream = Upstream(model, character_tokenizer(), folder=tmp_path)
    for url in ("http://LOCALHOST:8001", "http://127.0.0.1:80", "http://[::1]:80/v1/"):
        upstream.at(url)
        assert upstream._http is upstream._http


def run_server(house: House, child: Child | None, meanwhile: Callable[[_Server], None]) -> int:
    """The command behind the loading, in this thread, which the signals go to; `meanwhile` in another one."""
    address = _listening("127.0.0.1", 0)
    url = None if child is not None else house.below.url
    server = _Server(Serving(vllm_url=url), Console(stderr=True), house.upstream, child, house.chains, address)
    with address, ThreadPoolExecutor(1) as pool:
        other = pool.submit(meanwhile, server)
        code = asyncio.run(asyncio.wait_for(server.run(), SECONDS))
        other.result(SECONDS)
    return code


@pytest.mark.parametrize("signals", [1, 2])
def test_requests_that_the_end_cuts_off(
    house: House, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], signals: int
) -> None:
    """At the end of the time that they are given, or at once by the second signal."""
    monkeypatch.setattr("latentmas.serving.server.GRACE_SECONDS", 1 if signals == 1 else 60)

    async def wait(number: int, body: dict[str, Any]) -> None:
        await asyncio.sleep(60 if number or not body["temperature"] else 0)

    house.fake.on_token = wait

    def meanwhile(server: _Server) -> None:
        port = server.address.getsockname()[1]
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        body = {"model": "thinks", "messages": QUESTION}
        with ThreadPoolExecutor() as pool, socket.create_connection(("127.0.0.1", port), SECONDS) as slow:
            slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")

            def ask(**fields: Any) -> httpx.Response:
                return httpx.post(url, json={**body, **fields}, timeout=SECONDS, trust_env=False)

            whole, stream = pool.submit(ask), pool.submit(ask, stream=True, temperature=1)
            until(lambda: len(house.fake.seen) == 2)
            time.sleep(0.2)
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)
            answer = whole.result(SECONDS)
            error = error_of(answer, 503)
            assert (error["code"], int(answer.headers["retry-after"]) > 0) == ("server_ending", True)
            *_, name, data = stream.result(SECONDS).text.strip().split("\n")
            assert (name, json.loads(data.removeprefix("data: "))["error"]) == ("event: error", error)
            assert slow.recv(1000).startswith(b"HTTP/1.1 503")

    assert run_server(house, None, meanwhile) == 0
    assert "Traceback" not in capfd.readouterr().err
    assert not list(house.folder.iterdir())


def test_a_second_signal_as_it_starts_ends_it_at_once(house: House) -> None:
    child, _ = child_of(
        house.chains["thinks"].model, house.folder,
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(1000)",
    )  # fmt: skip
    child.upstream = house.upstream

    def meanwhile(server: _Server) -> None:
        until(lambda: child._log)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    began = time.monotonic()
    try:
        assert run_server(house, child, meanwhile) == 130
        assert time.monotonic() - began < 8
        assert child._process is not None
        assert child._process.returncode == -signal.SIGKILL
    finally:
        if child._process is not None:
            child._process.kill()


def test_no_chain_is_left(house: House) -> None:
    house.fake.max_model_len = 10
    with pytest.raises(ValueError, match="--max-model-len"):
        run_server(house, None, lambda server: None)
