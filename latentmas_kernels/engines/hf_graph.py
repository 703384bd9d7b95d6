"""The generic tier on CUDA: transformers' own forward over static tensors, captured as a graph.

For models outside the families that the kernels cover. The launches stay transformers', but the host no longer issues
them one by one, which is most of a step's time at small batch sizes. Attention runs over a window of slots that is as
long as the longest row, rounded up to a power of two: the cost follows the rows, in steps, and not the capacity.

Keys and values live in static tensors of the engine while steps run. A cache is copied in when a call first sees it or when
its content has changed since, and the new position of every step is copied back, so the cache is whole after each call.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from latentmas_kernels.alignment import Aligner
from latentmas_kernels.cache.latent_cache import LatentCache
from latentmas_kernels.engines.cuda_graphs import SYNC_EVERY, CudaGraphs, EagerReplay, GraphCapture, Replay
from latentmas_kernels.engines.eager import EagerEngine
from latentmas_kernels.engines.thinking import LatentParams, LatentResult, cosine
from latentmas_kernels.inputs import Prompt
from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.models.settings import settings_of
from latentmas_kernels.warn_once import warn_once

SMALLEST_WINDOW = 256


def unsupported_reason(model: Any, architecture: Architecture) -> str | None:
    """Why a forward of this model cannot be captured, as a clause; None where it is worth a try."""
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


class Window:
    """Static tensors of one batch size and number of slots, and the forward over them."""

    def __init__(self, eager: EagerEngine, batch: int, slots: int) -> None:
        a = eager.architecture
        self.eager, self.slots = eager, slots
        # The `device_copy_of` of the cache whose content this is; None where that is not certain.
        self.holds: object | None = None
        # One slot more than is attended to: where rows write that do not take part.
        shape = (2, a.layers, batch, a.kv_heads, slots + 1, a.head_dim)
        self.store = torch.zeros(shape, dtype=a.dtype, device=a.device)
        self.stored = torch.zeros(batch, slots + 1, dtype=torch.int64, device=a.device)
        self.active, self.lengths, self.positions = torch.zeros(3, batch, dtype=torch.int64, device=a.device)
        self.rows = torch.arange(batch, device=a.device)
        # What ends a row's latent steps: how many are left, and the cosine to the step before.
        self.left = torch.zeros(batch, dtype=torch.int64, device=a.device)
        self.settle = torch.zeros((), dtype=torch.float64, device=a.device)
        self.embedding = torch.zeros(batch, 1, a.hidden_size, dtype=a.dtype, device=a.device)
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=a.device)
        self.seeds: dict[int, Tensor] = {}  # by width: hidden states [B, D] and logits [B, V], what a step ends with
        self.written = torch.zeros(batch, dtype=torch.int64, device=a.device)

    def forward(self, *, logits: bool, **inputs: Tensor) -> Tensor:
        """One position per row behind what is stored: hidden states [B, D], or logits [B, V]."""
        self.written.copy_(torch.where(self.active > 0, self.lengths, self.slots))
        self.stored[self.rows, self.written] = self.positions
        slot = torch.arange(self.slots, device=self.rows.device)
        seen = slot <= self.lengths[:, None] - (1 - self.active)[:, None]
        # A row that brings nothing repeats its last position, which is inside every table of positions.
        positions = (self.positions - (1 - self.active)).clamp_min(0)
        query, stored = positions[:, None], self.stored[:, : self.slots]
        masks = {}
        a = self.eager.architecture
        for kind, window in zip(a.layer_types, a.windows, strict=True):
            if kind not in masks:
                visible = seen if window is None else seen & (query - stored < window)
                masks[kind] = self.eager.as_model_wants(visible[:, None, None])
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

    def start(self, latent_params: LatentParams) -> None:
        """Make ready for latent steps of all rows."""
        self.active.fill_(1)
        self.left.copy_(latent_params.steps)
        self.settle.fill_(float("inf") if latent_params.stop_cosine is None else latent_params.stop_cosine)
        self.embedding.fill_(float("nan"))  # no step before the first: it is like none

    def latent(self, seed: Tensor, aligner: Aligner) -> None:
        """One latent step of the active rows, from `seed` to `seed`; it ends those that are done."""
        fed, last = aligner(seed), self.embedding[:, 0]
        converged = cosine(fed, last) >= self.settle
        self.embedding[:, 0] = fed
        result = self.forward(inputs_embeds=self.embedding, logits=aligner.needs_logits)
        # A row that has ended keeps the state behind its own last step.
        seed.copy_(torch.where(self.active[:, None] > 0, result, seed))
        self.left -= self.active
        self.active *= (self.left > 0) & ~converged

    def load(self, cache: LatentCache) -> None:
        """Copy a cache in, borrowed slots from where they lie; what lies behind a row's end is zero, since 0 x NaN is NaN in
        attention."""
        used = int(cache.lengths.max())
        device = self.rows.device
        inside = torch.arange(used, device=device) < cache.lengths.to(device)[:, None]
        for here, there in zip(self.store, (cache.keys, cache.values), strict=True):
            here.zero_()
            here[:, :, :, :used] = there[:, :, :, :used].masked_fill(~inside[None, :, None, :, None], 0)
            for row in cache.prefix_len.nonzero()[:, 0].tolist():
                lender, prefix_len = int(cache.prefix_row[row]), int(cache.prefix_len[row])
                here[:, row, :, :prefix_len] = there[:, lender, :, :prefix_len]
        self.stored[:, :used] = cache.positions[:, :used]
        self.lengths.copy_(cache.lengths)
        self.positions.copy_(cache.next_position)

    def store_back(self, cache: LatentCache, rows: Tensor, slots: Tensor) -> None:
        """Copy the positions at slots[i] of rows[i] into the cache; they are the rows' own, behind what they borrow."""
        for here, there in zip(self.store, (cache.keys, cache.values), strict=True):
            there[:, rows, :, slots] = here[:, rows, :, slots]
        cache.positions[rows, slots] = self.stored[rows, slots]


