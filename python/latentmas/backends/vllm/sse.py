"""Server-sent events of vLLM's completions API."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import httpx

from latentmas.backends.base import EngineError
from latentmas.backends.vllm.http_errors import error_message


@dataclass(frozen=True)
class Chunk:
    """A piece of a text.

    Attributes:
        text: may be empty, where the tokens end within a character.
        ids: token ids.
        finish_reason: with the last piece of the text.
        usage: of the whole request, with the last event, which has no text.
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Any = None


async def read_chunks(response: httpx.Response) -> AsyncGenerator[Chunk, None]:
    """Yield the chunks of a stream. Raises EngineError as `parse_chunk`."""
    # httpx-sse would do the same; these lines spare the dependency.
    async with aclosing(_lines(response)) as lines:
        async for line in lines:
            data = line.removeprefix(b"data:").strip()
            if line.startswith(b"data:") and data != b"[DONE]":
                yield parse_chunk(data)


def parse_chunk(data: bytes) -> Chunk:
    """Parse the data of an event.

    Raises:
        EngineError: where it reports an error, or is not vLLM's.
    """
    try:
        event = json.loads(data)
        if "error" not in event:
            usage, choices = event.get("usage"), event["choices"]
            if len(choices) == 0:
                return Chunk(usage=usage)
            text, ids, reason = choices[0]["text"], choices[0].get("token_ids"), choices[0]["finish_reason"]
            if isinstance(text, str):
                return Chunk(text, list(ids or []), reason, usage)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        event = None
    if isinstance(event, dict) and "error" in event:
        raise EngineError(f"vLLM ended the request with an error: {error_message(data)}; its log says why")
    raise EngineError(
        f"vLLM sent {data[:200].decode(errors='replace')!r} as a piece of a text, which is not what vLLM says; look at "
        "what runs at its address"
    )


async def _lines(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """Yield lines that end with a line feed: `aiter_lines` also splits at characters that JSON contains as they are."""
    rest = b""
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line
    yield rest
