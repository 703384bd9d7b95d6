"""The CUDA engine: Llama, Qwen2, Qwen3 and Mistral decoders on Triton kernels, whole steps as CUDA graphs.

A graph is captured per batch bucket and kind of step when a call first needs it, and serves every later call on any cache:
what differs between calls (addresses, lengths, positions, what ends a row, sampling settings) is in device memory. Padding
rows of a bucket are inactive: they store nothing and attend to nothing. Prompts run through transformers' own forward.

Calls of one model share the tensors that its graphs read and write; they run one after the other (`CallOrder`).
"""

import dataclasses
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from latentmas_kernels.alignment import Aligner
from latentmas_kernels.cache.latent_cache import LatentCache
from latentmas_kernels.engines.base import LatentParams, LatentResult, SamplingParams
from latentmas_kernels.engines.cuda_graphs import (
    SYNC_EVERY,
    CaptureError,
    CudaGraphs,
    EagerReplay,
    GraphCapture,
    Replay,
    kind_of,
    order_of,
)
from latentmas_kernels.engines.cuda_step import DecodeStep
from latentmas_kernels.engines.eager import EagerEngine
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.inputs import Prompt
from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.models.module_settings import state_of
from latentmas_kernels.models.packed_weights import Weights, pack_weights, weights_key
from latentmas_kernels.models.packed_weights import unsupported_reason as unpackable_reason
from latentmas_kernels.ops.triton.launch import LaunchTarget, interpreted, target_of
from latentmas_kernels.ops.triton.row_state import RowField
from latentmas_kernels.ops.triton.sample import MAX_EOS_TOKENS
from latentmas_kernels.warn_once import warn_once

GRAPH_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
NO_ROOM = "out of memory for the graph of even one row: this call runs on the eager engine"


def unsupported_reason(model: Any, architecture: Architecture) -> str | None:
    """Return why this engine cannot run the model, as a clause; None where it can."""
    if architecture.device.type != "cuda" and not (architecture.device.type == "cpu" and interpreted()):
        return f"the model is on {architecture.device}, not on a CUDA device"
    return unpackable_reason(model, architecture)


