"""vLLM in a process beside this one, through its own engine: it writes the texts, agents go on thinking here."""

import os
import uuid
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from multiprocessing import connection
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from latentmas.backends.parcel import Handed, Parcel, check_plain, shared_folder, sweep
from latentmas.backends.writing import (
    HAND_OVERS,
    Embeds,
    EngineError,
    OnTokens,
    Steps,
    TextRequest,
    Written,
    check_requests,
)
from latentmas_kernels import LatentCache
from latentmas_kernels.architecture import Architecture
from latentmas_kernels.cache_file import Stamp

TESTED = "0.32"
"""The version of vLLM that the tests run with: connectors are an interface that it still changes."""


def kv_config(stamp: Stamp, folder: Path) -> dict[str, Any]:
    """vLLM's kv_transfer_config for our connector."""
    return {
        "kv_connector": "LatentConnector",
        "kv_connector_module_path": "latentmas.backends.connector",
        "kv_role": "kv_consumer",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"folder": str(folder), "fingerprint": stamp.fingerprint},
    }


class Vllm:
    """A `Decoder`. A context manager: vLLM ends with it.

    Attributes:
        stamp, hand_over, max_model_len: as in `Decoder`.
        logprobs: whether `Written.logprobs` is filled.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        *,
        hand_over: str = "kv",
        folder: Path | None = None,
        logprobs: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Start vLLM.

        Args:
            name: folder or hub name of the model.
            model: the same as a causal LM of transformers, whose memories will be handed over.
            hand_over: one of HAND_OVERS.
            folder: where memories are handed over; shared memory when None.
            logprobs: ask for the log-probability of each token.
            settings: of vLLM's engine (EngineArgs), such as tensor_parallel_size.

        Raises:
            ValueError: where vLLM is not installed, or cannot run this model or these settings.
        """
        if hand_over not in HAND_OVERS:
            raise ValueError(f"got hand_over {hand_over!r}; supported are {', '.join(HAND_OVERS)}")
        architecture = Architecture.of(model)
        if hand_over == "kv":
            check_plain(architecture)
        self.hand_over, self.logprobs, self.folder = hand_over, logprobs, folder or shared_folder()
        self.stamp, self._width, self._dtype = Stamp.of(model), architecture.hidden_size, architecture.dtype
        sweep(self.folder)
        engine_args, engine, on_cpu = _vllm()
        given = {
            "model": name,
            "dtype": str(architecture.dtype).removeprefix("torch."),
            # What is found in a cache is checked on every answer.
            "disable_log_stats": False,
            **({"kv_transfer_config": kv_config(self.stamp, self.folder)} if hand_over == "kv" else {}),
            **({"enable_prompt_embeds": True} if hand_over == "embeds" else {}),
            **({"enforce_eager": True} if on_cpu else {}),  # compiling for a CPU takes minutes
        }
        taken = sorted(given.keys() & (settings or {}).keys() - {"enforce_eager"})
        if taken:
            raise ValueError(
                f"got {', '.join(taken)} among the settings of vLLM, which are set by the chain; leave them out"
            )
        try:
            self._engine = engine.from_engine_args(engine_args(**{**given, **(settings or {})}))
        except TypeError as error:  # a setting that there is not
            raise ValueError(f"vLLM does not take these settings: {error}") from error
        except (ValueError, RuntimeError) as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"vLLM did not start: {said[0]} (more in its log above)") from error
        self.max_model_len = self._engine.model_config.max_model_len
        self._watch()

    def __enter__(self) -> "Vllm":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End vLLM's processes."""
        self._engine.engine_core.shutdown()

    def _watch(self) -> None:
        """vLLM notices when its process is killed, but leaves whoever waits for an answer waiting."""
        from vllm.v1.engine.exceptions import EngineDeadError

        core = self._engine.engine_core
        manager = getattr(getattr(core, "resources", None), "engine_manager", None)
        if manager is None:  # it runs in this process
            return

        def wake() -> None:
            connection.wait(manager.sentinels())
            core.outputs_queue.put(EngineDeadError())

        Thread(target=wake, daemon=True, name="vllm-watch").start()

    def write(
        self, memory: LatentCache | None, requests: Sequence[TextRequest], on_tokens: OnTokens | None = None
    ) -> list[Written]:
        """As `Decoder.write`."""
        check_requests(requests, memory, self.max_model_len)
        with ExitStack() as stack:
            rows: list[Handed] = []
            if memory is not None and self.hand_over == "kv":
                rows = stack.enter_context(Parcel(memory, self.stamp, self.folder)).rows
            sent = [self._prompt(request, rows) for request in requests]
            return self._run(requests, sent, Steps(len(requests), on_tokens))

    def _prompt(self, request: TextRequest, rows: list[Handed]) -> tuple[dict[str, Any], Handed | None]:
        """As vLLM takes it, and the row that comes before it."""
        if self.hand_over == "embeds":
            mixed = Embeds.of(request, self._width, self._dtype)
            if mixed is None:
                return {"prompt_token_ids": [*request.fed, *request.prompt]}, None
            return {
                "prompt_embeds": mixed.embeds,
                "prompt_token_ids": mixed.ids,
                "prompt_is_token_ids": mixed.is_token,
            }, None
        if request.row is None:
            return {"prompt_token_ids": request.prompt}, None
        handed = rows[request.row]
        return {"prompt_token_ids": [0] * handed.slots + request.prompt, "cache_salt": handed.salt}, handed

    def _sampling(self, request: TextRequest, handed: Handed | None) -> Any:
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
        self, requests: Sequence[TextRequest], sent: Sequence[tuple[dict[str, Any], Handed | None]], steps: Steps
    ) -> list[Written]:
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
            if cached < slots:
                raise EngineError(
                    f"vLLM read {slots - cached} of {slots} slots of memory as placeholders in request {number}, so its answer "
                    "is worth nothing; it must run with our connector and prefix caching as it is by default"
                )
            computed = len(prompt["prompt_token_ids"]) - cached
            written.append(Written(steps.ids[number], reason, computed, logprobs[number]))
        return written


def check_installed() -> None:
    """Raise ValueError where there is no vLLM; imports nothing of it."""
    if find_spec("vllm") is None:
        raise ValueError("vLLM is not installed here; docs/vllm.md says how to make an environment with it")


def _vllm() -> tuple[Any, Any, bool]:
    """vLLM's EngineArgs and LLMEngine, and whether it runs on the CPU."""
    check_installed()
    # Its log is for errors, and standard output is ours.
    for name, value in (
        ("VLLM_NO_USAGE_STATS", "1"), ("VLLM_LOGGING_LEVEL", "ERROR"), ("VLLM_LOGGING_STREAM", "ext://sys.stderr"),
    ):  # fmt: skip
        os.environ.setdefault(name, value)
    if not torch.cuda.is_available():
        # Of vLLM's process. Where it is not set, several pools of threads spin on the same cores: the first request took 17 s
        # instead of 3 on two of them.
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    import vllm
    from vllm import EngineArgs, LLMEngine
    from vllm.platforms import current_platform

    if not vllm.__version__.startswith(f"{TESTED}."):
        warnings.warn(f"vLLM {vllm.__version__} is here; this was tested with {TESTED}", stacklevel=3)
    return EngineArgs, LLMEngine, current_platform.is_cpu()
