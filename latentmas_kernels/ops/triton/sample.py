"""sample in Triton: the choice is defined in latentmas_kernels.ops.sample.

Every program of the first kernel finds the largest logit of one block of the vocabulary. For greedy decoding the second
kernel compares these. For sampling it reads the row in a single program: the k-th largest of the block maxima is a lower
bound for the k-th largest logit, so a first pass keeps the few logits above it, and the exact thresholds of top-k and top-p
are found among those by bisection over the bits of the float. Without top-k all logits are kept, which costs some thirty
passes over a row that is in the L2.
"""

from enum import IntEnum

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentmas_kernels.ops.triton.kv_table import step_log_pointer
from latentmas_kernels.ops.triton.launch import LaunchTarget
from latentmas_kernels.ops.triton.row_state import end_step, load_active, load_step
from latentmas_kernels.ops.triton.skinny_gemm import pdl_wait

BLOCK = 1024
MAX_EOS_TOKENS = 8
"""Most end-of-sequence tokens that the device compares with."""


class FloatField(IntEnum):
    """Fields of `Settings.floats`."""

    TEMPERATURE = 0
    TOP_P = 1


class IntField(IntEnum):
    """Fields of `Settings.ints`. TOP_K 0 is off."""

    SEED = 0
    TOP_K = 1
    MIN_NEW_TOKENS = 2
    PAD_TOKEN_ID = 3


# Triton's kernels see globals only where they are constexpr.
_TEMPERATURE: tl.constexpr = tl.constexpr(FloatField.TEMPERATURE.value)
_TOP_P: tl.constexpr = tl.constexpr(FloatField.TOP_P.value)
_SEED: tl.constexpr = tl.constexpr(IntField.SEED.value)
_TOP_K: tl.constexpr = tl.constexpr(IntField.TOP_K.value)
_MIN_NEW_TOKENS: tl.constexpr = tl.constexpr(IntField.MIN_NEW_TOKENS.value)
_PAD_TOKEN_ID: tl.constexpr = tl.constexpr(IntField.PAD_TOKEN_ID.value)


class Settings:
    """Sampling parameters in device memory, so that one captured graph serves every call.

    Attributes:
        floats: float32 [2], a line per `FloatField`.
        ints: int64 [4], a line per `IntField`.
        eos_token_ids: int64 [MAX_EOS_TOKENS], -1 for none.
    """

    def __init__(self, device: torch.device) -> None:
        self.floats = torch.ones(len(FloatField), device=device)
        self.ints = torch.zeros(len(IntField), dtype=torch.int64, device=device)
        self.eos_token_ids = torch.full((MAX_EOS_TOKENS,), -1, dtype=torch.int64, device=device)

    def set(
        self,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
        min_new_tokens: int,
        pad_token_id: int,
        eos_token_ids: list[int],
    ) -> None:
        """Copy the parameters to the device."""
        assert len(eos_token_ids) <= MAX_EOS_TOKENS
        floats = {FloatField.TEMPERATURE: temperature, FloatField.TOP_P: top_p}
        ints = {
            IntField.SEED: seed,
            IntField.TOP_K: top_k,
            IntField.MIN_NEW_TOKENS: min_new_tokens,
            IntField.PAD_TOKEN_ID: pad_token_id,
        }
        self.floats.copy_(torch.tensor([floats[field] for field in FloatField]))
        self.ints.copy_(torch.tensor([ints[field] for field in IntField]))
        self.eos_token_ids.copy_(torch.tensor(eos_token_ids + [-1] * (MAX_EOS_TOKENS - len(eos_token_ids))))


@triton.jit
def load_logits(logits_ptr, eos_ptr, row, cols, vocab_size, suppress_eos, MAX_EOS_TOKENS: tl.constexpr):
    """Return the logits of a row, -inf behind the vocabulary and, with suppress_eos, for the end-of-sequence tokens."""
    x = tl.load(logits_ptr + row.to(tl.int64) * vocab_size + cols, mask=cols < vocab_size, other=float("-inf"))
    if suppress_eos:
        for i in range(MAX_EOS_TOKENS):
            x = tl.where(cols == tl.load(eos_ptr + i), float("-inf"), x)
    return x


