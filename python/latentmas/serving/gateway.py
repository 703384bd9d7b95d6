"""The gateway: runs the chain that a request names, and streams its last text as vLLM generates it. Knows no HTTP."""

import secrets
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from anyio import CancelScope, CapacityLimiter, Semaphore, to_thread

from latentmas.backends.base import Completion
from latentmas.backends.vllm.request import PackedPrompt
from latentmas.backends.vllm.server import VllmServer
from latentmas.chain.chain import Chain
from latentmas.chain.run import PendingAnswer
from latentmas.serving.errors import ApiError
from latentmas.serving.model_lease import ModelLease
from latentmas.serving.protocol import ChatCompletionRequest, short_repr, usage_info
from latentmas_kernels.errors import LatentMASError

CHECKS = 2
"""Questions that are checked at a time: each thread that used torch may leave a thread pool of torch behind."""
TOKEN_CHARACTERS = 64
"""More characters than a token has on average; a question with more of them is refused before it is tokenized."""


@dataclass(frozen=True)
class Finish:
    """The end of an answer.

    Attributes:
        reason: "stop" or "length".
        usage: of all agents, as `usage_info` returns it.
    """

    reason: str
    usage: dict[str, Any]


class Gateway:
    """Answers requests, each by the chain that it names.

    Attributes:
        chains: by the names that requests give.
        requests: number of requests that are being answered or wait.
        stopped: whether `stop` was called.
    """

    def __init__(self, chains: Mapping[str, Chain], vllm: VllmServer, *, max_waiting: int = 256) -> None:
        """Set up the gateway, in the event loop that answers.

        Args:
            chains: of one model, each with `vllm` as its decoder.
            vllm: made with `wait=ModelLease.wait`.
            max_waiting: limit of `requests`; more are refused.
        """
        self.chains, self.vllm, self.max_waiting = chains, vllm, max_waiting
        self.requests, self.stopped = 0, False
        self._model, self._threads, self._checks = Semaphore(1), CapacityLimiter(max_waiting), CapacityLimiter(CHECKS)
        self._scopes = set[CancelScope]()

    def stop(self) -> None:
        """End all requests with an error, those that come later too."""
        self.stopped = True
        for scope in self._scopes:
            scope.cancel()

    @contextmanager
    def until_stopped(self) -> Iterator[None]:
        """Raise ApiError in place of the block, or of its rest, once the gateway is stopped."""
        with CancelScope() as scope:
            self._scopes.add(scope)
            try:
                if self.stopped:
                    scope.cancel()
                yield
            finally:
                self._scopes.discard(scope)
        if scope.cancelled_caught:
            raise ApiError(
                "the server is ending; send the request again once it runs", status=503, code="server_ending"
            )

    def chain(self, name: str) -> Chain:
        """Return the chain of that name. Raises ApiError where there is none."""
        if name not in self.chains:
            raise ApiError(
                f"there is no chain {short_repr(name)} here; model names one of {', '.join(self.chains)}",
                status=404, code="model_not_found", param="model",
            )  # fmt: skip
        return self.chains[name]

    async def answer(self, request: ChatCompletionRequest) -> AsyncGenerator[str | Finish, None]:
        """Yield the answer's text, as it is generated, then its Finish. Closing the generator ends all work for the request.

        Raises:
            ApiError: for a request that cannot be answered, or when the gateway stops.
            EngineError: where vLLM fails.
            LatentMASError: where the chain fails.
        """
        chain = self.chain(request.model)
        if self.requests >= self.max_waiting:
            raise ApiError(
                f"{self.requests} requests are being answered or wait, and no more at a time (--max-waiting); try again later",
                status=429,
                code="too_many_requests",
            )
        self.requests += 1
        try:
            with self.until_stopped():
                await self._check(chain, request)
                await self.vllm.connect()
                pending, prompt = await self._prepare(chain, request)
            try:
                (last,) = pending.requests
                last = last if request.limit is None else replace(last, max_new_tokens=request.limit)
                chunks = self.vllm.stream(
                    last, prompt, stop=request.stop, presence_penalty=request.presence_penalty,
                    frequency_penalty=request.frequency_penalty,
                )  # fmt: skip
                async with aclosing(chunks):
                    while True:
                        with self.until_stopped():
                            part = await anext(chunks)
                        if isinstance(part, Completion):
                            break
                        if part.text:
                            yield part.text
                yield Finish(part.finish_reason, usage_info(pending.finish([part])))
            finally:
                prompt.close()
        finally:
            self.requests -= 1

    async def _check(self, chain: Chain, request: ChatCompletionRequest) -> None:
        most = chain.agents[-1].max_new_tokens or 0
        if request.limit is not None and request.limit > most:
            name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
            raise ApiError(
                f"got {name} {short_repr(request.limit)}; the last agent of {request.model} writes up to {most} tokens, which "
                "is what the chain was planned for: ask for no more, or start the server with a larger --max-new-tokens",
                code="invalid_value", param=name,
            )  # fmt: skip
        length, longest = len(request.question), TOKEN_CHARACTERS * self.vllm.max_model_len
        if length > longest > 0:
            raise ApiError(
                f"got a question of {length} characters; vLLM was started for {self.vllm.max_model_len} tokens, and no "
                f"question of more than {longest} characters fits: ask something shorter",
                param="messages",
            )
        try:
            await to_thread.run_sync(chain.check, request.question, limiter=self._checks)
        except LatentMASError as error:
            raise ApiError(str(error), param="messages") from error

    async def _prepare(self, chain: Chain, request: ChatCompletionRequest) -> tuple[PendingAnswer, PackedPrompt]:
        """Run all agents but the last."""
        seed = secrets.randbits(62) if request.seed is None else request.seed
        lease = ModelLease(self._model, self._threads, seed)

        def work() -> tuple[PendingAnswer, PackedPrompt]:
            lease.check_cancelled()
            pending = chain.prepare(
                [request.question], temperature=request.temperature, top_p=request.top_p,
                on_progress=lambda progress: lease.check_cancelled(),
            )  # fmt: skip
            (prompt,) = self.vllm.pack(pending.memory, pending.requests)
            pending.forget()
            return pending, prompt

        return await lease.run(work)
