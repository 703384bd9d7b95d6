"""decode_attention on raw qkv: norms per head, RoPE at positions near and far, and what it appends; against float64."""

import pytest
import torch
from numerics import DEVICE, DOT_DTYPES, assert_as_good_as_torch, integers, normal, poisoned
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.ops.decode_attention import decode_attention, decode_attention_reference

# rows, query heads, KV heads, head_dim
SIZES = [(1, 4, 4, 16), (4, 4, 2, 64), (3, 4, 1, 96), (1, 8, 1, 128), (7, 2, 1, 6)]
SLOTS = 40
EPS = 1e-6


def frequencies(width, base=10000.0):
    return (1 / base ** (torch.arange(0, width, 2, dtype=torch.float64) / width)).float().to(DEVICE)


def inputs(rows, query_heads, kv_heads, width, dtype, seed=0):
    """qkv, the weights of both norms, keys, values, slots, lengths, positions.

    Row by row the new position is the first, stands behind some slots, or there is none (slot -1); every other one is far
    away. Buffers are NaN but for the slots in use.
    """
    qkv = normal(rows, (query_heads + 2 * kv_heads) * width, dtype=dtype, seed=seed)
    norm_weights = [1 + normal(width, dtype=dtype, seed=seed + i, scale=0.3) for i in (1, 2)]
    keys, values = (poisoned(rows, kv_heads, SLOTS, width, dtype=dtype) for _ in range(2))
    before = [(11 * row) % (SLOTS - 1) for row in range(rows)]
    for row, count in enumerate(before):
        for i, buffer in enumerate((keys, values)):
            buffer[row, :, :count] = normal(kv_heads, count, width, dtype=dtype, seed=seed + 10 * row + i + 3)
    takes_part = [row % 3 != 1 for row in range(rows)]
    slots = integers(*[count if part else -1 for count, part in zip(before, takes_part, strict=True)])
    lengths = integers(*[count + part for count, part in zip(before, takes_part, strict=True)])
    positions = integers(*[130000 + row if row % 2 == 0 else row for row in range(rows)])
    return qkv, norm_weights, keys, values, slots, lengths, positions


