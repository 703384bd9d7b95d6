"""Integers, floats, pairs of half floats, predicates: instructions whose lanes are on their own."""

from collections.abc import Callable
from typing import Any

import numpy as np

from emulator.program import Instruction, Program
from emulator.values import FROM_HALF, NUMBERS, SIZES, TO_HALF, UNSIGNED, Array

Elementwise = Callable[..., Array]


def on_registers(program: Program, instruction: Instruction, function: Elementwise, sizes: list[int]) -> Any:
    """Return what applies `function` to registers, of which `sizes` has the bytes; the result is of the first one's."""
    target, *sources = (program.register(t, s) for t, s in zip(instruction.operands, sizes, strict=True))
    if len(sources) == 1:
        (a,) = sources
        return lambda warp, lanes: warp.write(lanes, target, function(warp.registers[a]))
    if len(sources) == 2:
        a, b = sources
        return lambda warp, lanes: warp.write(lanes, target, function(warp.registers[a], warp.registers[b]))
    return lambda warp, lanes: warp.write(lanes, target, function(*[warp.registers[s] for s in sources]))


# ---- floats --------------------------------------------------------------------------------------------------------


def fused(wider: type, kind: type) -> Elementwise:
    """a b + c, rounded once (or, where float64 has no wider type, as good as that)."""
    return lambda a, b, c: (a.astype(wider) * b + c).astype(kind)


FLOATS: dict[str, Elementwise] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative, "abs": np.abs,
    "min": np.fmin, "max": np.fmax, "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt,
    "rsqrt": lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(a.dtype), "rcp": lambda a: a.dtype.type(1) / a,
}  # fmt: skip
NAN_IS_KEPT = {"min": np.minimum, "max": np.maximum}


def float_function(parts: list[str]) -> Elementwise | None:
    kind = NUMBERS[parts[-1]]
    if parts[0] == "fma":
        return fused(np.float64 if kind is np.float32 else np.longdouble, kind)
    return NAN_IS_KEPT[parts[0]] if "NaN" in parts else FLOATS.get(parts[0])


# ---- pairs of half floats in one register --------------------------------------------------------------------------

PAIRS: dict[str, Elementwise] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": lambda a, b, c: a * b + c, "neg": np.negative,
    "min": np.fmin, "max": np.fmax,
}  # fmt: skip


def pair_function(parts: list[str]) -> Elementwise | None:
    """A function of two halves at a time, each in float64 and rounded once."""
    half, function = parts[-1].removesuffix("x2"), PAIRS.get(parts[0])
    if function is None:
        return None

    def on_pairs(*pairs: Array) -> Array:
        halves = [FROM_HALF[half](pair.view(np.uint16)).astype(np.float64) for pair in pairs]
        return TO_HALF[half](function(*halves).astype(np.float32)).view(np.uint32)

    return on_pairs


def half_function(parts: list[str]) -> Elementwise | None:
    half, function = parts[-1], PAIRS.get(parts[0])
    if function is None:
        return None
    return lambda *a: TO_HALF[half](function(*[FROM_HALF[half](x).astype(np.float64) for x in a]).astype(np.float32))


# ---- integers ------------------------------------------------------------------------------------------------------


def shift_left(a: Array, by: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    return np.where(by >= bits, 0, a << np.minimum(by, bits - 1).astype(a.dtype)).astype(a.dtype)


def shift_right(a: Array, by: Array) -> Array:
    """Of signed numbers the sign moves in."""
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by >= bits, 0, shifted).astype(a.dtype)


def divide(a: Array, b: Array) -> Array:
    """Rounds towards zero; a division by 0 gives all ones."""
    safe = np.where(b == 0, 1, b).astype(a.dtype)
    quotient = (a - np.fmod(a, safe)) // safe
    return np.where(b == 0, a.dtype.type(-1) if a.dtype.kind == "i" else np.iinfo(a.dtype).max, quotient)


def remainder(a: Array, b: Array) -> Array:
    return np.where(b == 0, a, np.fmod(a, np.where(b == 0, 1, b).astype(a.dtype)))


def multiply_high(a: Array, b: Array) -> Array:
    wider = np.int64 if a.dtype.kind == "i" else np.uint64
    return (a.astype(wider) * b.astype(wider) >> wider(32)).astype(a.dtype)


def extract_bits(a: Array, start: Array, count: Array) -> Array:
    start, count = start.astype(np.int64) & 255, count.astype(np.int64) & 255
    field = (a.astype(np.int64) >> np.minimum(start, 63)) & ((np.int64(1) << np.minimum(count, 32)) - 1)
    if a.dtype.kind == "i":
        sign = np.int64(1) << np.maximum(count - 1, 0)
        field = np.where(count > 0, (field ^ sign) - sign, 0)
    return field.astype(a.dtype)


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """Byte i of the result is the byte of {b, a} that the i-th digit of the selector names; its top bit spreads the sign."""
    eight = np.stack([a.view(np.uint8).reshape(-1, 4), b.view(np.uint8).reshape(-1, 4)], 1).reshape(-1, 8)
    digits = (selector[:, None] >> np.uint32([0, 4, 8, 12])) & np.uint32(15)
    chosen = np.take_along_axis(eight, (digits & np.uint32(7)).astype(np.int64), 1)
    spread = np.where(chosen >= 128, 255, 0).astype(np.uint8)
    return np.ascontiguousarray(np.where(digits >= 8, spread, chosen)).view(np.uint32)[:, 0]


