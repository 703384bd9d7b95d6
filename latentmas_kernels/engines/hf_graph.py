"""The HF graph engine: transformers' own forward over static tensors, captured as a CUDA graph.

For models outside the families that the kernels cover. The launches stay transformers', but the host no longer issues
them one by one, which is most of a step's time at small batch sizes. Attention runs over as many slots as the longest row
has, rounded up to a power of two: the cost follows the rows, in steps, and not the capacity.

Keys and values are in static tensors of the engine while steps run. A cache is copied in when a call first sees it or when
its content has changed since, and the new position of every step is copied back, so the cache is complete after each call.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from latentmas_kernels.alignment import Aligner
from latentmas_kernels.cache.latent_cache import LatentCache
from latentmas_kernels.engines.base import LatentParams, LatentResult, OnStep, cosine
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
from latentmas_kernels.engines.eager import EagerEngine
from latentmas_kernels.inputs import Prompt
from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.models.module_settings import state_of
from latentmas_kernels.warn_once import warn_once

MIN_SLOTS = 256
TOKEN = ("token",)


def unsupported_reason(model: Any, architecture: Architecture) -> str | None:
    """Return why a forward of this model cannot be captured, as a clause; None where it may be."""
    if architecture.device.type != "cuda":
        return f"the model is on {architecture.device}, not on a CUDA device"
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        return "it is quantized"
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) > 1:
        return f"it is spread over {', '.join(sorted(devices))}"
    if any("forward" in vars(module) for module in model.modules()):
        return "one of its modules has a forward of its own (a hook that moves weights, say)"
    return None


class StaticBatch:
    """Static tensors of one batch size and number of slots, and the forward over them."""

    def __init__(self, eager: EagerEngine, batch: int, slots: int) -> None:
        a = eager.architecture
        self.eager, self.slots = eager, slots
        # The `device_copy_of` of the cache whose content this is; None where that is not certain.
        self.synced_with: object | None = None
        # One slot more than attention reads: rows that do not take part write there.
        shape = (2, a.layers, batch, a.kv_heads, slots + 1, a.head_dim)
        self.kv = torch.zeros(shape, dtype=a.dtype, device=a.device)
        self.stored_positions = torch.zeros(batch, slots + 1, dtype=torch.int64, device=a.device)
        self.active, self.lengths, self.positions = torch.zeros(3, batch, dtype=torch.int64, device=a.device)
        self.rows = torch.arange(batch, device=a.device)
        # A row's latent steps end when none is left, or with this cosine to the step before.
        self.steps_left = torch.zeros(batch, dtype=torch.int64, device=a.device)
        self.stop_cosine = torch.zeros((), dtype=torch.float64, device=a.device)
        self.embedding = torch.zeros(batch, 1, a.hidden_size, dtype=a.dtype, device=a.device)
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=a.device)
        self.seeds: dict[int, Tensor] = {}  # by width: the result of a step, hidden states [B, D] or logits [B, V]
        self.write_slots = torch.zeros(batch, dtype=torch.int64, device=a.device)

    @property
    def nbytes(self) -> int:
        """Bytes of the static tensors."""
        tensors = [t for t in vars(self).values() if isinstance(t, Tensor)]
        return sum(t.nbytes for t in [*tensors, *self.seeds.values()])

    def forward(self, *, logits: bool, **inputs: Tensor) -> Tensor:
        """Run one position per active row behind those stored; return hidden states [B, D], or logits [B, V]."""
        self.write_slots.copy_(torch.where(self.active > 0, self.lengths, self.slots))
        self.stored_positions[self.rows, self.write_slots] = self.positions
        slot = torch.arange(self.slots, device=self.rows.device)
        in_use = slot <= self.lengths[:, None] - (1 - self.active)[:, None]
        # A row that does not take part repeats its last position, which is inside every table of positions.
        positions = (self.positions - (1 - self.active)).clamp_min(0)
        query, stored = positions[:, None], self.stored_positions[:, : self.slots]
        masks = {}
        a = self.eager.architecture
        for kind, window in zip(a.layer_types, a.windows, strict=True):
            if kind not in masks:
                visible = in_use if window is None else in_use & (query - stored < window)
                masks[kind] = self.eager.attention_mask_of(visible[:, None, None])
        inputs = {
            **inputs,
            "attention_mask": masks if len(masks) > 1 else next(iter(masks.values())),  # type: ignore[dict-item]
            "position_ids": query,
            self.eager.cache_argument: _StaticForward(self),  # type: ignore[dict-item]
            "use_cache": True,  # type: ignore[dict-item]
        }
        if logits:
            result = self.eager.of_tokens(self.eager.model(**inputs, logits_to_keep=1).logits)
        else:
            result = self.eager.decoder(**inputs).last_hidden_state[:, -1]
        self.lengths += self.active
        self.positions += self.active
        return result

    def begin_latent(self, latent_params: LatentParams) -> None:
        """Set all rows to begin latent steps."""
        self.active.fill_(1)
        self.steps_left.copy_(latent_params.steps)
        self.stop_cosine.fill_(float("inf") if latent_params.stop_cosine is None else latent_params.stop_cosine)
        self.embedding.fill_(float("nan"))  # there is no step before the first: its cosine is NaN

    def token_step(self, seed: Tensor) -> None:
        """Run a forward over one token per active row, from `tokens` to the logits in `seed`."""
        seed.copy_(self.forward(input_ids=self.tokens, logits=True))

    def latent_step(self, seed: Tensor, aligner: Aligner) -> None:
        """Run one latent step of the active rows, from `seed` to `seed`, and end the rows that are done."""
        fed, last = aligner(seed), self.embedding[:, 0]
        converged = cosine(fed, last) >= self.stop_cosine
        self.embedding[:, 0] = fed
        result = self.forward(inputs_embeds=self.embedding, logits=aligner.needs_logits)
        # A row that has ended keeps the state behind its own last step.
        seed.copy_(torch.where(self.active[:, None] > 0, result, seed))
        self.steps_left -= self.active
        self.active *= (self.steps_left > 0) & ~converged

    def copy_in(self, cache: LatentCache) -> None:
        """Copy a cache here, shared prefixes included. Slots behind a row's end become zero, since 0 x NaN is NaN in
        attention."""
        used = int(cache.lengths.max())
        device = self.rows.device
        inside = torch.arange(used, device=device) < cache.lengths.to(device)[:, None]
        for here, there in zip(self.kv, (cache.keys, cache.values), strict=True):
            here.zero_()
            here[:, :, :, :used] = there[:, :, :, :used].masked_fill(~inside[None, :, None, :, None], 0)
            for row in cache.prefix_len.nonzero()[:, 0].tolist():
                prefix_row, prefix_len = int(cache.prefix_row[row]), int(cache.prefix_len[row])
                here[:, row, :, :prefix_len] = there[:, prefix_row, :, :prefix_len]
        self.stored_positions[:, :used] = cache.positions[:, :used]
        self.lengths.copy_(cache.lengths)
        self.positions.copy_(cache.next_position)

    def copy_out(self, cache: LatentCache, rows: Tensor, slots: Tensor) -> None:
        """Copy the positions at slots[i] of rows[i], behind any shared prefix, into the cache. This modifies the cache."""
        for here, there in zip(self.kv, (cache.keys, cache.values), strict=True):
            there[:, rows, :, slots] = here[:, rows, :, slots]
        cache.positions[rows, slots] = self.stored_positions[rows, slots]


class _StaticForward(Cache):
    """The cache of one forward over a StaticBatch: writes at each row's length, returns all slots."""

    def __init__(self, batch: StaticBatch) -> None:
        super().__init__(layers=[])
        self.batch = batch

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        b = self.batch
        keys, values = b.kv[0, layer_idx], b.kv[1, layer_idx]
        keys[b.rows, :, b.write_slots] = key_states[:, :, 0]
        values[b.rows, :, b.write_slots] = value_states[:, :, 0]
        return keys[:, :, : b.slots], values[:, :, : b.slots]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.batch.slots


