"""The product that rmsnorm_linear, linear_residual and gate_up_swiglu share: stream the weights once, for few rows.

    y[m, n] = scale[m] sum_k x[m, k] gain[k] w[n, k]          gain and scale are those of RMSNorm, where there is one
    scale[m] = 1 / sqrt(mean_k x[m, k]^2 + eps)

The norm needs no pass of its own: its scale is a number per row, so the same loop that streams w sums the squares of x
and the result is scaled at the end. Sums are float32. With `split` > 1 several programs share the outputs of a block:
each writes its part, and the one that arrives last adds all of them in order, so that the bits do not depend on who that
is, and puts the counter back to 0 for the next launch.
"""

import triton
import triton.language as tl
from torch import Tensor

from latentmas_kernels.ops.triton.launch import Target, Tile, tile_for


@triton.jit
def pdl_wait():
    """Behind this line lie the results of the kernels before; weights may be loaded ahead of it.

    Called under `if OVERLAP` (sm_90 and later). Every program of every kernel comes here, also one that has nothing to
    do: a kernel that ends has then waited for all that came before it.
    """
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()


@triton.jit
def weight_tile(weight, stride, outs, ins, width_out, stop):
    inside = (outs < width_out)[:, None] & (ins < stop)[None, :]
    # Weights are read once a step: they should leave the cache to what is read again.
    return tl.load(
        weight + outs[:, None].to(tl.int64) * stride + ins[None, :],
        mask=inside,
        other=0.0,
        eviction_policy="evict_first",
    )


@triton.jit
def input_tile(x, x_stride, gain, rows, ins, height, stop, HAS_GAIN: tl.constexpr):
    """x and x gain, float32."""
    inside = (rows < height)[:, None] & (ins < stop)[None, :]
    plain = tl.load(x + rows[:, None] * x_stride + ins[None, :], mask=inside, other=0.0).to(tl.float32)
    scaled = plain
    if HAS_GAIN:
        scaled = plain * tl.load(gain + ins, mask=ins < stop, other=0.0).to(tl.float32)[None, :]
    return plain, scaled


