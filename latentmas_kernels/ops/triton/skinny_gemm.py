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
def weight_tile(weight_ptr, stride, outs, ins, n_cols_out, stop):
    mask = (outs < n_cols_out)[:, None] & (ins < stop)[None, :]
    # Weights are read once a step: they should leave the cache to data that is read again.
    return tl.load(
        weight_ptr + outs[:, None].to(tl.int64) * stride + ins[None, :],
        mask=mask,
        other=0.0,
        eviction_policy="evict_first",
    )


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
def gemv_tile(
    x_ptr, x_stride, norm_weight_ptr, weight_ptr, weight_stride, rows, outs, n_rows, n_cols_out, up_offset, start, stop,
    HAS_NORM: tl.constexpr, GATED: tl.constexpr, USE_PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return sums for few rows by plain multiplications: [M, N] twice (the second for the rows of w at up_offset), squares [M].

    The next tile of weights is loaded while this one is used, the first before the inputs are ready.
    """
    first = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K], dtype=tl.float32)
    second = first
    squares = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    ins = start + tl.arange(0, BLOCK_K)
    w = weight_tile(weight_ptr, weight_stride, outs, ins, n_cols_out, stop)
    v = w
    if GATED:
        v = weight_tile(weight_ptr + up_offset, weight_stride, outs, ins, n_cols_out, stop)
    if USE_PDL:
        pdl_wait()
    for _ in range(start, stop, BLOCK_K):
        after = ins + BLOCK_K
        w_after = weight_tile(weight_ptr, weight_stride, outs, after, n_cols_out, stop)
        v_after = w_after
        if GATED:
            v_after = weight_tile(weight_ptr + up_offset, weight_stride, outs, after, n_cols_out, stop)
        plain, scaled = input_tile(x_ptr, x_stride, norm_weight_ptr, rows, ins, n_rows, stop, HAS_NORM)
        first += scaled[:, None, :] * w.to(tl.float32)[None, :, :]
        if GATED:
            second += scaled[:, None, :] * v.to(tl.float32)[None, :, :]
        if HAS_NORM:
            squares += plain * plain
        w, v, ins = w_after, v_after, after
    return tl.sum(first, axis=2), tl.sum(second, axis=2), tl.sum(squares, axis=1)


@triton.jit
def dot_tile(
    x_ptr, x_stride, norm_weight_ptr, weight_ptr, weight_stride, rows, outs, n_rows, n_cols_out, up_offset, start, stop,
    HAS_NORM: tl.constexpr, GATED: tl.constexpr, USE_PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return the sums of `gemv_tile` by tensor cores, x * norm_weight in the dtype of the weights."""
    first = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    second = first
    squares = tl.zeros([BLOCK_M], dtype=tl.float32)
    if USE_PDL:
        pdl_wait()
    for begin in range(start, stop, BLOCK_K):
        ins = begin + tl.arange(0, BLOCK_K)
        plain, scaled = input_tile(x_ptr, x_stride, norm_weight_ptr, rows, ins, n_rows, stop, HAS_NORM)
        a = scaled.to(weight_ptr.dtype.element_ty)
        w = weight_tile(weight_ptr, weight_stride, outs, ins, n_cols_out, stop)
        first = tl.dot(a, tl.trans(w), first, input_precision="ieee")
        if GATED:
            v = weight_tile(weight_ptr + up_offset, weight_stride, outs, ins, n_cols_out, stop)
            second = tl.dot(a, tl.trans(v), second, input_precision="ieee")
        if HAS_NORM:
            squares += tl.sum(plain * plain, axis=1)
    return first, second, squares


@triton.jit
def skinny_gemm_kernel(
    x_ptr, x_stride, norm_weight_ptr, weight_ptr, weight_stride, bias_ptr, residual_ptr, residual_stride, out_ptr, out_stride,
    split_k_partials_ptr, tile_counters_ptr, n_rows, n_cols_in, n_cols_out, eps,
    HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr, USE_PDL: tl.constexpr,
    DOT: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store out = product + bias + residual; with GATED w has 2 n_cols_out rows, out = silu(first half) * second half."""
    block, part, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks = tl.num_programs(0)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = block * BLOCK_N + tl.arange(0, BLOCK_N)
    # Whole blocks of K per part, so that the loads of no part straddle two cache lines.
    per_part = tl.cdiv(tl.cdiv(n_cols_in, SPLIT), BLOCK_K) * BLOCK_K
    start = part * per_part
    stop = tl.minimum(start + per_part, n_cols_in)
    up_offset = n_cols_out.to(tl.int64) * weight_stride
    if DOT:
        first, second, squares = dot_tile(
            x_ptr, x_stride, norm_weight_ptr, weight_ptr, weight_stride, rows, outs, n_rows, n_cols_out, up_offset, start,
            stop, HAS_NORM, GATED, USE_PDL, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        first, second, squares = gemv_tile(
            x_ptr, x_stride, norm_weight_ptr, weight_ptr, weight_stride, rows, outs, n_rows, n_cols_out, up_offset, start,
            stop, HAS_NORM, GATED, USE_PDL, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip

    rows_to_store = n_rows  # the program stores the rows below
    if SPLIT > 1:
        # [tile, block] holds for each part BLOCK_M x BLOCK_N sums, as many again with GATED, and BLOCK_M squares.
        SIZE: tl.constexpr = BLOCK_M * (BLOCK_N * (2 if GATED else 1) + 1)
        tile_partials = split_k_partials_ptr + (tile * blocks + block).to(tl.int64) * (SPLIT * SIZE)
        cell = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        row = tl.arange(0, BLOCK_M)
        mine = tile_partials + part * SIZE
        tl.store(mine + row, squares)
        tl.store(mine + BLOCK_M + cell, first)
        if GATED:
            tl.store(mine + BLOCK_M + BLOCK_M * BLOCK_N + cell, second)
        tl.debug_barrier()  # every thread's sums are stored before one thread counts
        counter = tile_counters_ptr + tile * blocks + block
        finished = tl.atomic_add(counter, 1, sem="acq_rel")
        rows_to_store = tl.where(finished == SPLIT - 1, n_rows, 0)
        if finished == SPLIT - 1:
            first = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            second = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            squares = tl.zeros([BLOCK_M], dtype=tl.float32)
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
        first = first * scale[:, None]
        second = second * scale[:, None]
    columns = outs < n_cols_out
    mask = (rows < rows_to_store)[:, None] & columns[None, :]
    if HAS_BIAS:
        first += tl.load(bias_ptr + outs, mask=columns, other=0.0).to(tl.float32)[None, :]
        if GATED:
            second += tl.load(bias_ptr + n_cols_out + outs, mask=columns, other=0.0).to(tl.float32)[None, :]
    if GATED:
        first = first / (1 + tl.exp(-first)) * second
    if HAS_RESIDUAL:
        at = residual_ptr + rows[:, None] * residual_stride + outs[None, :]
        first += tl.load(at, mask=mask, other=0.0).to(tl.float32)
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
    """Launch on checked arguments. Modifies `out` and `workspace`; `residual` may be the same tensor as `out`."""
    (m, k), n = x.shape, out.shape[1]
    if m == 0:
        return
    config = tile_for(target, m, n, k, weight.element_size(), gated=gated) if config is None else config
    if workspace is None:
        workspace = Workspace(x)
        workspace.reserve(config, m, n, gated=gated)
    partials, counters = workspace_sizes(config, m, n, gated=gated)
    assert partials <= workspace.split_k_partials.numel(), "reserve() comes first"
    assert counters <= workspace.tile_counters.numel(), "reserve() comes first"
    grid = (triton.cdiv(n, config.block_n), config.split, triton.cdiv(m, config.block_m))
    target.launch(
        skinny_gemm_kernel, grid,
        x, x.stride(0), norm_weight, weight, weight.stride(0), bias, residual, 0 if residual is None else residual.stride(0),
        out, out.stride(0), workspace.split_k_partials, workspace.tile_counters, m, k, n, eps,
        HAS_NORM=norm_weight is not None, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, GATED=gated,
        USE_PDL=target.enable_pdl, DOT=config.dot, SPLIT=config.split,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