class GraphState:
    """The static tensors and graphs that are kept between calls for one model, by batch size and number of slots."""

    def __init__(self, key: tuple, capture: GraphCapture) -> None:
        self.key, self.capture = key, capture
        self.batches: dict[tuple[int, int], StaticBatch] = {}
        # By size and kind of step, with the aligners, whose tensors the graphs read.
        self.graphs: dict[tuple[tuple[int, int], tuple], tuple[Replay, Aligner | None]] = {}
        self.failed: set[tuple] = set()  # kinds of steps that cannot be captured, and sizes that do not fit the memory

    def clear(self) -> None:
        """Drop all tensors and graphs and give their memory back."""
        self.capture.wait()
        self.batches.clear()
        self.graphs.clear()
        self.capture.release()


_states: "weakref.WeakKeyDictionary[Any, GraphState]" = weakref.WeakKeyDictionary()


def memory_report(model: Any) -> dict[str, int]:
    """Return the bytes of the static tensors that this engine keeps for a model; those of the graphs are not counted."""
    state = _states.get(model)
    if state is None:
        return {}
    # A copy, since calls in other threads add and drop batches, and no lock, which they hold to their end.
    batches = sorted(state.batches.items())
    return {f"tensors of {rows} x {slots} slots": batch.nbytes for (rows, slots), batch in batches}


