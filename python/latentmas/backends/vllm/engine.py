"""vLLM in a process beside this one, through its own engine: it writes the texts, agents go on thinking here."""

import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

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
from latentmas.backends.vllm.launch import end_engine, kv_config, start_engine
from latentmas_kernels import LatentCache
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.models.fingerprint import ModelFingerprint


class Vllm:
    """A `Decoder`. A context manager: vLLM ends with it.

    Attributes:
        stamp, kv_transfer, max_model_len: as in `Decoder`.
        logprobs: whether `Completion.logprobs` is filled.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        *,
        kv_transfer: str = "kv",
        folder: Path | None = None,
        logprobs: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Start vLLM.

        Args:
            name: folder or hub name of the model.
            model: the same as a causal LM of transformers, whose memories will be handed over.
            kv_transfer: one of KV_TRANSFERS.
            folder: where memories are handed over; shared memory when None.
            logprobs: ask for the log-probability of each token.
            settings: of vLLM's engine (EngineArgs), such as tensor_parallel_size.

        Raises:
            ValueError: where vLLM is not installed, or cannot run this model or these settings.
        """
        if kv_transfer not in KV_TRANSFERS:
            raise LatentMASError(f"got kv_transfer {kv_transfer!r}; supported are {', '.join(KV_TRANSFERS)}")
        architecture = Architecture.of(model)
        if kv_transfer == "kv":
            check_transferable(model)
        self.kv_transfer, self.logprobs, self.folder = kv_transfer, logprobs, folder or shared_folder()
        self.stamp, self._width, self._dtype = ModelFingerprint.of(model), architecture.hidden_size, architecture.dtype
        sweep(self.folder)
        way: dict[str, Any] = {"enable_prompt_embeds": True}
        if kv_transfer == "kv":
            way = {"kv_transfer_config": kv_config(self.stamp, self.folder, owner=os.getpid())}
        self._engine = start_engine(name, self._dtype, way, settings or {})
        self.max_model_len = self._engine.model_config.max_model_len

    def __enter__(self) -> "Vllm":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End vLLM's processes."""
        end_engine(self._engine)

    def write(
        self, memory: LatentCache | None, requests: Sequence[GenerationRequest], on_tokens: OnTokens | None = None
    ) -> list[Completion]:
        """As `Decoder.write`."""
        check_requests(requests, memory, self.max_model_len, self.kv_transfer)
        with ExitStack() as stack:
            rows: list[KVFileRow] = []
            if memory is not None and self.kv_transfer == "kv":
                try:
                    parcel = KVFile(memory, self.stamp, self.folder)
                except OSError as error:
                    raise EngineError(f"the memory could not be written to {self.folder}: {error}") from error
                rows = stack.enter_context(parcel).rows
            sent = [self._prompt(request, rows) for request in requests]
            return self._run(requests, sent, Steps(len(requests), on_tokens))

    def _prompt(self, request: GenerationRequest, rows: list[KVFileRow]) -> tuple[dict[str, Any], KVFileRow | None]:
        """As vLLM takes it, and the row that comes before it."""
        if self.kv_transfer == "embeds":
            mixed = Embeds.of(request, self._width, self._dtype)
            if mixed is None:
                return {"prompt_token_ids": [*request.slot_inputs, *request.prompt]}, None
            return {
                "prompt_embeds": mixed.embeds,
                "prompt_token_ids": mixed.ids,
                "prompt_is_token_ids": mixed.is_token,
            }, None
        if request.row is None:
            return {"prompt_token_ids": request.prompt}, None
        handed = rows[request.row]
        return {"prompt_token_ids": [0] * handed.slots + request.prompt, "cache_salt": handed.salt}, handed

    def _sampling(self, request: GenerationRequest, handed: KVFileRow | None) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=request.temperature, top_p=request.top_p, seed=request.seed, max_tokens=request.max_new_tokens,
            # The ends are the model's, as everywhere here, not the tokenizer's.
            ignore_eos=True, stop_token_ids=list(request.end_ids), detokenize=False, logprobs=0 if self.logprobs else None,
            output_kind=RequestOutputKind.DELTA,
            extra_args=None if handed is None else {"kv_transfer_params": handed.params},
        )  # fmt: skip

    def _run(
        self,
        requests: Sequence[GenerationRequest],
        sent: Sequence[tuple[dict[str, Any], KVFileRow | None]],
        steps: Steps,
    ) -> list[Completion]:
        from vllm.v1.engine.exceptions import EngineDeadError

        names = {f"latentmas-{uuid.uuid4().hex}": number for number in range(len(requests))}
        outputs: dict[int, Any] = {}
        logprobs: list[list[float]] = [[] for _ in requests]
        internal: list[str] = []
        try:
            for name, number in names.items():
                prompt, handed = sent[number]
                (rendered,) = self._engine.renderer.render_cmpl([prompt])
                internal.append(self._engine.add_request(name, rendered, self._sampling(requests[number], handed)))
            while len(outputs) < len(requests):
                for output in self._engine.step():
                    number, (new,) = names[output.request_id], output.outputs
                    steps.add(number, list(new.token_ids), output.finished)
                    for token, of in zip(new.token_ids, new.logprobs or (), strict=False):
                        logprobs[number].append(of[token].logprob)
                    if output.finished:
                        outputs[number] = output
        except EngineDeadError as error:
            raise EngineError(
                "vLLM's engine has ended; its log says why. Start the run again (with --resume where there is an --output)"
            ) from error
        except BaseException:  # Ctrl-C among them: nothing goes on without anyone waiting for it
            with suppress(EngineDeadError):
                self._engine.abort_request(internal, internal=True)
            raise
        written = []
        for number, (prompt, handed) in enumerate(sent):
            output = outputs[number]
            reason = output.outputs[0].finish_reason
            slots = 0 if handed is None else handed.slots
            if reason not in ("stop", "length"):
                raise EngineError(f"vLLM ended request {number} with {reason!r}; its log says why")
            cached = output.num_cached_tokens or 0
            check_cache_hit(slots, cached, f"request {number}")
            computed = len(prompt["prompt_token_ids"]) - cached
            written.append(Completion(steps.ids[number], reason, computed, logprobs[number]))
        return written
