"""One decode step as a sequence of launches over static tensors, which the CUDA engine captures in graphs.

    latent step     realign(hidden) -> x                        token step     embed(token) -> x
                    advance the rows, end those that are done                  advance the rows
                    layers(x), final norm -> hidden                            layers(x), final norm, lm_head -> logits
                                                                               sample(logits) -> token, end rows

A layer is five launches: rmsnorm_linear (QKV), decode_attention, linear_residual, gate_up_swiglu and linear_residual. No
launch allocates, copies from the host or waits for the device; positions, lengths, what ends a row and the addresses of the KV
cache are read from device memory, so the same launches serve every call. csrc/cpu/step.cpp is the same step on the CPU.
With soft feedback a latent step ends with the lm_head, and its realign is of a mean of embeddings that torch computes
(`Aligner.soft_embedding`), which allocates from the graph's own pool.
"""

import torch
from torch import Tensor

from latentmas_kernels.alignment import Aligner
from latentmas_kernels.cache.latent_cache import LatentCache
from latentmas_kernels.engines.base import LatentParams
from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.models.packed_weights import Weights
from latentmas_kernels.ops.triton.decode_attention import SplitWorkspace, decode_attention, num_kv_splits
from latentmas_kernels.ops.triton.embed import embed
from latentmas_kernels.ops.triton.kv_table import KVTable
from latentmas_kernels.ops.triton.launch import LaunchTarget
from latentmas_kernels.ops.triton.realign import StepBuffers, realign
from latentmas_kernels.ops.triton.rmsnorm import rmsnorm
from latentmas_kernels.ops.triton.row_state import NEVER_COSINE, RowField
from latentmas_kernels.ops.triton.sample import Candidates, Settings, sample
from latentmas_kernels.ops.triton.skinny_gemm import Workspace, skinny_gemm
from latentmas_kernels.ops.triton.tiles import tile_for


