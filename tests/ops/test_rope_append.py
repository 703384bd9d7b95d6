"""rope_append: the Triton kernel (in the interpreter where there is no GPU) against the torch reference and float64."""

import pytest
import torch
from numerics import DEVICE, DTYPES, TARGET, assert_as_good_as_torch, integers, normal, poisoned
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from latentmas_kernels.ops.rope_append import rope_append, rope_append_reference
from latentmas_kernels.ops.triton.kv_table import KVTable
from latentmas_kernels.ops.triton.rope_append import rope_append as kernel

# rows, query heads, KV heads, head_dim
SIZES = [(1, 4, 4, 16), (3, 4, 2, 64), (3, 4, 1, 96), (1, 8, 1, 128), (19, 2, 1, 6)]
SLOTS = 7
EPS = 1e-6


def frequencies(width, base=10000.0):
    return (1 / base ** (torch.arange(0, width, 2, dtype=torch.float64) / width)).float().to(DEVICE)


def inputs(rows, query_heads, kv_heads, width, dtype, seed=0):
    """qkv, the norm_weights of both norms, slots (every third stores nothing), positions (every other one far away)."""
    qkv = normal(rows, (query_heads + 2 * kv_heads) * width, dtype=dtype, seed=seed)
    norm_weights = [1 + normal(width, dtype=dtype, seed=seed + i, scale=0.3) for i in (1, 2)]
    slots = integers(*[-1 if row % 3 == 1 else (5 * row + 2) % SLOTS for row in range(rows)])
    return qkv, *norm_weights, slots, integers(*[130000 + row if row % 2 == 0 else row for row in range(rows)])


