"""sample in Triton: what is chosen and how is defined in latentmas_kernels.ops.sample.

Every program of the first kernel finds the largest logit of one block of the vocabulary. Greedy, a second one compares
those. Sampling, it goes through the row in a single program: the k-th largest of the block maxima is a lower bound for
the k-th largest logit, so a first pass keeps the few logits above it, and the exact thresholds of top-k and top-p are
found among those by bisection over the float's bits. Without top-k all logits are kept, which costs some thirty passes
over a row that lies in the L2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentmas_kernels.ops.triton.kv_table import trace_pointer
from latentmas_kernels.ops.triton.launch import Target
from latentmas_kernels.ops.triton.row_state import next_step
from latentmas_kernels.ops.triton.skinny_gemm import pdl_wait

BLOCK = 1024
END_TOKENS = 8
"""Most end-of-sequence tokens that the device compares with."""


class Settings:
    """How to sample, in device memory, so that one captured graph serves every call.

    Attributes:
        numbers: float32 [2], temperature and top_p.
        counts: int64 [4], seed, top_k (0 is off), min_new_tokens, padding token.
        ends: int64 [END_TOKENS], end-of-sequence tokens, -1 for none.
    """

    def __init__(self, device: torch.device) -> None:
        self.numbers = torch.ones(2, device=device)
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)
        self.ends = torch.full((END_TOKENS,), -1, dtype=torch.int64, device=device)

    def set(
        self,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
        min_new_tokens: int,
        padding: int,
        ends: list[int],
    ) -> None:
        assert len(ends) <= END_TOKENS
        self.numbers.copy_(torch.tensor([temperature, top_p]))
        self.counts.copy_(torch.tensor([seed, top_k, min_new_tokens, padding]))
        self.ends.copy_(torch.tensor(ends + [-1] * (END_TOKENS - len(ends))))


@triton.jit
def load_logits(logits, ends, row, cols, vocabulary, barred, END_TOKENS: tl.constexpr):
    """Logits of a row, -inf behind the vocabulary and, where `barred`, for the end tokens."""
    x = tl.load(logits + row.to(tl.int64) * vocabulary + cols, mask=cols < vocabulary, other=float("-inf"))
    if barred:
        for i in range(END_TOKENS):
            x = tl.where(cols == tl.load(ends + i), float("-inf"), x)
    return x


@triton.jit
def maxima_kernel(
    logits, maxima, indices, counts, ends, rows, rows_stride, vocabulary,
    BLOCK: tl.constexpr, END_TOKENS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """maxima[row, block] and the lowest index that has it."""
    block, row = tl.program_id(0), tl.program_id(1)
    cols = block * BLOCK + tl.arange(0, BLOCK)
    if OVERLAP:
        pdl_wait()
    barred = tl.load(rows + 4 * rows_stride + row) < tl.load(counts + 2)
    x = load_logits(logits, ends, row, cols, vocabulary, barred, END_TOKENS)
    top = tl.max(x, axis=0)
    at = row * tl.num_programs(0) + block
    tl.store(maxima + at, top)
    tl.store(indices + at, tl.min(tl.where(x == top, cols, vocabulary - 1), axis=0))


@triton.jit
def settle(token, tokens, counts, ends, rows, rows_stride, memory, row, END_TOKENS: tl.constexpr):
    """Write the token down, the padding token for a row that has ended, and end the row where it is an end token."""
    active = tl.load(rows + row)
    token = tl.where(active > 0, token.to(tl.int64), tl.load(counts + 3))
    for i in range(END_TOKENS):
        active = tl.where(token == tl.load(ends + i), 0, active)
    tl.store(tokens + row, token)
    tl.store(trace_pointer(memory, row, tl.int64) + next_step(rows, rows_stride, row), token)
    tl.store(rows + row, active)


@triton.jit
def greedy_kernel(
    maxima, indices, tokens, counts, ends, rows, memory, rows_stride, blocks, vocabulary,
    BLOCKS: tl.constexpr, END_TOKENS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The most likely token; of equals the lowest, as in torch."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCKS)
    if OVERLAP:
        pdl_wait()
    tops = tl.load(maxima + row * blocks + at, mask=at < blocks, other=float("-inf"))
    where = tl.load(indices + row * blocks + at, mask=at < blocks, other=0)
    token = tl.min(tl.where(tops == tl.max(tops, axis=0), where, vocabulary - 1), axis=0)
    settle(token, tokens, counts, ends, rows, rows_stride, memory, row, END_TOKENS)


@triton.jit
def order(x):
    """int32 that compare as the floats do."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def count_from(values, n, least, BLOCK: tl.constexpr):
    """How many values are `least` or more."""
    found = tl.zeros([BLOCK], dtype=tl.int32)
    for begin in range(0, n, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        keys = order(tl.load(values + at, mask=at < n, other=float("-inf")))
        found += ((at < n) & (keys >= least)).to(tl.int32)
    return tl.sum(found, axis=0)


@triton.jit
def mass_from(values, n, least, top, temperature, BLOCK: tl.constexpr):
    """Sum of exp((x - top) / temperature) over the values that are `least` or more."""
    mass = tl.zeros([BLOCK], dtype=tl.float32)
    for begin in range(0, n, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(values + at, mask=at < n, other=float("-inf"))
        mass += tl.where((at < n) & (order(x) >= least), tl.exp((x - top) / temperature), 0.0)
    return tl.sum(mass, axis=0)


@triton.jit
def kth_largest(values, n, k, BLOCK: tl.constexpr):
    """order() of the k-th largest of n >= k values: the largest number that k of them reach."""
    low = tl.full([], -2147483648, dtype=tl.int64)
    high = tl.full([], 2147483647, dtype=tl.int64)
    for _ in range(32):
        middle = low + (high - low + 1) // 2
        enough = count_from(values, n, middle, BLOCK) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def sample_kernel(
    logits, maxima, kept, kept_index, tokens, numbers, counts, ends, rows, memory,
    rows_stride, blocks, vocabulary, BLOCK: tl.constexpr, END_TOKENS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if OVERLAP:
        pdl_wait()
    step = tl.load(rows + 4 * rows_stride + row)
    temperature, top_p = tl.load(numbers), tl.load(numbers + 1)
    seed, top_k, barred = tl.load(counts), tl.load(counts + 1), step < tl.load(counts + 2)
    row_maxima = maxima + row * blocks
    least = tl.full([], -2147483648, dtype=tl.int64)
    if (top_k > 0) & (top_k <= blocks):
        least = kth_largest(row_maxima, blocks, top_k, BLOCK)

    values, index = kept + row.to(tl.int64) * vocabulary, kept_index + row.to(tl.int64) * vocabulary
    n = 0
    for begin in range(0, vocabulary, BLOCK):
        cols = begin + tl.arange(0, BLOCK)
        x = load_logits(logits, ends, row, cols, vocabulary, barred, END_TOKENS)
        keep = ((cols < vocabulary) & (order(x) >= least)).to(tl.int32)
        place = n + tl.cumsum(keep, axis=0) - 1
        tl.store(values + place, x, mask=keep > 0)
        tl.store(index + place, cols, mask=keep > 0)
        n += tl.sum(keep, axis=0)
    tl.debug_barrier()  # what other threads kept is read from here on

    largest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for begin in range(0, blocks, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(row_maxima + at, mask=at < blocks, other=float("-inf")))
    top = tl.max(largest, axis=0)
    if (top_k > 0) & (top_k < n):
        least = kth_largest(values, n, top_k, BLOCK)
    if top_p < 1:
        # The smallest threshold with less than top_p of the mass above it: what reaches it is the nucleus.
        wanted = top_p * mass_from(values, n, least, top, temperature, BLOCK)
        low, high = least, order(top).to(tl.int64)
        for _ in range(32):
            middle = low + (high - low) // 2
            enough = mass_from(values, n, middle + 1, top, temperature, BLOCK) < wanted
            high = tl.where(enough, middle, high)
            low = tl.where(enough, low, tl.minimum(middle + 1, high))
        least = high

    mass = mass_from(values, n, least, top, temperature, BLOCK)
    point = tl.rand(seed, step * 65536 + row) * mass
    token = 0
    passed = 0.0
    found = 0
    for begin in range(0, n, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(values + at, mask=at < n, other=float("-inf"))
        p = tl.where((at < n) & (order(x) >= least), tl.exp((x - top) / temperature), 0.0)
        reached = passed + tl.cumsum(p, axis=0)
        # The first with the point below what it reaches; rounding may leave none, then it is the last that has any mass.
        hits = tl.min(tl.where((reached > point) & (p > 0), at, n), axis=0)
        last = tl.max(tl.where(p > 0, at, -1), axis=0)
        choice = tl.where(hits < n, hits, last)
        better = (found == 0) & (choice >= 0)
        token = tl.where(better, tl.load(index + tl.maximum(choice, 0)), token)
        found = tl.where(hits < n, 1, found)
        passed += tl.sum(p, axis=0)
    settle(token, tokens, counts, ends, rows, rows_stride, memory, row, END_TOKENS)


class Candidates:
    """Room for the two kernels: block maxima, and what a row keeps of its logits."""

    def __init__(self, batch: int, vocabulary: int, device: torch.device, *, sampling: bool) -> None:
        blocks = triton.cdiv(vocabulary, BLOCK)
        kept = vocabulary if sampling else 1
        self.maxima = torch.empty(batch, blocks, device=device)
        self.indices = torch.empty(batch, blocks, dtype=torch.int32, device=device)
        self.kept = torch.empty(batch, kept, device=device)
        self.kept_index = torch.empty(batch, kept, dtype=torch.int32, device=device)


def sample(
    logits: Tensor,
    tokens: Tensor,
    settings: Settings,
    candidates: Candidates,
    rows: Tensor,
    memory: Tensor,
    *,
    do_sample: bool,
    target: Target,
) -> None:
    """Choose a token per row of `logits` float32 [B, V]; writes `tokens` int64 [B], the trace, and `rows`."""
    batch, vocabulary = logits.shape
    if batch == 0:
        return
    blocks = candidates.maxima.shape[1]
    maxima_kernel[(blocks, batch)](
        logits, candidates.maxima, candidates.indices, settings.counts, settings.ends, rows, rows.stride(0), vocabulary,
        BLOCK=BLOCK, END_TOKENS=END_TOKENS, OVERLAP=target.overlap, **target.options,
    )  # fmt: skip
    if not do_sample:
        greedy_kernel[(batch,)](
            candidates.maxima, candidates.indices, tokens, settings.counts, settings.ends, rows, memory, rows.stride(0),
            blocks, vocabulary, BLOCKS=triton.next_power_of_2(blocks), END_TOKENS=END_TOKENS, OVERLAP=target.overlap,
            **target.options,
        )  # fmt: skip
        return
    assert candidates.kept.shape[1] == vocabulary
    sample_kernel[(batch,)](
        logits, candidates.maxima, candidates.kept, candidates.kept_index, tokens, settings.numbers, settings.counts,
        settings.ends, rows, memory, rows.stride(0), blocks, vocabulary, BLOCK=BLOCK, END_TOKENS=END_TOKENS,
        OVERLAP=target.overlap, num_warps=8, **target.options,
    )  # fmt: skip
