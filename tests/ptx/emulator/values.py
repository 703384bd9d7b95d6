"""Types of PTX as numpy has them, constants, and the two half precisions."""

import re

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]

Lanes = NDArray[np.bool_]
"""Which of the 32 lanes an instruction runs in."""
LANES = np.arange(32)
ALL: Lanes = np.ones(32, bool)
"""Every lane. Masks of all lanes are this object, and masks of none NONE, so that `is` finds them."""
NONE: Lanes = np.zeros(32, bool)
UNSIGNED: dict[int, type] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""The type of a register or an access, by its size in bytes."""
NUMBERS: dict[str, type] = {
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
    "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64,
    "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64,
    "f32": np.float32, "f64": np.float64,
}  # fmt: skip
"""The type that arithmetic is done in; bf16, f16 and the pairs of them have functions of their own."""
SIZES = {name: np.dtype(kind).itemsize for name, kind in NUMBERS.items()} | {
    "bf16": 2, "f16": 2, "bf16x2": 4, "f16x2": 4, "pred": 1,
}  # fmt: skip
SIGNED = {"s8", "s16", "s32", "s64"}


def constant(text: str, size: int) -> int:
    """Return the bits of a literal: 0f and hexadecimal digits for a float32, 0d for a float64, or an integer."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
        return int(text[2:], 16)
    return int(text.rstrip("U"), 0) & ((1 << 8 * size) - 1)


def from_bfloat16(bits: Array) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(value: Array) -> NDArray[np.uint16]:
    """Return the bits of float32 values, rounded to nearest even."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


def from_float16(bits: Array) -> NDArray[np.float32]:
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def to_float16(value: Array) -> NDArray[np.uint16]:
    return value.astype(np.float16).view(np.uint16)


FROM_HALF = {"bf16": from_bfloat16, "f16": from_float16}
TO_HALF = {"bf16": to_bfloat16, "f16": to_float16}
