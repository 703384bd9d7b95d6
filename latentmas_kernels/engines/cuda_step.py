"""One decode step as a sequence of launches over tensors that never move: what the CUDA engine captures in graphs.

    latent step     realign(hidden) -> x                        token step     embed(token) -> x
                    advance the rows, end those that are done                  advance the rows
                    layers(x), final norm -> hidden                            layers(x), final norm, lm_head -> logits
                                                                               sample(logits) -> token, end rows

A layer is six ops: rmsnorm_linear (QKV), rope_append, decode_attention, linear_residual, gate_up_swiglu and
linear_residual. Nothing here allocates, copies from the host or waits for the device; positions, lengths, what ends a row
and the addresses of the cache are read from device memory, so the same launches serve every call.
"""

import torch
from torch import Tensor

from latentmas_kernels.alignment import Aligner
from latentmas_kernels.cache.latent_cache import LatentCache
from latentmas_kernels.engines.thinking import LatentParams
from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.models.packed_weights import Weights
from latentmas_kernels.ops.triton import row_state as fields
from latentmas_kernels.ops.triton.decode_attention import Partials, decode_attention, num_kv_splits
from latentmas_kernels.ops.triton.embed import embed
from latentmas_kernels.ops.triton.kv_table import FIELDS, describe
from latentmas_kernels.ops.triton.launch import Target, tile_for
from latentmas_kernels.ops.triton.realign import Step as RealignStep
from latentmas_kernels.ops.triton.realign import realign, squares_per_row
from latentmas_kernels.ops.triton.rmsnorm import rmsnorm
from latentmas_kernels.ops.triton.rope_append import rope_append
from latentmas_kernels.ops.triton.sample import Candidates, Settings, sample
from latentmas_kernels.ops.triton.skinny_gemm import Scratch, product