@triton.jit
def maxima_kernel(
    logits_ptr, maxima_ptr, indices_ptr, ints_ptr, eos_ptr, row_state_ptr, state_stride, vocab_size,
    BLOCK: tl.constexpr, MAX_EOS_TOKENS: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Store maxima[row, block] and the lowest index that has it."""
    block, row = tl.program_id(0), tl.program_id(1)
    cols = block * BLOCK + tl.arange(0, BLOCK)
    if USE_PDL:
        pdl_wait()
    suppress_eos = load_step(row_state_ptr, state_stride, row) < tl.load(ints_ptr + _MIN_NEW_TOKENS)
    x = load_logits(logits_ptr, eos_ptr, row, cols, vocab_size, suppress_eos, MAX_EOS_TOKENS)
    top = tl.max(x, axis=0)
    at = row * tl.num_programs(0) + block
    tl.store(maxima_ptr + at, top)
    tl.store(indices_ptr + at, tl.min(tl.where(x == top, cols, vocab_size - 1), axis=0))


@triton.jit
def store_token(
    token,
    token_ids_ptr,
    ints_ptr,
    eos_ptr,
    row_state_ptr,
    state_stride,
    kv_table_ptr,
    row,
    MAX_EOS_TOKENS: tl.constexpr,
):
    """Store the token, the padding token for a row that has ended, and end the row at an end-of-sequence token."""
    active, step = load_active(row_state_ptr, state_stride, row), load_step(row_state_ptr, state_stride, row)
    token = tl.where(active > 0, token.to(tl.int64), tl.load(ints_ptr + _PAD_TOKEN_ID))
    for i in range(MAX_EOS_TOKENS):
        active = tl.where(token == tl.load(eos_ptr + i), 0, active)
    tl.store(token_ids_ptr + row, token)
    tl.store(step_log_pointer(kv_table_ptr, row, tl.int64) + step, token)
    end_step(row_state_ptr, state_stride, row, step, active > 0)


@triton.jit
def greedy_kernel(
    maxima_ptr, indices_ptr, token_ids_ptr, ints_ptr, eos_ptr, row_state_ptr, kv_table_ptr, state_stride, n_blocks,
    vocab_size, BLOCKS: tl.constexpr, MAX_EOS_TOKENS: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Choose the most likely token; of equals the lowest, as in torch."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCKS)
    if USE_PDL:
        pdl_wait()
    maxima = tl.load(maxima_ptr + row * n_blocks + at, mask=at < n_blocks, other=float("-inf"))
    indices = tl.load(indices_ptr + row * n_blocks + at, mask=at < n_blocks, other=0)
    token = tl.min(tl.where(maxima == tl.max(maxima, axis=0), indices, vocab_size - 1), axis=0)
    store_token(token, token_ids_ptr, ints_ptr, eos_ptr, row_state_ptr, state_stride, kv_table_ptr, row, MAX_EOS_TOKENS)


@triton.jit
def order(x):
    """Return the bits of floats as int32 that compare as the floats do."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def count_from(values_ptr, n, least, BLOCK: tl.constexpr):
    """Return the number of values that are `least` or more."""
    found = tl.zeros([BLOCK], dtype=tl.int32)
    for begin in range(0, n, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        keys = order(tl.load(values_ptr + at, mask=at < n, other=float("-inf")))
        found += ((at < n) & (keys >= least)).to(tl.int32)
    return tl.sum(found, axis=0)


@triton.jit
def mass_from(values_ptr, n, least, top, temperature, BLOCK: tl.constexpr):
    """Return the sum of exp((x - top) / temperature) over the values that are `least` or more."""
    mass = tl.zeros([BLOCK], dtype=tl.float32)
    for begin in range(0, n, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(values_ptr + at, mask=at < n, other=float("-inf"))
        mass += tl.where((at < n) & (order(x) >= least), tl.exp((x - top) / temperature), 0.0)
    return tl.sum(mass, axis=0)


@triton.jit
def kth_largest(values_ptr, n, k, BLOCK: tl.constexpr):
    """Return order() of the k-th largest of n >= k values: the largest number that k of them reach."""
    low = tl.full([], -2147483648, dtype=tl.int64)
    high = tl.full([], 2147483647, dtype=tl.int64)
    for _ in range(32):
        middle = low + (high - low + 1) // 2
        enough = count_from(values_ptr, n, middle, BLOCK) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def sample_kernel(
    logits_ptr, maxima_ptr, kept_ptr, kept_index_ptr, token_ids_ptr, floats_ptr, ints_ptr, eos_ptr, row_state_ptr,
    kv_table_ptr, state_stride, n_blocks, vocab_size,
    BLOCK: tl.constexpr, MAX_EOS_TOKENS: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if USE_PDL:
        pdl_wait()
    step = load_step(row_state_ptr, state_stride, row)
    temperature, top_p = tl.load(floats_ptr + _TEMPERATURE), tl.load(floats_ptr + _TOP_P)
    seed, top_k = tl.load(ints_ptr + _SEED), tl.load(ints_ptr + _TOP_K)
    suppress_eos = step < tl.load(ints_ptr + _MIN_NEW_TOKENS)
    row_maxima = maxima_ptr + row * n_blocks
    least = tl.full([], -2147483648, dtype=tl.int64)
    if (top_k > 0) & (top_k <= n_blocks):
        least = kth_largest(row_maxima, n_blocks, top_k, BLOCK)

    values, index = kept_ptr + row.to(tl.int64) * vocab_size, kept_index_ptr + row.to(tl.int64) * vocab_size
    n = 0
    for begin in range(0, vocab_size, BLOCK):
        cols = begin + tl.arange(0, BLOCK)
        x = load_logits(logits_ptr, eos_ptr, row, cols, vocab_size, suppress_eos, MAX_EOS_TOKENS)
        keep = ((cols < vocab_size) & (order(x) >= least)).to(tl.int32)
        place = n + tl.cumsum(keep, axis=0) - 1
        tl.store(values + place, x, mask=keep > 0)
        tl.store(index + place, cols, mask=keep > 0)
        n += tl.sum(keep, axis=0)
    tl.debug_barrier()  # logits that other threads kept are read from here on

    largest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for begin in range(0, n_blocks, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(row_maxima + at, mask=at < n_blocks, other=float("-inf")))
    top = tl.max(largest, axis=0)
    if (top_k > 0) & (top_k < n):
        least = kth_largest(values, n, top_k, BLOCK)
    if top_p < 1:
        # The smallest threshold with less than top_p of the mass above it: the logits that reach it are the nucleus.
        target_mass = top_p * mass_from(values, n, least, top, temperature, BLOCK)
        low, high = least, order(top).to(tl.int64)
        for _ in range(32):
            middle = low + (high - low) // 2
            enough = mass_from(values, n, middle + 1, top, temperature, BLOCK) < target_mass
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
        # The first token whose cumulated mass exceeds the point; where rounding leaves none, the last one with any mass.
        hits = tl.min(tl.where((reached > point) & (p > 0), at, n), axis=0)
        last = tl.max(tl.where(p > 0, at, -1), axis=0)
        choice = tl.where(hits < n, hits, last)
        better = (found == 0) & (choice >= 0)
        token = tl.where(better, tl.load(index + tl.maximum(choice, 0)), token)
        found = tl.where(hits < n, 1, found)
        passed += tl.sum(p, axis=0)
    store_token(token, token_ids_ptr, ints_ptr, eos_ptr, row_state_ptr, state_stride, kv_table_ptr, row, MAX_EOS_TOKENS)


class Candidates:
    """Buffers between the two kernels: block maxima, and the logits that a row keeps."""

    def __init__(self, batch: int, vocab_size: int, device: torch.device, *, sampling: bool) -> None:
        blocks = triton.cdiv(vocab_size, BLOCK)
        kept = vocab_size if sampling else 1
        self.maxima = torch.empty(batch, blocks, device=device)
        self.indices = torch.empty(batch, blocks, dtype=torch.int32, device=device)
        self.kept = torch.empty(batch, kept, device=device)
        self.kept_index = torch.empty(batch, kept, dtype=torch.int32, device=device)


def sample(
    logits: Tensor,
    token_ids: Tensor,
    settings: Settings,
    candidates: Candidates,
    row_state: Tensor,
    kv_table: Tensor,
    *,
    do_sample: bool,
    target: LaunchTarget,
) -> None:
    """Choose a token per row of `logits` float32 [B, V]. Modifies `token_ids` int64 [B], the step log and `row_state`."""
    batch, vocab_size = logits.shape
    if batch == 0:
        return
    blocks = candidates.maxima.shape[1]
    target.launch(
        maxima_kernel, (blocks, batch),
        logits, candidates.maxima, candidates.indices, settings.ints, settings.eos_token_ids, row_state,
        row_state.stride(0), vocab_size, BLOCK=BLOCK, MAX_EOS_TOKENS=MAX_EOS_TOKENS, USE_PDL=target.enable_pdl,
    )  # fmt: skip
    if not do_sample:
        target.launch(
            greedy_kernel, (batch,),
            candidates.maxima, candidates.indices, token_ids, settings.ints, settings.eos_token_ids, row_state, kv_table,
            row_state.stride(0), blocks, vocab_size, BLOCKS=triton.next_power_of_2(blocks), MAX_EOS_TOKENS=MAX_EOS_TOKENS,
            USE_PDL=target.enable_pdl,
        )  # fmt: skip
        return
    assert candidates.kept.shape[1] == vocab_size
    target.launch(
        sample_kernel, (batch,),
        logits, candidates.maxima, candidates.kept, candidates.kept_index, token_ids, settings.floats, settings.ints,
        settings.eos_token_ids, row_state, kv_table, row_state.stride(0), blocks, vocab_size, BLOCK=BLOCK,
        MAX_EOS_TOKENS=MAX_EOS_TOKENS, USE_PDL=target.enable_pdl, num_warps=8,
    )  # fmt: skip
