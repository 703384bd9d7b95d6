"""A server with the part of vLLM's API that the gateway uses, with failures that tests switch on; and any app in a thread."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


class FakeVllm:
    """Generates " w0 w1 w2 ..." with the tokens 40, 41, 42, ... until the limit.

    Attributes:
        probe_token: generated for the gateway's probe.
        seen: bodies of requests, without those of probes.
        probes: number of probes.
        ended, disconnected: number of streams that were sent to their end, and of those that the client left.
        on_token: awaited before each token of a text, with its number and the request.
        cached: returns the cached tokens of `usage` for the slots of the KV file; None leaves them out.
        refuse: status of the response to every request.
        error_at, disconnect_at: number of the token at which the stream reports an error, or breaks off.
        stop_after: tokens after which a text ends by itself ("stop").
        suffix: of each token's text.
        raw_stream: sent in place of a text's events.
        max_model_len: in the answer to /v1/models.
        models_requests: number of requests for /v1/models.
        on_get: awaited before the answers to /health and /v1/models.
    """

    def __init__(self, probe_token: int) -> None:
        self.probe_token = probe_token
        self.seen: list[dict[str, Any]] = []
        self.probes, self.ended, self.disconnected = 0, 0, 0
        self.on_token: Callable[[int, dict[str, Any]], Awaitable[None]] | None = None
        self.cached: Callable[[int], int | None] = lambda slots: slots
        self.refuse = self.error_at = self.disconnect_at = self.stop_after = None  # type: Any
        self.suffix, self.max_model_len, self.models_requests = "", 400, 0
        self.raw_stream: str | None = None
        self.on_get: Callable[[], Awaitable[None]] | None = None
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/models", self._models),
                Route("/v1/completions", self._complete, methods=["POST"]),
            ]
        )

    async def _health(self, request: Request) -> Response:
        if self.on_get is not None:
            await self.on_get()
        return Response()

    async def _models(self, request: Request) -> Response:
        self.models_requests += 1
        if self.on_get is not None:
            await self.on_get()
        return JSONResponse({"data": [{"id": "fake", "max_model_len": self.max_model_len}]})

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        assert body["stream"]
        probe = body["max_tokens"] == 1 and not body["stop_token_ids"]
        if probe:
            self.probes += 1
        else:
            self.seen.append(body)
        if self.refuse and not probe:
            return JSONResponse(
                {"error": {"message": "no", "type": "x", "param": None, "code": self.refuse}}, self.refuse
            )
        return StreamingResponse(self._events(body, probe), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any], probe: bool) -> AsyncIterator[str]:
        slots = (body.get("kv_transfer_params") or {}).get("latentmas_slots", 0)
        count = body["max_tokens"] if self.stop_after is None else min(self.stop_after, body["max_tokens"])
        whole = False
        if self.raw_stream is not None and not probe:
            yield self.raw_stream
            return
        try:
            for number in range(count):
                if self.on_token is not None and not probe:
                    await self.on_token(number, body)
                if number == self.error_at and not probe:
                    yield 'data: {"error": {"message": "the engine burns", "code": 500}}\n\ndata: [DONE]\n\n'
                    return
                if number == self.disconnect_at and not probe:
                    raise ConnectionError("the server dies")
                token = self.probe_token if probe else 40 + number
                reason = None if number + 1 < count else "length" if count == body["max_tokens"] else "stop"
                choice = {"index": 0, "text": f" w{number}{self.suffix}", "token_ids": [token], "finish_reason": reason}
                yield f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}\n\n"  # as vLLM does
            cached = self.cached(slots)
            details = None if cached is None else {"cached_tokens": cached}
            usage = {"prompt_tokens": 1, "completion_tokens": count, "prompt_tokens_details": details}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"
            whole = True
            self.ended += 1
        finally:
            self.disconnected += not whole


class ServedApp:
    """An app on a port of its own, in a thread with a loop of its own. A context manager."""

    def __init__(self, make: Callable[[], Awaitable[Any]], port: int = 0) -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(("127.0.0.1", port))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._make, self._up, self.thread = make, threading.Event(), threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        async def main() -> None:
            try:
                app = await self._make()
            except BaseException as error:
                self.error = error
                self._up.set()
                raise
            self.loop = asyncio.get_running_loop()
            config = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
            self.server = uvicorn.Server(config)
            self.socket.listen()
            self._up.set()
            await self.server.serve(sockets=[self.socket])

        asyncio.run(main())

    def __enter__(self) -> "ServedApp":
        self.thread.start()
        assert self._up.wait(60)
        assert not hasattr(self, "error"), self.error
        return self

    def __exit__(self, *error: object) -> None:
        self.server.should_exit = True
        self.thread.join(15)
        assert not self.thread.is_alive()
        self.socket.close()