class _StaticForward(Cache):
    """The cache of one forward over a Window: writes at each row's length, gives back all slots."""

    def __init__(self, window: Window) -> None:
        super().__init__(layers=[])
        self.window = window

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        w = self.window
        keys, values = w.store[0, layer_idx], w.store[1, layer_idx]
        keys[w.rows, :, w.written] = key_states[:, :, 0]
        values[w.rows, :, w.written] = value_states[:, :, 0]
        return keys[:, :, : w.slots], values[:, :, : w.slots]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.window.slots


class _State:
    """What is kept between calls for one model: a window per size, and graphs."""

    def __init__(self, key: tuple, capture: GraphCapture) -> None:
        self.key, self.capture = key, capture
        self.windows: dict[tuple[int, int], Window] = {}
        self.graphs: dict[tuple[tuple[int, int], Aligner | None], Replay] = {}
        self.failed = False
        self.lock = threading.RLock()


_states: "weakref.WeakKeyDictionary[Any, _State]" = weakref.WeakKeyDictionary()


class HFGraphEngine:
    """See `latentmas_kernels.engines.Engine`."""

    name = "cuda (generic)"
    uses_thread_pool = False

    def __init__(self, model: Any, architecture: Architecture) -> None:
        self.eager, self.architecture = EagerEngine(model, architecture), architecture
        # A graph has the addresses of all tensors in it, and all numbers that the host read while it was captured.
        tensors = [*model.parameters(), *model.buffers()]
        key = architecture, settings_of(model, leaves=True), *((t.data_ptr(), t.dtype) for t in tensors)
        state = _states.get(model)
        if state is None or state.key != key:
            on_cuda = architecture.device.type == "cuda"
            state = _State(key, CudaGraphs(architecture.device) if on_cuda else EagerReplay())
            _states[model] = state
        self.state = state

    def extend(self, cache: LatentCache, prompt: Prompt, *, logits: bool) -> Tensor:
        if prompt.columns > 1 or prompt.input_ids is None or not logits:
            return self.eager.extend(cache, prompt, logits=logits)
        with self.state.lock:
            ready = self._ready(cache, prompt.counts, None)
            if ready is None:
                return self.eager.extend(cache, prompt, logits=logits)
            window, seed, replay = ready
            window.active.copy_(prompt.counts)
            window.tokens.copy_(prompt.input_ids)
            replay()
            rows = prompt.counts.nonzero()[:, 0]
            window.store_back(cache, rows.to(window.rows.device), cache.lengths[rows].to(window.rows.device))
            cache.advance(prompt.counts)
            window.holds = cache.device_copy_of = object()
            return seed.clone()

    def run_latent(
        self,
        cache: LatentCache,
        seed: Tensor,
        aligner: Aligner,
        latent_params: LatentParams,
        on_step: Callable[[int], None] | None,
    ) -> LatentResult:
        if aligner.needs_logits:
            return self._think_softly(cache, seed, aligner, latent_params, on_step)
        return self._think(cache, seed, aligner, latent_params, on_step) or self.eager.run_latent(
            cache, seed, aligner, latent_params, on_step
        )

    def _think(
        self,
        cache: LatentCache,
        seed: Tensor,
        aligner: Aligner,
        latent_params: LatentParams,
        on_step: Callable[[int], None] | None,
    ) -> LatentResult | None:
        """Captured steps; None where they cannot be. `last_hidden` is what the aligner would read next."""
        with self.state.lock:
            ready = self._ready(cache, latent_params.steps, aligner)
            if ready is None:
                return None
            window, static, replay = ready
            window.start(latent_params)
            static.copy_(seed)
            latents = window.embedding.new_zeros(len(seed), latent_params.longest, window.embedding.shape[2])
            states = torch.zeros_like(latents) if latent_params.record else None
            for index in range(latent_params.longest):
                # Without `settle` it is known when all rows have ended, and looking waits for the device.
                look = latent_params.stop_cosine is not None and index > 0 and index % SYNC_EVERY == 0
                if look and not bool(window.active.any()):
                    break
                if on_step is not None:
                    on_step(index)
                replay()
                latents[:, index] = window.embedding[:, 0]
                if states is not None:
                    states[:, index] = static
            taken = (
                latent_params.steps.clone()
                if latent_params.stop_cosine is None
                else window.lengths.cpu() - cache.lengths
            )
            window.store_back(cache, *_appended(cache.lengths, taken, window.rows.device))
            cache.advance(taken)
            last = static.clone()
        steps = int(taken.max())
        behind = (torch.arange(steps) >= taken[:, None]).to(seed.device)[..., None]
        latents = latents[:, :steps].masked_fill_(behind, 0)
        states = None if states is None else states[:, :steps].masked_fill_(behind, 0)
        return LatentResult(latents, last, taken, states)

    def _think_softly(
        self,
        cache: LatentCache,
        seed: Tensor,
        aligner: Aligner,
        latent_params: LatentParams,
        on_step: Callable[[int], None] | None,
    ) -> LatentResult:
        """Soft feedback takes logits from step to step, and a row's last step ends with a hidden state, for which a captured
        forward has no room. So that one runs without a graph, and all of them where any step may be a row's last or states
        are kept: models that are both outside of the packed families and in need of soft feedback are rare."""
        before = latent_params.steps - 1
        alike = bool((before == before[0]).all()) and latent_params.stop_cosine is None and not latent_params.record
        start = (
            self._think(cache, seed, aligner, LatentParams(before), on_step) if alike and bool(before[0] > 0) else None
        )
        if start is None:
            return self.eager.run_latent(cache, seed, aligner, latent_params, on_step)
        if on_step is not None:
            on_step(int(before[0]))
        end = self.eager.run_latent(cache, start.last_hidden, aligner, LatentParams(torch.ones_like(before)), None)
        return LatentResult(torch.cat([start.latents, end.latents], dim=1), end.last_hidden, latent_params.steps)

    def _ready(
        self, cache: LatentCache, steps: Tensor, aligner: Aligner | None
    ) -> tuple[Window, Tensor, Replay] | None:
        """A window that holds the cache with room for so many steps of each row, the tensor that its steps go on from, and
        their graph: latent steps with an aligner, token steps without. None where the model's forward cannot be captured.
        """
        state = self.state
        if state.failed:
            return None
        need = int((cache.lengths + steps).max())
        large_enough = [slots for batch, slots in state.windows if batch == cache.batch_size and slots >= need]
        slots = min(large_enough, default=max(SMALLEST_WINDOW, 1 << (need - 1).bit_length()))
        size = cache.batch_size, slots
        logits = aligner is None or aligner.needs_logits
        try:
            window = state.windows.get(size)
            if window is None:
                # Not self.eager: what is kept of a model must not keep the model.
                eager = EagerEngine(weakref.proxy(self.eager.model), self.architecture)
                eager.decoder = weakref.proxy(eager.decoder)
                window = state.windows[size] = Window(eager, *size)
            a, rows = self.architecture, self.eager.model.get_output_embeddings().weight.shape[0]
            width = min(rows, a.vocab_size) if logits else a.hidden_size
            seed = window.seeds.setdefault(width, window.embedding.new_zeros(cache.batch_size, width))
            if (size, aligner) not in state.graphs:
                window.holds = None
                window.active.zero_()
                state.graphs[size, aligner] = state.capture(_body(window, seed, aligner))
        except RuntimeError as error:  # out of memory, or a forward that waits for the device, which no graph can hold
            state.failed = True
            state.windows.clear()
            state.graphs.clear()
            state.capture.release()
            first = str(error).partition("\n")[0]
            warn_once(
                f"{self.architecture.name} runs on the eager engine: a step of it could not be captured ({first})"
            )
            return None
        held = window.holds is not None and cache.device_copy_of is window.holds
        window.holds = None  # until the steps are through: what an interrupted call leaves is no cache's content
        if not held:
            window.load(cache)
        return window, seed, state.graphs[size, aligner]


def _body(window: Window, seed: Tensor, aligner: Aligner | None) -> Callable[[], None]:
    def token() -> None:
        seed.copy_(window.forward(input_ids=window.tokens, logits=True))

    return token if aligner is None else lambda: window.latent(seed, aligner)


def _appended(lengths: Tensor, taken: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and slot of each position that taken[b] steps have put behind lengths[b] slots of row b."""
    rows, steps = (torch.arange(int(taken.max())) < taken[:, None]).nonzero(as_tuple=True)
    return rows.to(device), (lengths[rows] + steps).to(device)
