"""The gateway: a request names a chain, whose agents think here and whose last text vLLM writes, streamed as it comes."""

import asyncio
import json
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from latentmas.backends.base import EngineError
from latentmas.backends.vllm.server import Sent, Upstream
from latentmas.backends.vllm.sse import Busy, Refused, Silent, Unreachable, Unwritable
from latentmas.chain.chain import Chain
from latentmas.chain.run import PendingAnswer
from latentmas.serving.model_lease import Turn
from latentmas.serving.protocol import ApiError, ChatRequest, Reply, cut, shown, usage_of
from latentmas_kernels.cache.free_memory import InsufficientMemoryError

logger = logging.getLogger(__name__)

BODY_BYTES = 2**20
RETRY_SECONDS = 5
TOKEN_CHARACTERS = 64
"""More than a token stands for on average; a question with more of them is refused before it is tokenized."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]


@dataclass(frozen=True)
class Ending:
    """What comes behind the text of an answer: OpenAI's finish_reason and usage."""

    reason: str
    usage: Mapping[str, Any]


class Gateway:
    """An ASGI application, as `app`.

    Attributes:
        chains: by the names that requests give.
        requests: that are being answered or wait for that.
        ending: whether requests that are ended from now on are so because the server ends.
    """

    def __init__(self, chains: Mapping[str, Chain], upstream: Upstream, *, max_waiting: int = 256) -> None:
        """Made in the event loop that it will run in.

        Args:
            chains: of one model, each with `upstream` for its decoder.
            max_waiting: requests at a time; more are refused.
        """
        self.chains, self.upstream, self.max_waiting = chains, upstream, max_waiting
        self.requests, self.ending, self._began = 0, False, int(time.time())
        self._model = asyncio.Lock()
        self._threads = ThreadPoolExecutor(max_waiting, "latentmas")
        # Few: each that used torch may leave threads of its own behind. Checks of clients that left are never begun.
        self._checks = ThreadPoolExecutor(2, "latentmas-check")
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", _Chat(self), methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{name}", self._one_model),
                Route("/health", self._health),
            ],
            exception_handlers={HTTPException: _http_error},
        )

    # ---- an answer -------------------------------------------------------------------------------------------------

    async def answer(self, request: ChatRequest) -> AsyncGenerator[str | Ending, None]:
        """The answer's text, as it comes, and behind it its ending. Closing it ends all work for it.

        Raises:
            ApiError: for what cannot be answered.
        """
        chain = self._chain(request.model)
        if self.requests >= self.max_waiting:
            raise ApiError(
                f"{self.requests} requests are being answered or wait, and no more at a time (--max-waiting); try again later",
                status=429, kind="rate_limit_error", code="too_many_requests", retry_after=RETRY_SECONDS,
            )  # fmt: skip
        self.requests += 1
        try:
            await self._check(chain, request)
            await self.upstream.connect()
            prepared, sent = await self._think(chain, request)
            try:
                written = None
                pieces = self.upstream.stream(
                    self._last(prepared, request), sent, stop=request.stop, presence_penalty=request.presence_penalty,
                    frequency_penalty=request.frequency_penalty,
                )  # fmt: skip
                async with aclosing(pieces):
                    async for piece in pieces:
                        written = piece.written
                        if piece.text:
                            yield piece.text
                assert written is not None
                yield Ending(written.finish_reason, usage_of(prepared.finish([written])))
            finally:
                sent.close()
        except asyncio.CancelledError:
            if self.ending:
                raise _ended() from None
            raise
        except Exception as error:
            raise _api_error(error) from error
        finally:
            self.requests -= 1

    def _chain(self, name: str) -> Chain:
        if name not in self.chains:
            raise ApiError(
                f"there is no chain {shown(name)} here; model names one of {', '.join(self.chains)}",
                status=404, param="model", code="model_not_found",
            )  # fmt: skip
        return self.chains[name]

    async def _check(self, chain: Chain, request: ChatRequest) -> None:
        most = chain.agents[-1].max_new_tokens or 0
        if request.limit is not None and request.limit > most:
            name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
            raise ApiError(
                f"got {name} {shown(request.limit)}; the last agent of {request.model} writes up to {most} tokens, which is "
                "what the chain was planned for: ask for no more, or start the server with a larger --max-new-tokens",
                param=name, code="invalid_value",
            )  # fmt: skip
        length, longest = len(request.question), TOKEN_CHARACTERS * self.upstream.max_model_len
        if length > longest > 0:
            raise ApiError(
                f"got a question of {length} characters; vLLM was started for {self.upstream.max_model_len} tokens, and no "
                f"question of more than {longest} characters fits: ask something shorter",
                param="messages",
            )
        try:
            await asyncio.get_running_loop().run_in_executor(self._checks, chain.check, request.question)
        except ValueError as error:
            raise ApiError(str(error), param="messages") from error

    async def _think(self, chain: Chain, request: ChatRequest) -> tuple[PendingAnswer, Sent]:
        """Run all agents but the last, once it is the request's turn."""
        turn = Turn(self._model, self._threads, secrets.randbits(62) if request.seed is None else request.seed)

        def work() -> tuple[PendingAnswer, Sent]:
            turn.look()
            prepared = chain.prepare(
                [request.question], temperature=request.temperature, top_p=request.top_p,
                on_progress=lambda progress: turn.look(),
            )  # fmt: skip
            (sent,) = self.upstream.pack(prepared.memory, prepared.requests)
            prepared.forget()
            return prepared, sent

        return await turn.run(work, lambda done: done[1].close())

    @staticmethod
    def _last(prepared: PendingAnswer, request: ChatRequest) -> Any:
        (last,) = prepared.requests
        return last if request.limit is None else replace(last, max_new_tokens=request.limit)

    # ---- what else there is ----------------------------------------------------------------------------------------

    def _described(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._began, "owned_by": "latentmas"}

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described(name) for name in self.chains]})

    async def _one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        try:
            self._chain(name)
        except ApiError as error:
            return _error(error)
        return JSONResponse(self._described(name))

    async def _health(self, request: Request) -> Response:
        if await self.upstream.answers():
            return JSONResponse({"status": "ok", "requests": self.requests})
        told = f"vLLM does not answer at {self.upstream.url}; wait until it has started, or look at its log and start it again"
        return _error(_api_error(Unreachable(told)))


