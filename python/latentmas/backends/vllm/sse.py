"""Server-sent events of vLLM's completions API."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import httpx

from latentmas.backends.base import EngineError
from latentmas.backends.vllm.http_errors import error_message


@dataclass(frozen=True)
class Choice:
    """A piece of a text.

    Attributes:
        text: may be empty.
        ids: token ids.
        finish_reason: with the last piece.
    """

    text: str
    ids: list[int]
    finish_reason: str | None


@dataclass(frozen=True)
class Event:
    """An event of a stream.

    Attributes:
        choices: mostly one.
        usage: of the whole request, with the last event.
    """

    choices: list[Choice]
    usage: Any

    @classmethod
    def read(cls, data: bytes) -> "Event":
        """Parse the data of an event.

        Raises:
            EngineError: where it reports an error, or is not vLLM's.
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
            raise EngineError(f"vLLM ended the request with an error: {error_message(data)}; its log says why")
        raise EngineError(
            f"vLLM sent {data[:200].decode(errors='replace')!r} as a piece of a text, which is not what vLLM says; look at "
            "what runs at its address"
        )


async def read_events(response: httpx.Response) -> AsyncGenerator[Event, None]:
    """Yield the events of a stream. Raises EngineError as `Event.read`."""
    # httpx-sse would do the same; these lines spare the dependency.
    async with aclosing(_lines(response)) as lines:
        async for line in lines:
            data = line.removeprefix(b"data:").strip()
            if line.startswith(b"data:") and data != b"[DONE]":
                yield Event.read(data)


async def _lines(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """Yield lines that end with a line feed: `aiter_lines` also splits at characters that JSON contains as they are."""
    rest = b""
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line
    yield rest
