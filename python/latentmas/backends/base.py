"""What a chain asks of an engine that writes texts for it, and how such an engine is given a memory as embeddings."""

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
"""Keys and values as they are, with nothing computed again; or what the memory was fed, which is read again."""

OnTokens = Callable[[int, Tensor], None]
"""Told of each step: its number from 1, and int64 [requests], the token of each request at it, anything behind its end."""


@dataclass(frozen=True)
class GenerationRequest:
    """A text that is to be written behind a memory, or behind nothing.

    Attributes:
        prompt: token ids, one or more.
        max_new_tokens: limit of the text.
        end_ids: tokens that end it.
        row: of the memory; None for a request that begins one.
        slot_inputs: what that row was fed, slot by slot: a token, or the embedding [D] of a thought; for embeds only.
        temperature, top_p: as in Chain.run; seed: of the sampling.
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
    """A text.

    Attributes:
        ids: its tokens; one that ended it is the last.
        finish_reason: "stop" or "length".
        computed_tokens: of memory and prompt, those that were read for it and not found in a cache.
        logprobs: of each token, where the engine was asked for them.
    """

    ids: list[int]
    finish_reason: Literal["stop", "length"]
    computed_tokens: int
    logprobs: list[float] = field(default_factory=list)


class Decoder(Protocol):
    """An engine that writes the texts of agents on one model.

    Attributes:
        stamp: of the model.
        kv_transfer: one of KV_TRANSFERS.
        max_model_len: tokens of memory, prompt and text together, at most.
    """

    stamp: ModelFingerprint
    kv_transfer: str
    max_model_len: int

    def write(
        self, memory: LatentCache | None, requests: Sequence[GenerationRequest], on_tokens: OnTokens | None = None
    ) -> list[Completion]:
        """Write all of them at the same time; the memory stays as it is.

        Raises:
            ValueError: for a request that cannot be right; then none is sent.
            EngineError: where the engine failed.
        """


class EngineError(RuntimeError):
    """An engine of others failed, or gave an answer that is not to be trusted; says what to do."""


@dataclass(frozen=True)
class Embeds:
    """A prompt in which some positions are embeddings.

    Attributes:
        embeds: [T, D]; zeros where there are tokens.
        ids: token ids, 0 where there are embeddings.
        is_token: for each position.
    """

    embeds: Tensor
    ids: list[int]
    is_token: list[bool]

    @classmethod
    def of(cls, request: GenerationRequest, width: int, dtype: torch.dtype) -> "Embeds | None":
        """What the memory was fed and the prompt behind it, in that order; None where all of it are tokens.

        Args:
            width, dtype: of the model's embeddings.

        Raises:
            ValueError: for thoughts that are not of that width, or hold NaN or Inf.
        """
        slots = [*request.slot_inputs, *request.prompt]
        thoughts = [(at, slot) for at, slot in enumerate(slots) if not isinstance(slot, int)]
        if not thoughts:
            return None
        for at, thought in thoughts:
            if list(thought.shape) != [width]:
                raise LatentMASError(
                    f"the embedding at position {at} has the shape {list(thought.shape)}; this model reads [{width}]: "
                    "build the aligner with target_model for a model of another width"
                )
        embeds = torch.zeros(len(slots), width, dtype=dtype)
        places, vectors = zip(*thoughts, strict=True)
        embeds[list(places)] = torch.stack(vectors).to("cpu", dtype)
        check_finite(embeds, "what the agents thought")
        is_token = [isinstance(slot, int) for slot in slots]
        return cls(embeds, [slot if isinstance(slot, int) else 0 for slot in slots], is_token)

    def embedded(self, embedding: nn.Module) -> Tensor:
        """[T, D] on the CPU, the tokens embedded as well."""
        at = torch.tensor(self.is_token)
        ids = torch.tensor(self.ids)[at].to(next(embedding.parameters()).device)
        whole = self.embeds.clone()
        with torch.no_grad():
            whole[at] = embedding(ids).to("cpu", whole.dtype)
        return whole


def check_requests(
    requests: Sequence[GenerationRequest], memory: LatentCache | None, max_model_len: int, kv_transfer: str
) -> None:
    """Raise ValueError for a request that does not fit its memory or what the engine was started for."""
    for number, request in enumerate(requests):
        if not request.prompt:
            raise LatentMASError(
                f"request {number} has an empty prompt; the text needs one token or more to go on from"
            )
        if request.row is not None and (memory is None or not 0 <= request.row < memory.batch_size):
            rows = 0 if memory is None else memory.batch_size
            raise LatentMASError(f"request {number} goes on from row {request.row} of a memory of {rows} rows")
        slots = 0 if request.row is None or memory is None else int(memory.lengths[request.row])
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
    """Raise EngineError where an engine found fewer tokens in its cache than the memory that came before a request."""
    if found < slots:
        raise EngineError(
            f"vLLM read {slots - found} of {slots} slots of memory as placeholders in {request}, so its answer is worth "
            "nothing; it must run with our connector and prefix caching as it is by default"
        )


class Steps:
    """Turns tokens that come for one request at a time into steps that all requests have made."""

    def __init__(self, requests: int, on_tokens: OnTokens | None) -> None:
        self.on_tokens, self.ids = on_tokens, [list[int]() for _ in range(requests)]
        self.ended, self.step = [False] * requests, 0

    def add(self, request: int, ids: Sequence[int], ended: bool) -> None:
        """Take down new tokens of a request, and tell of the steps that are complete."""
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
