"""The native engine: Llama, Qwen2, Qwen3 and Mistral decoders on the CPU, whole calls in C++ (csrc/cpu).

A call of `run_latent` or `decode` is one call of C++ for all of its steps, and so is a prompt. Nothing but real positions is
computed: padding is left out before, rows that have ended leave the batch, and the last layer runs only for the positions
whose state is asked for.
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
from latentmas_kernels.models.module_settings import state_of
from latentmas_kernels.models.packed_weights import Layer, Weights, pack_weights, weights_key
from latentmas_kernels.models.packed_weights import unsupported_reason as unpackable_reason

LINEARS = ("qkv", "output", "gate_up", "down")


def unsupported_reason(model: Any, architecture: Architecture) -> str | None:
    """Return why this engine cannot run the model, as a clause; None where it can."""
    if architecture.device.type != "cpu":
        return f"the model is on {architecture.device}, not on the CPU"
    if extension() is None:
        return f"the C++ extension is missing ({extension_state()})"
    return unpackable_reason(model, architecture)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight [out, in] to int8, symmetric per row: w is close to scale * q.

    Returns:
        int8 [out, in] with values from -127 to 127; the scales, float32 [out].
    """
    wide = weight.float()
    scales = wide.abs().amax(dim=1) / 127
    return (wide / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_().to(torch.int8), scales


class NativeState:
    """What is kept between calls for one model: the C++ side of its layers, and the int8 weights where they are asked for.

    The C++ side holds addresses of the model's own weights, not the tensors: every call compares them before.
    """

    def __init__(self, weights: Weights, key: tuple, *, int8: bool) -> None:
        self.key = key
        self.vocabulary, self.embedding_address = len(weights.lm_head), weights.embedding.data_ptr()
        self.int8: list[Tensor] = []
        c = extension()

        def linear(weight: Tensor, bias: Tensor | None) -> Any:
            if not int8:
                return c.Linear(weight, bias=bias)
            packed, scales = quantize_rows(weight)
            self.int8 += [packed, scales]
            return c.Linear(packed, bias=bias, scales=scales)

        def layer_of(layer: Layer) -> Any:
            return c.Layer(
                input_norm=layer.input_norm,
                query_norm=layer.query_norm,
                key_norm=layer.key_norm,
                mlp_norm=layer.mlp_norm,
                **{name: linear(getattr(layer, name), getattr(layer, f"{name}_bias")) for name in LINEARS},
                window=layer.window,
                slot=layer.slot,
            )

        model = c.Model(
            embedding=weights.embedding,
            layers=[layer_of(layer) for layer in weights.layers],
            final_norm=weights.final_norm,
            lm_head=linear(weights.lm_head, weights.lm_head_bias),
            inv_freq=weights.inv_freq.contiguous(),
            query_heads=weights.query_heads,
            kv_heads=weights.kv_heads,
            head_dim=weights.head_dim,
            intermediate_size=weights.intermediate,
            eps=weights.eps,
            scale=weights.scale,
            attention_scaling=weights.attention_scaling,
        )
        self.runner = c.Runner(model)

    @property
    def nbytes(self) -> int:
        """Bytes beside the model's weights."""
        return self.runner.scratch_bytes + sum(t.nbytes for t in self.int8)


_states: "weakref.WeakKeyDictionary[Any, dict[bool, NativeState]]" = weakref.WeakKeyDictionary()


def memory_report(model: Any) -> dict[str, int]:
    """Return the bytes that this engine keeps for a model beside its weights."""
    states = list(_states.get(model, {}).items())  # a copy: another thread may open the engine with other weights
    return {"int8 weights and scratch" if int8 else "scratch": state.nbytes for int8, state in states}


class NativeEngine:
    """See `latentmas_kernels.engines.Engine`."""

    name = "native"
    uses_thread_pool = True

    def __init__(self, model: Any, architecture: Architecture, *, int8: bool = False) -> None:
        """Open the engine on a model.

        Args:
            int8: products run on weights rounded to int8 by row, made once; the rest keeps the model's dtype.

        Raises:
            UnsupportedWeights: for a model that `unsupported_reason` has a reason for.
        """
        self.architecture = architecture
        if int8:
            self.name = "native (int8)"
        # The storages are held as long as the engine: C++ reads them, whatever becomes of the model meanwhile.
        key, self.storages = weights_key(model, architecture)
        state = _states.setdefault(model, {}).get(int8)
        if state is None or state.key != key or int8:
            state = self._pack(model, int8=int8)
        self.state = state  # held: another thread may replace it while a call of this engine is running
        self.runner = state.runner

    def _pack(self, model: Any, *, int8: bool) -> NativeState:
        weights = pack_weights(model, self.architecture)
        self.storages = state_of(model).storages
        key, states = weights.key, _states[model]
        if int8:
            # Copies must follow a change in place as well, and tensors do not count one that goes through `.data` (merging a
            # LoRA does). Reading all weights once costs a call as much as one bfloat16 step.
            linears = [getattr(layer, name) for layer in weights.layers for name in LINEARS]
            key += tuple(extension().checksum(w) for w in [*linears, weights.lm_head])
        if int8 not in states or states[int8].key != key:
            states[int8] = NativeState(weights, key, int8=int8)
        return states[int8]

    def extend(self, cache: LatentCache, prompt: Prompt, *, logits: bool) -> Tensor:
        last_hidden, last_logits = self._extend(cache, prompt, states=not logits, logits=logits)
        return last_logits if logits else last_hidden

    def extend_both(self, cache: LatentCache, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """Append as `extend` and return both: states [B, D] and logits [B, V]."""
        return self._extend(cache, prompt, states=True, logits=True)

    def _extend(self, cache: LatentCache, prompt: Prompt, *, states: bool, logits: bool) -> tuple[Tensor, Tensor]:
        batch, a = len(prompt.counts), self.architecture
        last_hidden = torch.zeros(batch if states else 0, a.hidden_size, dtype=a.dtype, device="cpu")
        last_logits = torch.zeros(batch if logits else 0, self.state.vocabulary, dtype=torch.float32, device="cpu")
        self.runner.extend(
            _kv_cache(cache),
            counts=prompt.counts,
            token_ids=None if prompt.input_ids is None else prompt.input_ids.long().contiguous(),
            embeds=None if prompt.inputs_embeds is None else prompt.inputs_embeds.contiguous(),
            states=last_hidden if states else None,
            logits=last_logits if logits else None,
        )
        cache.advance(prompt.counts)
        return last_hidden, last_logits

    def run_latent(
        self,
        cache: LatentCache,
        seed: Tensor,
        aligner: Aligner,
        latent_params: LatentParams,
        on_step: Callable[[int], None] | None,
    ) -> LatentResult:
        batch, a, soft_top_k = len(seed), self.architecture, 0
        if aligner.needs_logits:
            assert aligner.embedding is not None
            embedding = aligner.embedding.weight
            rows = self.state.vocabulary
            if embedding.data_ptr() != self.state.embedding_address or len(embedding) != rows:
                # the embedding of another model
                return latent_stepwise(self, cache, seed, aligner, latent_params, on_step)
            seed, soft_top_k = seed.float(), min(TOP_K, rows)
        c = extension()
        latents = torch.zeros(batch, latent_params.longest, a.hidden_size, dtype=a.dtype)
        states = torch.zeros_like(latents) if latent_params.record else None
        last_hidden = torch.empty(batch, a.hidden_size, dtype=a.dtype)
        taken = self.runner.run_latent(
            _kv_cache(cache),
            seed=seed.contiguous(),
            feedback=c.Feedback(
                target_norm=aligner.target_norm,
                aligner=None if aligner.weight is None else aligner.weight.contiguous(),
                soft_top_k=soft_top_k,
            ),
            params=c.LatentParams(steps=latent_params.steps, stop_cosine=latent_params.stop_cosine),
            latents=latents,
            last_hidden=last_hidden,
            states=states,
            on_step=on_step,
        )
        steps = torch.tensor(taken)
        cache.advance(steps)
        longest = max(taken)
        return LatentResult(latents[:, :longest], last_hidden, steps, None if states is None else states[:, :longest])

    def can_decode(self, sampling_params: SamplingParams, batch: int, *, streaming: bool) -> bool:
        return True

    def decode(
        self,
        cache: LatentCache,
        logits: Tensor,
        sampling_params: SamplingParams,
        on_tokens: Callable[[Tensor], None] | None,
    ) -> Tensor:
        p, c = sampling_params, extension()
        tokens = torch.full((len(logits), p.max_new_tokens), p.pad_token_id)
        self.runner.decode(
            _kv_cache(cache),
            logits=logits.float().contiguous(),
            params=c.DecodeParams(
                sampling=c.Sampling(
                    do_sample=p.do_sample,
                    temperature=p.temperature,
                    top_k=p.top_k,
                    top_p=p.top_p,
                    min_p=p.min_p,
                    repetition_penalty=p.repetition_penalty,
                    seed=int(torch.randint(2**62, ()).item()) if p.do_sample else 0,
                ),
                max_new_tokens=p.max_new_tokens,
                min_new_tokens=p.min_new_tokens,
                eos_token_ids=p.eos_token_ids,
                penalty_mask=p.penalty_mask,
            ),
            token_ids=tokens,
            on_token=None if on_tokens is None else lambda step: on_tokens(tokens[:, step].clone()),
        )
        new = sampling_params.lengths(tokens)
        cache.advance(new - 1)
        return tokens[:, : int(new.max())]


def _kv_cache(cache: LatentCache) -> Any:
    return extension().KVCache(
        keys=cache.keys,
        values=cache.values,
        positions=cache.positions,
        lengths=cache.lengths,
        next_position=cache.next_position,
        prefix_row=cache.prefix_row,
        prefix_len=cache.prefix_len,
    )
