"""HTTP status, code and headers of everything that a request may fail with, in OpenAI's format."""

import logging
from collections.abc import Mapping

import torch
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from latentmas.backends.base import EngineError
from latentmas.backends.vllm.http_errors import BusyError, RefusedError, SilentError, UnreachableError, UnwritableError
from latentmas_kernels.cache.free_memory import InsufficientMemoryError
from latentmas_kernels.errors import LatentMASError

logger = logging.getLogger(__name__)

RETRY_SECONDS = 5

CODES: Mapping[type[Exception], str] = {
    UnreachableError: "vllm_unreachable",
    BusyError: "vllm_busy",
    UnwritableError: "folder_unwritable",
    RefusedError: "vllm_refused",
    SilentError: "vllm_silent",
    EngineError: "vllm_failed",
    InsufficientMemoryError: "no_room",
    MemoryError: "no_room",
    torch.OutOfMemoryError: "no_room",
    # Known only once agents have run: NaN in an embedding, a server that was replaced by another one.
    LatentMASError: "cannot_answer",
}
"""Codes of exceptions; the first type that fits."""

STATUSES: Mapping[str | None, int] = {
    "model_not_found": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "too_many_requests": 429,
    "cannot_answer": 500,
    "internal_error": 500,
    "vllm_failed": 502,
    "vllm_unreachable": 503,
    "vllm_busy": 503,
    "folder_unwritable": 503,
    "no_room": 503,
    "server_ending": 503,
    "vllm_silent": 504,
}
"""Statuses of codes; 400 for all others."""

FINAL = ("vllm_refused", "vllm_silent", "cannot_answer")
"""Clients that repeat a failed request by themselves must not: it would fail again, or take as long."""


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """OpenAI's error object."""

    error: ErrorBody


class ApiError(Exception):
    """An error that a client gets in place of an answer.

    Attributes:
        code: a word for programs, or None.
        param: the field of the request that is wrong, or None.
        status: of HTTP, by STATUSES unless it is given.
    """

    def __init__(
        self, message: str, *, code: str | None = None, param: str | None = None, status: int | None = None
    ) -> None:
        super().__init__(message)
        self.code, self.param, self.status = code, param, status or STATUSES.get(code, 400)

    @property
    def body(self) -> ErrorResponse:
        client = "rate_limit_error" if self.status == 429 else "invalid_request_error"
        kind = client if self.status < 500 else "server_error"
        return ErrorResponse(error=ErrorBody(message=str(self), type=kind, param=self.param, code=self.code))

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """Return a response of the error's status."""
        retry = {"Retry-After": str(RETRY_SECONDS)} if self.status in (429, 503) else {}
        final = {"x-should-retry": "false"} if self.code in FINAL else {}
        return JSONResponse(self.body.model_dump(), self.status, {**(headers or {}), **retry, **final})


def api_error(error: Exception, request_id: str) -> ApiError:
    """Return what a client is told about an exception. A bug goes to the log with its traceback, and the client gets its id."""
    if isinstance(error, ApiError):
        return error
    for kind, code in CODES.items():
        if isinstance(error, kind):
            text = str(error) or "there is not enough memory for this request now; try again later"
            return ApiError(text, code=code)
    logger.error("request %s failed", request_id, exc_info=error)
    return ApiError(
        f"the gateway failed ({type(error).__name__}); its log says where, under {request_id}", code="internal_error"
    )
