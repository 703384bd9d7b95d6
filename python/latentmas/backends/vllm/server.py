"""vLLM's OpenAI-compatible server, reached over HTTP."""

import asyncio
import base64
import io
import os
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import torch

from latentmas.backends.base import (
    Completion,
    EngineError,
    GenerationRequest,
    LockstepTokens,
    OnTokens,
    PromptEmbeds,
    check_requests,
)
from latentmas.backends.kv_file import shared_folder
from latentmas.backends.vllm.http_errors import (
    BusyError,
    SilentError,
    UnreachableError,
    UnwritableError,
    authorization_header,
    refusal,
    server_address,
)
from latentmas.backends.vllm.request import PackedPrompt, RequestPacker, checked_completion, sampling_params
from latentmas.backends.vllm.sse import Chunk, read_chunks
from latentmas_kernels import LatentCache, generate
from latentmas_kernels.cache.free_memory import InsufficientMemoryError
from latentmas_kernels.errors import LatentMASError

CONNECT_SECONDS, HEALTH_SECONDS, ASK_SECONDS = 5.0, 3.0, 15.0
PROBE_TEXT = "The capital of France is the city of"
LIKELY = 20
"""The token that a server generates after the probe must be among so many likeliest of our model; dtypes round differently."""
PROBE_SECONDS = 60.0
"""Limit of the first texts of a server, which may still compile kernels."""


