"""skinny_gemm: the product of rmsnorm_linear, linear_residual and gate_up_swiglu. Streams the weights once, for few rows.

    y[m, n] = scale[m] sum_k x[m, k] g[k] w[n, k]             g and scale are those of RMSNorm, where there is one
    scale[m] = 1 / sqrt(mean_k x[m, k]^2 + eps)

The norm needs no pass of its own: its scale is a number per row, so the same loop that streams w sums the squares of x
and the result is scaled at the end. Sums are float32. With `split` > 1 several programs share the outputs of a block
(split-K): each stores its partial sums, and the last one to finish adds all of them in order, so that the bits do not depend
on which one is last, and resets the counter to 0 for the next launch.
"""

import triton
import triton.language as tl
from torch import Tensor

from latentmas_kernels.ops.triton.gemv import gemv_tile, weight_tile
from latentmas_kernels.ops.triton.launch import LaunchTarget
from latentmas_kernels.ops.triton.tiles import GemmConfig, tile_for


@triton.jit
def pdl_wait():
    """Wait for the results of the kernels before; weights may be loaded ahead of this line.

    Called under `if USE_PDL` (sm_90 and later). Every program of every kernel calls this, also one that has nothing to do: a
    kernel that ends has then waited for all kernels before it.
    """
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()


@triton.jit
def input_tile(x_ptr, x_stride, norm_weight_ptr, rows, ins, n_rows, stop, HAS_NORM: tl.constexpr):
    """Return x and x * norm_weight, float32."""
    mask = (rows < n_rows)[:, None] & (ins < stop)[None, :]
    plain = tl.load(x_ptr + rows[:, None] * x_stride + ins[None, :], mask=mask, other=0.0).to(tl.float32)
    scaled = plain
    if HAS_NORM:
        scaled = plain * tl.load(norm_weight_ptr + ins, mask=ins < stop, other=0.0).to(tl.float32)[None, :]
    return plain, scaled


