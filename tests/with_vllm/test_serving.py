"""The gateway of `latentmas serve` in front of a server that misbehaves on demand; the model is a tiny one."""

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import socket
import sys
import threading
import time
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
from latentmas.serving.child import Child
from latentmas.serving.command import Serving, serve
from latentmas.serving.gateway import Gateway
from latentmas.serving.upstream import Upstream
from rich.console import Console
from tokenizers_offline import character_tokenizer

SECONDS = 20.0
QUESTION = [{"role": "user", "content": "Why?"}]
THINKER, JUDGER = Agent("planner", "{question} Plan.", latent_steps=3), Agent("judger", "Answer.", max_new_tokens=6)
WRITER = Agent("writer", "Draft.", max_new_tokens=4)


class House:
    """A gateway in front of a fake server."""

    def __init__(
        self, model: Any, folder: Path, *, hand_over: str = "kv", timeout: float = 60.0, **options: Any
    ) -> None:
        self.tokenizer = character_tokenizer()
        self.upstream = Upstream(model, self.tokenizer, hand_over=hand_over, folder=folder, timeout=timeout)
        self.fake, self.folder = Fake(next(iter(self.upstream._probe.likely))), folder
        self.chains = {
            name: Chain(model, self.tokenizer, agents, aligner="identity", decoder=self.upstream)
            for name, agents in {
                "thinks": [THINKER, JUDGER], "mixes": [THINKER, WRITER, JUDGER], "alone": [JUDGER],
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
    with House(model, tmp_path, hand_over="embeds") as house:
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
        assert house.fake.seen[-1]["prompt"] == house.tokenizer("Answer.\n\n").input_ids


def test_models_and_health(house: House) -> None:
    assert [model["id"] for model in house.client.get("/v1/models").json()["data"]] == ["thinks", "mixes", "alone"]
    assert house.client.get("/v1/models/mixes").json()["id"] == "mixes"
    assert error_of(house.client.get("/v1/models/x"), 404)["code"] == "model_not_found"
    assert house.client.get("/health").status_code == 200
    house.below.__exit__()
    assert error_of(house.client.get("/health"), 503)["code"] == "vllm_unreachable"


# ---- refusals --------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "x"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function"}]}, "tools"), ({"n": 2}, "n"), ({"logprobs": True}, "logprobs"),
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
    assert error_of(house.client.post("/v1/chat/completions", content=b" " * (17 * 2**20)), 413)["message"]
    assert house.fake.seen == []
    assert house.ask().status_code == 200


def test_what_there_is_not(house: House) -> None:
    error = error_of(house.ask(model="gpt"), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "thinks, mixes, alone" in error["message"]
    assert "/v1/chat/completions" in error_of(house.client.post("/v1/completions", json={}), 404)["message"]
    error_of(house.client.get("/v1/chat/completions"), 405)


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


@pytest.mark.parametrize("hand_over", ["kv", "embeds"])
def test_other_servers_are_refused_at_once(model: Any, tmp_path: Path, hand_over: str) -> None:
    house = House(model, tmp_path, hand_over=hand_over)
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
        if hand_over == "kv":
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
if pathlib.Path("BROKEN").exists(): sys.exit(4)
subprocess.Popen(["sleep", "1000"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


def test_a_child_is_started_again_but_not_for_ever(model: Any, tmp_path: Path) -> None:
    child, said = child_of(model, tmp_path, SERVER.replace("BROKEN", str(tmp_path / "broken")))

    async def run() -> None:
        await child.start()
        keeping = asyncio.ensure_future(child.keep())
        assert child._process is not None
        first = psutil.Process(child._process.pid)
        group = [first, *first.children(recursive=True)]
        assert len(group) == 2
        os.kill(first.pid, signal.SIGKILL)
        while not any("answers again" in line for line in said):
            await asyncio.sleep(0.05)
        assert not any(process.is_running() and process.status() != "zombie" for process in group)
        (tmp_path / "broken").touch()
        os.kill(child._process.pid, signal.SIGKILL)
        with pytest.raises(ValueError, match="did not start 3 times in a row"):
            await keeping

    asyncio.run(asyncio.wait_for(run(), 2 * SECONDS))


def test_a_child_leaves_nothing_behind(model: Any, tmp_path: Path) -> None:
    child, _ = child_of(model, tmp_path, SERVER.replace("BROKEN", str(tmp_path / "broken")))

    async def run() -> None:
        await child.start()
        assert child._process is not None
        first = psutil.Process(child._process.pid)
        group = [first, *first.children(recursive=True)]
        await child.end()
        assert not any(process.is_running() and process.status() != "zombie" for process in group)

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_options_that_the_gateway_sets_are_refused(model: Any, tmp_path: Path) -> None:
    upstream = Upstream(model, character_tokenizer(), folder=tmp_path)
    for option in ("--port=1", "--kv_transfer_config", "--host", "--dtype"):
        with pytest.raises(ValueError, match="--vllm-url"):
            Child("model", model, upstream, ["--max-num-seqs", "4", option], print)


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

    async def nothing() -> Any:
        return None

    taken = Served(nothing)
    taken.socket.listen()
    with taken.socket, pytest.raises(ValueError, match=f"port {taken.port}"):
        serve(Serving(missing, port=taken.port), console)
