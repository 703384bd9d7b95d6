"""The protocol of a text-generation backend, its requests and completions, and what every backend checks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from latentmas.backends.kv_file import check_finite
from latentmas_kernels import LatentCache
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.fingerprint import ModelFingerprint

KV_TRANSFERS = ("kv", "embeds")
"""How a KV cache is transferred: "kv", keys and values; "embeds", the inputs that filled the cache, to be prefilled again."""

OnTokens = Callable[[int, Tensor], None]
"""Called after each decode step with its number, from 1, and int64 [requests], a token of each (any one after its end)."""


@dataclass(frozen=True)
class GenerationRequest:
    """A text to be generated after a row of a KV cache, or after a prompt alone.

    Attributes:
        prompt: token ids, one or more.
        max_new_tokens: limit of the text.
        end_ids: tokens that end it.
        row: of the cache; None for a request without a cache.
        slot_inputs: inputs that filled the row, per slot: a token id, or the embedding [D] of a latent step. For "embeds" only.
        temperature, top_p: as in Chain.run.
        seed: of the sampling.
    """

    prompt: list[int]
    max_new_tokens: int
    end_ids: tuple[int, ...]
    row: int | None = None
    slot_inputs: Sequence[int | Tensor] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """A generated text.

    Attributes:
        ids: token ids, with the end token where one was generated.
        finish_reason: "stop" or "length".
        computed_tokens: tokens of cache and prompt that the backend prefilled, without those found in a cache.
        logprobs: of each token, where the backend was asked for them.
    """

    ids: list[int]
    finish_reason: Literal["stop", "length"]
    computed_tokens: int
    logprobs: list[float] = field(default_factory=list)


class TextBackend(Protocol):
    """An engine outside this package that generates the texts of agents on one model.

    Attributes:
        stamp: fingerprint of the model.
        kv_transfer: one of KV_TRANSFERS.
        max_model_len: limit of cache, prompt and text together, in tokens.
    """

    stamp: ModelFingerprint
    kv_transfer: str
    max_model_len: int

    def write(
        self, cache: LatentCache | None, requests: Sequence[GenerationRequest], on_tokens: OnTokens | None = None
    ) -> list[Completion]:
        """Generate the texts of all requests as one batch. This does not modify the cache.

        Raises:
            LatentMASError: for a request that cannot be right; then none is sent.
            EngineError: where the engine failed.
        """


class EngineError(RuntimeError):
    """A backend's engine failed, or its answer cannot be trusted. The message says what to do."""


@dataclass(frozen=True)
class PromptEmbeds:
    """A prompt in which some positions are embeddings.

    Attributes:
        embeds: [T, D]; zeros at the positions of tokens.
        ids: T token ids; 0 at the positions of embeddings.
        is_token: T flags.
    """

    embeds: Tensor
    ids: list[int]
    is_token: list[bool]

    @classmethod
    def of(cls, request: GenerationRequest, hidden_size: int, dtype: torch.dtype) -> "PromptEmbeds | None":
        """Return the inputs of the request's row, followed by its prompt; None where all of them are tokens.

        Args:
            hidden_size, dtype: of the model's embeddings.

        Raises:
            LatentMASError: for embeddings that are not of that size, or hold NaN or Inf.
        """
        slots = [*request.slot_inputs, *request.prompt]
        given = [(position, slot) for position, slot in enumerate(slots) if not isinstance(slot, int)]
        if not given:
            return None
        for position, vector in given:
            if list(vector.shape) != [hidden_size]:
                raise LatentMASError(
                    f"the embedding at position {position} has the shape {list(vector.shape)}; this model reads "
                    f"[{hidden_size}]: build the aligner with target_model for a model of another width"
                )
        embeds = torch.zeros(len(slots), hidden_size, dtype=dtype)
        positions, vectors = zip(*given, strict=True)
        embeds[list(positions)] = torch.stack(vectors).to("cpu", dtype)
        check_finite(embeds, "what the agents thought")
        is_token = [isinstance(slot, int) for slot in slots]
        return cls(embeds, [slot if isinstance(slot, int) else 0 for slot in slots], is_token)

    def embed_tokens(self, embedding: nn.Module) -> Tensor:
        """Return [T, D] on the CPU, with the tokens embedded as well."""
        mask = torch.tensor(self.is_token)
        ids = torch.tensor(self.ids)[mask].to(next(embedding.parameters()).device)
        embeds = self.embeds.clone()
        with torch.no_grad():
            embeds[mask] = embedding(ids).to("cpu", embeds.dtype)
        return embeds


def check_requests(
    requests: Sequence[GenerationRequest], cache: LatentCache | None, max_model_len: int, kv_transfer: str
) -> None:
    """Raise LatentMASError for a request that does not fit its cache or the engine's limits."""
    for number, request in enumerate(requests):
        if not request.prompt:
            raise LatentMASError(
                f"request {number} has an empty prompt; the text needs one token or more to go on from"
            )
        if request.row is not None and (cache is None or not 0 <= request.row < cache.batch_size):
            rows = 0 if cache is None else cache.batch_size
            raise LatentMASError(f"request {number} goes on from row {request.row} of a memory of {rows} rows")
        slots = 0 if request.row is None or cache is None else int(cache.lengths[request.row])
        if kv_transfer == "embeds" and len(request.slot_inputs) != slots:
            raise LatentMASError(
                f"request {number} says what {len(request.slot_inputs)} slots were fed, and its memory has {slots}; embeddings "
                'are all that is sent of it: give `slot_inputs` for every slot, or start the engine with kv_transfer="kv"'
            )
        tokens = slots + len(request.prompt)
        if tokens + request.max_new_tokens > max_model_len:
            raise LatentMASError(
                f"request {number} has {tokens} tokens ({slots} of memory) and may write {request.max_new_tokens} more; vLLM "
                f"was started for {max_model_len} together (max_model_len): shorten it, or start vLLM with more"
            )


def check_cache_hit(slots: int, found: int, request: str) -> None:
    """Raise EngineError where an engine found fewer tokens in its cache than the slots that were transferred to it."""
    if found < slots:
        raise EngineError(
            f"vLLM read {slots - found} of {slots} slots of memory as placeholders in {request}, so its answer is worth "
            "nothing; it must run with our connector and prefix caching as it is by default"
        )


class LockstepTokens:
    """Tokens that arrive request by request, regrouped into decode steps of all requests.

    Attributes:
        ids: per request its tokens so far.
    """

    def __init__(self, requests: int, on_tokens: OnTokens | None) -> None:
        self.on_tokens, self.ids = on_tokens, [list[int]() for _ in range(requests)]
        self.ended, self.step = [False] * requests, 0

    def add(self, request: int, ids: Sequence[int], ended: bool) -> None:
        """Add new tokens of a request, and call `on_tokens` for each step that is now complete."""
        self.ids[request] += ids
        self.ended[request] |= ended
        if self.on_tokens is None:
            return
        made = [len(ids) for ids in self.ids]
        complete = min((m for m, ended in zip(made, self.ended, strict=True) if not ended), default=max(made))
        while self.step < complete:
            row = [ids[min(self.step, len(ids) - 1)] if ids else 0 for ids in self.ids]
            self.step += 1
            self.on_tokens(self.step, torch.tensor(row))
