"""A gateway in front of a fake vLLM server, both in threads; the model is a tiny one."""

import contextlib
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from fake_vllm import FakeVllm, ServedApp
from latentmas import Agent, Chain
from latentmas.backends.vllm.server import VllmServer
from latentmas.serving.app import build_app
from latentmas.serving.gateway import Gateway
from latentmas.serving.model_lease import ModelLease
from tokenizers_offline import character_tokenizer

SECONDS = 20.0
QUESTION = [{"role": "user", "content": "Why?"}]
THINKER, JUDGER = Agent("planner", "{question} Plan.", latent_steps=3), Agent("judger", "Answer.", max_new_tokens=6)
WRITER, ASKED = Agent("writer", "Draft.", max_new_tokens=4), Agent("judger", "{question} Answer.", max_new_tokens=6)


class ServedGateway:
    """A gateway in front of a fake server."""

    def __init__(
        self, model: Any, folder: Path, *, kv_transfer: str = "kv", timeout: float = 60.0, **options: Any
    ) -> None:
        self.tokenizer = character_tokenizer()
        self.vllm = VllmServer(
            model, self.tokenizer, kv_transfer=kv_transfer, folder=folder, timeout=timeout, wait=ModelLease.wait
        )
        self.fake, self.folder = FakeVllm(next(iter(self.vllm._probe_text.likely))), folder
        self.chains = {
            name: Chain(model, self.tokenizer, agents, aligner="identity", decoder=self.vllm)
            for name, agents in {
                "thinks": [THINKER, JUDGER], "mixes": [THINKER, WRITER, JUDGER], "alone": [ASKED],
            }.items()
        }  # fmt: skip
        self.options = options

    def __enter__(self) -> "ServedGateway":
        async def fake() -> Any:
            return self.fake.app

        async def gateway() -> Any:
            self.vllm.set_url(self.vllm_app.url)
            await self.vllm.connect()
            self.gateway = Gateway(self.chains, self.vllm, **self.options)
            return build_app(self.gateway)

        with contextlib.ExitStack() as stack:
            self.vllm_app = stack.enter_context(ServedApp(fake))
            self.gateway_app = stack.enter_context(ServedApp(gateway))
            self.client = stack.enter_context(
                httpx.Client(base_url=self.gateway_app.url, timeout=SECONDS, trust_env=False)
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def ask(self, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/chat/completions", json={"model": "thinks", "messages": QUESTION, **fields})

    def send(self, **fields: Any) -> socket.socket:
        """Send a request and return its connection; to close that is to disconnect."""
        body = json.dumps({"model": "thinks", "messages": QUESTION, **fields})
        connection = socket.create_connection(("127.0.0.1", self.gateway_app.port), SECONDS)
        connection.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        return connection

    def events(self, **fields: Any) -> list[tuple[str, Any]]:
        """Return (name, data) of each event of a stream."""
        response = self.ask(stream=True, **fields)
        assert response.status_code == 200, response.text
        found = []
        for block in response.text.removesuffix("\n\n").split("\n\n"):
            *name, data = block.split("\n")
            content = data.removeprefix("data: ")
            found.append((name[0] if name else "", content if content == "[DONE]" else json.loads(content)))
        return found

    def empty(self) -> bool:
        """Return whether no request is in progress and no KV file exists."""
        return not list(self.folder.iterdir()) and self.gateway.requests == 0


def until(condition: Callable[[], Any], seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition was never met"
        time.sleep(0.01)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error
