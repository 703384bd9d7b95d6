"""vLLM's OpenAI-compatible server as the engine that writes a chain's texts."""

import asyncio
import base64
import io
import os
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import httpx
import torch

from latentmas.backends.base import (
    KV_TRANSFERS,
    Completion,
    Embeds,
    EngineError,
    GenerationRequest,
    OnTokens,
    Steps,
    check_cache_hit,
    check_requests,
)
from latentmas.backends.kv_file import KVFile, KVFileRow, check_transferable, shared_folder, sweep
from latentmas.backends.vllm.sse import Busy, Silent, Unreachable, Unwritable, address_of, events, refusal
from latentmas.serving.model_lease import Turn
from latentmas_kernels import LatentCache, generate
from latentmas_kernels.cache.free_memory import InsufficientMemoryError
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.models.fingerprint import ModelFingerprint

CONNECT_SECONDS, HEALTH_SECONDS, ASK_SECONDS = 5.0, 3.0, 15.0
PROBE_SECONDS = 60.0
"""For the first texts of a server, which may still compile things."""
PROBE_TEXT = "The capital of France is the city of"
LIKELY = 20
"""The token that a server writes behind the probe is among so many likeliest of our model; dtypes round differently."""


@dataclass(frozen=True)
class Sent:
    """What comes before a text, as the server takes it.

    Attributes:
        prompt: fields of the request.
        slots: of memory, that the server must find and not read.
        tokens: of memory and prompt.
        parcel: the memory's file; None where there is none.
    """

    prompt: dict[str, Any]
    slots: int
    tokens: int
    parcel: KVFile | None = None

    def close(self) -> None:
        """Remove the file."""
        if self.parcel is not None:
            self.parcel.close()


