"""OpenAI's chat completions, as far as a chain of agents has an answer to them: what is read, what is refused, what is sent."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from latentmas.chain.results import ChainResult
from latentmas_kernels.errors import LatentMASError

SUPPORTED = (
    "model, messages, temperature, top_p, max_tokens, max_completion_tokens, stop, seed, stream, stream_options, "
    "presence_penalty, frequency_penalty; user and metadata are taken and mean nothing"
)
SEEDS = 2**63


class ApiError(Exception):
    """What a client is told in place of an answer, in OpenAI's shape.

    Attributes:
        status: of HTTP.
        kind: OpenAI's "type".
        param: field of the request that it is about, or None.
        code: a word for programs, or None.
        retry_after: seconds after which to try again, or None.
        final: clients that send a request again by themselves are told not to: it would fail again, or take as long.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        final: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.retry_after, self.final = retry_after, final

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        wait = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return {**wait, "x-should-retry": "false"} if self.final else wait


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """Clients write null for what they leave out. Of unknown fields the first is enough to refuse all."""
        if not isinstance(data, dict):
            return data
        given = {key: value for key, value in data.items() if value is not None}
        unknown = [key for key in given if key not in cls.model_fields]
        return {key: value for key, value in given.items() if key in cls.model_fields or key == unknown[0]}


class TextPart(_Strict):
    type: Literal["text"]
    text: str


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(_Strict):
    role: Literal["system", "developer", "user"]
    content: Annotated[list[TextPart], Field(fail_fast=True), BeforeValidator(_parts)]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)


class StreamOptions(_Strict):
    include_usage: bool = False


class TextFormat(_Strict):
    type: Literal["text"]


def _listed(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _false(value: bool) -> bool:
    if value:
        raise LatentMASError("false")
    return value


class ChatRequest(_Strict):
    """A request that a chain can answer.

    The sampling is that of all agents that write; penalties, stop and max_tokens are of the last one alone. Without
    temperature a text is greedy, as everywhere here.
    """

    model: str
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]], Field(max_length=16, fail_fast=True), BeforeValidator(_listed)
    ] = []
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    # What clients send along and what says what is done anyway.
    n: Annotated[int, Field(ge=1, le=1)] = 1
    logprobs: Annotated[bool, AfterValidator(_false)] = False
    response_format: TextFormat = TextFormat(type="text")
    user: str = ""
    metadata: dict[str, Any] = {}

    @property
    def limit(self) -> int | None:
        """Tokens of the answer; None for the chain's own limit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def question(self) -> str:
        return "\n\n".join(message.text for message in self.messages)

    @classmethod
    def read(cls, body: bytes) -> "ChatRequest":
        """From a request's body. Raises ApiError, which names the first field at fault."""
        try:
            data = json.loads(body)
            json.dumps(data, ensure_ascii=False).encode()  # halves of characters, which are no text
        except (ValueError, RecursionError) as error:
            raise ApiError(f"the body is no JSON ({error}); send a JSON object with model and messages") from error
        if not isinstance(data, dict):
            raise ApiError("the body is no JSON object; send one with model and messages")
        try:
            request = cls.model_validate(data)
        except ValidationError as error:
            raise _refusal(error.errors()[0]) from error
        request._check_together()
        return request

    def _check_together(self) -> None:
        roles = [message.role for message in self.messages]
        if roles[-1] != "user" or len(roles) > 2 or roles[:-1] == ["user"]:
            raise ApiError(
                f"got messages of {cut(', '.join(roles))}; supported is one user message, and one system or developer message "
                "before it: agents answer one question, so put what was said before into it",
                param="messages",
            )
        if not self.question.strip():
            raise ApiError("the messages hold no text; ask something", param="messages")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ApiError(
                f"got max_tokens {shown(self.max_tokens)} and max_completion_tokens {shown(self.max_completion_tokens)}, which "
                "are two names of one limit; send one of them",
                param="max_completion_tokens",
            )
        if "stream_options" in self.model_fields_set and not self.stream:
            raise ApiError("got stream_options without stream; send stream: true with it", param="stream_options")


def _refusal(fault: Mapping[str, Any]) -> ApiError:
    """The first thing that is wrong with a request."""
    where = list(fault["loc"])
    param = cut(".".join(map(str, where)))
    if fault["type"] == "extra_forbidden":
        beside = SUPPORTED if len(where) == 1 else _BESIDE[where[0]]
        return ApiError(
            f"got {param}, which a chain of agents does not take; supported are {beside}. Leave it out",
            param=param,
            code="unsupported_parameter",
        )
    if fault["type"] == "missing":
        return ApiError(f"{param} is missing; send model, and messages with role and content", param=param)
    got = shown(fault["input"])
    if where[:1] == ["messages"] and where[-1:] == ["role"]:
        return ApiError(
            f"got {param} {got}; supported is one user message, and one system or developer message before it: agents "
            "answer one question, so put what was said before into it",
            param=param,
        )
    if where[:1] == ["messages"] and len(where) > 2:
        return ApiError(
            f"got {param} {got}; supported is text, as a string or a list of parts of type text", param=param
        )
    return ApiError(f"got {param} {got}; supported: {_supported(where, fault)}", param=param, code="invalid_value")


_BESIDE = {
    "messages": "role, and content as a string or a list of parts with type text and text",
    "stream_options": "include_usage",
    "response_format": 'type, which is "text"',
}
"""Fields within a field."""


def _supported(where: list[Any], fault: Mapping[str, Any]) -> str:
    match where[0]:
        case "n":
            return "one answer, n 1; send the request again for another one"
        case "logprobs":
            return "no log-probabilities; leave it out"
        case "response_format":
            return 'text, {"type": "text"}; leave it out and check the answer yourself'
    said = fault["msg"]
    return said[:1].lower() + said[1:]


def shown(value: Any) -> str:
    """What a client sent, for an error; short, whatever it sent."""
    try:
        return cut(json.dumps(value, default=str))
    except RecursionError:
        return "something deeply nested"


def cut(text: str) -> str:
    """Its beginning, where it is long."""
    return text if len(text) <= 80 else text[:77] + "..."


def usage_of(result: ChainResult) -> dict[str, Any]:
    """OpenAI's usage of one question, with what each agent did."""
    (answer,) = result.answers
    *before, last = answer.turns
    read, written = (
        sum(turn.prompt_tokens for turn in answer.turns),
        sum(turn.new_tokens for turn in answer.turns),
    )
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "completion_tokens_details": {"reasoning_tokens": sum(turn.new_tokens for turn in before)},
        "latent_steps": sum(turn.latent_steps for turn in answer.turns),
        "latentmas": [
            {
                "agent": turn.agent,
                "prompt_tokens": turn.prompt_tokens,
                "latent_steps": turn.latent_steps,
                "new_tokens": turn.new_tokens,
            }
            for turn in answer.turns
        ],
    }


class Reply:
    """The objects of one answer.

    Attributes:
        head: what all of them begin with but for "object".
    """

    def __init__(self, name: str, model: str, created: int) -> None:
        self.head = {"id": name, "created": created, "model": model}

    def whole(self, text: str, reason: str, usage: Mapping[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": usage}

    def chunk(self, delta: Mapping[str, str], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice]}

    def usage(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": usage}
