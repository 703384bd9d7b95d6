"""OpenAI's chat completions, as far as chains support them: requests, their validation, and replies."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from latentmas.chain.results import ChainResult
from latentmas.serving.errors import ApiError

SUPPORTED = {
    None: "model, messages, temperature, top_p, max_tokens, max_completion_tokens, stop, seed, stream, stream_options, "
    "presence_penalty, frequency_penalty; user and metadata are taken and mean nothing",
    "messages": "role, and content as a string or a list of parts with type text and text",
    "stream_options": "include_usage",
    "response_format": 'type, which is "text"',
}
"""Fields of a request, and of the objects in it."""
REMEDIES = {
    "n": "one answer, n 1; send the request again for another one",
    "logprobs": "no log-probabilities; leave it out",
    "response_format": 'text, {"type": "text"}; leave it out and check the answer yourself',
}
"""Supported values of fields that have one; those of all others are in pydantic's message."""
ROLES = (
    "supported is one user message, and one system or developer message before it: agents answer one question, so put what was "
    "said before into it"
)
SEEDS = 2**63
AGENT_USAGE = ("agent", "prompt_tokens", "latent_steps", "new_tokens")
"""Attributes of an AgentTurn that its usage has."""


# ---- requests --------------------------------------------------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        """Drop nulls, which clients send for fields that they leave out, and all unknown fields but the first."""
        if not isinstance(data, dict):
            return data
        given = {key: value for key, value in data.items() if value is not None}
        unknown = [key for key in given if key not in cls.model_fields]
        return {key: value for key, value in given.items() if key in cls.model_fields or key == unknown[0]}


class TextPart(_Strict):
    type: Literal["text"]
    text: str


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(_Strict):
    role: Literal["system", "developer", "user"]
    content: Annotated[list[TextPart], Field(fail_fast=True), BeforeValidator(_as_parts)]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)


class StreamOptions(_Strict):
    include_usage: bool = False


class TextFormat(_Strict):
    type: Literal["text"]


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _check_false(value: bool) -> bool:
    if value:
        raise ValueError("false")
    return value


class ChatCompletionRequest(_Strict):
    """A request that a chain can answer.

    Temperature, top_p and seed are for all agents that write; penalties, stop and max_tokens for the last one. Without a
    temperature a text is greedy, as everywhere in this package.
    """

    model: str
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]], Field(max_length=16, fail_fast=True), BeforeValidator(_as_list)
    ] = []
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    # Clients send these along; supported are the values that change nothing.
    n: Annotated[int, Field(ge=1, le=1)] = 1
    logprobs: Annotated[bool, AfterValidator(_check_false)] = False
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
    def read(cls, body: bytes) -> "ChatCompletionRequest":
        """Parse a request's body. Raises ApiError, which names the first wrong field."""
        try:
            data = json.loads(body)
            json.dumps(data, ensure_ascii=False).encode()  # raises for lone surrogates, which are no text
        except (ValueError, RecursionError) as error:
            raise ApiError(f"the body is no JSON ({error}); send a JSON object with model and messages") from error
        if not isinstance(data, dict):
            raise ApiError("the body is no JSON object; send one with model and messages")
        try:
            request = cls.model_validate(data)
        except ValidationError as error:
            raise _refusal(error.errors()[0]) from error
        request._check_fields()
        return request

    def _check_fields(self) -> None:
        """Raise ApiError for fields that do not go together."""
        roles = [message.role for message in self.messages]
        if roles[-1] != "user" or len(roles) > 2 or roles[:-1] == ["user"]:
            raise ApiError(f"got messages of {truncate(', '.join(roles))}; {ROLES}", param="messages")
        if not self.question.strip():
            raise ApiError("the messages hold no text; ask something", param="messages")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ApiError(
                f"got max_tokens {short_repr(self.max_tokens)} and max_completion_tokens "
                f"{short_repr(self.max_completion_tokens)}, which are two names of one limit; send one of them",
                param="max_completion_tokens",
            )
        if "stream_options" in self.model_fields_set and not self.stream:
            raise ApiError("got stream_options without stream; send stream: true with it", param="stream_options")


def _refusal(fault: Mapping[str, Any]) -> ApiError:
    """Return pydantic's first finding as an error."""
    where = list(fault["loc"])
    param, got = truncate(".".join(map(str, where))), short_repr(fault["input"])
    if fault["type"] == "extra_forbidden":
        supported = SUPPORTED[None if len(where) == 1 else where[0]]
        return ApiError(
            f"got {param}, which a chain of agents does not take; supported are {supported}. Leave it out",
            param=param, code="unsupported_parameter",
        )  # fmt: skip
    if fault["type"] == "missing":
        return ApiError(f"{param} is missing; send model, and messages with role and content", param=param)
    if where[0] == "messages" and where[-1] == "role":
        return ApiError(f"got {param} {got}; {ROLES}", param=param)
    if where[0] == "messages" and len(where) > 2:
        text = "supported is text, as a string or a list of parts of type text"
        return ApiError(f"got {param} {got}; {text}", param=param)
    supported = REMEDIES.get(where[0], fault["msg"][:1].lower() + fault["msg"][1:])
    return ApiError(f"got {param} {got}; supported: {supported}", param=param, code="invalid_value")


def short_repr(value: Any) -> str:
    """Return the beginning of a client's value as JSON."""
    try:
        return truncate(json.dumps(value, default=str))
    except RecursionError:
        return "something deeply nested"


def truncate(text: str) -> str:
    """Return the first 80 characters of a text, with an ellipsis where it is longer."""
    return text if len(text) <= 80 else text[:77] + "..."


# ---- replies ---------------------------------------------------------------------------------------------------------


def usage_info(result: ChainResult) -> dict[str, Any]:
    """Return OpenAI's usage for a run with one question, of all agents together, with latent steps and each agent's usage.

    Texts before the last one count as reasoning.
    """
    (answer,) = result.answers
    turns = answer.turns
    prompt, new = sum(turn.prompt_tokens for turn in turns), sum(turn.new_tokens for turn in turns)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "completion_tokens_details": {"reasoning_tokens": new - turns[-1].new_tokens},
        "latent_steps": sum(turn.latent_steps for turn in turns),
        "latentmas": [{name: getattr(turn, name) for name in AGENT_USAGE} for turn in turns],
    }


@dataclass(frozen=True)
class Reply:
    """What all objects of one answer have in common.

    Attributes:
        id: of the answer.
        created: Unix time.
        model: name of the chain.
    """

    id: str
    created: int
    model: str

    def completion(self, text: str, finish_reason: str, usage: dict[str, Any]) -> dict[str, Any]:
        """Return the whole answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return {**asdict(self), "object": "chat.completion", "choices": [choice], "usage": usage}

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> str:
        """Return a piece of the answer as a server-sent event."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return server_sent_event({**asdict(self), "object": "chat.completion.chunk", "choices": [choice]})

    def usage_chunk(self, usage: dict[str, Any]) -> str:
        """Return the usage as a server-sent event, the last one but [DONE]."""
        return server_sent_event({**asdict(self), "object": "chat.completion.chunk", "choices": [], "usage": usage})


def server_sent_event(data: Mapping[str, Any]) -> str:
    """Return an event in ASCII: some clients take other characters than line feeds for ends of lines."""
    return f"data: {json.dumps(data)}\n\n"


def model_card(name: str, created: int) -> dict[str, Any]:
    """Return a chain as an entry of OpenAI's list of models."""
    return {"id": name, "object": "model", "created": created, "owned_by": "latentmas"}
