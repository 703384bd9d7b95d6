"""HTTP status, code and headers of everything that a request may fail with, in OpenAI's format."""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from starlette.responses import JSONResponse, Response

from latentmas.backends.base import EngineError
from latentmas.backends.vllm.http_errors import BusyError, RefusedError, SilentError, UnreachableError, UnwritableError
from latentmas_kernels.cache.free_memory import InsufficientMemoryError
from latentmas_kernels.errors import LatentMASError

logger = logging.getLogger(__name__)

RETRY_SECONDS = 5


class Failure(NamedTuple):
    """What a client gets for an exception.

    Attributes:
        code: a word for programs.
        status: of HTTP.
        final: whether clients that repeat a failed request by themselves must not: it would fail again, or take as long.
    """

    code: str
    status: int
    final: bool = False


NO_ROOM = Failure("no_room", 503)
FAILURES: Mapping[type[Exception], Failure] = {
    UnreachableError: Failure("vllm_unreachable", 503),
    BusyError: Failure("vllm_busy", 503),
    UnwritableError: Failure("folder_unwritable", 503),
    RefusedError: Failure("vllm_refused", 400, final=True),
    SilentError: Failure("vllm_silent", 504, final=True),
    EngineError: Failure("vllm_failed", 502),
    InsufficientMemoryError: NO_ROOM,
    MemoryError: NO_ROOM,
    torch.OutOfMemoryError: NO_ROOM,
    # Known only once agents have run: NaN in an embedding, a server that was replaced by another one.
    LatentMASError: Failure("cannot_answer", 500, final=True),
}
"""Of each type of exception; the first that fits."""


class ApiError(Exception):
    """An error that a client gets in place of an answer.

    Attributes:
        code: a word for programs, or None.
        param: the field of the request that is wrong, or None.
        status: of HTTP.
        final: as in `Failure`.
    """

    def __init__(
        self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None, final: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.final = status, code, param, final

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        client = "rate_limit_error" if self.status == 429 else "invalid_request_error"
        kind = client if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """Return a response of the error's status."""
        retry = {"Retry-After": str(RETRY_SECONDS)} if self.status in (429, 503) else {}
        final = {"x-should-retry": "false"} if self.final else {}
        return JSONResponse(self.body, self.status, {**(headers or {}), **retry, **final})


def api_error(error: Exception, request_id: str) -> ApiError:
    """Return the error for an exception. A bug goes to the log with its traceback, and the client gets its id."""
    if isinstance(error, ApiError):
        return error
    for kind, failure in FAILURES.items():
        if isinstance(error, kind):
            text = str(error) or "there is not enough memory for this request now; try again later"
            return ApiError(text, status=failure.status, code=failure.code, final=failure.final)
    logger.error("request %s failed", request_id, exc_info=error)
    return ApiError(
        f"the gateway failed ({type(error).__name__}); its log says where, under {request_id}",
        status=500,
        code="internal_error",
    )
