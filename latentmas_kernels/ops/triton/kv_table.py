"""The device table of a KV buffer: addresses and strides in device memory, read when a kernel runs.

A captured graph keeps the pointers of its launches. So that one graph serves every cache, the launches hold the address of
this small table instead, and a call writes the addresses of its own cache into the table before the first step.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class KVTable(NamedTuple):
    """One int64 per field, in this order. Strides are in elements; slots are contiguous: head_dim elements, one position each.

    Attributes:
        keys, values, positions: addresses of the KV buffer, and of the positions int64 [B, S].
        layer_stride, row_stride, head_stride: of keys and values.
        position_stride: of rows of the positions.
        step_log: address where steps record their input: latents [B, steps, D] or token ids int64 [B, steps].
        step_log_stride: of its rows.
        states: address where the states behind latent steps are recorded, [B, steps, D] with the strides of the step log;
            0 where they are not.
    """

    keys: int = 0
    values: int = 0
    positions: int = 0
    layer_stride: int = 0
    row_stride: int = 0
    head_stride: int = 0
    position_stride: int = 0
    step_log: int = 0
    step_log_stride: int = 0
    states: int = 0

    @classmethod
    def of(
        cls,
        keys: Tensor,
        values: Tensor,
        positions: Tensor | None = None,
        step_log: Tensor | None = None,
        states: Tensor | None = None,
    ) -> "KVTable":
        """Return the table for keys and values [layers, B, kv_heads, S, head_dim] of equal strides, positions int64 [B, S]."""
        assert keys.stride() == values.stride()
        assert keys.stride(4) == 1
        assert keys.stride(3) == keys.shape[4]
        assert positions is None or positions.stride(1) == 1
        assert step_log is None or step_log[0].is_contiguous()
        assert states is None or (step_log is not None and states.stride() == step_log.stride())
        return cls(
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            positions=0 if positions is None else positions.data_ptr(),
            layer_stride=keys.stride(0),
            row_stride=keys.stride(1),
            head_stride=keys.stride(2),
            position_stride=0 if positions is None else positions.stride(0),
            step_log=0 if step_log is None else step_log.data_ptr(),
            step_log_stride=0 if step_log is None else step_log.stride(0),
            states=0 if states is None else states.data_ptr(),
        )

    @classmethod
    def of_layer(cls, keys: Tensor, values: Tensor, positions: Tensor | None = None) -> "KVTable":
        """Return the table for keys and values of one layer, [B, kv_heads, S, head_dim]."""
        return cls.of(keys[None], values[None], positions)

    def tensor(self, device: torch.device | str | None = None) -> Tensor:
        """Return the table as int64 [10]."""
        return torch.tensor(tuple(self), dtype=torch.int64, device=device)


# Triton's kernels see globals only where they are constexpr.
_KEYS: tl.constexpr = tl.constexpr(KVTable._fields.index("keys"))
_VALUES: tl.constexpr = tl.constexpr(KVTable._fields.index("values"))
_POSITIONS: tl.constexpr = tl.constexpr(KVTable._fields.index("positions"))
_LAYER_STRIDE: tl.constexpr = tl.constexpr(KVTable._fields.index("layer_stride"))
_ROW_STRIDE: tl.constexpr = tl.constexpr(KVTable._fields.index("row_stride"))
_HEAD_STRIDE: tl.constexpr = tl.constexpr(KVTable._fields.index("head_stride"))
_POSITION_STRIDE: tl.constexpr = tl.constexpr(KVTable._fields.index("position_stride"))
_STEP_LOG: tl.constexpr = tl.constexpr(KVTable._fields.index("step_log"))
_STEP_LOG_STRIDE: tl.constexpr = tl.constexpr(KVTable._fields.index("step_log_stride"))
_STATES: tl.constexpr = tl.constexpr(KVTable._fields.index("states"))


@triton.jit
def keys_pointer(kv_table_ptr, layer, row, head, dtype: tl.constexpr):
    """Return the address of slot 0 of a head's keys."""
    base = tl.multiple_of(tl.load(kv_table_ptr + _KEYS).to(tl.pointer_type(dtype)), 16)
    return base + _head_offset(kv_table_ptr, layer, row, head)


@triton.jit
def values_pointer(kv_table_ptr, layer, row, head, dtype: tl.constexpr):
    """Return the address of slot 0 of a head's values."""
    base = tl.multiple_of(tl.load(kv_table_ptr + _VALUES).to(tl.pointer_type(dtype)), 16)
    return base + _head_offset(kv_table_ptr, layer, row, head)


@triton.jit
def _head_offset(kv_table_ptr, layer, row, head):
    layer_stride = tl.multiple_of(tl.load(kv_table_ptr + _LAYER_STRIDE), 8)
    row_stride = tl.multiple_of(tl.load(kv_table_ptr + _ROW_STRIDE), 8)
    head_stride = tl.multiple_of(tl.load(kv_table_ptr + _HEAD_STRIDE), 8)
    return layer * layer_stride + row * row_stride + head * head_stride


@triton.jit
def row_offset(kv_table_ptr, rows):
    """Return the distance to the row that is `rows` rows further on (negative: before), in elements of keys or values."""
    return rows * tl.multiple_of(tl.load(kv_table_ptr + _ROW_STRIDE), 8)


@triton.jit
def position_pointer(kv_table_ptr, row):
    """Return the address of the position of slot 0 of a row."""
    return tl.load(kv_table_ptr + _POSITIONS).to(tl.pointer_type(tl.int64)) + row * tl.load(
        kv_table_ptr + _POSITION_STRIDE
    )


@triton.jit
def step_log_pointer(kv_table_ptr, row, dtype: tl.constexpr):
    """Return the address of the step log of a row."""
    return tl.load(kv_table_ptr + _STEP_LOG).to(tl.pointer_type(dtype)) + row * tl.load(kv_table_ptr + _STEP_LOG_STRIDE)


@triton.jit
def records_states(kv_table_ptr):
    """Return whether the states behind latent steps are recorded."""
    return tl.load(kv_table_ptr + _STATES) != 0


@triton.jit
def states_pointer(kv_table_ptr, row, dtype: tl.constexpr):
    """Return the address of the recorded states of a row."""
    return tl.load(kv_table_ptr + _STATES).to(tl.pointer_type(dtype)) + row * tl.load(kv_table_ptr + _STEP_LOG_STRIDE)
