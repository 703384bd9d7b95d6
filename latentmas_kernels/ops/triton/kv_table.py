"""A KV buffer as the kernels see it: addresses and strides in device memory, read when a kernel runs.

A captured graph keeps the pointers of its launches. So that one graph serves every cache, the launches hold the address
of this small table instead, and a call writes the addresses of its own cache into it before the first step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FIELDS = 10
"""keys, values, positions (addresses); strides of layers, rows and heads of keys and values, and of rows of positions, in
elements; then the address of the trace, the stride of its rows, and the address of the states. Slots are contiguous:
head_dim elements each, one position each. The trace is where steps write down what they fed: latents [B, steps, D] or
token ids int64 [B, steps]. The states behind latent steps are kept beside it, [B, steps, D], where there is an address."""


def describe(
    keys: Tensor,
    values: Tensor,
    positions: Tensor | None = None,
    trace: Tensor | None = None,
    states: Tensor | None = None,
) -> list[int]:
    """The table for keys and values [layers, B, kv_heads, S, head_dim] of equal strides, positions int64 [B, S]."""
    assert keys.stride() == values.stride()
    assert keys.stride(4) == 1
    assert keys.stride(3) == keys.shape[4]
    assert positions is None or positions.stride(1) == 1
    assert trace is None or trace[0].is_contiguous()
    assert states is None or (trace is not None and states.stride() == trace.stride())
    return [
        keys.data_ptr(),
        values.data_ptr(),
        0 if positions is None else positions.data_ptr(),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        0 if positions is None else positions.stride(0),
        0 if trace is None else trace.data_ptr(),
        0 if trace is None else trace.stride(0),
        0 if states is None else states.data_ptr(),
    ]


def memory_of(keys: Tensor, values: Tensor, positions: Tensor | None = None) -> Tensor:
    """The table as a tensor, for one layer [B, kv_heads, S, head_dim]."""
    return torch.tensor(describe(keys[None], values[None], positions), device=keys.device)


@triton.jit
def head_pointer(memory, field: tl.constexpr, layer, row, head, dtype: tl.constexpr):
    """Slot 0 of a head of keys (field 0) or values (field 1)."""
    base = tl.multiple_of(tl.load(memory + field).to(tl.pointer_type(dtype)), 16)
    layers = tl.multiple_of(tl.load(memory + 3), 8)
    rows = tl.multiple_of(tl.load(memory + 4), 8)
    heads = tl.multiple_of(tl.load(memory + 5), 8)
    return base + (layer * layers + row * rows + head * heads)


@triton.jit
def row_offset(memory, rows):
    """How far it is to so many rows on (or back), in elements of keys or values."""
    return rows * tl.multiple_of(tl.load(memory + 4), 8)


@triton.jit
def position_pointer(memory, row):
    """The position of slot 0 of a row."""
    return tl.load(memory + 2).to(tl.pointer_type(tl.int64)) + row * tl.load(memory + 6)


@triton.jit
def trace_pointer(memory, row, dtype: tl.constexpr):
    """Where the trace of a row begins."""
    return tl.load(memory + 7).to(tl.pointer_type(dtype)) + row * tl.load(memory + 8)


@triton.jit
def keeps_states(memory):
    """Whether the states behind latent steps are kept."""
    return tl.load(memory + 9) != 0


@triton.jit
def states_pointer(memory, row, dtype: tl.constexpr):
    """Where the states of a row begin."""
    return tl.load(memory + 9).to(tl.pointer_type(dtype)) + row * tl.load(memory + 8)
