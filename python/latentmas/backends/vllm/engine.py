"""vLLM's engine, started and stepped by this process."""

import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from latentmas.backends.base import (
    Completion,
    EngineError,
    GenerationRequest,
    LockstepTokens,
    OnTokens,
    check_requests,
)
from latentmas.backends.kv_file import shared_folder
from latentmas.backends.vllm.launch import end_engine, kv_config, start_engine
from latentmas.backends.vllm.request import PackedPrompt, RequestPacker, checked_completion, sampling_params
from latentmas_kernels import LatentCache


class Vllm:
    """A `TextBackend`. A context manager that ends vLLM's processes at its end.

    Attributes:
        stamp, kv_transfer, max_model_len: as in `TextBackend`.
        folder: for KV files.
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
            model: the same model as a causal LM of transformers, whose caches will be transferred.
            kv_transfer: one of KV_TRANSFERS.
            folder: for KV files; shared memory when None.
            logprobs: whether to return the log-probability of each token.
            settings: of vLLM's engine (EngineArgs), such as tensor_parallel_size.

        Raises:
            LatentMASError: where vLLM is not installed, or cannot run this model or these settings.
        """
        self._packer = RequestPacker(model, kv_transfer, folder or shared_folder())
        self.stamp, self.kv_transfer, self.folder = self._packer.stamp, kv_transfer, self._packer.folder
        self.logprobs = logprobs
        transfer: dict[str, Any] = {"enable_prompt_embeds": True}
        if kv_transfer == "kv":
            transfer = {"kv_transfer_config": kv_config(self.stamp, self.folder, owner=os.getpid())}
        self._engine = start_engine(name, self._packer.dtype, transfer, settings or {})
        self.max_model_len = self._engine.model_config.max_model_len

    def __enter__(self) -> "Vllm":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End vLLM's processes."""
        end_engine(self._engine)

    def write(
        self, cache: LatentCache | None, requests: Sequence[GenerationRequest], on_tokens: OnTokens | None = None
    ) -> list[Completion]:
        """See `TextBackend.write`."""
        check_requests(requests, cache, self.max_model_len, self.kv_transfer)
        with ExitStack() as stack:
            try:
                prompts = self._packer.pack(cache, requests)
            except OSError as error:
                raise EngineError(f"the memory could not be written to {self.folder}: {error}") from error
            for prompt in prompts:
                stack.callback(prompt.close)
            return self._run(requests, prompts, LockstepTokens(len(requests), on_tokens))

    @staticmethod
    def _prompt(prompt: PackedPrompt) -> dict[str, Any]:
        """Return the prompt in the form of vLLM's engine."""
        fields: dict[str, Any] = {"prompt_token_ids": prompt.token_ids}
        if prompt.embeds is not None:
            fields |= {"prompt_embeds": prompt.embeds.embeds, "prompt_is_token_ids": prompt.embeds.is_token}
        if prompt.row is not None:
            fields["cache_salt"] = prompt.row.salt
        return fields

    def _sampling(self, request: GenerationRequest, prompt: PackedPrompt) -> Any:
        # vLLM takes seconds to import and is optional.
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            **sampling_params(request),
            detokenize=False,
            logprobs=0 if self.logprobs else None,
            output_kind=RequestOutputKind.DELTA,
            extra_args=None if prompt.row is None else {"kv_transfer_params": prompt.row.params},
        )

    def _run(
        self, requests: Sequence[GenerationRequest], prompts: Sequence[PackedPrompt], tokens: LockstepTokens
    ) -> list[Completion]:
        from vllm.v1.engine.exceptions import EngineDeadError  # optional, as above

        names = {f"latentmas-{uuid.uuid4().hex}": number for number in range(len(requests))}
        outputs: dict[int, Any] = {}
        logprobs: list[list[float]] = [[] for _ in requests]
        internal: list[str] = []
        try:
            for name, number in names.items():
                (rendered,) = self._engine.renderer.render_cmpl([self._prompt(prompts[number])])
                sampling = self._sampling(requests[number], prompts[number])
                internal.append(self._engine.add_request(name, rendered, sampling))
            while len(outputs) < len(requests):
                for output in self._engine.step():
                    number, (new,) = names[output.request_id], output.outputs
                    tokens.add(number, list(new.token_ids), output.finished)
                    for token, of in zip(new.token_ids, new.logprobs or (), strict=False):
                        logprobs[number].append(of[token].logprob)
                    if output.finished:
                        outputs[number] = output
        except EngineDeadError as error:
            raise EngineError(
                "vLLM's engine has ended; its log says why. Start the run again (with --resume where there is an --output)"
            ) from error
        except BaseException:  # Ctrl-C included: nobody waits for these requests any more
            with suppress(EngineDeadError):
                self._engine.abort_request(internal, internal=True)
            raise
        return [
            checked_completion(
                prompt, tokens.ids[number], outputs[number].outputs[0].finish_reason,
                outputs[number].num_cached_tokens or 0, f"request {number}", logprobs[number],
            )
            for number, prompt in enumerate(prompts)
        ]  # fmt: skip
