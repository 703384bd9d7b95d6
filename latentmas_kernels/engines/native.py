"""The native engine: Llama, Qwen2, Qwen3 and Mistral decoders on the CPU, whole calls in C++ (csrc/cpu).

A call of `think` or `speak` is one call of C++ for all of its steps, and so is a prompt. Nothing but real positions is
computed: padding is left out before, rows that have ended leave the batch, and the last layer runs for the positions whose
state is asked for.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from latentmas_kernels.alignment import TOP_K, Aligner
from latentmas_kernels.cache.latent_cache import LatentCache
from latentmas_kernels.engines.base import LatentParams, LatentResult, SamplingParams
from latentmas_kernels.engines.stepwise import latent_stepwise
from latentmas_kernels.extension import extension, extension_state
from latentmas_kernels.inputs import Prompt
from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.models.packed_weights import Layer, Weights, pack_weights
from latentmas_kernels.models.packed_weights import unsupported_reason as unpackable_reason

PRODUCTS = ("qkv", "output", "gate_up", "down")
NUMBERS = ("window", "slot")


def unsupported_reason(model: Any, architecture: Architecture) -> str | None:
    """Why this engine cannot run the model, as a clause; None where it can."""
    if architecture.device.type != "cpu":
        return f"the model is on {architecture.device}, not on the CPU"
    if extension() is None:
        return f"the C++ extension is missing ({extension_state()})"
    return unpackable_reason(model, architecture)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [out, in] as int8, symmetric per row: w is close to scale * q.

    Returns:
        int8 [out, in] with values from -127 to 127; the scales, float32 [out].
    """
    wide = weight.float()
    scales = wide.abs().amax(dim=1) / 127
    return (wide / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_().to(torch.int8), scales


class State:
    """What is kept between calls for one model: the C++ side of its layers, and the int8 weights where they are asked for.

    Holds addresses of the model's own weights, not the tensors: whoever calls has read them just before.
    """

    def __init__(self, weights: Weights, key: tuple, *, int8: bool) -> None:
        self.key = key
        self.int8: list[Tensor] = []

        def product(weight: Tensor) -> tuple[int, int, int, int]:
            rows, cols = weight.shape
            if not int8:
                return weight.data_ptr(), rows, cols, 0
            packed, scales = quantize_rows(weight)
            self.int8 += [packed, scales]
            return packed.data_ptr(), rows, cols, scales.data_ptr()

        def layer_of(layer: Layer) -> dict[str, Any]:
            given = vars(layer).items()
            address = {name: 0 if t is None else t.data_ptr() for name, t in given if name not in (*PRODUCTS, *NUMBERS)}
            return {
                **address,
                **{name: product(getattr(layer, name)) for name in PRODUCTS},
                "window": layer.window or 0,
                "slot": layer.slot,
            }

        model = {
            "dtype": str(weights.embedding.dtype).removeprefix("torch."),
            "width": weights.embedding.shape[1],
            "query_heads": weights.query_heads,
            "kv_heads": weights.kv_heads,
            "head_dim": weights.head_dim,
            "intermediate": weights.intermediate,
            "embedding": weights.embedding.data_ptr(),
            "embedding_rows": len(weights.embedding),
            "final_gain": weights.final_gain.data_ptr(),
            "lm_head": product(weights.lm_head),
            "lm_head_bias": 0 if weights.lm_head_bias is None else weights.lm_head_bias.data_ptr(),
            "eps": weights.eps,
            "scale": weights.scale,
            "attention_scaling": weights.attention_scaling,
            "inv_freq": weights.inv_freq.tolist(),
        }
        self.runner = extension().Runner(model, [layer_of(layer) for layer in weights.layers])

    @property
    def nbytes(self) -> int:
        """Bytes beside the model's weights."""
        return self.runner.scratch_bytes + sum(t.nbytes for t in self.int8)


_states: "weakref.WeakKeyDictionary[Any, dict[bool, State]]" = weakref.WeakKeyDictionary()


def memory_report(model: Any) -> dict[str, int]:
    """Bytes that this engine keeps for a model beside its weights."""
    return {
        "int8 weights and scratch" if int8 else "scratch": state.nbytes
        for int8, state in _states.get(model, {}).items()
    }


class NativeEngine:
    """See `latentmas_kernels.engines.Engine`."""

    name = "native"
    uses_thread_pool = True

    def __init__(self, model: Any, architecture: Architecture, *, int8: bool = False) -> None:
        """int8: products run on weights rounded to int8 by row, made once; the rest keeps the model's dtype.

        Raises UnsupportedWeights for a model that `unsupported_reason` has a reason for.
        """
        self.architecture = architecture
        self.weights = pack_weights(model, architecture)
        key = self.weights.key
        if int8:
            # Copies must follow a change in place as well, and tensors do not count one that goes through `.data` (merging a
            # LoRA does). Reading all weights once costs a call as much as one bfloat16 step.
            self.name = "native (int8)"
            products = [getattr(layer, name) for layer in self.weights.layers for name in PRODUCTS]
            checksum = extension().checksum
            key += tuple(checksum(w.data_ptr(), w.nbytes) for w in [*products, self.weights.lm_head])
        states = _states.setdefault(model, {})
        if int8 not in states or states[int8].key != key:
            states[int8] = State(self.weights, key, int8=int8)
        self.state = states[int8]  # held: another thread may replace it while a call of this engine is running
        self.runner = self.state.runner

    def extend(self, cache: LatentCache, prompt: Prompt, *, logits: bool) -> Tensor:
        states, spoken = self._extend(cache, prompt, states=not logits, logits=logits)
        return spoken if logits else states

    def extend_both(self, cache: LatentCache, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """As extend: states [B, D] and logits [B, V]."""
        return self._extend(cache, prompt, states=True, logits=True)

    def _extend(self, cache: LatentCache, prompt: Prompt, *, states: bool, logits: bool) -> tuple[Tensor, Tensor]:
        batch, a = len(prompt.counts), self.architecture
        hidden = torch.zeros(batch if states else 0, a.hidden_size, dtype=a.dtype, device="cpu")
        spoken = torch.zeros(batch if logits else 0, self.weights.lm_head.shape[0], dtype=torch.float32, device="cpu")
        ids = None if prompt.input_ids is None else prompt.input_ids.long().contiguous()
        embeds = None if prompt.inputs_embeds is None else prompt.inputs_embeds.contiguous()
        self.runner.extend(
            memory=_memory(cache),
            lengths=cache.lengths.tolist(),
            positions=cache.next_position.tolist(),
            counts=prompt.counts.tolist(),
            columns=prompt.columns,
            tokens=0 if ids is None else ids.data_ptr(),
            embeds=0 if embeds is None else embeds.data_ptr(),
            states=hidden.data_ptr() if states else 0,
            logits=spoken.data_ptr() if logits else 0,
        )
        cache.advance(prompt.counts)
        return hidden, spoken

    def run_latent(
        self,
        cache: LatentCache,
        seed: Tensor,
        aligner: Aligner,
        latent_params: LatentParams,
        on_step: Callable[[int], None] | None,
    ) -> LatentResult:
        batch, a, likely = len(seed), self.architecture, 0
        if aligner.needs_logits:
            assert aligner.embedding is not None
            embedding = aligner.embedding.weight
            rows = self.weights.lm_head.shape[0]
            if embedding.data_ptr() != self.weights.embedding.data_ptr() or len(embedding) != rows:
                # the embedding of another model
                return latent_stepwise(self, cache, seed, aligner, latent_params, on_step)
            seed, likely = seed.float(), min(TOP_K, rows)
        latents = torch.zeros(batch, latent_params.longest, a.hidden_size, dtype=a.dtype)
        states = torch.zeros_like(latents) if latent_params.record else None
        seed = seed.contiguous()
        last = torch.empty(batch, a.hidden_size, dtype=a.dtype)
        weight = None if aligner.weight is None else aligner.weight.contiguous()
        taken = self.runner.run_latent(
            memory=_memory(cache),
            lengths=cache.lengths.tolist(),
            positions=cache.next_position.tolist(),
            seed=seed.data_ptr(),
            aligner=0 if weight is None else weight.data_ptr(),
            target_norm=aligner.target_norm,
            likely=likely,
            steps=latent_params.steps.tolist(),
            settle=2.0 if latent_params.stop_cosine is None else latent_params.stop_cosine,
            latents=latents.data_ptr(),
            states=last.data_ptr(),
            recorded=0 if states is None else states.data_ptr(),
            on_step=on_step,
        )
        steps = torch.tensor(taken)
        cache.advance(steps)
        longest = max(taken)
        return LatentResult(latents[:, :longest], last, steps, None if states is None else states[:, :longest])

    def can_decode(self, sampling_params: SamplingParams, batch: int, *, streaming: bool) -> bool:
        return True

    def decode(
        self,
        cache: LatentCache,
        logits: Tensor,
        sampling_params: SamplingParams,
        on_tokens: Callable[[Tensor], None] | None,
    ) -> Tensor:
        tokens = torch.full((len(logits), sampling_params.max_new_tokens), sampling_params.pad_token_id)
        logits = logits.float().contiguous()
        self.runner.decode(
            memory=_memory(cache),
            lengths=cache.lengths.tolist(),
            positions=cache.next_position.tolist(),
            logits=logits.data_ptr(),
            sampling=extension().Sampling(
                draw=sampling_params.do_sample,
                temperature=sampling_params.temperature,
                top_k=sampling_params.top_k,
                top_p=sampling_params.top_p,
                min_p=sampling_params.min_p,
                penalty=sampling_params.repetition_penalty,
                seed=int(torch.randint(2**62, ()).item()) if sampling_params.do_sample else 0,
            ),
            max_new_tokens=sampling_params.max_new_tokens,
            min_new_tokens=sampling_params.min_new_tokens,
            ends=sampling_params.eos_token_ids,
            seen=0 if sampling_params.penalty_mask is None else sampling_params.penalty_mask.data_ptr(),
            tokens=tokens.data_ptr(),
            on_token=None if on_tokens is None else lambda step: on_tokens(tokens[:, step].clone()),
        )
        new = sampling_params.lengths(tokens)
        cache.advance(new - 1)
        return tokens[:, : int(new.max())]


def _memory(cache: LatentCache) -> tuple[int, ...]:
    keys, values, positions = cache.keys, cache.values, cache.positions
    layer, row, head = keys.stride()[:3]
    lent = (cache.prefix_row.data_ptr(), cache.prefix_len.data_ptr()) if bool(cache.prefix_len.any()) else (0, 0)
    return keys.data_ptr(), values.data_ptr(), layer, row, head, positions.data_ptr(), positions.stride(0), *lent