def exact(qkv, query_norm, key_norm, frequency, scaling, keys, values, slots, lengths, positions):
    """Output, new keys and new values in float64, from angles in float32 as transformers has them."""
    rows, kv_heads, _, width = keys.shape
    heads = qkv.double().view(rows, -1, width)
    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if query_norm is not None:
        q, k = (
            norm_weight.double() * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
            for x, norm_weight in ((q, query_norm), (k, key_norm))
        )
    angle = (positions.float()[:, None] * frequency)[:, None].double()
    cosine, sine = (torch.cat([t, t], dim=-1) * scaling for t in (angle.cos(), angle.sin()))
    q, k = (x * cosine + torch.cat([-x[..., width // 2 :], x[..., : width // 2]], dim=-1) * sine for x in (q, k))
    out = torch.zeros_like(q)
    for row, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        old = length - (slot >= 0)
        all_keys, all_values = (t[row, :, :old].double() for t in (keys, values))
        if slot >= 0:
            all_keys, all_values = (
                torch.cat([old, new[row][:, None]], dim=1) for old, new in ((all_keys, k), (all_values, v))
            )
        for head in range(q.shape[1] if length else 0):
            group = head * kv_heads // q.shape[1]
            weights = (all_keys[group] @ q[row, head] * width**-0.5).softmax(0)
            out[row, head] = weights @ all_values[group]
    return out.flatten(1), k, v


def run(op, qkv, norm_weights, keys, values, slots, lengths, positions, frequency, scaling=1.0):
    """The output, and the buffers as the op leaves them."""
    keys, values = keys.clone(), values.clone()
    query_norm, key_norm = norm_weights
    out = op(
        qkv, keys, values, slots, lengths, positions, frequency, attention_scaling=scaling, query_norm=query_norm,
        key_norm=key_norm, eps=EPS,
    )  # fmt: skip
    return out, keys, values


def assert_right(results, plain, given, frequency, scaling):
    """Output and new slots as good as plain torch's; no other slot is touched."""
    qkv, norm_weights, keys, values, slots, lengths, positions = given
    want, *new = exact(qkv, *norm_weights, frequency, scaling, keys, values, slots, lengths, positions)
    assert_as_good_as_torch(results[0], plain[0], want)
    stored = (slots >= 0).nonzero()[:, 0]
    where = slots[stored].long()
    for got, of_torch, before, wanted in zip(results[1:], plain[1:], (keys, values), new, strict=True):
        assert_as_good_as_torch(got[stored, :, where], of_torch[stored, :, where], wanted[stored])
        got = got.clone()
        got[stored, :, where] = before[stored, :, where]
        torch.testing.assert_close(got, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("size", SIZES)
def test_interpreter_equals_reference_and_writes_its_slots_only(size, norm, dtype):
    qkv, norm_weights, *cache = inputs(*size, dtype)
    given = qkv, norm_weights if norm else (None, None), *cache
    frequency, scaling = frequencies(size[3]), 1.25 if norm else 1.0
    results, plain = (run(op, *given, frequency, scaling) for op in (decode_attention, decode_attention_reference))
    assert_right(results, plain, given, frequency, scaling)
    assert torch.equal(qkv, inputs(*size, dtype)[0])


@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_interpreter_stores_values_bit_for_bit(dtype):
    qkv, _, *given = inputs(3, 4, 2, 16, dtype)
    _, _, values = run(decode_attention, qkv, (None, None), *given, frequencies(16))
    for row, slot in enumerate(given[2].tolist()):
        if slot >= 0:
            assert torch.equal(values[row, :, slot], qkv.view(3, 8, 16)[row, 6:])


def test_interpreter_equals_transformers():
    """Llama's own rotation, at positions near and far."""
    rows, query_heads, kv_heads, width = 3, 4, 2, 64
    qkv, _, keys, values, *_ = inputs(rows, query_heads, kv_heads, width, torch.float32)
    positions, frequency = integers(0, 17, 130000), frequencies(width)
    slots = integers(0, 11, 22)
    out, keys, values = run(
        decode_attention, qkv, (None, None), keys, values, slots, slots + 1, positions, frequency
    )  # fmt: skip
    q, k, _ = qkv.view(rows, -1, width).split([query_heads, kv_heads, kv_heads], dim=1)
    angle = positions.float()[:, None, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    q, k = apply_rotary_pos_emb(q[:, :, None], k[:, :, None], angle.cos(), angle.sin())
    for row, slot in enumerate(slots.tolist()):
        torch.testing.assert_close(keys[row, :, slot], k[row, :, 0], rtol=0, atol=2e-6)
        used = slice(0, slot + 1)
        want = torch.nn.functional.scaled_dot_product_attention(
            q[row], keys[row, :, used].repeat_interleave(2, dim=0), values[row, :, used].repeat_interleave(2, dim=0)
        )
        torch.testing.assert_close(out[row], want.flatten(), rtol=0, atol=1e-5)


def test_interpreter_a_row_without_a_slot_attends_to_what_it_has():
    qkv, norm_weights, keys, values, *_ = inputs(2, 4, 2, 16, torch.float32)
    keys[0], values[0] = keys[1], values[1]
    qkv[1] = qkv[0]
    position = integers(5, 5)
    out, *_ = run(
        decode_attention, qkv, norm_weights, keys, values, integers(-1, -1), integers(11, 0), position, frequencies(16)
    )
    plain, *_ = run(
        decode_attention_reference, qkv, norm_weights, keys, values, integers(-1, -1), integers(11, 0), position,
        frequencies(16),
    )  # fmt: skip
    torch.testing.assert_close(out, plain)
    assert out[0].abs().min() > 0
    assert not out[1].any()


@pytest.mark.parametrize("window", [4, 9, 25])
@pytest.mark.parametrize("length", range(20, 30))
def test_interpreter_windows_of_rows_with_and_without_a_slot(length, window):
    """Each row sees a window of positions; also where that begins at a multiple of what is read at once."""
    qkv, norm_weights, keys, values, *_ = inputs(2, 4, 2, 16, torch.float32)
    keys[:, :, :length], values[:, :, :length] = normal(2, 2, 2, length, 16, seed=5)
    given = qkv, keys, values, integers(-1, length - 1), integers(length, length), integers(length - 1, length - 1)
    options = {"window": window, "positions": torch.arange(SLOTS, device=DEVICE).repeat(2, 1)}
    out, plain = (
        op(qkv, keys.clone(), values.clone(), *given[3:], frequencies(16), **options)
        for op in (decode_attention, decode_attention_reference)
    )
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (torch.zeros(8 * 16 + 1, dtype=torch.float16)[1:].view(1, 1, 8, 16), "got 2 bytes behind one"),
        (torch.zeros(300, dtype=torch.float16).as_strided((2, 1, 8, 16), (131, 128, 16, 1)), r"strides \(131, 128, 16, 1\)"),
    ],
)  # fmt: skip
def test_interpreter_buffers_that_loads_would_miss_are_refused(keys, words):
    batch = len(keys)
    numbers = [torch.zeros(batch, dtype=torch.int32)] * 3
    with pytest.raises(LatentMASError, match=f"must begin at a multiple of 16 bytes.*{words}"):
        decode_attention(torch.zeros(batch, 48).half(), keys, keys, *numbers, frequencies(16))


def test_float64_is_refused():
    cache, numbers = torch.zeros(1, 1, 8, 16, dtype=torch.float64), [torch.zeros(1, dtype=torch.int32)] * 3
    with pytest.raises(LatentMASError, match=r"must be float32, float16 or bfloat16; got torch.float64"):
        decode_attention(torch.zeros(1, 48).double(), cache, cache.clone(), *numbers, frequencies(16))


def test_interpreter_rows_are_the_same_alone_and_in_a_batch():
    qkv, norm_weights, *cache = inputs(4, 4, 2, 16, torch.float32)
    together = run(decode_attention, qkv, norm_weights, *cache, frequencies(16))
    for row in range(4):
        only = slice(row, row + 1)
        alone = run(decode_attention, qkv[only], norm_weights, *(t[only] for t in cache), frequencies(16))
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a, b[only], rtol=0, atol=0, equal_nan=True)


def test_interpreter_takes_strided_arguments():
    """Columns of a table of slots and positions, every other frequency and norm weight: strided arguments are read right."""
    qkv, norm_weights, keys, values, slots, lengths, positions = inputs(3, 4, 2, 16, torch.float32)
    plain = [*norm_weights, slots, lengths, positions, frequencies(16)]
    strided = [torch.stack([t, torch.zeros_like(t)], dim=1)[:, 0] for t in plain]
    assert not any(t.is_contiguous() for t in strided)
    results = [run(decode_attention, qkv, g[:2], keys, values, *g[2:]) for g in (plain, strided)]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on the device the kernel always runs")
def test_without_the_interpreter_the_reference_runs(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    given = inputs(3, 4, 2, 16, torch.float16)
    results = [run(op, *given, frequencies(16)) for op in (decode_attention, decode_attention_reference)]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
