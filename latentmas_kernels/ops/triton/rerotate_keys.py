"""rerotate_keys in Triton: formula and shapes in latentmas_kernels.ops.rerotate_keys."""

import triton
import triton.language as tl
from torch import Tensor

from latentmas_kernels.ops.triton.launch import LaunchTarget
from latentmas_kernels.ops.triton.sincos import cosine_sine

BLOCK_SLOTS = 16


@triton.jit
def rerotate_kernel(
    keys_ptr, shifts_ptr, inv_freq_ptr, layer_stride, row_stride, head_stride, shift_stride, n_slots, n_heads,
    HALF: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """Rotate a run of slots of one head in place: (x1, x2) -> (x1 c - x2 s, x2 c + x1 s)."""
    block, row, layer_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    layer, head = layer_head // n_heads, layer_head % n_heads
    slots = block * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    cols = tl.arange(0, BLOCK)
    shift = tl.load(shifts_ptr + row * shift_stride + slots, mask=slots < n_slots, other=0)
    mask = ((slots < n_slots) & (shift != 0))[:, None] & (cols < HALF)[None, :]
    base = keys_ptr + (
        layer.to(tl.int64) * layer_stride + row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride
    )
    low_ptr = base + slots.to(tl.int64)[:, None] * (2 * HALF) + cols[None, :]
    frequency = tl.load(inv_freq_ptr + cols, mask=cols < HALF, other=0.0)
    cosine, sine = cosine_sine(shift.to(tl.float32)[:, None] * frequency[None, :])
    low = tl.load(low_ptr, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(low_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(low_ptr, (low * cosine - high * sine).to(keys_ptr.dtype.element_ty), mask=mask)
    tl.store(low_ptr + HALF, (high * cosine + low * sine).to(keys_ptr.dtype.element_ty), mask=mask)


def rerotate_keys(keys: Tensor, shifts: Tensor, inv_freq: Tensor, *, target: LaunchTarget) -> None:
    """Launch on checked arguments. Modifies `keys`."""
    layers, batch, heads, _, head_dim = keys.shape
    slots, block = shifts.shape[1], triton.next_power_of_2(head_dim // 2)
    if keys.numel() == 0 or slots == 0:
        return
    target.launch(
        rerotate_kernel, (triton.cdiv(slots, BLOCK_SLOTS), batch, layers * heads),
        keys, shifts, inv_freq, keys.stride(0), keys.stride(1), keys.stride(2), shifts.stride(0), slots, heads,
        HALF=head_dim // 2, BLOCK=block, BLOCK_SLOTS=BLOCK_SLOTS,
        # Not more threads than elements: those that hold a copy would read keys that the others store at the time.
        num_warps=min(4, max(1, block * BLOCK_SLOTS // 32)),
    )  # fmt: skip