class DecodeStep:
    """The static tensors of one batch size, and the launches over them. Holds no weights: those are the model's.

    Attributes:
        batch: rows.
        row_state: int32 [9, batch], see ops/triton/row_state.py.
        kv_table: int64 [10], see ops/triton/kv_table.py.
        hidden: [batch, D], the state after the final norm; of a row that has ended, behind its own last step.
        logits: float32 [batch, V], of the last token step (or latent step with soft feedback).
        token_ids: int64 [batch], the last tokens.
    """

    def __init__(self, weights: Weights, architecture: Architecture, batch: int, target: LaunchTarget) -> None:
        w, device = weights, architecture.device
        self.batch, self.target, self.width = batch, target, architecture.hidden_size

        def empty(*shape: int, dtype: torch.dtype = architecture.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.row_state = torch.zeros(len(RowField), batch, dtype=torch.int32, device=device)
        self.lengths = self.row_state[RowField.LENGTH]
        self.positions = self.row_state[RowField.POSITION]
        self.slots = self.row_state[RowField.SLOT]
        self.prefix_row = self.row_state[RowField.PREFIX_ROW]
        self.prefix_len = self.row_state[RowField.PREFIX_LEN]
        self.kv_table = torch.zeros(len(KVTable._fields), dtype=torch.int64, device=device)
        self.x = empty(batch, self.width)
        self.attended = empty(batch, self.width)  # x + attention: a product may not write the residual that it reads
        self.hidden = empty(batch, self.width)
        self.qkv = empty(batch, (w.query_heads + 2 * w.kv_heads) * w.head_dim)
        self.attention = empty(batch, w.query_heads * w.head_dim)
        self.activated = empty(batch, w.intermediate)
        self.logits = empty(batch, w.lm_head.shape[0], dtype=torch.float32)
        self.token_ids = torch.zeros(batch, dtype=torch.int64, device=device)
        self.settings = Settings(device)
        self.candidates: dict[bool, Candidates] = {}
        splits = num_kv_splits(target, batch, w.kv_heads, self.x.element_size())
        self.splits = SplitWorkspace(batch, w.query_heads, w.kv_heads, w.head_dim, splits, device)
        self.workspace = Workspace(self.x)
        for matrix, gated in [(w.layers[0].qkv, False), (w.layers[0].output, False), (w.layers[0].down, False),
                             (w.lm_head, False), (w.layers[0].gate_up, True)]:  # fmt: skip
            self._reserve(matrix.shape[0] // (2 if gated else 1), matrix.shape[1], matrix.element_size(), gated=gated)
        product = empty(batch, self.width, dtype=torch.float32)
        self._reserve(self.width, self.width, product.element_size(), gated=False)  # W_a is float32, whatever the dtype
        self.realign = StepBuffers(self.row_state, self.kv_table, product, self.workspace)

    def _reserve(self, n: int, k: int, itemsize: int, *, gated: bool) -> None:
        """Make room in the workspace for a product with a weight [n, k]."""
        config = tile_for(self.target, self.batch, n, k, itemsize, gated=gated)
        self.workspace.reserve(config, self.batch, n, gated=gated)

    @property
    def nbytes(self) -> int:
        """Bytes of the static tensors."""
        views = (self.lengths, self.positions, self.slots, self.prefix_row, self.prefix_len)
        tensors = [t for t in vars(self).values() if isinstance(t, Tensor) and not any(t is view for view in views)]
        nested = [self.splits, self.workspace, self.settings, *self.candidates.values()]
        tensors += [t for part in nested for t in vars(part).values()] + [self.realign.product]
        return sum(t.nbytes for t in tensors)

    def zero_counters(self) -> None:
        """Set the counters of programs to 0, as every launch leaves them: one that is once wrong would stay so for good."""
        self.workspace.tile_counters.zero_()
        self.splits.split_counters.zero_()

    def allocate(self, *, do_sample: bool) -> None:
        """Allocate the buffers of `token(do_sample)`; outside of captures."""
        if do_sample not in self.candidates:
            vocabulary = self.logits.shape[1]
            self.candidates[do_sample] = Candidates(self.batch, vocabulary, self.x.device, sampling=do_sample)

    def bind(
        self,
        cache: LatentCache,
        rows: slice,
        active: Tensor,
        step_log: Tensor | None,
        latent_params: LatentParams | None = None,
        states: Tensor | None = None,
    ) -> None:
        """Bind the launches to rows of a KV cache, which go on from their present lengths.

        Args:
            rows: of the cache, at most `batch`.
            active: bool on the CPU, whether each of these rows takes part.
            step_log: int64 [batch, steps] for tokens, or [rows, steps, D] for latents, where only active rows write. The
                caller keeps it.
            latent_params: what ends the rows' latent steps.
            states: shaped as the step log of latents, for the states behind them; not recorded where None.
        """
        count = len(active)
        state = torch.zeros(len(RowField), self.batch, dtype=torch.int32)
        state[RowField.ACTIVE, :count] = active.int()
        state[RowField.LENGTH, :count] = cache.lengths[rows].int()
        state[RowField.POSITION, :count] = cache.next_position[rows].int() - 1
        if latent_params is not None:
            stop_cosine = NEVER_COSINE if latent_params.stop_cosine is None else latent_params.stop_cosine
            state[RowField.LIMIT, :count] = latent_params.steps[rows].int()
            state[RowField.STOP_COSINE] = torch.tensor(stop_cosine, dtype=torch.float32).view(torch.int32)
        state[RowField.PREFIX_ROW, :count] = (cache.prefix_row[rows] - rows.start).int()
        state[RowField.PREFIX_LEN, :count] = cache.prefix_len[rows].int()
        self.row_state.copy_(state)
        self.zero_counters()
        keys, values, positions = cache.keys[:, rows], cache.values[:, rows], cache.positions[rows]
        self.kv_table.copy_(KVTable.of(keys, values, positions, step_log, states).tensor())

    def reset(self, step_log: Tensor) -> None:
        """Bind the launches to no rows: they read and store nothing but the step log. For the warm-up."""
        self.row_state.zero_()
        self.zero_counters()
        self.kv_table.copy_(KVTable(step_log=step_log.data_ptr(), step_log_stride=step_log.stride(0)).tensor())
        self.hidden.zero_()
        self.logits.zero_()
        self.token_ids.zero_()

    def latent(self, weights: Weights, aligner: Aligner) -> None:
        """Run a latent step: hidden (or logits, for soft feedback) -> x -> hidden (and logits)."""
        if aligner.needs_logits:
            mean = aligner.soft_embedding(self.logits)
            realign(mean, None, aligner.target_norm, self.x, target=self.target, step=self.realign)
        else:
            realign(self.hidden, aligner.weight, aligner.target_norm, self.x, target=self.target, step=self.realign)
        self._layers(weights)
        rmsnorm(
            self.x, weights.final_norm, weights.eps, self.hidden, target=self.target, row_state=self.row_state,
            kv_table=self.kv_table,
        )  # fmt: skip
        if aligner.needs_logits:
            self._lm_head(weights)

    def forward(self, weights: Weights) -> None:
        """Run a forward over one token per row: token_ids -> x -> logits."""
        embed(self.token_ids, weights.embedding, self.x, self.row_state, self.kv_table, target=self.target)
        self._layers(weights)
        self._lm_head(weights)

    def sample(self, *, do_sample: bool) -> None:
        """Choose the next token of each row: logits -> token_ids."""
        sample(
            self.logits, self.token_ids, self.settings, self.candidates[do_sample], self.row_state, self.kv_table,
            do_sample=do_sample, target=self.target,
        )  # fmt: skip

    def token(self, weights: Weights, *, do_sample: bool) -> None:
        """Run a decode step: token_ids -> x -> logits -> token_ids."""
        self.forward(weights)
        self.sample(do_sample=do_sample)

    def _layers(self, w: Weights) -> None:
        target, workspace = self.target, self.workspace
        for layer in w.layers:
            skinny_gemm(
                self.x, layer.qkv, self.qkv, norm_weight=layer.input_norm, eps=w.eps, bias=layer.qkv_bias, target=target,
                workspace=workspace,
            )  # fmt: skip
            decode_attention(
                self.qkv, self.kv_table, layer.slot, self.slots, self.lengths, self.positions, w.inv_freq, w.attention_scaling,
                layer.query_norm, layer.key_norm, w.eps, w.scale, layer.window, self.splits, self.attention, target=target,
                prefix_row=self.prefix_row, prefix_len=self.prefix_len,
            )  # fmt: skip
            skinny_gemm(
                self.attention,
                layer.output,
                self.attended,
                bias=layer.output_bias,
                residual=self.x,
                target=target,
                workspace=workspace,
            )
            skinny_gemm(
                self.attended, layer.gate_up, self.activated, norm_weight=layer.mlp_norm, eps=w.eps, bias=layer.gate_up_bias,
                gated=True, target=target, workspace=workspace,
            )  # fmt: skip
            skinny_gemm(
                self.activated,
                layer.down,
                self.x,
                bias=layer.down_bias,
                residual=self.attended,
                target=target,
                workspace=workspace,
            )

    def _lm_head(self, w: Weights) -> None:
        skinny_gemm(
            self.x, w.lm_head, self.logits, norm_weight=w.final_norm, eps=w.eps, bias=w.lm_head_bias, target=self.target,
            workspace=self.workspace,
        )  # fmt: skip