class CudaState:
    """What is kept between calls for one model: static tensors, graphs and what those read besides the model's own weights.
    Lives as long as the model, or until that is edited."""

    def __init__(
        self, weights: Weights, architecture: Architecture, target: LaunchTarget, capture: GraphCapture
    ) -> None:
        self.key, self.architecture, self.target, self.capture = weights.key, architecture, target, capture
        self.buckets = list(GRAPH_BATCH_SIZES)
        self.steps: dict[int, DecodeStep] = {}
        # With the aligners, whose tensors the graphs read.
        self.graphs: dict[tuple, tuple[Replay, Aligner | None]] = {}
        self.graph_bytes = 0
        # May be a copy of the model's. All graphs read this one.
        self.inv_freq = weights.inv_freq
        self.vocabulary = len(weights.lm_head)
        self.failed: set[tuple] = set()  # buckets and kinds that cannot be captured

    def step(
        self, weights: Callable[[], Weights], batch: int, kind: tuple, aligner: Aligner | None
    ) -> tuple[DecodeStep, Replay]:
        """Return the step for up to `batch` rows with its graph; fewer rows where no bucket is large enough or fits the memory.

        Args:
            weights: gives those of the state's key; called where something is captured.

        Raises:
            torch.OutOfMemoryError: where not even one row fits.
            CaptureError: where the step was found not to be captured, now or before.
        """
        while True:
            bucket = next((b for b in self.buckets if b >= batch), self.buckets[-1])
            try:
                return self._step(weights, bucket, kind, aligner)
            except torch.OutOfMemoryError as error:
                reason = str(error)
            # Behind the block, since the error holds the frames that it passed, and so the step.
            self.forget(bucket)
            smaller = [b for b in self.buckets if b < bucket]
            if not smaller:
                raise torch.OutOfMemoryError(reason)
            self.buckets = smaller
            warn_once(
                f"out of memory while capturing a step of {bucket} rows: the memory was given back, and batches run in "
                f"parts of {smaller[-1]} rows from now on, which reads the weights once for each part"
            )

    def forget(self, bucket: int) -> None:
        """Drop a bucket's graphs and tensors and give their memory back."""
        self.capture.wait()
        self.steps.pop(bucket, None)
        self.graphs = {key: graph for key, graph in self.graphs.items() if key[0] != bucket}
        gc.collect()
        self.capture.release()

    def _step(
        self, weights: Callable[[], Weights], bucket: int, kind: tuple, aligner: Aligner | None
    ) -> tuple[DecodeStep, Replay]:
        if (bucket, *kind) in self.failed:
            raise CaptureError("as before")
        if (bucket, *kind) not in self.graphs:
            before = _reserved(self.architecture.device)
            w = dataclasses.replace(weights(), inv_freq=self.inv_freq)
            step = self.steps.get(bucket)
            if step is None:
                step = self.steps[bucket] = DecodeStep(w, self.architecture, bucket, self.target)
            try:
                replay = self._capture(step, w, kind, aligner)
            except CaptureError as error:
                self.failed.add((bucket, *kind))
                warn_once(
                    f"{self.architecture.name} runs {kind[0]} steps of {bucket} rows on the eager engine: a step could not be "
                    f"captured ({error})"
                )
                raise
            self.graphs[bucket, *kind] = replay, aligner
            self.graph_bytes += max(0, _reserved(self.architecture.device) - before)
        return self.steps[bucket], self.graphs[bucket, *kind][0]

    def _capture(self, step: DecodeStep, weights: Weights, kind: tuple, aligner: Aligner | None) -> Replay:
        if kind[0] == "latent":
            assert aligner is not None
            latent_log = torch.empty(step.batch, 2, step.width, dtype=step.x.dtype, device=step.x.device)
            step.reset(latent_log)
            return self.capture(DecodeStep.latent, step, weights, aligner)
        step_log = torch.empty(step.batch, 2, dtype=torch.int64, device=step.x.device)
        step.reset(step_log)
        if kind[0] == "forward":
            return self.capture(DecodeStep.forward, step, weights)
        step.allocate(do_sample=kind[1])
        return self.capture(DecodeStep.token, step, weights, do_sample=kind[1])