def exact(qkv, query_norm, key_norm, frequency, scaling, kv_heads, positions):
    """Queries, keys and values in float64, from angles in float32 as transformers has them."""
    rows, width = len(qkv), 2 * len(frequency)
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
    return q, k, v


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("size", SIZES)
def test_interpreter_equals_reference_and_writes_its_slots_only(size, norm, dtype):
    rows, query_heads, kv_heads, width = size
    qkv, query_norm, key_norm, slots, positions = inputs(*size, dtype)
    norm_weights = (query_norm, key_norm) if norm else (None, None)
    frequency, scaling = frequencies(width), 1.25 if norm else 1.0
    buffers = [
        poisoned(2, rows, kv_heads, SLOTS, width, dtype=dtype) for _ in range(2)
    ]  # two layers, the second in use
    queries = poisoned(rows, query_heads, width, dtype=dtype)
    kv_table = KVTable.of(*buffers).tensor(DEVICE)
    kernel(qkv, queries, *norm_weights, EPS, frequency, scaling, kv_table, 1, slots, positions, target=TARGET)

    plain_buffers = [poisoned(rows, kv_heads, SLOTS, width, dtype=dtype) for _ in range(2)]
    plain = rope_append_reference(qkv, *norm_weights, EPS, frequency, scaling, *plain_buffers, slots, positions)
    want_queries, *want = exact(qkv, *norm_weights, frequency, scaling, kv_heads, positions)
    assert_as_good_as_torch(queries, plain, want_queries)
    stored = (slots >= 0).nonzero()[:, 0]
    where = slots[stored].long()
    for buffer, plain_buffer, wanted in zip(buffers, plain_buffers, want, strict=True):
        assert buffer[0].isnan().all()
        assert_as_good_as_torch(buffer[1][stored, :, where], plain_buffer[stored, :, where], wanted[stored])
        buffer[1][stored, :, where] = float("nan")
        assert buffer[1].isnan().all()
    assert torch.equal(qkv, inputs(*size, dtype)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_interpreter_stores_values_bit_for_bit(dtype):
    qkv, _, _, _, positions = inputs(3, 4, 2, 16, dtype)
    keys, values = (poisoned(3, 2, SLOTS, 16, dtype=dtype) for _ in range(2))
    rope_append(qkv, None, None, EPS, frequencies(16), 1.0, keys, values, integers(0, 6, 3), positions)
    for row, slot in enumerate([0, 6, 3]):
        assert torch.equal(values[row, :, slot], qkv.view(3, 8, 16)[row, 6:])


def test_interpreter_equals_transformers():
    """Llama's own rotation, at positions near and far."""
    rows, query_heads, kv_heads, width = 3, 4, 2, 64
    qkv = normal(rows, (query_heads + 2 * kv_heads) * width)
    positions, frequency = integers(0, 17, 130000), frequencies(width)
    keys, values = (poisoned(rows, kv_heads, SLOTS, width) for _ in range(2))
    queries = rope_append(qkv, None, None, EPS, frequency, 1.0, keys, values, integers(1, 1, 1), positions)
    q, k, _ = qkv.view(rows, -1, width).split([query_heads, kv_heads, kv_heads], dim=1)
    angle = positions.float()[:, None, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    q, k = apply_rotary_pos_emb(q[:, :, None], k[:, :, None], angle.cos(), angle.sin())
    torch.testing.assert_close(queries, q[:, :, 0], rtol=0, atol=2e-6)
    torch.testing.assert_close(keys[:, :, 1], k[:, :, 0], rtol=0, atol=2e-6)


def test_interpreter_position_0_rotates_nothing():
    qkv = normal(2, 6 * 16)
    keys, values = (poisoned(2, 1, SLOTS, 16) for _ in range(2))
    queries = rope_append(qkv, None, None, EPS, frequencies(16), 1.0, keys, values, integers(4, 4), integers(0, 0))
    assert torch.equal(queries, qkv.view(2, 6, 16)[:, :4])
    assert torch.equal(keys[:, :, 4], qkv.view(2, 6, 16)[:, 4:5])


def test_interpreter_rows_are_the_same_alone_and_in_a_batch():
    qkv, query_norm, key_norm, _, positions = inputs(3, 4, 2, 16, torch.float32)
    slots = integers(0, 6, 3)

    def run(rows):
        buffers = [torch.zeros(len(qkv[rows]), 2, SLOTS, 16, device=DEVICE) for _ in range(2)]
        queries = rope_append(
            qkv[rows], query_norm, key_norm, EPS, frequencies(16), 1.0, *buffers, slots[rows], positions[rows]
        )
        return queries, *buffers

    together = run(slice(0, 3))
    for row in range(3):
        for alone, all_rows in zip(run(slice(row, row + 1)), together, strict=True):
            assert torch.equal(alone, all_rows[row : row + 1])


def test_interpreter_takes_strided_arguments():
    """Columns of a table of slots and positions, every other frequency and norm weight: strided arguments are read right."""
    qkv, query_norm, key_norm, slots, positions = inputs(3, 4, 2, 16, torch.float32)
    plain = [query_norm, key_norm, slots, positions, frequencies(16)]
    strided = [torch.stack([t, torch.zeros_like(t)], dim=1)[:, 0] for t in plain]
    results = []
    for query_norm, key_norm, slots, positions, frequency in (plain, strided):
        keys, values = (torch.zeros(3, 2, SLOTS, 16, device=DEVICE) for _ in range(2))
        results.append((
            rope_append(qkv, query_norm, key_norm, EPS, frequency, 1.0, keys, values, slots, positions), keys, values
        ))  # fmt: skip
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_empty_batch_interpreter():
    keys, values = (poisoned(0, 2, SLOTS, 16) for _ in range(2))
    none = integers()
    out = rope_append(normal(0, 8 * 16), None, None, EPS, frequencies(16), 1.0, keys, values, none, none)
    assert out.shape == (0, 4, 16)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on the device the kernel always runs")
def test_without_the_interpreter_the_reference_runs(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    qkv, query_norm, key_norm, slots, positions = inputs(3, 4, 2, 16, torch.float16)
    results = []
    for op in (rope_append, rope_append_reference):
        keys, values = (torch.zeros(3, 2, SLOTS, 16, dtype=qkv.dtype) for _ in range(2))
        results.append((
            op(qkv, query_norm, key_norm, EPS, frequencies(16), 1.0, keys, values, slots, positions), keys, values
        ))  # fmt: skip
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_opcheck_interpreter(norm):
    qkv, query_norm, key_norm, slots, positions = inputs(2, 2, 1, 16, torch.float32)
    norm_weights = (query_norm, key_norm) if norm else (None, None)
    keys, values = (torch.zeros(2, 1, SLOTS, 16, device=DEVICE) for _ in range(2))
    torch.library.opcheck(
        torch.ops.latentmas.rope_append.default,
        (qkv, *norm_weights, EPS, frequencies(16), 1.0, keys, values, slots, positions),
    )


CACHE = torch.zeros(2, 1, SLOTS, 4)
INT = torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keys": CACHE[0]}, r"rope_append: keys and values must be torch.float32 \[B, kv_heads, S, head_dim\]"),
        ({"values": torch.zeros(2, 1, 8, 4)}, "of equal strides with contiguous slots"),
        ({"keys": CACHE.half(), "values": CACHE.half()}, "got torch.float16"),
        ({"keys": CACHE.mT.contiguous().mT, "values": CACHE.mT.contiguous().mT}, "contiguous slots"),
        ({"qkv": torch.zeros(2, 4, 4)}, r"qkv must be \[2, \(query heads \+ 2\) \* 4\]; got \[2, 4, 4\]"),
        ({"qkv": torch.zeros(3, 16)}, r"got \[3, 16\]"),
        ({"qkv": torch.zeros(2, 15)}, r"got \[2, 15\]"),
        ({"qkv": torch.zeros(2, 8)}, r"got \[2, 8\]"),
        ({"inv_freq": torch.zeros(3)}, r"inv_freq must be float32 \[2\]; got torch.float32 \[3\]"),
        ({"inv_freq": torch.zeros(2).double()}, "got torch.float64"),
        ({"query_norm": torch.zeros(4)}, "weights of both norms per head, or of none"),
        (
            {"query_norm": torch.zeros(4), "key_norm": torch.zeros(3)},
            r"norms per head must be \[4\]; got \[4\] and \[3\]",
        ),
        ({"slots": INT.long()}, r"slots must be int32 \[2\]; got torch.int64"),
        ({"slots": torch.zeros(3, dtype=torch.int32)}, r"slots must be int32 \[2\]; got torch.int32 \[3\]"),
        ({"positions": INT.long()}, r"positions must be int32 \[2\]"),
        (
            {"qkv": torch.zeros(2, 15), "keys": torch.zeros(2, 1, SLOTS, 5), "values": torch.zeros(2, 1, SLOTS, 5)},
            "an even head_dim; got 5",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, words):
    good = {
        "qkv": torch.zeros(2, 16), "query_norm": None, "key_norm": None, "eps": EPS, "inv_freq": torch.zeros(2),
        "attention_scaling": 1.0, "keys": CACHE, "values": CACHE.clone(), "slots": INT, "positions": INT,
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        rope_append(**{**good, **change})