INTEGERS: dict[str, Elementwise] = {
    "add": np.add, "sub": np.subtract, "neg": np.negative, "abs": np.abs, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "shl": shift_left, "shr": shift_right, "div": divide, "rem": remainder, "bfe": extract_bits,
    "prmt": permute_bytes, "popc": lambda a: np.bitwise_count(a).astype(np.uint32),
}  # fmt: skip
COUNTS_ARE_B32 = {"shl": 1, "shr": 1, "bfe": 2}
"""Instructions whose last sources are 32 bits, whatever the type: how many."""


def integer_function(parts: list[str]) -> Elementwise | None:
    base, kind = parts[0], parts[-1]
    if base in ("mul", "mad"):
        if "hi" in parts:
            product: Elementwise | None = multiply_high if base == "mul" and SIZES[kind] == 4 else None
        elif "wide" in parts:
            wider = NUMBERS[kind[0] + str(16 * SIZES[kind])]
            product = lambda a, b: a.astype(wider) * b.astype(wider)  # noqa: E731
        else:
            product = np.multiply
        if base == "mul" or product is None:
            return product
        return lambda a, b, c: product(a, b) + c.astype(product(a, b).dtype)
    return INTEGERS.get(base)


MODIFIERS = {"rn", "ftz", "approx", "full", "NaN", "lo", "hi", "wide"}


def decode_arithmetic(program: Program, instruction: Instruction) -> Any:
    parts, kind = instruction.parts, instruction.parts[-1]
    if not set(parts[1:-1]) <= MODIFIERS or kind not in SIZES:
        return None
    count = len(instruction.operands)
    if kind == "pred":
        return on_registers(program, instruction, PREDICATES[parts[0]], [1] * count)
    size = SIZES[kind]
    if kind in ("bf16x2", "f16x2"):
        function = pair_function(parts)
        return function and on_registers(program, instruction, function, [4] * count)
    if kind in ("bf16", "f16"):
        function = half_function(parts)
        return function and on_registers(program, instruction, function, [2] * count)
    function = float_function(parts) if kind in ("f32", "f64") else integer_function(parts)
    if function is None:
        return None
    result = 2 * size if "wide" in parts else size
    sizes = [result] + [size] * (count - 1)
    types: list[Any] = [NUMBERS[kind]] * (count - 1)
    if parts[0] == "mad" and result != size:
        sizes[-1], types[-1] = result, UNSIGNED[result]
    for i in range(1, COUNTS_ARE_B32.get(parts[0], 0) + 1):
        sizes[-i], types[-i] = 4, np.uint32
    if parts[0] == "popc":
        result = sizes[0] = 4
    bits = UNSIGNED[result]

    def typed(*sources: Array) -> Array:
        return function(*[s.view(t) for s, t in zip(sources, types, strict=True)]).view(bits)

    def typed_pair(a: Array, b: Array) -> Array:
        return function(a.view(types[0]), b.view(types[1])).view(bits)

    return on_registers(program, instruction, typed_pair if count == 3 else typed, sizes)


# ---- predicates ----------------------------------------------------------------------------------------------------

PREDICATES: dict[str, Elementwise] = {
    "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not,
}  # fmt: skip
COMPARISONS: dict[str, Elementwise] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def either_is_nan(a: Array, b: Array) -> Array:
    return np.isnan(a) | np.isnan(b)


def float_comparison(name: str) -> Elementwise | None:
    """Of numbers, and of NaN: true with a trailing u, otherwise false."""
    if name == "nan":
        return either_is_nan
    if name == "num":
        return lambda a, b: ~either_is_nan(a, b)
    if name == "ne":  # numpy holds a NaN to be unequal
        return lambda a, b: (a != b) & ~either_is_nan(a, b)
    if name in COMPARISONS:
        return COMPARISONS[name]
    ordered = COMPARISONS.get(name[:-1]) if name.endswith("u") else None
    return None if ordered is None else lambda a, b: ordered(a, b) | either_is_nan(a, b)


def decode_setp(program: Program, instruction: Instruction) -> Any:
    parts, kind = instruction.parts, instruction.parts[-1]
    names = [part for part in parts[1:-1] if part != "ftz"]
    if len(names) != 1 or kind not in NUMBERS or len(instruction.operands) != 3:
        return None
    function = float_comparison(names[0]) if kind[0] == "f" else COMPARISONS.get(names[0])
    if function is None:
        return None
    number, size = NUMBERS[kind], SIZES[kind]
    return on_registers(program, instruction, lambda a, b: function(a.view(number), b.view(number)), [1, size, size])


def decode_selp(program: Program, instruction: Instruction) -> Any:
    size = SIZES[instruction.parts[-1]]
    return on_registers(program, instruction, lambda a, b, p: np.where(p, a, b), [size, size, size, 1])


DECODERS = {
    **dict.fromkeys(
        [*FLOATS, *INTEGERS, "fma", "mul", "mad"],
        decode_arithmetic,
    ),
    "setp": decode_setp,
    "selp": decode_selp,
}