@triton.jit
def streamed(
    x, x_stride, gain, weight, weight_stride, rows, outs, height, width_out, pair_offset, start, stop,
    HAS_GAIN: tl.constexpr, PAIR: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums for few rows in plain multiplications: [M, N] twice (the second for the rows of w at pair_offset), squares [M].

    The next tile of weights is on its way while this one is used, the first before the inputs are there.
    """
    first = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K], dtype=tl.float32)
    second = first
    squares = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    ins = start + tl.arange(0, BLOCK_K)
    w = weight_tile(weight, weight_stride, outs, ins, width_out, stop)
    v = w
    if PAIR:
        v = weight_tile(weight + pair_offset, weight_stride, outs, ins, width_out, stop)
    if OVERLAP:
        pdl_wait()
    for _ in range(start, stop, BLOCK_K):
        after = ins + BLOCK_K
        w_after = weight_tile(weight, weight_stride, outs, after, width_out, stop)
        v_after = w_after
        if PAIR:
            v_after = weight_tile(weight + pair_offset, weight_stride, outs, after, width_out, stop)
        plain, scaled = input_tile(x, x_stride, gain, rows, ins, height, stop, HAS_GAIN)
        first += scaled[:, None, :] * w.to(tl.float32)[None, :, :]
        if PAIR:
            second += scaled[:, None, :] * v.to(tl.float32)[None, :, :]
        if HAS_GAIN:
            squares += plain * plain
        w, v, ins = w_after, v_after, after
    return tl.sum(first, axis=2), tl.sum(second, axis=2), tl.sum(squares, axis=1)


@triton.jit
def multiplied(
    x, x_stride, gain, weight, weight_stride, rows, outs, height, width_out, pair_offset, start, stop,
    HAS_GAIN: tl.constexpr, PAIR: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same on tensor cores, x gain in the dtype of the weights."""
    first = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    second = first
    squares = tl.zeros([BLOCK_M], dtype=tl.float32)
    if OVERLAP:
        pdl_wait()
    for begin in range(start, stop, BLOCK_K):
        ins = begin + tl.arange(0, BLOCK_K)
        plain, scaled = input_tile(x, x_stride, gain, rows, ins, height, stop, HAS_GAIN)
        a = scaled.to(weight.dtype.element_ty)
        w = weight_tile(weight, weight_stride, outs, ins, width_out, stop)
        first = tl.dot(a, tl.trans(w), first, input_precision="ieee")
        if PAIR:
            v = weight_tile(weight + pair_offset, weight_stride, outs, ins, width_out, stop)
            second = tl.dot(a, tl.trans(v), second, input_precision="ieee")
        if HAS_GAIN:
            squares += tl.sum(plain * plain, axis=1)
    return first, second, squares


@triton.jit
def product_kernel(
    x, x_stride, gain, weight, weight_stride, bias, residual, residual_stride, out, out_stride, partials, arrivals,
    height, width_in, width_out, eps,
    HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PAIR: tl.constexpr, OVERLAP: tl.constexpr,
    DOT: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = product + bias + residual; with PAIR, w has 2 width_out rows and out = silu(first half) * second half."""
    block, part, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks = tl.num_programs(0)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = block * BLOCK_N + tl.arange(0, BLOCK_N)
    # Whole blocks of K per part, so that no part's loads straddle two cache lines.
    per_part = tl.cdiv(tl.cdiv(width_in, SPLIT), BLOCK_K) * BLOCK_K
    start = part * per_part
    stop = tl.minimum(start + per_part, width_in)
    pair_offset = width_out.to(tl.int64) * weight_stride
    if DOT:
        first, second, squares = multiplied(
            x, x_stride, gain, weight, weight_stride, rows, outs, height, width_out, pair_offset, start, stop,
            HAS_GAIN, PAIR, OVERLAP, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        first, second, squares = streamed(
            x, x_stride, gain, weight, weight_stride, rows, outs, height, width_out, pair_offset, start, stop,
            HAS_GAIN, PAIR, OVERLAP, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip

    writable = height  # rows that this program may write
    if SPLIT > 1:
        # [tile, block] holds for each part BLOCK_M x BLOCK_N sums, as many again with PAIR, and BLOCK_M squares.
        SIZE: tl.constexpr = BLOCK_M * (BLOCK_N * (2 if PAIR else 1) + 1)
        home = partials + (tile * blocks + block).to(tl.int64) * (SPLIT * SIZE)
        cell = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        row = tl.arange(0, BLOCK_M)
        mine = home + part * SIZE
        tl.store(mine + row, squares)
        tl.store(mine + BLOCK_M + cell, first)
        if PAIR:
            tl.store(mine + BLOCK_M + BLOCK_M * BLOCK_N + cell, second)
        tl.debug_barrier()  # every thread's part is written before one of them says so
        counter = arrivals + tile * blocks + block
        arrived = tl.atomic_add(counter, 1, sem="acq_rel")
        writable = tl.where(arrived == SPLIT - 1, height, 0)
        if arrived == SPLIT - 1:
            first = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            second = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            squares = tl.zeros([BLOCK_M], dtype=tl.float32)
            for i in range(SPLIT):
                theirs = home + i * SIZE  # .cg: past the L1, which does not see what other multiprocessors wrote
                squares += tl.load(theirs + row, cache_modifier=".cg")
                first += tl.load(theirs + BLOCK_M + cell, cache_modifier=".cg")
                if PAIR:
                    second += tl.load(theirs + BLOCK_M + BLOCK_M * BLOCK_N + cell, cache_modifier=".cg")
            tl.store(counter, 0)

    if HAS_GAIN:
        scale = tl.rsqrt(squares / width_in + eps)
        first = first * scale[:, None]
        second = second * scale[:, None]
    columns = outs < width_out
    inside = (rows < writable)[:, None] & columns[None, :]
    if HAS_BIAS:
        first += tl.load(bias + outs, mask=columns, other=0.0).to(tl.float32)[None, :]
        if PAIR:
            second += tl.load(bias + width_out + outs, mask=columns, other=0.0).to(tl.float32)[None, :]
    if PAIR:
        first = first / (1 + tl.exp(-first)) * second
    if HAS_RESIDUAL:
        at = residual + rows[:, None] * residual_stride + outs[None, :]
        first += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + rows[:, None] * out_stride + outs[None, :], first.to(out.dtype.element_ty), mask=inside)


def scratch_sizes(tile: Tile, m: int, n: int, *, pair: bool) -> tuple[int, int]:
    """Elements of `partials` (float32) and `arrivals` (int32, zeros) that a product needs."""
    blocks = triton.cdiv(n, tile.block_n) * triton.cdiv(m, tile.block_m)
    cells = tile.block_m * (tile.block_n * (2 if pair else 1) + 1)
    return (blocks * tile.split * cells, blocks) if tile.split > 1 else (0, 0)


class Scratch:
    """Where parts of a split product meet. Grows outside of captures only; `arrivals` is all 0 between launches."""

    def __init__(self, like: Tensor) -> None:
        self.partials = like.new_empty(1, dtype=like.new_empty(0).float().dtype)
        self.arrivals = like.new_zeros(1).int()

    def reserve(self, tile: Tile, m: int, n: int, *, pair: bool) -> None:
        partials, arrivals = scratch_sizes(tile, m, n, pair=pair)
        if partials > self.partials.numel():
            self.partials = self.partials.new_empty(partials)
        if arrivals > self.arrivals.numel():
            self.arrivals = self.arrivals.new_zeros(arrivals)


def product(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    gain: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    pair: bool = False,
    target: Target,
    scratch: Scratch | None = None,
    tile: Tile | None = None,
) -> None:
    """Launch on checked arguments; `out` is written, `residual` may be the same tensor."""
    (m, k), n = x.shape, out.shape[1]
    if m == 0:
        return
    tile = tile_for(target, m, n, k, weight.element_size(), pair=pair) if tile is None else tile
    if scratch is None:
        scratch = Scratch(x)
        scratch.reserve(tile, m, n, pair=pair)
    partials, arrivals = scratch_sizes(tile, m, n, pair=pair)
    assert partials <= scratch.partials.numel(), "reserve() comes first"
    assert arrivals <= scratch.arrivals.numel(), "reserve() comes first"
    grid = (triton.cdiv(n, tile.block_n), tile.split, triton.cdiv(m, tile.block_m))
    product_kernel[grid](
        x, x.stride(0), gain, weight, weight.stride(0), bias, residual, 0 if residual is None else residual.stride(0),
        out, out.stride(0), scratch.partials, scratch.arrivals, m, k, n, eps,
        HAS_GAIN=gain is not None, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, PAIR=pair,
        OVERLAP=target.overlap, DOT=tile.dot, SPLIT=tile.split,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **target.options,
    )  # fmt: skip
