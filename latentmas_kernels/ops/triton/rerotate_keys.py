"""rerotate_keys in Triton: formula and shapes in latentmas_kernels.ops.rerotate_keys."""

import triton
import triton.language as tl
from torch import Tensor

from latentmas_kernels.ops.triton.sincos import cosine_sine

BLOCK_SLOTS = 16


@triton.jit
def rerotate_kernel(
    keys, shifts, inv_freq, layer_stride, row_stride, head_stride, shift_stride, slots, heads,
    HALF: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """One run of slots of one head: (x1, x2) -> (x1 c - x2 s, x2 c + x1 s) in place."""
    block, row, both = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    layer, head = both // heads, both % heads
    at = block * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    cols = tl.arange(0, BLOCK)
    shift = tl.load(shifts + row * shift_stride + at, mask=at < slots, other=0)
    inside = ((at < slots) & (shift != 0))[:, None] & (cols < HALF)[None, :]
    base = keys + (layer.to(tl.int64) * layer_stride + row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride)
    low_at = base + at.to(tl.int64)[:, None] * (2 * HALF) + cols[None, :]
    frequency = tl.load(inv_freq + cols, mask=cols < HALF, other=0.0)
    cosine, sine = cosine_sine(shift.to(tl.float32)[:, None] * frequency[None, :])
    low = tl.load(low_at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(low_at + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(low_at, (low * cosine - high * sine).to(keys.dtype.element_ty), mask=inside)
    tl.store(low_at + HALF, (high * cosine + low * sine).to(keys.dtype.element_ty), mask=inside)


def rerotate_keys(keys: Tensor, shifts: Tensor, inv_freq: Tensor) -> None:
    """Launch on checked arguments; `keys` is written."""
    layers, batch, heads, _, width = keys.shape
    slots = shifts.shape[1]
    if keys.numel() == 0 or slots == 0:
        return
    rerotate_kernel[(triton.cdiv(slots, BLOCK_SLOTS), batch, layers * heads)](
        keys, shifts, inv_freq, keys.stride(0), keys.stride(1), keys.stride(2), shifts.stride(0), slots, heads,
        HALF=width // 2, BLOCK=triton.next_power_of_2(width // 2), BLOCK_SLOTS=BLOCK_SLOTS,
    )  # fmt: skip