class _Chat:
    """POST /v1/chat/completions. Work ends where the client goes away."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._serve(scope, receive, send)
        except asyncio.CancelledError:
            if not self.gateway.ending:  # otherwise the client has been told by now
                raise

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await _body(receive)
        except asyncio.CancelledError:
            if self.gateway.ending:
                await _error(_ended())(scope, receive, send)
            raise
        if body is None:
            return
        work = asyncio.ensure_future(self._reply(body, scope, receive, send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.wait({work, gone})
        if not work.cancelled():
            work.result()

    async def _reply(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if len(body) > BODY_BYTES:
                raise ApiError(f"the body is larger than {BODY_BYTES // 2**20} MB; send less", status=413)
            request = ChatRequest.read(body)
            parts = self.gateway.answer(request)
            reply = Reply(f"chatcmpl-{uuid.uuid4().hex}", request.model, int(time.time()))
            async with aclosing(parts):
                if request.stream:
                    # What is wrong before the first piece of text has a status of its own.
                    first = await anext(parts)
                    await _stream(_events(request, reply, first, parts), send)
                    return
                text = ""
                async for part in parts:
                    if isinstance(part, str):
                        text += part
                    else:
                        response: Response = JSONResponse(reply.whole(text, part.reason, part.usage))
        except Exception as error:
            response = _error(_api_error(error))
        await response(scope, receive, send)


async def _events(
    request: ChatRequest, reply: Reply, first: str | Ending, parts: AsyncIterator[str | Ending]
) -> AsyncIterator[str]:
    """Server-sent events of a stream; one named error in place of the end where something goes wrong."""
    yield _event(reply.chunk({"role": "assistant", "content": ""}))
    part = first
    try:
        while isinstance(part, str):
            yield _event(reply.chunk({"content": part}))
            part = await anext(parts)
    except ApiError as error:
        yield f"event: error\n{_event(error.body)}"
        return
    yield _event(reply.chunk({}, part.reason))
    if request.stream_options.include_usage:
        yield _event(reply.usage(part.usage))
    yield "data: [DONE]\n\n"


def _event(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"  # in ASCII: some clients take other characters than line feeds for ends of lines


async def _stream(events: AsyncIterator[str], send: Send) -> None:
    headers = {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-cache",
        "x-accel-buffering": "no",
    }
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw})
    async for event in events:
        await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _body(receive: Receive) -> bytes | None:
    """Of a request, or its beginning where it is too large; None where the client went away."""
    body = b""
    while len(body) <= BODY_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    return body


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


_FAULTS: Mapping[type[Exception], tuple[int, str, bool]] = {
    Unreachable: (503, "vllm_unreachable", True),
    Busy: (503, "vllm_busy", True),
    Unwritable: (503, "folder_unwritable", True),
    Refused: (400, "vllm_refused", False),
    Silent: (504, "vllm_silent", False),
    EngineError: (502, "vllm_failed", True),
    InsufficientMemoryError: (503, "no_room", True),
    MemoryError: (503, "no_room", True),
    torch.OutOfMemoryError: (503, "no_room", True),
    # Known only behind the thinking: NaN in a thought, a server that was exchanged for another one.
    ValueError: (500, "cannot_answer", False),
}
"""Status and code of what a request may end with, and whether clients are to send it again; the first that fits."""


def _api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    for kind, (status, code, again) in _FAULTS.items():
        if isinstance(error, kind):
            return ApiError(
                str(error) or "there is not enough memory for this request now; try again later",
                status=status, kind="invalid_request_error" if status < 500 else "server_error", code=code,
                retry_after=RETRY_SECONDS if status == 503 else None, final=not again,
            )  # fmt: skip
    logger.error("a request failed", exc_info=error)
    return ApiError(
        f"the gateway failed ({type(error).__name__}); its log says where",
        status=500, kind="server_error", code="internal_error",
    )  # fmt: skip


def _ended() -> ApiError:
    return ApiError(
        "the server is ending; send the request again once it runs",
        status=503, kind="server_error", code="server_ending", retry_after=RETRY_SECONDS,
    )  # fmt: skip


def _error(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(error.body, error.status, {**(headers or {}), **error.headers})


async def _http_error(request: Request, error: Exception) -> Response:
    """Paths and methods that there are not, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    return _error(
        ApiError(
            f"there is no {request.method} {cut(request.scope['path'])} here; there are POST /v1/chat/completions, "
            "GET /v1/models and GET /health",
            status=error.status_code,
            code="method_not_allowed" if error.status_code == 405 else "not_found",
        ),
        error.headers,
    )