class VllmServer:
    """A `TextBackend`.

    Attributes:
        stamp, kv_transfer, max_model_len: as in `TextBackend`; the last is 0 until the server is connected.
        folder: for KV files.
        timeout: seconds that the server may send nothing while it works for a request.
        name, url: of the server's model and the server; the name is known once it is connected.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        kv_transfer: str = "kv",
        folder: Path | None = None,
        timeout: float = 300.0,
        wait: Callable[[Coroutine[Any, Any, Any]], Any] = asyncio.run,
    ) -> None:
        """Prepare for a server whose address `set_url` gives later.

        Args:
            model: the server's model, as a causal LM of transformers.
            tokenizer: the model's.
            kv_transfer: one of KV_TRANSFERS.
            folder: for KV files; shared memory when None.
            wait: runs a coroutine to its end and returns its result; called in the thread that calls `write`. Where an event
                loop runs already, it must run the coroutine there.

        Raises:
            LatentMASError: where the model's caches cannot be transferred, or the folder cannot be written to.
        """
        folder = shared_folder() if folder is None else folder
        self._packer = RequestPacker(model, kv_transfer, folder)
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise LatentMASError(f"{folder} is no folder that can be written to; name one that vLLM can read, too")
        self.stamp, self.kv_transfer, self.folder = self._packer.stamp, kv_transfer, folder
        self.timeout, self.max_model_len, self.name, self.url = timeout, 0, "", ""
        self._embedding, self._wait = model.get_input_embeddings(), wait
        self._probe_text = _ProbeText.of(model, tokenizer)
        self._client: httpx.AsyncClient | None = None
        self._connected, self._connecting = False, None  # type: bool, asyncio.Task[None] | None

    def set_url(self, url: str) -> None:
        """Set the server's address, which may have changed.

        Raises:
            LatentMASError: where that is no HTTP URL, or no header can carry VLLM_API_KEY.
        """
        self.url, self._connected, self._connecting = server_address(url), False, None
        self._client = httpx.AsyncClient(
            base_url=self.url,
            timeout=self._timeout(self.timeout),
            # A connection for each request: one that was kept may be to a server that has ended by now.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            headers=authorization_header(),
            trust_env=False,
        )

    async def close(self) -> None:
        """Close the HTTP client."""
        if self._client is not None:
            await self._client.aclose()

    # ---- the server's state ----------------------------------------------------------------------------------------

    async def is_healthy(self) -> bool:
        """Return whether the server answers /health with 200."""
        try:
            return (await self._http.get("/health", timeout=HEALTH_SECONDS)).status_code == 200
        except httpx.HTTPError:
            return False

    async def connect(self) -> None:
        """Check that the server is there and takes this model's caches; do nothing where that is known.

        Concurrent callers share one attempt, which goes on when one of them is cancelled.

        Raises:
            UnreachableError: where it is not there.
            LatentMASError: where it is not a vLLM that was started for this.
            EngineError: where it fails.
        """
        if self._connected:
            return
        if self._connecting is None:
            self._connecting = asyncio.ensure_future(self._connect())
            self._connecting.add_done_callback(self._on_connected)
        await asyncio.shield(self._connecting)

    def _on_connected(self, attempt: "asyncio.Task[None]") -> None:
        connected = not attempt.cancelled() and attempt.exception() is None
        if attempt is self._connecting:  # and not one at an earlier address
            self._connecting, self._connected = None, connected

    async def _connect(self) -> None:
        with self._engine_errors(ASK_SECONDS):
            response = await self._http.get("/v1/models", timeout=ASK_SECONDS)
        if response.status_code == 503:
            raise UnreachableError(f"vLLM at {self.url} is not ready (503); try again in a while")
        if response.status_code in (401, 403):
            raise LatentMASError(
                f"{self.url} wants an API key (status {response.status_code}); set VLLM_API_KEY to that of vLLM"
            )
        try:
            served = response.json()["data"][0]
            self.name, self.max_model_len = str(served["id"]), int(served["max_model_len"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise LatentMASError(
                f"{self.url}/v1/models gave {response.text[:200]!r} (status {response.status_code}), which is not what vLLM "
                "says; --vllm-url is the address of a running `vllm serve`, like http://127.0.0.1:8001"
            ) from error
        await self._probe()

    async def _probe(self) -> None:
        # First as tokens: embeddings of another width would end a server that runs another model.
        probe = self._probe_text
        await self._probe_prompt(probe.request, PackedPrompt(probe.request.prompt))
        prompt = self._encode(probe.embeds)
        if self.kv_transfer == "kv":
            (prompt,) = self.pack(probe.cache, [probe.after_cache])
        try:
            await self._probe_prompt(probe.request, prompt)
        except (UnreachableError, BusyError, SilentError):
            raise
        except EngineError as error:
            raise LatentMASError(f"{error}. {self._remedy}") from error
        finally:
            prompt.close()

    async def _probe_prompt(self, request: GenerationRequest, prompt: PackedPrompt) -> None:
        *_, completion = [part async for part in self.stream(request, prompt, seconds=PROBE_SECONDS)]
        if completion.ids[0] not in self._probe_text.likely:
            raise LatentMASError(
                f"vLLM at {self.url} ({self.name}) goes on otherwise behind {PROBE_TEXT!r} than {self.stamp.model}, so it runs "
                "another model; serve the same model and dtype there and here (--model, --dtype)"
            )

    @property
    def _remedy(self) -> str:
        if self.kv_transfer == "embeds":
            return "Start vLLM with --enable-prompt-embeds"
        return (
            "Start vLLM with --enable-prompt-tokens-details and the --kv-transfer-config that `latentmas serve --kv-config` "
            "prints for this model, dtype and folder"
        )

    # ---- texts -----------------------------------------------------------------------------------------------------

    def write(
        self, cache: LatentCache | None, requests: Sequence[GenerationRequest], on_tokens: OnTokens | None = None
    ) -> list[Completion]:
        """See `TextBackend.write`."""
        check_requests(requests, cache, self.max_model_len, self.kv_transfer)
        with ExitStack() as stack:
            prompts = self.pack(cache, requests)
            for prompt in prompts:
                stack.callback(prompt.close)
            tokens = LockstepTokens(len(requests), on_tokens)
            completions: list[Completion] = self._wait(self._write(requests, prompts, tokens))
            return completions

    async def _write(
        self, requests: Sequence[GenerationRequest], prompts: Sequence[PackedPrompt], tokens: LockstepTokens
    ) -> list[Completion]:
        async def write_one(number: int) -> Completion:
            part: Chunk | Completion | None = None
            async for part in self.stream(requests[number], prompts[number]):
                ended = isinstance(part, Completion)
                tokens.add(number, [] if ended else part.ids, ended)
            assert isinstance(part, Completion), "a stream ends with one"
            return part

        await self.connect()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(write_one(number)) for number in range(len(requests))]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    def pack(self, cache: LatentCache | None, requests: Sequence[GenerationRequest]) -> list[PackedPrompt]:
        """Pack and encode the prompts; a cache is written to a file, which exists until a prompt is closed.

        Called in the thread that runs the model, not in the event loop: embedding and encoding a prompt of 8k tokens of 4096
        takes 0.2 s, in which no other request would get its tokens.

        Raises:
            LatentMASError: where the cache cannot be transferred.
            UnwritableError: where it cannot be written.
        """
        try:
            return [self._encode(prompt) for prompt in self._packer.pack(cache, requests)]
        except (OSError, InsufficientMemoryError) as error:
            raise UnwritableError(
                f"the memory could not be written to {self.folder} ({error}); make room there, or start the server with "
                "another --folder"
            ) from error

    def _encode(self, prompt: PackedPrompt) -> PackedPrompt:
        """Return the prompt with its embeddings as vLLM's completions API takes them."""
        if prompt.embeds is None:
            return prompt
        file = io.BytesIO()
        torch.save(prompt.embeds.embed_tokens(self._embedding).contiguous(), file)
        return replace(prompt, embeds=None, encoded_embeds=base64.b64encode(file.getvalue()).decode())

    @staticmethod
    def _prompt(prompt: PackedPrompt) -> dict[str, Any]:
        """Return the prompt in the form of vLLM's completions API."""
        if prompt.encoded_embeds:
            return {"prompt_embeds": prompt.encoded_embeds}
        if prompt.row is None:
            return {"prompt": prompt.token_ids}
        row = prompt.row
        return {"prompt": prompt.token_ids, "cache_salt": row.salt, "kv_transfer_params": row.params}

    async def stream(
        self,
        request: GenerationRequest,
        prompt: PackedPrompt,
        *,
        stop: Sequence[str] = (),
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seconds: float | None = None,
    ) -> AsyncGenerator[Chunk | Completion, None]:
        """Yield a text as the server generates it, then its Completion. Closing the generator aborts the request.

        Args:
            prompt: the request's, as `pack` returns it.
            stop: strings that end the text and are no part of it.
            seconds: that the server may send nothing; None for `timeout`.

        Raises:
            EngineError: where the server failed, or its answer cannot be trusted.
        """
        body = {
            "model": self.name, **self._prompt(prompt), **sampling_params(request),
            # Everything for which a server or a model's generation_config could have defaults of its own.
            "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty, "min_tokens": 0, "stop": list(stop), "skip_special_tokens": True,
            "return_token_ids": True, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        ids: list[int] = []
        reason, usage = None, None
        timeout = self._timeout(self.timeout if seconds is None else seconds)
        with self._engine_errors(seconds):
            async with self._http.stream("POST", "/v1/completions", json=body, timeout=timeout) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise refusal(response)
                async with aclosing(read_chunks(response)) as chunks:
                    async for chunk in chunks:
                        usage, reason = chunk.usage or usage, chunk.finish_reason or reason
                        ids += chunk.ids
                        yield chunk
            if reason is None:
                raise EOFError("the stream ended before the text did")
        cached = ((usage or {}).get("prompt_tokens_details") or {}).get("cached_tokens")
        completion = checked_completion(prompt, ids, reason, cached, "a request")
        if not ids:
            raise EngineError("vLLM wrote no tokens, or does not say which; it must support return_token_ids")
        yield completion

    # ---- HTTP ------------------------------------------------------------------------------------------------------

    @property
    def _http(self) -> httpx.AsyncClient:
        assert self._client is not None, "`set_url` comes first"
        return self._client

    @staticmethod
    def _timeout(seconds: float) -> httpx.Timeout:
        return httpx.Timeout(seconds, connect=CONNECT_SECONDS, pool=None)

    @contextmanager
    def _engine_errors(self, seconds: float | None) -> Iterator[None]:
        """Turn HTTP failures into EngineErrors; a server that was lost must be probed again before it is used.

        Args:
            seconds: that the server may send nothing; None for `timeout`.
        """
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            self._connected = False
            raise UnreachableError(f"vLLM does not answer at {self.url} ({error}); try again in a while") from error
        except httpx.TimeoutException as error:
            limit = self.timeout if seconds is None else seconds
            remedy = ", or start the server with a longer --timeout" if seconds is None else " or look at its log"
            raise SilentError(
                f"vLLM said nothing for {limit:g} s, so the request was ended; it may be overloaded: try again later{remedy}"
            ) from error
        except (httpx.HTTPError, EOFError) as error:
            self._connected = False
            raise EngineError(
                f"vLLM's answer broke off ({type(error).__name__}: {error}); its process may have ended: try again"
            ) from error


@dataclass(frozen=True)
class _ProbeText:
    """A text that tells whether a server runs our model and takes its caches.

    Attributes:
        request: the text as tokens.
        cache: the text's first two tokens, as a row of a KV cache.
        after_cache: the rest of the text, after the cache.
        embeds: all of the text as embeddings.
        likely: the likeliest next tokens of our model.
    """

    request: GenerationRequest
    cache: LatentCache
    after_cache: GenerationRequest
    embeds: PackedPrompt
    likely: set[int]

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> "_ProbeText":
        ids = tokenizer(PROBE_TEXT).input_ids
        with torch.no_grad():
            inputs = torch.tensor([ids], device=model.device)
            logits = model(input_ids=inputs).logits[0, -1]
            cache = generate(model, inputs[:, :2], max_new_tokens=1, engine="eager").past_key_values
            embeds = model.get_input_embeddings()(inputs[0]).cpu()
        request, placeholders = GenerationRequest(ids, 1, ()), [0] * len(ids)
        return cls(
            request, cache, replace(request, prompt=ids[2:], row=0),
            PackedPrompt(placeholders, PromptEmbeds(embeds, placeholders, [False] * len(ids))),
            set(logits.topk(LIKELY).indices.tolist()),
        )  # fmt: skip