class HFGraphEngine:
    """See `latentmas_kernels.engines.base.Engine`."""

    name = "cuda (generic)"
    uses_thread_pool = False

    def __init__(self, model: Any, architecture: Architecture) -> None:
        self.eager, self.architecture = EagerEngine(model, architecture), architecture
        self.order = order_of(model)
        # A graph has the addresses of all tensors in it, which are held as long as the engine, and all numbers that the host
        # read while it was captured.
        key, self.storages, _ = state_of(model)
        key = architecture, *key
        state = _states.get(model)
        self.state = state if state is not None and state.key == key else self._new_state(model, key)

    def _new_state(self, model: Any, key: tuple) -> GraphState:
        device = self.architecture.device
        with self.order.call(device):
            state = _states.get(model)
            if state is not None:
                if state.key == key:  # made by another thread in the meantime
                    return state
                state.capture.wait()  # its tensors are freed, on whatever stream they were used last
            state = _states[model] = GraphState(key, CudaGraphs(device) if device.type == "cuda" else EagerReplay())
            return state

    def extend(self, cache: LatentCache, prompt: Prompt, *, logits: bool) -> Tensor:
        if prompt.columns > 1 or prompt.input_ids is None or not logits:
            return self.eager.extend(cache, prompt, logits=logits)
        with self.order.call(self.architecture.device):
            ready = self._prepare(cache, prompt.counts, None)
            if ready is None:
                return self.eager.extend(cache, prompt, logits=logits)
            batch, seed, replay = ready
            batch.active.copy_(prompt.counts)
            batch.tokens.copy_(prompt.input_ids)
            replay()
            rows = prompt.counts.nonzero()[:, 0]
            batch.copy_out(cache, rows.to(batch.rows.device), cache.lengths[rows].to(batch.rows.device))
            cache.advance(prompt.counts)
            batch.synced_with = cache.device_copy_of = object()
            return seed.clone()

    def run_latent(
        self, cache: LatentCache, seed: Tensor, aligner: Aligner, latent_params: LatentParams, on_step: OnStep | None
    ) -> LatentResult:
        # Soft feedback takes logits from step to step, and a row's last step ends with a hidden state, for which a captured
        # forward has no room. So that one runs without a graph, and all of them where any step may be a row's last or states
        # are kept: models that are both outside of the packed families and in need of soft feedback are rare.
        captured = _all_but_last(latent_params) if aligner.needs_logits else latent_params
        result = None if captured is None else self._run_captured(cache, seed, aligner, captured, on_step)
        if result is None:
            return self.eager.run_latent(cache, seed, aligner, latent_params, on_step)
        if not aligner.needs_logits:
            return result
        last = LatentParams(torch.ones_like(latent_params.steps))
        if on_step is not None:
            on_step(latent_params.longest - 1)
        end = self.eager.run_latent(cache, result.last_hidden, aligner, last, None)
        return LatentResult(torch.cat([result.latents, end.latents], dim=1), end.last_hidden, latent_params.steps)

    def _run_captured(
        self, cache: LatentCache, seed: Tensor, aligner: Aligner, latent_params: LatentParams, on_step: OnStep | None
    ) -> LatentResult | None:
        """Run captured latent steps; None where they cannot be captured. `last_hidden` is the aligner's next input."""
        with self.order.call(self.architecture.device):
            ready = self._prepare(cache, latent_params.steps, aligner)
            if ready is None:
                return None
            batch, static_seed, replay = ready
            batch.begin_latent(latent_params)
            static_seed.copy_(seed)
            latents = batch.embedding.new_zeros(len(seed), latent_params.longest, batch.embedding.shape[2])
            states = torch.zeros_like(latents) if latent_params.record else None
            for index in range(latent_params.longest):
                # Without `stop_cosine` it is known when all rows have ended, and looking waits for the device.
                look = latent_params.stop_cosine is not None and index > 0 and index % SYNC_EVERY == 0
                if look and not bool(batch.active.any()):
                    break
                if on_step is not None:
                    on_step(index)
                replay()
                latents[:, index] = batch.embedding[:, 0]
                if states is not None:
                    states[:, index] = static_seed
            taken = (
                latent_params.steps.clone()
                if latent_params.stop_cosine is None
                else batch.lengths.cpu() - cache.lengths
            )
            batch.copy_out(cache, *_appended_slots(cache.lengths, taken, batch.rows.device))
            cache.advance(taken)
            last = static_seed.clone()
        steps = int(taken.max())
        behind = (torch.arange(steps) >= taken[:, None]).to(seed.device)[..., None]
        latents = latents[:, :steps].masked_fill_(behind, 0)
        states = None if states is None else states[:, :steps].masked_fill_(behind, 0)
        return LatentResult(latents, last, taken, states)

    def _prepare(
        self, cache: LatentCache, steps: Tensor, aligner: Aligner | None
    ) -> tuple[StaticBatch, Tensor, Replay] | None:
        """Copy the cache into a StaticBatch with room for steps[b] more slots of each row b.

        Returns:
            The batch; the tensor that its steps start from and end in; and their graph, of latent steps with an aligner, of
            token steps without. None where the model's forward cannot be captured.
        """
        state = self.state
        need = int((cache.lengths + steps).max())
        large_enough = [slots for rows, slots in state.batches if rows == cache.batch_size and slots >= need]
        slots = min(large_enough, default=max(MIN_SLOTS, 1 << (need - 1).bit_length()))
        size, kind = (cache.batch_size, slots), TOKEN if aligner is None else kind_of(aligner)
        if kind in state.failed or size in state.failed:
            return None
        failed: tuple | None = None
        batch = seed = None
        try:
            batch = state.batches.get(size)
            if batch is None:
                # Not self.eager: what is kept of a model must not keep the model.
                eager = EagerEngine(weakref.proxy(self.eager.model), self.architecture)
                eager.decoder = weakref.proxy(eager.decoder)
                batch = state.batches[size] = StaticBatch(eager, *size)
            a, lm_head_rows = self.architecture, self.eager.model.get_output_embeddings().weight.shape[0]
            logits = aligner is None or aligner.needs_logits
            width = min(lm_head_rows, a.vocab_size) if logits else a.hidden_size
            seed = batch.seeds.get(width)
            if seed is None:
                seed = batch.seeds[width] = batch.embedding.new_zeros(cache.batch_size, width)
            if (size, kind) not in state.graphs:
                batch.synced_with = None
                batch.active.zero_()
                if aligner is None:
                    replay = state.capture(StaticBatch.token_step, batch, seed)
                else:
                    replay = state.capture(StaticBatch.latent_step, batch, seed, aligner)
                state.graphs[size, kind] = replay, aligner
        except torch.OutOfMemoryError:
            failed = size
            warning = (
                f"{self.architecture.name} runs on the eager engine where a cache has {size[0]} rows and up to {slots} "
                "slots: out of memory for a captured step; the memory was given back"
            )
        except CaptureError as error:  # a forward that waits for the device, say, which no graph can hold
            failed = kind
            name = self.architecture.name
            warning = f"{name} runs {kind[0]} steps on the eager engine: a step could not be captured ({error})"
        if failed is not None:
            # Behind the blocks, since an error holds the frames that it passed, and so the tensors.
            batch = seed = None
            state.failed.add(failed)
            state.clear()
            warn_once(warning)
            return None
        assert batch is not None
        assert seed is not None
        synced = batch.synced_with is not None and cache.device_copy_of is batch.synced_with
        batch.synced_with = None  # until all steps are run: what an interrupted call leaves is no cache's content
        if not synced:
            batch.copy_in(cache)
        return batch, seed, state.graphs[size, kind][0]


def _all_but_last(latent_params: LatentParams) -> LatentParams | None:
    """Return the steps before the last, where all rows have as many and nothing is recorded; None where there are none."""
    before = latent_params.steps - 1
    alike = bool((before == before[0]).all()) and latent_params.stop_cosine is None and not latent_params.record
    return LatentParams(before) if alike and bool(before[0] > 0) else None


def _appended_slots(lengths: Tensor, taken: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the row and slot of each position that taken[b] steps have put behind lengths[b] slots of row b."""
    rows, steps = (torch.arange(int(taken.max())) < taken[:, None]).nonzero(as_tuple=True)
    return rows.to(device), (lengths[rows] + steps).to(device)