def _reserved(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


_states: "weakref.WeakKeyDictionary[Any, CudaState]" = weakref.WeakKeyDictionary()


def memory_report(model: Any) -> dict[str, int]:
    """Return the bytes that this engine keeps for a model beside its weights: static tensors by batch bucket, and graphs."""
    state = _states.get(model)
    if state is None:
        return {}
    # A copy, since calls in other threads add and drop buckets, and no lock, which they hold to their end.
    report = {f"tensors of batch {bucket}": step.nbytes for bucket, step in sorted(state.steps.items())}
    return {**report, "graphs": state.graph_bytes}


class CudaEngine:
    """See `latentmas_kernels.engines.Engine`."""

    name = "cuda"
    uses_thread_pool = False

    def __init__(self, model: Any, architecture: Architecture) -> None:
        """Raise UnsupportedWeights for a model that `unsupported_reason` has a reason for."""
        self.eager, self.architecture = EagerEngine(model, architecture), architecture
        self.order = order_of(model)
        # The storages are held as long as the engine: its replays read them, whatever becomes of the model meanwhile.
        key, self.storages = weights_key(model, architecture)
        state = _states.get(model)
        self.state = state if state is not None and state.key == key else self._new_state(model)

    def _new_state(self, model: Any) -> CudaState:
        architecture = self.architecture
        with self.order.call(architecture.device):  # packing moves weights, and no other call may run ahead of that
            self.weights = weights = pack_weights(model, architecture)
            self.storages = state_of(model).storages
            state = _states.get(model)
            if state is not None:
                if state.key == weights.key:  # made by another thread in the meantime
                    return state
                state.capture.wait()  # its tensors are freed, on whatever stream they were used last
            capture = CudaGraphs(architecture.device) if architecture.device.type == "cuda" else EagerReplay()
            target = target_of(architecture.device, captured=True)
            _states[model] = CudaState(weights, architecture, target, capture)
            return _states[model]

    @functools.cached_property
    def weights(self) -> Weights:
        """The packed weights that the state's graphs read."""
        weights = pack_weights(self.eager.model, self.architecture)
        if weights.key != self.state.key:
            raise LatentMASError(
                f"{self.architecture.name} was edited after an engine was opened for it; open one for each call, as "
                "latent_generate() and generate() do"
            )
        return weights

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Run a call of the state's graphs in this block, on the model's device and behind the call before."""
        state = self.state
        with self.order.call(self.architecture.device):
            inv_freq = self.eager.model.model.rotary_emb.inv_freq
            if inv_freq.dtype != state.inv_freq.dtype:  # a copy, which follows what edits the model's own through .data
                state.inv_freq.copy_(inv_freq)
            yield

    def _step(self, batch: int, kind: tuple, aligner: Aligner | None) -> tuple[DecodeStep, Replay]:
        return self.state.step(lambda: self.weights, batch, kind, aligner)

    def capture(self, batches: list[int], aligner: Aligner | None = None, *, do_sample: bool = False) -> None:
        """Capture the graphs of these batch sizes ahead of time, the largest first, so that all fit its memory pool."""
        with self._call():
            for batch in sorted(set(batches), reverse=True):
                if aligner is not None:
                    self._step(batch, kind_of(aligner), aligner)
                self._step(batch, ("token", do_sample), None)

    def extend(self, cache: LatentCache, prompt: Prompt, *, logits: bool) -> Tensor:
        if prompt.columns > 1 or prompt.input_ids is None or not logits:
            return self.eager.extend(cache, prompt, logits=logits)
        active, ids = prompt.counts > 0, prompt.input_ids[:, 0]
        result = torch.empty(len(ids), self.state.vocabulary, dtype=torch.float32, device=ids.device)
        try:
            with self._call():
                for rows, step, replay in self._parts(len(ids), ("forward",), None):
                    step.bind(cache, rows, active[rows], None)
                    count = rows.stop - rows.start
                    step.token_ids[:count] = ids[rows]
                    replay()
                    result[rows] = step.logits[:count]
        except (torch.OutOfMemoryError, CaptureError) as error:
            _warn_of(error)
            return self.eager.extend(cache, prompt, logits=logits)
        cache.advance(prompt.counts)
        return result

    def run_latent(
        self,
        cache: LatentCache,
        seed: Tensor,
        aligner: Aligner,
        latent_params: LatentParams,
        on_step: Callable[[int], None] | None,
    ) -> LatentResult:
        batch, width = len(seed), self.architecture.hidden_size
        latents = torch.zeros(batch, latent_params.longest, width, dtype=self.architecture.dtype, device=seed.device)
        states = torch.zeros_like(latents) if latent_params.record else None
        last = latents.new_empty(batch, width)
        taken = latent_params.steps.clone()
        issued = 0
        try:
            with self._call():
                for rows, step, replay in self._parts(batch, kind_of(aligner), aligner):
                    count = rows.stop - rows.start
                    all_rows = torch.ones(count, dtype=torch.bool)
                    step.bind(
                        cache, rows, all_rows, latents[rows], latent_params, None if states is None else states[rows]
                    )
                    (step.logits if aligner.needs_logits else step.hidden)[:count] = seed[rows]
                    for index in range(int(latent_params.steps[rows].max())):
                        # Without a stop cosine the number of steps is known.
                        if latent_params.stop_cosine is not None and _all_ended(step, index):
                            break
                        if on_step is not None and index == issued:
                            on_step(index)
                            issued += 1
                        replay()
                    last[rows] = step.hidden[:count]
                    if latent_params.stop_cosine is not None:
                        taken[rows] = step.lengths[:count].cpu() - cache.lengths[rows]
        except (torch.OutOfMemoryError, CaptureError) as error:
            _warn_of(error)  # what was written is behind the lengths, which have not changed
            return self.eager.run_latent(cache, seed, aligner, latent_params, on_step)
        cache.advance(taken)
        steps = int(taken.max())
        return LatentResult(latents[:, :steps], last, taken, None if states is None else states[:, :steps])

    def can_decode(self, sampling_params: SamplingParams, batch: int, *, streaming: bool) -> bool:
        if (
            len(sampling_params.eos_token_ids) > MAX_EOS_TOKENS
            or sampling_params.min_p
            or sampling_params.penalty_mask is not None
        ):
            return False
        try:
            with self._call():
                parts = [step.batch for _, step, _ in self._parts(batch, ("token", sampling_params.do_sample), None)]
        except (torch.OutOfMemoryError, CaptureError) as error:
            _warn_of(error)
            return False
        return not streaming or len(parts) == 1

    def decode(
        self,
        cache: LatentCache,
        logits: Tensor,
        sampling_params: SamplingParams,
        on_tokens: Callable[[Tensor], None] | None,
    ) -> Tensor:
        batch, most = len(logits), sampling_params.max_new_tokens
        seed = int(torch.randint(2**62, ()).item()) if sampling_params.do_sample else 0
        parts = []
        with self._call():
            for rows, step, replay in self._parts(batch, ("token", sampling_params.do_sample), None):
                count = rows.stop - rows.start
                step_log = torch.full((step.batch, most), sampling_params.pad_token_id, device=logits.device)
                step.settings.set(
                    sampling_params.temperature, sampling_params.top_k, sampling_params.top_p, seed + rows.start,
                    sampling_params.min_new_tokens, sampling_params.pad_token_id, sampling_params.eos_token_ids,
                )  # fmt: skip
                step.bind(cache, rows, torch.ones(count, dtype=torch.bool), step_log)
                step.logits[:count] = logits[rows]
                step.sample(do_sample=sampling_params.do_sample)
                for index in range(1, most + 1):
                    if on_tokens is not None:
                        on_tokens(step.token_ids[:count].cpu())
                    every = 1 if on_tokens is not None else SYNC_EVERY
                    if index == most or (sampling_params.eos_token_ids and _all_ended(step, index, every)):
                        break
                    replay()
                parts.append(step_log[:count])
        tokens = torch.cat(parts)
        new = sampling_params.lengths(tokens)
        cache.advance(new - 1)
        return tokens[:, : int(new.max())]

    def _parts(self, batch: int, kind: tuple, aligner: Aligner | None) -> Iterator[tuple[slice, DecodeStep, Replay]]:
        """Yield the rows of a batch in parts that a graph covers; mostly one."""
        start = 0
        while start < batch:
            step, replay = self._step(batch - start, kind, aligner)
            if step.batch < batch and start == 0:
                warn_once(
                    f"a batch of {batch} rows runs in parts of {step.batch}, the largest that is captured; each part reads "
                    "the weights again"
                )
            yield slice(start, min(start + step.batch, batch)), step, replay
            start += step.batch


def _all_ended(step: DecodeStep, index: int, every: int = SYNC_EVERY) -> bool:
    """Return whether all rows have ended after so many steps; looks every `every` steps only."""
    return index > 0 and index % every == 0 and not bool(step.row_state[RowField.ACTIVE].any())


def _warn_of(error: Exception) -> None:
    if isinstance(error, torch.OutOfMemoryError):  # a capture that failed otherwise has said so
        warn_once(NO_ROOM)
