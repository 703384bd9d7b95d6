"""Requests as vLLM takes them: what both clients send and how both check the answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from latentmas.backends.base import (
    KV_TRANSFERS,
    Completion,
    EngineError,
    GenerationRequest,
    PromptEmbeds,
    check_cache_hit,
)
from latentmas.backends.kv_file import KVFile, KVFileRow, check_transferable, remove_stale
from latentmas_kernels import LatentCache
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.models.fingerprint import ModelFingerprint


@dataclass(frozen=True)
class PackedPrompt:
    """The prompt of one request.

    Attributes:
        token_ids: placeholders 0 at the slots of `row` and at the embeddings.
        embeds: all of the prompt where a part of it is embeddings; None for tokens alone.
        row: of the KV file, whose slots precede the request's own prompt; None without one.
        file: that `row` is in; it must exist until the request has ended.
        encoded_embeds: `embeds` with all tokens embedded, saved by torch, in base64; in place of `embeds`, for the server.
    """

    token_ids: list[int]
    embeds: PromptEmbeds | None = None
    row: KVFileRow | None = None
    file: KVFile | None = None
    encoded_embeds: str = ""

    @property
    def slots(self) -> int:
        """Tokens that vLLM must find in its cache."""
        return 0 if self.row is None else self.row.slots

    def close(self) -> None:
        """Remove the file, which other requests of the same batch may share."""
        if self.file is not None:
            self.file.close()


class RequestPacker:
    """Packs prompts for a vLLM that runs one model.

    Attributes:
        stamp: fingerprint of the model.
        kv_transfer: one of KV_TRANSFERS.
        folder: for KV files.
    """

    def __init__(self, model: Any, kv_transfer: str, folder: Path) -> None:
        """Remove stale files from the folder.

        Args:
            model: a causal LM of transformers.

        Raises:
            LatentMASError: where the model's caches cannot be transferred.
        """
        if kv_transfer not in KV_TRANSFERS:
            raise LatentMASError(f"got kv_transfer {kv_transfer!r}; supported are {', '.join(KV_TRANSFERS)}")
        if kv_transfer == "kv":
            check_transferable(model)
        architecture = Architecture.of(model)
        self.stamp, self.kv_transfer, self.folder = ModelFingerprint.of(model), kv_transfer, folder
        self.dtype, self._hidden_size = architecture.dtype, architecture.hidden_size
        remove_stale(folder)

    def pack(self, cache: LatentCache | None, requests: Sequence[GenerationRequest]) -> list[PackedPrompt]:
        """Pack the prompts, and for "kv" write the cache to a file, which each of them can close.

        Raises:
            LatentMASError: where the cache cannot be transferred.
            OSError: where it cannot be written.
        """
        if self.kv_transfer == "embeds":
            return [self._pack_embeds(request) for request in requests]
        file = None if cache is None else KVFile(cache, self.stamp, self.folder)
        packed = []
        for request in requests:
            if file is None or request.row is None:
                packed.append(PackedPrompt(request.prompt, file=file))
            else:
                row = file.rows[request.row]
                packed.append(PackedPrompt([0] * row.slots + request.prompt, None, row, file))
        return packed

    def _pack_embeds(self, request: GenerationRequest) -> PackedPrompt:
        embeds = PromptEmbeds.of(request, self._hidden_size, self.dtype)
        if embeds is not None:
            return PackedPrompt(embeds.ids, embeds)
        return PackedPrompt([slot for slot in request.slot_inputs if isinstance(slot, int)] + request.prompt)


def sampling_params(request: GenerationRequest) -> dict[str, Any]:
    """Return the sampling parameters that vLLM's engine and server have in common."""
    return {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "max_tokens": request.max_new_tokens,
        # The end tokens are the model's, as everywhere here, not the tokenizer's.
        "ignore_eos": True,
        "stop_token_ids": list(request.end_ids),
    }


def checked_completion(
    prompt: PackedPrompt,
    ids: list[int],
    reason: str | None,
    cached: int | None,
    request: str,
    logprobs: Sequence[float] = (),
) -> Completion:
    """Return vLLM's answer as a Completion.

    Args:
        cached: prompt tokens that vLLM found in its cache; None where it does not say.
        request: name of the request in an error.

    Raises:
        EngineError: where vLLM failed, or did not load the KV file.
    """
    if reason not in ("stop", "length"):
        raise EngineError(f"vLLM ended {request} with {reason!r}; its log says why")
    if cached is None and prompt.slots:
        raise EngineError(
            "vLLM did not say how many tokens it found in its cache, so nobody knows whether it read the memory; start it "
            "with --enable-prompt-tokens-details"
        )
    check_cache_hit(prompt.slots, cached or 0, request)
    finish: Literal["stop", "length"] = "stop" if reason == "stop" else "length"
    return Completion(ids, finish, len(prompt.token_ids) - (cached or 0), list(logprobs))
