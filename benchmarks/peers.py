"""What this package is measured beside: the published loop, transformers compiled on a static cache, a graph of plain torch.

All of them go on from the same `Start` and have the methods of `Side`. `Ours` drives the CUDA engine in the same way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu
from transformers import DynamicCache, StaticCache

from latentmas_kernels import LatentCache
from latentmas_kernels.alignment import Aligner
from latentmas_kernels.engines import LatentParams, SamplingParams
from latentmas_kernels.engines.cuda import GRAPH_BATCH_SIZES, CudaEngine
from latentmas_kernels.engines.cuda_graphs import CudaGraphs, EagerReplay
from latentmas_kernels.models.architecture import Architecture, decoder_of
from latentmas_kernels.ops.realign import realign_reference


@dataclass(frozen=True)
class Start:
    """Where steps begin: a memory of random keys and values, all rows `kv` slots long.

    Attributes:
        memory: its buffer is random throughout, so that nothing read by mistake is a zero.
        hidden: [B, D], what the first latent step maps back. token: int64 [B], what the first token step embeds.
    """

    model: Any
    architecture: Architecture
    aligner: Aligner
    memory: LatentCache
    kv: int
    hidden: Tensor
    token: Tensor

    @classmethod
    def random(cls, model: Any, aligner: Aligner, batch: int, kv: int, capacity: int) -> "Start":
        architecture = Architecture.of(model)
        draw = torch.Generator(architecture.device).manual_seed(1)
        memory = LatentCache.for_model(architecture, batch, capacity)
        for layer in (*memory.keys, *memory.values):  # by layer: the buffer is too large for one temporary
            layer.normal_(generator=draw)
        memory.positions[:] = torch.arange(capacity, device=architecture.device)
        hidden = torch.empty(batch, architecture.hidden_size, dtype=architecture.dtype, device=architecture.device)
        token = torch.randint(3, architecture.vocab_size, (batch,), generator=draw, device=architecture.device)
        start = cls(model, architecture, aligner, memory, kv, hidden.normal_(generator=draw), token)
        start.rewind()
        return start

    def rewind(self) -> None:
        """Forget what was appended; what lies behind the length is written again before it is read."""
        self.memory.lengths = torch.full((len(self.token),), self.kv)
        self.memory.next_position = self.memory.lengths.clone()

    @property
    def kv_bytes(self) -> int:
        return self.memory.kv_bytes


class Side(Protocol):
    """One way to compute steps."""

    def rewind(self) -> None:
        """Go back to the start. Not timed."""
        ...

    def latent(self, steps: int) -> Tensor:
        """Latent steps from the start's hidden state; the state after the final norm [B, D] behind them."""
        ...

    def token(self, steps: int) -> Tensor:
        """Greedy token steps from the start's token, behind whatever was appended; logits [B, V] of the last."""
        ...


class Ours:
    """The CUDA engine, as latent_generate() and generate() call it, without their checks."""

    def __init__(self, start: Start) -> None:
        self.start, self.runner = start, CudaEngine(start.model, start.architecture)
        batch, vocabulary = len(start.token), start.architecture.vocab_size
        # The engine chooses the first token itself: these logits leave it no choice.
        self.first = torch.zeros(batch, vocabulary, device=start.token.device)
        self.first.scatter_(1, start.token[:, None], 1.0)

    def rewind(self) -> None:
        self.start.rewind()

    def latent(self, steps: int) -> Tensor:
        latent_params = LatentParams(torch.full((len(self.first),), steps))
        return self.runner.run_latent(
            self.start.memory, self.start.hidden, self.start.aligner, latent_params, None
        ).last_hidden

    def token(self, steps: int) -> Tensor:
        sampling_params = SamplingParams(
            steps + 1, 0, False, 1.0, 0, 1.0, eos_token_ids=[], pad_token_id=0
        )  # the last token is not fed in
        self.runner.decode(self.start.memory, self.first, sampling_params, None)
        bucket = next(b for b in GRAPH_BATCH_SIZES if b >= len(self.first))
        return self.runner.state.steps[bucket].logits[: len(self.first)]


