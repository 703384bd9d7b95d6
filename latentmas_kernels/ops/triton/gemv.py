"""The product of one, two or four rows with a tile of weights, by fused multiply-adds.

A thread loads vectors of 16 bytes and keeps everything that it makes of them: each element of a vector is multiplied with its
inputs in turn, and all are added to one sum per row of x and row of w. So the loop moves no value between threads: it has
no conversion of layouts and no barrier, which a product in three dimensions [M, N, K] has about ten of. The threads of a
program lie along K only (BLOCK_K is at least a vector per thread), else the inputs would have to be exchanged.
"""

import triton
import triton.language as tl


@triton.jit
def weight_tile(weight_ptr, stride, first_out, BLOCK_N: tl.constexpr, ins, n_cols_out, stop):
    """Load w[first_out : first_out + BLOCK_N, ins], 0 behind the ends."""
    # 64 bits for the first row only, which all threads share: those of each row would be two registers each.
    row = tl.arange(0, BLOCK_N)[:, None]
    at = weight_ptr + first_out.to(tl.int64) * stride + (row * stride + ins[None, :])
    mask = (first_out + row < n_cols_out) & (ins < stop)[None, :]
    # Weights are read once a step: they should leave the cache to data that is read again.
    return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def split_all(parts, COUNT: tl.constexpr):
    """Split the last dimension, of 2, of each of COUNT tensors."""
    halves = ()
    for i in tl.static_range(COUNT):
        low, high = tl.split(parts[i])
        halves = halves + (low, high)
    return halves


@triton.jit
def vector_elements(tile, VECTORS: tl.constexpr, VECTOR: tl.constexpr):
    """Return [..., K] as VECTOR tensors VECTORS = [..., K / VECTOR]: the elements of each vector, in an order of their own."""
    if VECTOR == 8:
        parts = (tl.reshape(tile, [VECTORS[0], VECTORS[1], 2, 2, 2]),)
        parts = split_all(parts, 1)
    else:
        parts = (tl.reshape(tile, [VECTORS[0], VECTORS[1], 2, 2]),)
    parts = split_all(parts, VECTOR // 4)
    return split_all(parts, VECTOR // 2)


@triton.jit
def add_products(sums, inputs, w, ROWS: tl.constexpr):
    """Return sums + inputs * w for each row."""
    added = ()
    for row in tl.static_range(ROWS):
        added = added + (tl.fma(inputs[row], w, sums[row]),)
    return added


@triton.jit
def total(sums, ROWS: tl.constexpr, N: tl.constexpr, VECTORS: tl.constexpr):
    """Return [ROWS, N], the sums over the vectors of ROWS tensors [N, VECTORS], of all rows in one exchange."""
    if ROWS == 4:
        rows = tl.join(tl.join(sums[0], sums[2]), tl.join(sums[1], sums[3]))
    elif ROWS == 2:
        rows = tl.join(sums[0], sums[1])
    else:
        rows = sums[0]
    return tl.trans(tl.sum(tl.reshape(rows, [N, VECTORS, ROWS]), axis=1))


@triton.jit
def gemv_tile(
    x_ptr, x_stride, norm_weight_ptr, weight_ptr, weight_stride, w, v, g, first_row, first_out, n_rows, n_cols_out, up_offset,
    start, stop, HAS_NORM: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Return the sums [ROWS, BLOCK_N] twice, the second for the rows of w at up_offset, and the squares [ROWS, 1].

    w, v and g are the first tiles of the weights, of those at up_offset and of the norm's weight, which the caller has
    loaded ahead. The tiles of each further turn are loaded into their registers as soon as they are used.
    """
    VECTORS: tl.constexpr = BLOCK_K // VECTOR
    first = (tl.zeros([BLOCK_N, VECTORS], tl.float32),) * ROWS
    second = first
    squares = (tl.zeros([1, VECTORS], tl.float32),) * ROWS
    ins = start + tl.arange(0, BLOCK_K)
    for _ in range(start, stop, BLOCK_K):
        x = ()
        for row in tl.static_range(ROWS):
            end = tl.where(first_row + row < n_rows, stop, 0)
            loaded = tl.load(x_ptr + (first_row + row) * x_stride + ins, mask=ins < end, other=0.0)
            x = x + (vector_elements(loaded, [1, VECTORS], VECTOR),)
        ws = vector_elements(w, [BLOCK_N, VECTORS], VECTOR)
        if GATED:
            vs = vector_elements(v, [BLOCK_N, VECTORS], VECTOR)
        if HAS_NORM:
            gs = vector_elements(g, [1, VECTORS], VECTOR)
        # One element of all vectors at a time: so only that one is held in float32.
        for i in tl.static_range(VECTOR):
            inputs = ()
            for row in tl.static_range(ROWS):
                inputs = inputs + (x[row][i].to(tl.float32),)
            if HAS_NORM:
                scaled, added = (), ()
                for row in tl.static_range(ROWS):
                    scaled = scaled + (inputs[row] * gs[i].to(tl.float32),)
                    added = added + (tl.fma(inputs[row], inputs[row], squares[row]),)
                inputs, squares = scaled, added
            first = add_products(first, inputs, ws[i].to(tl.float32), ROWS)
            if GATED:
                second = add_products(second, inputs, vs[i].to(tl.float32), ROWS)
        ins += BLOCK_K
        w = weight_tile(weight_ptr, weight_stride, first_out, BLOCK_N, ins, n_cols_out, stop)
        if GATED:
            v = weight_tile(weight_ptr + up_offset, weight_stride, first_out, BLOCK_N, ins, n_cols_out, stop)
        if HAS_NORM:
            g = tl.load(norm_weight_ptr + ins, mask=ins < stop, other=0.0)
    first_total = total(first, ROWS, BLOCK_N, VECTORS)
    second_total = first_total
    if GATED:
        second_total = total(second, ROWS, BLOCK_N, VECTORS)
    return first_total, second_total, total(squares, ROWS, 1, VECTORS)