class Step:
    """The static tensors of one batch size, and the launches over them. Holds no weights: those are the model's.

    Attributes:
        batch: rows.
        rows: int32 [9, batch], see ops/triton/rows.py.
        memory: int64 [10], see ops/triton/memory.py.
        hidden: [batch, D], the state after the final norm; of a row that has ended, behind its own last step.
        logits: float32 [batch, V], of the last token step (or latent step with soft feedback).
        tokens: int64 [batch], chosen last.
    """

    def __init__(self, weights: Weights, architecture: Architecture, batch: int, target: Target) -> None:
        w, device = weights, architecture.device
        self.batch, self.target, self.width = batch, target, architecture.hidden_size

        def empty(*shape: int, dtype: torch.dtype = architecture.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.rows = torch.zeros(fields.FIELDS, batch, dtype=torch.int32, device=device)
        self.lengths, self.positions, self.slots = (self.rows[i] for i in (fields.LENGTH, fields.POSITION, fields.SLOT))
        self.prefix_row, self.prefix_len = self.rows[fields.PREFIX_ROW], self.rows[fields.PREFIX_LEN]
        self.memory = torch.zeros(FIELDS, dtype=torch.int64, device=device)
        self.x = empty(batch, self.width)
        self.hidden = empty(batch, self.width)
        self.qkv = empty(batch, (w.query_heads + 2 * w.kv_heads) * w.head_dim)
        self.queries = empty(batch, w.query_heads, w.head_dim)
        self.mixed = empty(batch, w.query_heads * w.head_dim)
        self.activated = empty(batch, w.intermediate)
        self.logits = empty(batch, w.lm_head.shape[0], dtype=torch.float32)
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.settings = Settings(device)
        self.candidates: dict[bool, Candidates] = {}
        self.partials = Partials(self.queries, num_kv_splits(target, batch, w.kv_heads, self.x.element_size()))
        self.realign = RealignStep(
            self.rows,
            self.memory,
            empty(batch, self.width, dtype=torch.float32),
            empty(batch, squares_per_row(self.width), dtype=torch.float32),
        )
        self.scratch = Scratch(self.x)
        for matrix, pair in [(w.layers[0].qkv, False), (w.layers[0].output, False), (w.layers[0].down, False),
                             (w.lm_head, False), (w.layers[0].gate_up, True)]:  # fmt: skip
            n, k = matrix.shape[0] // (2 if pair else 1), matrix.shape[1]
            tile = tile_for(target, batch, n, k, self.x.element_size(), pair=pair)
            self.scratch.reserve(tile, batch, n, pair=pair)

    @property
    def nbytes(self) -> int:
        """Bytes of the static tensors."""
        views = (self.lengths, self.positions, self.slots, self.prefix_row, self.prefix_len)
        own = [t for t in vars(self).values() if isinstance(t, Tensor) and not any(t is view for view in views)]
        nested = [self.partials, self.scratch, self.settings, *self.candidates.values()]
        own += [t for part in nested for t in vars(part).values()] + list(self.realign[2:])
        return sum(t.nbytes for t in own)

    def prepare(self, *, do_sample: bool) -> None:
        """Make room for `token(do_sample)`; outside of captures."""
        if do_sample not in self.candidates:
            vocabulary = self.logits.shape[1]
            self.candidates[do_sample] = Candidates(self.batch, vocabulary, self.x.device, sampling=do_sample)

    def aim(
        self,
        cache: LatentCache,
        rows: slice,
        active: Tensor,
        trace: Tensor | None,
        latent_params: LatentParams | None = None,
        states: Tensor | None = None,
    ) -> None:
        """Point the launches at rows of a cache that go on from where they are.

        Args:
            rows: of the cache, at most `batch`.
            active: bool on the CPU, which of these take part.
            trace: int64 [batch, steps] of tokens, or [rows, steps, D] of latents, which only active rows write. Kept by the
                caller.
            thinking: what ends the rows' latent steps.
            states: as `trace` of latents, the states behind them; not kept where None.
        """
        count = len(active)
        state = torch.zeros(fields.FIELDS, self.batch, dtype=torch.int32)
        state[fields.ACTIVE, :count] = active.int()
        state[fields.LENGTH, :count] = cache.lengths[rows].int()
        state[fields.POSITION, :count] = cache.next_position[rows].int() - 1
        if latent_params is not None:
            settle = fields.NEVER if latent_params.stop_cosine is None else latent_params.stop_cosine
            state[fields.LIMIT, :count] = latent_params.steps[rows].int()
            state[fields.SETTLE] = torch.tensor(settle, dtype=torch.float32).view(torch.int32)
        state[fields.PREFIX_ROW, :count] = (cache.prefix_row[rows] - rows.start).int()
        state[fields.PREFIX_LEN, :count] = cache.prefix_len[rows].int()
        self.rows.copy_(state)
        keys, values, positions = cache.keys[:, rows], cache.values[:, rows], cache.positions[rows]
        self.memory.copy_(torch.tensor(describe(keys, values, positions, trace, states)))

    def idle(self, trace: Tensor) -> None:
        """Let the launches run without reading or storing anything: for warming up."""
        self.rows.zero_()
        self.memory.zero_()
        self.memory[7:9] = torch.tensor([trace.data_ptr(), trace.stride(0)])
        self.hidden.zero_()
        self.logits.zero_()
        self.tokens.zero_()

    def latent(self, weights: Weights, aligner: Aligner) -> None:
        """hidden (or logits, for soft feedback) -> x -> hidden (and logits)."""
        if aligner.needs_logits:
            realign(aligner.mix(self.logits), None, aligner.target_norm, self.x, target=self.target, step=self.realign)
        else:
            realign(self.hidden, aligner.weight, aligner.target_norm, self.x, target=self.target, step=self.realign)
        self._layers(weights)
        rmsnorm(
            self.x, weights.final_norm, weights.eps, self.hidden, target=self.target, rows=self.rows, memory=self.memory
        )  # fmt: skip
        if aligner.needs_logits:
            self._lm_head(weights)

    def read(self, weights: Weights) -> None:
        """tokens -> x -> logits."""
        embed(self.tokens, weights.embedding, self.x, self.rows, self.memory, target=self.target)
        self._layers(weights)
        self._lm_head(weights)

    def choose(self, *, do_sample: bool) -> None:
        """logits -> tokens."""
        sample(
            self.logits, self.tokens, self.settings, self.candidates[do_sample], self.rows, self.memory,
            do_sample=do_sample, target=self.target,
        )  # fmt: skip

    def token(self, weights: Weights, *, do_sample: bool) -> None:
        """tokens -> x -> logits -> tokens."""
        self.read(weights)
        self.choose(do_sample=do_sample)

    def _layers(self, w: Weights) -> None:
        target, scratch = self.target, self.scratch
        for layer in w.layers:
            product(
                self.x, layer.qkv, self.qkv, gain=layer.input_norm, eps=w.eps, bias=layer.qkv_bias, target=target,
                scratch=scratch,
            )  # fmt: skip
            rope_append(
                self.qkv, self.queries, layer.query_norm, layer.key_norm, w.eps, w.inv_freq, w.attention_scaling,
                self.memory, layer.slot, self.slots, self.positions, target=target,
            )  # fmt: skip
            decode_attention(
                self.queries, self.memory, layer.slot, w.kv_heads, self.lengths, self.positions, layer.window, w.scale,
                self.partials, self.mixed, target=target, prefix_row=self.prefix_row, prefix_len=self.prefix_len,
            )  # fmt: skip
            product(
                self.mixed,
                layer.output,
                self.x,
                bias=layer.output_bias,
                residual=self.x,
                target=target,
                scratch=scratch,
            )
            product(
                self.x, layer.gate_up, self.activated, gain=layer.mlp_norm, eps=w.eps, bias=layer.gate_up_bias, pair=True,
                target=target, scratch=scratch,
            )  # fmt: skip
            product(
                self.activated,
                layer.down,
                self.x,
                bias=layer.down_bias,
                residual=self.x,
                target=target,
                scratch=scratch,
            )

    def _lm_head(self, w: Weights) -> None:
        product(
            self.x, w.lm_head, self.logits, gain=w.final_norm, eps=w.eps, bias=w.lm_head_bias, target=self.target,
            scratch=self.scratch,
        )  # fmt: skip
