"""What vLLM's server says on the wire: addresses, events of a stream, refusals; and what else may go wrong there."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import httpx

from latentmas.backends.base import EngineError
from latentmas_kernels.errors import LatentMASError


class Unreachable(EngineError):
    """There is no server at the address, or not yet again."""


class Busy(EngineError):
    """The server takes no request now."""


class Refused(EngineError):
    """The server does not take this request, and would not take it again."""


class Unwritable(EngineError):
    """There is no room for a memory in the folder, or no folder."""


class Silent(EngineError):
    """The server said nothing for longer than the limit."""


@dataclass(frozen=True)
class Choice:
    """Some of a text.

    Attributes:
        text: may be empty.
        ids: the tokens.
        reason: why the text ended, with its last piece.
    """

    text: str
    ids: list[int]
    reason: str | None


@dataclass(frozen=True)
class Event:
    """Of a stream.

    Attributes:
        choices: mostly one.
        usage: of the whole request, with the last event.
    """

    choices: list[Choice]
    usage: Any

    @classmethod
    def read(cls, data: bytes) -> "Event":
        """From what comes behind "data:".

        Raises:
            EngineError: where it reports an error, or is nothing that vLLM would say.
        """
        try:
            event = json.loads(data)
            if "error" not in event:
                choices = [
                    Choice(choice["text"], list(choice.get("token_ids") or []), choice["finish_reason"])
                    for choice in event["choices"]
                ]
                if all(isinstance(choice.text, str) for choice in choices):
                    return cls(choices, event.get("usage"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            event = None
        if isinstance(event, dict) and "error" in event:
            raise EngineError(f"vLLM ended the request with an error: {_said(data)}; its log says why")
        raise EngineError(
            f"vLLM sent {data[:200].decode(errors='replace')!r} as a piece of a text, which is not what vLLM says; look at "
            "what runs at its address"
        )


async def events(response: httpx.Response) -> AsyncGenerator[Event, None]:
    """Of a stream. Raises EngineError as `Event.read`."""
    async with aclosing(_lines(response)) as lines:
        async for line in lines:
            data = line.removeprefix(b"data:").strip()
            if line.startswith(b"data:") and data != b"[DONE]":
                yield Event.read(data)


async def _lines(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """Those that end with a line feed. httpx also ends lines at characters that are sent as they are within JSON."""
    rest = b""
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line
    yield rest


def address_of(url: str) -> str:
    """Of a server, from what --vllm-url says.

    Raises:
        ValueError: where that is no URL of HTTP.
    """
    try:
        parsed = httpx.URL(url)
        fits = parsed.scheme in ("http", "https") and bool(parsed.host) and not parsed.query
    except httpx.InvalidURL:
        fits = False
    if not fits:
        raise LatentMASError(
            f"got --vllm-url {url}; supported is the address of a running `vllm serve`, like http://127.0.0.1:8001"
        )
    return url.rstrip("/").removesuffix("/v1")


def refusal(response: httpx.Response) -> EngineError:
    said = f"(status {response.status_code}): {_said(response.content)}"
    if response.status_code in (429, 503):
        return Busy(f"vLLM takes no request now {said}; try again in a while")
    if response.status_code in (400, 413, 422):
        return Refused(f"vLLM does not take this request {said}; change the request, or how vLLM was started")
    return EngineError(f"vLLM refused a request {said}")


def _said(body: bytes) -> str:
    """The message in an error of vLLM's."""
    try:
        return str(json.loads(body)["error"]["message"])[:500]
    except (ValueError, KeyError, TypeError, RecursionError):
        return body[:500].decode(errors="replace")
