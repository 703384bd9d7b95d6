"""Failures of vLLM's server, and the address that it is reached at."""

import json
import os

import httpx

from latentmas.backends.base import EngineError
from latentmas_kernels.errors import LatentMASError


class UnreachableError(EngineError):
    """No server answers at the address, or it is not ready yet."""


class BusyError(EngineError):
    """The server takes no request now."""


class RefusedError(EngineError):
    """The server does not take this request, and would not take it a second time."""


class UnwritableError(EngineError):
    """A KV file cannot be written to the folder."""


class SilentError(EngineError):
    """The server sent nothing for longer than the limit."""


def server_address(url: str) -> str:
    """Return the address of a server from the value of --vllm-url.

    Raises:
        LatentMASError: where that is no HTTP URL.
    """
    try:
        parsed = httpx.URL(url)
        fits = parsed.scheme in ("http", "https") and bool(parsed.host) and not parsed.query
        fits = fits and (parsed.port is None or 0 < parsed.port < 2**16)
    except (httpx.InvalidURL, UnicodeError):  # the second for a host that begins with xn--
        fits = False
    if not fits:
        raise LatentMASError(
            f"got --vllm-url {url}; supported is the address of a running `vllm serve`, like http://127.0.0.1:8001"
        )
    return url.rstrip("/").removesuffix("/v1")


def authorization_header() -> dict[str, str]:
    """Return the header that carries VLLM_API_KEY; an empty dict where that is not set.

    Raises:
        LatentMASError: for a key that no header can carry.
    """
    key = os.environ.get("VLLM_API_KEY")
    if not key:
        return {}
    if not (key.isascii() and key.isprintable() and key == key.strip()):
        raise LatentMASError(
            "got a VLLM_API_KEY with characters that an HTTP header cannot carry; supported are printable ASCII characters, "
            "without spaces or line ends around them: set it to the key of vLLM"
        )
    return {"Authorization": f"Bearer {key}"}


def refusal(response: httpx.Response) -> EngineError:
    """Return the error for a response whose status is not 200."""
    reason = f"(status {response.status_code}): {error_message(response.content)}"
    if response.status_code in (429, 503):
        return BusyError(f"vLLM takes no request now {reason}; try again in a while")
    if response.status_code in (400, 413, 422):
        return RefusedError(f"vLLM does not take this request {reason}; change the request, or how vLLM was started")
    return EngineError(f"vLLM refused a request {reason}")


def error_message(body: bytes) -> str:
    """Return the message of an error in OpenAI's format, or the beginning of a body that is none."""
    try:
        return str(json.loads(body)["error"]["message"])[:500]
    except (ValueError, KeyError, TypeError, RecursionError):
        return body[:500].decode(errors="replace")