@dataclass(frozen=True)
class Piece:
    """Some of a text, as it comes.

    Attributes:
        text: may be empty: the beginning of a character, say.
        ids: the tokens.
        written: all of it, with the last piece.
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    written: Completion | None = None


class Upstream:
    """A `Decoder`.

    Attributes:
        stamp, kv_transfer, max_model_len: as in `Decoder`; the last is known once it is connected.
        folder: where memories are handed over.
        timeout: seconds that the server may be silent while it works for a request.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, kv_transfer: str = "kv", folder: Path | None = None, timeout: float = 300.0
    ) -> None:
        """For a server that is not there yet.

        Args:
            model: what the server is to run, as a causal LM of transformers.
            tokenizer: the model's.
            kv_transfer: one of KV_TRANSFERS.
            folder: shared memory when None.

        Raises:
            ValueError: where the model's memories cannot be handed over, or there is no such folder.
        """
        if kv_transfer not in KV_TRANSFERS:
            raise LatentMASError(f"got --hand-over {kv_transfer}; supported are {', '.join(KV_TRANSFERS)}")
        if not timeout > 0:
            raise LatentMASError(f"got --timeout {timeout}; supported are seconds, more than 0")
        if kv_transfer == "kv":
            check_transferable(model)
        self.folder = shared_folder() if folder is None else folder
        if not self.folder.is_dir() or not os.access(self.folder, os.W_OK):
            raise LatentMASError(f"{self.folder} is no folder that can be written to; name one that vLLM can read, too")
        sweep(self.folder)
        self.kv_transfer, self.timeout, self.stamp, self.max_model_len = (
            kv_transfer,
            timeout,
            ModelFingerprint.of(model),
            0,
        )
        self.name, self.url = "", ""
        self._embedding, self._dtype = model.get_input_embeddings(), Architecture.of(model).dtype
        self._width = Architecture.of(model).hidden_size
        self._probe = _Probe.of(model, tokenizer)
        self._client: httpx.AsyncClient | None = None
        self._connected, self._connecting = False, None  # type: bool, asyncio.Task[None] | None

    def at(self, url: str) -> None:
        """Look for the server at another address.

        Raises:
            ValueError: where that is none.
        """
        self.url, self._connected, self._connecting = address_of(url), False, None
        key = os.environ.get("VLLM_API_KEY")
        self._client = httpx.AsyncClient(
            base_url=self.url,
            timeout=self._patience(self.timeout),
            # A connection for each request: one that was kept may be to a server that is gone by now.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            trust_env=False,
        )

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    # ---- is it there, and the right one ----------------------------------------------------------------------------

    async def answers(self) -> bool:
        """Whether the server says that it is well."""
        try:
            return (await self._http.get("/health", timeout=HEALTH_SECONDS)).status_code == 200
        except httpx.HTTPError:
            return False

    async def connect(self) -> None:
        """Make sure that the server is there and goes on from our memories; does nothing where that is known.

        All that wait for it at a time share one attempt.

        Raises:
            Unreachable: where it is not there.
            ValueError: where it is not a vLLM that was started for this.
            EngineError: where it fails.
        """
        if self._connected:
            return
        if self._connecting is None:
            self._connecting = asyncio.ensure_future(self._connect())
            self._connecting.add_done_callback(self._tried)
        await asyncio.shield(self._connecting)

    def _tried(self, attempt: "asyncio.Task[None]") -> None:
        well = not attempt.cancelled() and attempt.exception() is None
        if attempt is self._connecting:  # and not one at an address before this
            self._connecting, self._connected = None, well

    async def _connect(self) -> None:
        with self._faults(ASK_SECONDS):
            told = await self._http.get("/v1/models", timeout=ASK_SECONDS)
        if told.status_code == 503:
            raise Unreachable(f"vLLM at {self.url} is not ready (503); try again in a while")
        if told.status_code in (401, 403):
            raise LatentMASError(
                f"{self.url} wants an API key (status {told.status_code}); set VLLM_API_KEY to that of vLLM"
            )
        try:
            served = told.json()["data"][0]
            self.name, self.max_model_len = str(served["id"]), int(served["max_model_len"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise LatentMASError(
                f"{self.url}/v1/models gave {told.text[:200]!r} (status {told.status_code}), which is not what vLLM says; "
                "--vllm-url is the address of a running `vllm serve`, like http://127.0.0.1:8001"
            ) from error
        await self._try_out()

    async def _try_out(self) -> None:
        # First as tokens: a server with another model would be ended by embeddings of a width that is not its own.
        await self._try(
            self._probe.tokens, Sent({"prompt": self._probe.tokens.prompt}, 0, len(self._probe.tokens.prompt))
        )
        if self.kv_transfer == "kv":
            (sent,) = self.pack(self._probe.memory, [self._probe.request])
        else:
            sent = self._embedded(self._probe.embeds)
        try:
            await self._try(self._probe.request, sent)
        except (Unreachable, Busy, Silent):
            raise
        except EngineError as error:
            raise LatentMASError(f"{error}. {self._remedy}") from error
        finally:
            sent.close()

    async def _try(self, request: GenerationRequest, sent: Sent) -> None:
        written = None
        async for piece in self.stream(request, sent, seconds=PROBE_SECONDS):
            written = piece.written
        assert written is not None
        if written.ids[0] not in self._probe.likely:
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
        self, memory: LatentCache | None, requests: Sequence[GenerationRequest], on_tokens: OnTokens | None = None
    ) -> list[Completion]:
        """As `Decoder.write`; in the thread of a `Turn`, whose model others may use meanwhile."""
        check_requests(requests, memory, self.max_model_len, self.kv_transfer)
        with ExitStack() as stack:
            sent = self.pack(memory, requests)
            for one in sent:
                stack.callback(one.close)
            return Turn.wait_for(self._write(requests, sent, Steps(len(requests), on_tokens)))

    async def _write(
        self, requests: Sequence[GenerationRequest], sent: Sequence[Sent], steps: Steps
    ) -> list[Completion]:
        async def one(number: int) -> Completion:
            written = None
            async for piece in self.stream(requests[number], sent[number]):
                steps.add(number, piece.ids, piece.written is not None)
                written = piece.written
            assert written is not None
            return written

        await self.connect()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(number)) for number in range(len(requests))]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    def pack(self, memory: LatentCache | None, requests: Sequence[GenerationRequest]) -> list[Sent]:
        """What comes before each text; a memory is written to a file, which is there until all of them are closed.

        Raises:
            ValueError: where the memory cannot be handed over.
            EngineError: where it cannot be written.
        """
        if self.kv_transfer == "embeds":
            sent = []
            for request in requests:
                mixed = Embeds.of(request, self._width, self._dtype)
                if mixed is None:
                    ids = [slot for slot in request.slot_inputs if isinstance(slot, int)] + request.prompt
                    sent.append(Sent({"prompt": ids}, 0, len(ids)))
                else:
                    sent.append(self._embedded(mixed.embedded(self._embedding)))
            return sent
        parcel = None
        if memory is not None:
            try:
                parcel = KVFile(memory, self.stamp, self.folder)
            except (OSError, InsufficientMemoryError) as error:
                raise Unwritable(
                    f"the memory could not be written to {self.folder} ({error}); make room there, or start the server with "
                    "another --folder"
                ) from error
        return [self._behind(parcel, request) for request in requests]

    def _behind(self, parcel: KVFile | None, request: GenerationRequest) -> Sent:
        if parcel is None or request.row is None:
            return Sent({"prompt": request.prompt}, 0, len(request.prompt), parcel)
        handed: KVFileRow = parcel.rows[request.row]
        ids = [0] * handed.slots + request.prompt
        prompt = {"prompt": ids, "cache_salt": handed.salt, "kv_transfer_params": handed.params}
        return Sent(prompt, handed.slots, len(ids), parcel)

    def _embedded(self, embeds: torch.Tensor) -> Sent:
        file = io.BytesIO()
        torch.save(embeds.contiguous(), file)
        return Sent({"prompt_embeds": base64.b64encode(file.getvalue()).decode()}, 0, len(embeds))

    async def stream(
        self,
        request: GenerationRequest,
        sent: Sent,
        *,
        stop: Sequence[str] = (),
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seconds: float | None = None,
    ) -> AsyncGenerator[Piece, None]:
        """Let the server write a text; the last piece says what became of it. Closing it ends the work there.

        Args:
            sent: what comes before it, as `pack` made it.
            stop: strings that end it and are no part of it.
            seconds: that the server may be silent; None for `timeout`.

        Raises:
            EngineError: where the server failed, or its answer is not to be trusted.
        """
        body = {
            "model": self.name, **sent.prompt,
            # All that a server or a model's generation_config could have defaults of its own for.
            "temperature": request.temperature, "top_p": request.top_p, "top_k": -1, "min_p": 0.0,
            "repetition_penalty": 1.0, "presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty,
            "seed": request.seed, "max_tokens": request.max_new_tokens, "min_tokens": 0, "stop": list(stop),
            # The ends are the model's, as everywhere here, not the tokenizer's.
            "ignore_eos": True, "stop_token_ids": list(request.end_ids), "skip_special_tokens": True,
            "return_token_ids": True, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        ids: list[int] = []
        reason, usage = None, None
        patience = self._patience(self.timeout if seconds is None else seconds)
        with self._faults(seconds):
            async with self._http.stream("POST", "/v1/completions", json=body, timeout=patience) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise refusal(response)
                async with aclosing(events(response)) as said:
                    async for event in said:
                        usage = event.usage or usage
                        for choice in event.choices:
                            ids += choice.ids
                            reason = choice.reason or reason
                            yield Piece(choice.text, choice.ids)
            if reason is None:
                raise EOFError("the stream ended before the text did")
        yield Piece(written=self._checked(sent, ids, reason, usage))

    def _checked(self, sent: Sent, ids: list[int], reason: str | None, usage: Any) -> Completion:
        if reason not in ("stop", "length"):
            raise EngineError(f"vLLM ended a text with {reason!r}; its log says why")
        cached = ((usage or {}).get("prompt_tokens_details") or {}).get("cached_tokens")
        found = cached or 0
        if cached is None and sent.slots:
            raise EngineError(
                "vLLM did not say how many tokens it found in its cache, so nobody knows whether it read the memory; start it "
                "with --enable-prompt-tokens-details"
            )
        check_cache_hit(sent.slots, found, "a request")
        if not ids:
            raise EngineError("vLLM wrote no tokens, or does not say which; it must support return_token_ids")
        finish: Literal["stop", "length"] = "stop" if reason == "stop" else "length"
        return Completion(ids, finish, sent.tokens - found)

    # ---- HTTP ------------------------------------------------------------------------------------------------------

    @property
    def _http(self) -> httpx.AsyncClient:
        assert self._client is not None, "`at` comes first"
        return self._client

    @staticmethod
    def _patience(seconds: float) -> httpx.Timeout:
        return httpx.Timeout(seconds, connect=CONNECT_SECONDS, pool=None)

    @contextmanager
    def _faults(self, seconds: float | None) -> Iterator[None]:
        """What goes wrong on the way, as an EngineError; a server that was lost must be tried out again before it is used.

        Args:
            seconds: that the server may be silent; None for `timeout`.
        """
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            self._connected = False
            raise Unreachable(f"vLLM does not answer at {self.url} ({error}); try again in a while") from error
        except httpx.TimeoutException as error:
            limit = self.timeout if seconds is None else seconds
            remedy = ", or start the server with a longer --timeout" if seconds is None else " or look at its log"
            raise Silent(
                f"vLLM said nothing for {limit:g} s, so the request was ended; it may be overloaded: try again later{remedy}"
            ) from error
        except (httpx.HTTPError, EOFError) as error:
            self._connected = False
            raise EngineError(
                f"vLLM's answer broke off ({type(error).__name__}: {error}); its process may have ended: try again"
            ) from error


@dataclass(frozen=True)
class _Probe:
    """A text whose beginning is handed over as a memory, and what may come behind it.

    Attributes:
        memory: a row of two slots or so.
        request: goes on from it.
        tokens: the same as tokens alone.
        embeds: all of it as embeddings.
        likely: what our model would write next.
    """

    memory: LatentCache
    request: GenerationRequest
    tokens: GenerationRequest
    embeds: torch.Tensor
    likely: set[int]

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> "_Probe":
        ids = tokenizer(PROBE_TEXT).input_ids
        with torch.no_grad():
            inputs = torch.tensor([ids], device=model.device)
            logits = model(input_ids=inputs).logits[0, -1]
            memory = generate(model, inputs[:, :2], max_new_tokens=1, engine="eager").past_key_values
            embeds = model.get_input_embeddings()(inputs[0]).cpu()
        tokens = GenerationRequest(ids, 1, ())
        return cls(
            memory, replace(tokens, prompt=ids[2:], row=0), tokens, embeds, set(logits.topk(LIKELY).indices.tolist())
        )