@triton.jit
def dot_tile(
    x_ptr, x_stride, norm_weight_ptr, weight_ptr, weight_stride, rows, first_out, n_rows, n_cols_out, up_offset, start, stop,
    HAS_NORM: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return the sums of `gemv_tile` by tensor cores, x * norm_weight in the dtype of the weights."""
    first = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    second = first
    squares = tl.zeros([BLOCK_M, 1], dtype=tl.float32)
    for begin in range(start, stop, BLOCK_K):
        ins = begin + tl.arange(0, BLOCK_K)
        plain, scaled = input_tile(x_ptr, x_stride, norm_weight_ptr, rows, ins, n_rows, stop, HAS_NORM)
        a = scaled.to(weight_ptr.dtype.element_ty)
        w = weight_tile(weight_ptr, weight_stride, first_out, BLOCK_N, ins, n_cols_out, stop)
        first = tl.dot(a, tl.trans(w), first, input_precision="ieee")
        if GATED:
            v = weight_tile(weight_ptr + up_offset, weight_stride, first_out, BLOCK_N, ins, n_cols_out, stop)
            second = tl.dot(a, tl.trans(v), second, input_precision="ieee")
        if HAS_NORM:
            squares += tl.sum(plain * plain, axis=1, keep_dims=True)
    return first, second, squares


# Sizes that may be 1 would be constants there; the others are whole vectors or not, which decides how they are loaded.
@triton.jit(do_not_specialize=["n_rows", "n_cols_out"])
def skinny_gemm_kernel(
    x_ptr, x_stride, norm_weight_ptr, weight_ptr, weight_stride, bias_ptr, residual_ptr, residual_stride, out_ptr, out_stride,
    split_k_partials_ptr, tile_counters_ptr, n_rows, n_cols_in, n_cols_out, row_tiles, eps,
    HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr, USE_PDL: tl.constexpr,
    DOT: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Store out = product + bias + residual; with GATED w has 2 n_cols_out rows, out = silu(first half) * second half."""
    program, part = tl.program_id(0), tl.program_id(1)
    # The tiles of rows that read the same weights are neighbours: what one of them has read, the others find in the L2.
    block, tile = program // row_tiles, program % row_tiles
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    first_out = block * BLOCK_N
    outs = first_out + tl.arange(0, BLOCK_N)
    columns = outs < n_cols_out
    # Whole blocks of K per part, so that the loads of no part straddle two cache lines.
    per_part = tl.cdiv(tl.cdiv(n_cols_in, SPLIT), BLOCK_K) * BLOCK_K
    start = part * per_part
    stop = tl.minimum(start + per_part, n_cols_in)
    up_offset = tl.cast(n_cols_out, tl.int64) * weight_stride

    # Weights are on their way before the inputs are ready; for tensor cores they are staged in shared memory by the loop.
    ins = start + tl.arange(0, BLOCK_K)
    w, v, g = 0, 0, 0
    if not DOT:
        w = weight_tile(weight_ptr, weight_stride, first_out, BLOCK_N, ins, n_cols_out, stop)
        if GATED:
            v = weight_tile(weight_ptr + up_offset, weight_stride, first_out, BLOCK_N, ins, n_cols_out, stop)
        if HAS_NORM:
            g = tl.load(norm_weight_ptr + ins, mask=ins < stop, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + outs, mask=columns, other=0.0)
        if GATED:
            up_bias = tl.load(bias_ptr + n_cols_out + outs, mask=columns, other=0.0)
    if USE_PDL:
        pdl_wait()
    # Loaded here, not where it is added: behind the sums its latency would be one of the launch.
    if HAS_RESIDUAL:
        mask = (rows < n_rows)[:, None] & columns[None, :]
        residual = tl.load(residual_ptr + rows[:, None] * residual_stride + outs[None, :], mask=mask, other=0.0)
    if DOT:
        first, second, squares = dot_tile(
            x_ptr, x_stride, norm_weight_ptr, weight_ptr, weight_stride, rows, first_out, n_rows, n_cols_out, up_offset, start,
            stop, HAS_NORM, GATED, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        first, second, squares = gemv_tile(
            x_ptr, x_stride, norm_weight_ptr, weight_ptr, weight_stride, w, v, g, tile * BLOCK_M, first_out, n_rows, n_cols_out,
            up_offset, start, stop, HAS_NORM, GATED, BLOCK_M, BLOCK_N, BLOCK_K, VECTOR,
        )  # fmt: skip

    rows_to_store = n_rows  # the program stores the rows below
    if SPLIT > 1:
        # [block, tile] holds for each part BLOCK_M x BLOCK_N sums, as many again with GATED, and BLOCK_M squares.
        SIZE: tl.constexpr = BLOCK_M * (BLOCK_N * (2 if GATED else 1) + 1)
        tile_partials = split_k_partials_ptr + program.to(tl.int64) * (SPLIT * SIZE)
        row = tl.arange(0, BLOCK_M)[:, None]
        cell = row * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        mine = tile_partials + part * SIZE
        tl.store(mine + row, squares)
        tl.store(mine + BLOCK_M + cell, first)
        if GATED:
            tl.store(mine + BLOCK_M + BLOCK_M * BLOCK_N + cell, second)
        tl.debug_barrier()  # every thread's sums are stored before one thread counts
        counter = tile_counters_ptr + program
        finished = tl.atomic_add(counter, 1, sem="acq_rel")
        rows_to_store = tl.where(finished == SPLIT - 1, n_rows, 0)
        if finished == SPLIT - 1:
            first = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            second = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            squares = tl.zeros([BLOCK_M, 1], dtype=tl.float32)
            for i in range(SPLIT):
                theirs = tile_partials + i * SIZE
                # .cg: past the L1, which does not see the stores of other multiprocessors.
                squares += tl.load(theirs + row, cache_modifier=".cg")
                first += tl.load(theirs + BLOCK_M + cell, cache_modifier=".cg")
                if GATED:
                    second += tl.load(theirs + BLOCK_M + BLOCK_M * BLOCK_N + cell, cache_modifier=".cg")
            tl.store(counter, 0)

    if HAS_NORM:
        scale = tl.rsqrt(squares / n_cols_in + eps)
        first = first * scale
        second = second * scale
    if HAS_BIAS:
        first += bias.to(tl.float32)[None, :]
        if GATED:
            second += up_bias.to(tl.float32)[None, :]
    if GATED:
        first = first / (1 + tl.exp(-first)) * second
    if HAS_RESIDUAL:
        first += residual.to(tl.float32)
    mask = (rows < rows_to_store)[:, None] & columns[None, :]
    tl.store(out_ptr + rows[:, None] * out_stride + outs[None, :], first.to(out_ptr.dtype.element_ty), mask=mask)


def workspace_sizes(config: GemmConfig, m: int, n: int, *, gated: bool) -> tuple[int, int]:
    """Return the elements of `split_k_partials` (float32) and `tile_counters` (int32, zeros) that a product needs."""
    blocks = triton.cdiv(n, config.block_n) * triton.cdiv(m, config.block_m)
    cells = config.block_m * (config.block_n * (2 if gated else 1) + 1)
    return (blocks * config.split * cells, blocks) if config.split > 1 else (0, 0)


class Workspace:
    """Split-K sums of the programs of a tile, on the device of `like`.

    Grows outside of captures only; `tile_counters` is all 0 between launches.
    """

    def __init__(self, like: Tensor) -> None:
        self.split_k_partials = like.new_empty(1, dtype=like.new_empty(0).float().dtype)
        self.tile_counters = like.new_zeros(1).int()

    def reserve(self, config: GemmConfig, m: int, n: int, *, gated: bool) -> None:
        """Make room for a product [m, n]."""
        partials, counters = workspace_sizes(config, m, n, gated=gated)
        if partials > self.split_k_partials.numel():
            self.split_k_partials = self.split_k_partials.new_empty(partials)
        if counters > self.tile_counters.numel():
            self.tile_counters = self.tile_counters.new_zeros(counters)


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether the ranges from the first to the last element of two tensors overlap."""
    if a.is_meta or not (a.numel() and b.numel()):
        return False
    (a_start, a_stop), (b_start, b_stop) = (
        (
            t.data_ptr(),
            t.data_ptr() + t.itemsize * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))),
        )
        for t in (a, b)
    )
    return a_start < b_stop and b_start < a_stop


def skinny_gemm(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    target: LaunchTarget,
    workspace: Workspace | None = None,
    config: GemmConfig | None = None,
) -> None:
    """Launch on checked arguments. Modifies `out` and `workspace`.

    Args:
        x: [M, K]; its dtype may be another one than that of the weight.
        weight: [N, K] with contiguous rows, or [2 N, K] where gated.
        out: [M, N], in any dtype. No memory of x or residual: one thread reads what another has written by then.
        norm_weight: [K], of RMSNorm, with eps.
        bias: [N], or [2 N] where gated.
        residual: [M, N], added to the product.
        workspace: with room for this product; one of its own where None.
        config: the tile; `tile_for` chooses where None.
    """
    (m, k), n = x.shape, out.shape[1]
    if m == 0 or n == 0:
        return
    for name, tensor in (("x", x), ("residual", residual)):
        assert tensor is None or not share_memory(tensor, out), f"{name} shares memory with out; give out its own"
    config = tile_for(target, m, n, k, weight.element_size(), gated=gated) if config is None else config
    if workspace is None:
        workspace = Workspace(x)
        workspace.reserve(config, m, n, gated=gated)
    partials, counters = workspace_sizes(config, m, n, gated=gated)
    assert partials <= workspace.split_k_partials.numel(), "reserve() comes first"
    assert counters <= workspace.tile_counters.numel(), "reserve() comes first"
    row_tiles = triton.cdiv(m, config.block_m)
    target.launch(
        skinny_gemm_kernel, (triton.cdiv(n, config.block_n) * row_tiles, config.split),
        x, x.stride(0), norm_weight, weight, weight.stride(0), bias, residual, 0 if residual is None else residual.stride(0),
        out, out.stride(0), workspace.split_k_partials, workspace.tile_counters, m, k, n, row_tiles, eps,
        HAS_NORM=norm_weight is not None, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, GATED=gated,
        USE_PDL=target.enable_pdl, DOT=config.dot, SPLIT=config.split,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, VECTOR=16 // weight.element_size(),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
