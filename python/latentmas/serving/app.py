"""The gateway as an ASGI application: routes, streams, disconnects."""

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import TypeVar

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from latentmas.backends.vllm.http_errors import UnreachableError
from latentmas.serving.errors import ApiError, api_error
from latentmas.serving.gateway import Finish, Gateway
from latentmas.serving.protocol import (
    ChatCompletionRequest,
    Reply,
    model_card,
    server_sent_event,
    truncate,
)

BODY_BYTES = 2**20
T = TypeVar("T")
Parts = AsyncGenerator[str | Finish, None]


def build_app(gateway: Gateway) -> Starlette:
    """Return the application."""
    began = int(time.time())

    async def chat_completions(request: Request) -> Response:
        try:
            with gateway.until_stopped():
                body = await _read_body(request)
        except ClientDisconnect:
            return Response()  # to a client that has disconnected
        response = await with_cancellation(request.receive, partial(_respond, gateway, body))
        return Response() if response is None else response

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model_card(name, began) for name in gateway.chains]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        gateway.chain(name)
        return JSONResponse(model_card(name, began))

    async def health(request: Request) -> Response:
        if not await gateway.vllm.is_healthy():
            raise UnreachableError(
                f"vLLM does not answer at {gateway.vllm.url}; wait until it has started, or look at its log and start it again"
            )
        return JSONResponse({"status": "ok", "requests": gateway.requests})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name}", model),
            Route("/health", health),
        ],
        exception_handlers={HTTPException: _on_http_exception, ApiError: _on_error, UnreachableError: _on_error},
    )


async def with_cancellation(receive: Receive, work: Callable[[], Awaitable[T]]) -> T | None:
    """Return the result of `work`; cancel it and return None when the client disconnects first.

    Args:
        receive: of a request whose body was read.
        work: raises nothing.
    """
    result = None
    async with anyio.create_task_group() as group:

        async def run() -> None:
            nonlocal result
            result = await work()
            group.cancel_scope.cancel()

        group.start_soon(run)
        while (await receive())["type"] != "http.disconnect":
            pass
        group.cancel_scope.cancel()
    return result


async def _read_body(request: Request) -> bytes:
    """Return the body. Raises ApiError where it is too large, ClientDisconnect where the client disconnects."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_BYTES:
            raise ApiError(f"the body is larger than {BODY_BYTES // 2**20} MB; send less", status=413)
    return body


async def _respond(gateway: Gateway, body: bytes) -> Response:
    """Return the whole answer, a stream that has begun, or an error."""
    name = f"chatcmpl-{uuid.uuid4().hex}"
    try:
        request = ChatCompletionRequest.read(body)
        reply = Reply(name, int(time.time()), request.model)
        parts = gateway.answer(request)
        if request.stream:
            # A fault before the first piece of text has a status of its own.
            first = await anext(parts)
            return _EventStream(_events(reply, first, parts, request.stream_options.include_usage), parts)
        text = ""
        async with aclosing(parts):
            async for part in parts:
                if isinstance(part, Finish):
                    finish = part
                else:
                    text += part
        return JSONResponse(reply.completion(text, finish.reason, finish.usage))
    except Exception as error:
        return api_error(error, name).response()


class _EventStream(StreamingResponse):
    """A stream that ends the work for its request when it ends, for whatever reason."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], parts: Parts) -> None:
        super().__init__(events, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self.parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.parts):
            await super().__call__(scope, receive, send)


async def _events(reply: Reply, first: str | Finish, parts: Parts, include_usage: bool) -> AsyncIterator[str]:
    """Yield server-sent events; after a failure a last one, named error."""
    yield reply.chunk({"role": "assistant", "content": ""})
    part = first
    try:
        while isinstance(part, str):
            yield reply.chunk({"content": part})
            part = await anext(parts)
    except Exception as error:
        yield f"event: error\n{server_sent_event(api_error(error, reply.id).body)}"
        return
    yield reply.chunk({}, part.reason)
    if include_usage:
        yield reply.usage_chunk(part.usage)
    yield "data: [DONE]\n\n"


async def _on_error(request: Request, error: Exception) -> Response:
    return api_error(error, "").response()


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Return the error for a path or a method that does not exist."""
    assert isinstance(error, HTTPException)
    return ApiError(
        f"there is no {request.method} {truncate(request.scope['path'])} here; there are POST /v1/chat/completions, "
        "GET /v1/models and GET /health",
        status=error.status_code,
        code="method_not_allowed" if error.status_code == 405 else "not_found",
    ).response(error.headers)