class Published:
    """The published loop."""

    def __init__(self, model: Any, target_norm: float, weight: Tensor | None = None) -> None:
        self.model, self.target_norm, self.weight = model, target_norm, weight

    def _forward(self, given: Tensor, hidden_states: bool, **inputs: Any) -> Any:
        length = self.cache.get_seq_length() + given.shape[1]
        mask = torch.ones(len(given), length, dtype=torch.int64, device=given.device)
        inputs = {**inputs, "attention_mask": mask, "past_key_values": self.cache}
        return self.model(**inputs, use_cache=True, output_hidden_states=hidden_states)

    def prefill(self, ids: Tensor) -> None:
        self.cache = DynamicCache(config=self.model.config)
        self.hidden = self._forward(ids, True, input_ids=ids).hidden_states[-1][:, -1]

    def latent(self, steps: int) -> Tensor:
        latents = []
        for _ in range(steps):
            latents.append(realign_reference(self.hidden, self.weight, self.target_norm))
            embedding = latents[-1][:, None]
            self.hidden = self._forward(embedding, True, inputs_embeds=embedding).hidden_states[-1][:, -1]
        return torch.stack(latents, dim=1)

    def token(self, token: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            logits = self._forward(token[:, None], False, input_ids=token[:, None]).logits[:, -1]
            token = logits.argmax(-1)
        return logits


class Eager:
    """The published loop as a `Side`: transformers eager, dynamic cache."""

    def __init__(self, start: Start) -> None:
        self.start = start
        self.loop = Published(start.model, start.aligner.target_norm, start.aligner.weight)

    def rewind(self) -> None:
        self.loop.cache = None  # before the next one is made: two would not fit
        memory = self.start.memory
        filled = [
            (k[:, :, : self.start.kv], v[:, :, : self.start.kv])
            for k, v in zip(memory.keys, memory.values, strict=True)
        ]
        self.loop.cache, self.loop.hidden = DynamicCache(ddp_cache_data=filled), self.start.hidden

    def latent(self, steps: int) -> Tensor:
        self.loop.latent(steps)
        return self.loop.hidden

    def token(self, steps: int) -> Tensor:
        return self.loop.token(self.start.token, steps)


class Compiled:
    """transformers on its StaticCache, whole forwards in torch.compile(mode="reduce-overhead"), as generate() compiles.

    The cache has the capacity of ours. On the CPU, for dry runs, the same calls without torch.compile.
    """

    def __init__(self, start: Start) -> None:
        self.start, model = start, start.model
        batch, arch = len(start.token), start.architecture
        self.cache = StaticCache(config=model.config, max_cache_len=start.memory.capacity)
        self.cache.early_initialization(
            batch_size=batch, num_heads=arch.kv_heads, head_dim=arch.head_dim, dtype=arch.dtype, device=arch.device
        )
        for layer, keys, values in zip(self.cache.layers, start.memory.keys, start.memory.values, strict=True):
            layer.keys.copy_(keys)
            layer.values.copy_(values)
        self.position = torch.zeros(batch, 1, dtype=torch.int64, device=arch.device)
        decoder, cache, slots = decoder_of(model), self.cache, torch.arange(start.memory.capacity, device=arch.device)

        def run(module: Any, position: Tensor, **inputs: Tensor) -> Any:
            # generate() makes this mask outside of what it compiles; inside it costs less.
            seen = (slots <= position)[:, None, None, :]
            return module(**inputs, attention_mask=seen, position_ids=position, past_key_values=cache, use_cache=True)

        def latent(hidden: Tensor, position: Tensor) -> Tensor:
            embedding = realign_reference(hidden, start.aligner.weight, start.aligner.target_norm)[:, None]
            return run(decoder, position, inputs_embeds=embedding).last_hidden_state[:, -1]

        def token(token: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
            logits = run(model, position, input_ids=token[:, None]).logits[:, -1]
            return logits, logits.argmax(-1)

        self._latent, self._token = latent, token
        if arch.device.type == "cuda":
            without_hooks(model)
            if start.aligner.weight is not None:
                torch._dynamo.mark_static_address(start.aligner.weight)  # else every step copies it
            torch._dynamo.reset()  # what was compiled for another model or size counts against a limit
            self._latent, self._token = (torch.compile(f, mode="reduce-overhead") for f in (latent, token))

    def rewind(self) -> None:
        self.position.fill_(self.start.kv)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.start.kv)

    def latent(self, steps: int) -> Tensor:
        hidden = self.start.hidden
        for _ in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            # A copy: the next step overwrites what this one gave, and a graph that reads its own output is captured anew.
            hidden = self._latent(hidden, self.position).clone()
            self.position += 1
        return hidden

    def token(self, steps: int) -> Tensor:
        token = self.start.token
        for _ in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            logits, chosen = self._token(token, self.position)
            token = chosen.clone()
            self.position += 1
        return logits.clone()


class Graphed:
    """A whole step of plain torch ops in one CUDA graph: merged products, attention over the full capacity with a mask.

    What a careful user gets without a kernel. It appends to the buffer of the start's memory.
    """

    def __init__(self, start: Start) -> None:
        self.start, device = start, start.architecture.device
        # Reads the weights as the engine does, which merged them already.
        self.w = CudaEngine(start.model, start.architecture).weights
        self.hidden, self.chosen = start.hidden.clone(), start.token.clone()
        self.position = torch.full((1,), start.kv, device=device)  # the capture's warm-up appends here
        self.slots = torch.arange(start.memory.capacity, device=device)
        self.logits = torch.empty(len(start.token), len(self.w.lm_head), dtype=self.hidden.dtype, device=device)
        capture = CudaGraphs(device) if device.type == "cuda" else EagerReplay()
        self._latent, self._token = capture(self._latent_step), capture(self._token_step)

    def _latent_step(self) -> None:
        x = realign_reference(self.hidden, self.start.aligner.weight, self.start.aligner.target_norm)
        self.hidden.copy_(self._decoder(x))

    def _token_step(self) -> None:
        self.logits.copy_(linear(self._decoder(self.w.embedding[self.chosen]), self.w.lm_head, self.w.lm_head_bias))
        self.chosen.copy_(self.logits.argmax(-1))

    def _decoder(self, x: Tensor) -> Tensor:
        w, memory = self.w, self.start.memory
        batch, width = x.shape
        shape = (batch, w.kv_heads, w.query_heads // w.kv_heads, w.head_dim)
        angles = (self.position[:, None] * w.inv_freq).repeat(1, 2)
        cosine, sine = ((f(angles) * w.attention_scaling).to(x.dtype) for f in (torch.cos, torch.sin))
        seen = (self.slots <= self.position).expand(*shape[:3], -1)

        def rotated(heads: Tensor, gain: Tensor | None) -> Tensor:
            if gain is not None:
                heads = rms_norm(heads, (w.head_dim,), gain, w.eps)
            low, high = heads.chunk(2, dim=-1)
            return heads * cosine + torch.cat([-high, low], dim=-1) * sine

        for index, layer in enumerate(w.layers):
            qkv = linear(rms_norm(x, (width,), layer.input_norm, w.eps), layer.qkv, layer.qkv_bias)
            q, k, v = qkv.view(batch, -1, w.head_dim).split([w.query_heads, w.kv_heads, w.kv_heads], dim=1)
            q, k = rotated(q, layer.query_norm), rotated(k, layer.key_norm)
            keys, values = memory.keys[index], memory.values[index]
            keys.index_copy_(2, self.position, k[:, :, None])
            values.index_copy_(2, self.position, v[:, :, None])
            # The query heads of a KV head as so many queries: keys and values are read once for all of them.
            mixed = scaled_dot_product_attention(q.view(shape), keys, values, attn_mask=seen, scale=w.scale)
            x = x + linear(mixed.reshape(batch, -1), layer.output, layer.output_bias)
            gate, up = linear(rms_norm(x, (width,), layer.mlp_norm, w.eps), layer.gate_up, layer.gate_up_bias).chunk(
                2, -1
            )
            x = x + linear(silu(gate) * up, layer.down, layer.down_bias)
        return rms_norm(x, (width,), w.final_norm, w.eps)

    def rewind(self) -> None:
        self.position.fill_(self.start.kv)
        self.hidden.copy_(self.start.hidden)
        self.chosen.copy_(self.start.token)

    def latent(self, steps: int) -> Tensor:
        return self._run(self._latent, steps, self.hidden)

    def token(self, steps: int) -> Tensor:
        return self._run(self._token, steps, self.logits)

    def _run(self, replay: Callable[[], None], steps: int, result: Tensor) -> Tensor:
        for _ in range(steps):
            replay()
            self.position += 1
        return result.clone()


def without_hooks(model: Any) -> None:
    """Take off the hooks that transformers leaves on a model once hidden states were asked for: torch.compile sees them."""
    for module in model.modules():
        own = [i for i, h in module._forward_hooks.items() if h.__module__ == "transformers.utils.output_capturing"]
        for index in own:
            del module._forward_hooks[index]
        vars(module).pop("_output_capturing_hooks_installed", None)


PEERS: dict[str, tuple[type, str]] = {
    "eager": (Eager, "the published loop: transformers eager, dynamic cache"),
    "compiled": (Compiled, 'transformers, StaticCache of the same capacity, torch.compile(mode="reduce-overhead")'),
    "graphed": (Graphed, "plain torch ops over the same buffer, a whole step as one CUDA graph"),
}
