"""decode_attention: the Triton kernel (in the interpreter where there is no GPU) against the torch reference and float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DEVICE, DOT_DTYPES, TARGET, assert_as_good_as_torch, integers, normal, poisoned

from latentmas_kernels.ops.decode_attention import decode_attention, decode_attention_reference
from latentmas_kernels.ops.triton.decode_attention import SplitWorkspace, num_kv_splits
from latentmas_kernels.ops.triton.decode_attention import decode_attention as kernel
from latentmas_kernels.ops.triton.kv_table import KVTable
from latentmas_kernels.ops.triton.launch import INTERPRETER, LaunchTarget

# query heads, KV heads, head_dim: every group size of the models, widths that are powers of two and not
HEADS = [(2, 2, 16), (4, 2, 64), (4, 1, 96), (8, 1, 128), (3, 1, 6)]
LENGTHS = [0, 1, 37, 70]
SLOTS = 75


def inputs(heads, lengths=LENGTHS, slots=SLOTS, dtype=torch.float32, seed=0):
    """Queries, keys, values, lengths; behind its length a row holds NaN."""
    query_heads, kv_heads, width = heads
    queries = normal(len(lengths), query_heads, width, dtype=dtype, seed=seed)
    keys, values = (poisoned(len(lengths), kv_heads, slots, width, dtype=dtype) for _ in range(2))
    for row, length in enumerate(lengths):
        for i, buffer in enumerate((keys, values)):
            drawn = normal(kv_heads, length, width, dtype=dtype, seed=seed + 10 * row + i + 1)
            buffer[row, :, :length] = drawn
    return queries, keys, values, integers(*lengths)


def gapped(lengths, slots=SLOTS, seed=3, ahead=0):
    """Positions that rise with gaps, behind a row's length such as every window sees; and those of the queries."""
    steps = torch.randint(1, 4, (len(lengths), slots), generator=torch.Generator().manual_seed(seed))
    positions = steps.cumsum(1)
    last = [int(positions[row, length - 1]) + ahead if length else 0 for row, length in enumerate(lengths)]
    for row, length in enumerate(lengths):
        positions[row, length:] = last[row]
    return positions.to(DEVICE), integers(*last)


def exact(queries, keys, values, lengths, scale, window=None, positions=None, query_positions=None):
    """Row by row and head by head, over the slots that a row sees and nothing else."""
    batch, query_heads, width = queries.shape
    group = query_heads // keys.shape[1]
    out = torch.zeros(batch, query_heads, width, dtype=torch.float64, device=DEVICE)
    for row, length in enumerate(lengths.tolist()):
        seen = torch.arange(length, device=DEVICE)
        if window is not None:
            seen = seen[query_positions[row] - positions[row, :length] < window]
        if len(seen):
            for head in range(query_heads):
                k, v = (t[row, head // group, seen].double() for t in (keys, values))
                out[row, head] = (k @ queries[row, head].double() * scale).softmax(0) @ v
    return out.flatten(1)


def assert_right(got, queries, keys, values, lengths, scale, window=None, positions=None, query_positions=None):
    given = (queries, keys, values, lengths, scale, window, positions, query_positions)
    # Values that cancel in the mean: with two of them in all, plain torch is right to the last bit by chance.
    size = exact(queries, keys, values.abs(), lengths, scale, window, positions, query_positions)
    assert_as_good_as_torch(got, decode_attention_reference(*given), exact(*given), size=size)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_interpreter_equals_reference_on_ragged_rows(heads, dtype):
    given = inputs(heads, dtype=dtype)
    out = decode_attention(*given)
    assert_right(out, *given, heads[2] ** -0.5)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    of_one = given[2][1, :, 0].repeat_interleave(heads[0] // heads[1], dim=0).flatten()
    assert torch.equal(out[1], of_one)  # the only slot has all the weight


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("window", [1, 2, 30, 64, 1000])
def test_interpreter_windows_over_positions_with_gaps(window, dtype):
    queries, keys, values, lengths = inputs((4, 2, 16), dtype=dtype)
    positions, query_positions = gapped(LENGTHS)
    options = {"window": window, "positions": positions, "query_positions": query_positions}
    out = decode_attention(queries, keys, values, lengths, scale=0.3, **options)
    assert_right(out, queries, keys, values, lengths, 0.3, **options)


@pytest.mark.parametrize("window", [None, 1, 40, 100, 1000])
@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_interpreter_reads_a_prefix_in_the_row_that_stores_it(dtype, window):
    """Prefixes in rows before and behind, whole rows or a part; the slots that a row does not use are NaN."""
    lengths, slots = [64, 200, 130, 70, 131], 210
    queries, keys, values, rows = inputs((4, 2, 16), lengths, slots, dtype=dtype)
    prefix_row, prefix_len = [1, 1, 4, 1, 4], [64, 0, 128, 64, 0]
    positions, query_positions = gapped(lengths, slots)
    want = [t.clone() for t in (keys, values)]
    for row, (source, count) in enumerate(zip(prefix_row, prefix_len, strict=True)):
        for store, full in zip((keys, values), want, strict=True):
            full[row, :, :count] = store[source, :, :count]
    for row, count in enumerate(prefix_len):
        keys[row, :, :count] = values[row, :, :count] = float("nan")
    options = {"window": window, "positions": positions, "query_positions": query_positions}
    prefix = {"prefix_row": integers(*prefix_row), "prefix_len": integers(*prefix_len)}
    out = decode_attention(queries, keys, values, rows, scale=0.25, **options, **prefix)
    assert_right(out, queries, *want, rows, 0.25, **options)
    # Where a prefix is stored makes no difference in any bit.
    assert torch.equal(out, decode_attention(queries, *want, rows, scale=0.25, **options))
    plain = decode_attention_reference(queries, keys, values, rows, 0.25, **options, **prefix)
    assert torch.equal(plain, decode_attention_reference(queries, *want, rows, 0.25, **options))


@pytest.mark.parametrize("part", [slice(0, 2), slice(2, 4), slice(4, 5)])
def test_interpreter_prefix_rows_may_be_outside_of_the_rows(part):
    """They count from the first row of the table."""
    lengths = [70, 66, 66, 64, 130]
    queries, keys, values, rows = inputs((4, 2, 16), lengths, 140)
    prefix_row, prefix_len = integers(0, 0, 4, 4, 4), integers(0, 64, 64, 64, 0)
    want = decode_attention(queries, keys, values, rows, prefix_row=prefix_row, prefix_len=prefix_len)
    kv_table = KVTable.of_layer(keys[part], values[part]).tensor(DEVICE)
    splits, out = SplitWorkspace(queries[part], 2), poisoned(len(queries[part]), 64)
    kernel(
        queries[part].contiguous(), kv_table, 0, 2, rows[part], rows[part], None, 0.25, splits, out,
        target=TARGET, prefix_row=prefix_row[part] - part.start, prefix_len=prefix_len[part],
    )  # fmt: skip
    torch.testing.assert_close(out, want[part])


def test_interpreter_slots_outside_the_window_are_never_used():
    """NaN in a slot that fell out of the window does not show; nothing is seen where all of them have."""
    queries, keys, values, lengths = inputs((4, 2, 16))
    positions, query_positions = gapped(LENGTHS, ahead=2)
    options = {"window": 20, "positions": positions, "query_positions": query_positions}
    clean = decode_attention(queries, keys, values, lengths, **options)
    left = (query_positions[:, None] - positions >= 20)[:, None, :, None]
    assert left.any()
    keys, values = (t.masked_fill(left, float("nan")) for t in (keys, values))
    assert torch.equal(decode_attention(queries, keys, values, lengths, **options), clean)
    options["query_positions"] = query_positions + 1000
    gone = decode_attention(queries, keys, values, lengths, **options)
    assert torch.equal(gone, torch.zeros_like(gone))


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("n_splits", [1, 4, 16])
def test_interpreter_any_number_of_splits_in_poisoned_buffers(n_splits, window):
    """Also more splits than there are blocks of slots; the second layer of a buffer, the first poisoned."""
    queries, keys, values, lengths = inputs((4, 2, 16))
    positions, query_positions = gapped(LENGTHS)
    splits, out = SplitWorkspace(queries, n_splits), poisoned(len(queries), 64)
    splits.out.fill_(float("nan"))
    splits.lse.fill_(float("nan"))
    layers = [torch.stack([torch.full_like(t, float("nan")), t]) for t in (keys, values)]
    kv_table = KVTable.of(*layers, positions).tensor(DEVICE)
    kernel(queries, kv_table, 1, 2, lengths, query_positions, window, 0.25, splits, out, target=TARGET)
    assert_right(out, queries, keys, values, lengths, 0.25, window, positions, query_positions)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_interpreter_capacity_costs_and_changes_nothing(dtype):
    queries, keys, values, lengths = inputs((4, 2, 16), dtype=dtype)
    want = decode_attention(queries, keys, values, lengths)
    larger = [torch.cat([t, torch.full_like(t, float("nan")), t], dim=2) for t in (keys, values)]
    assert torch.equal(decode_attention(queries, *larger, lengths), want)
    views = [t[:, :, :SLOTS] for t in larger]
    assert torch.equal(decode_attention(queries, *views, lengths), want)


def test_interpreter_float32_rows_are_the_same_alone_and_in_a_batch():
    queries, keys, values, lengths = inputs((4, 2, 16), [37, 70, 0, 1, 12])
    together = decode_attention(queries, keys, values, lengths)
    for row in range(5):
        only = slice(row, row + 1)
        assert torch.equal(decode_attention(queries[only], keys[only], values[only], lengths[only]), together[only])


@pytest.mark.parametrize("slot", [0, 36, 69])
@pytest.mark.parametrize("which", ["keys", "values", "queries"])
def test_interpreter_nan_comes_out_in_its_row_only(which, slot):
    queries, keys, values, lengths = inputs((4, 2, 16), [37, 70, 1])
    clean = decode_attention(queries, keys, values, lengths)
    if which == "queries":
        queries[1] = float("nan")
    else:
        (keys if which == "keys" else values)[1, :, slot] = float("nan")
    out = decode_attention(queries, keys, values, lengths)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


def test_interpreter_scores_far_from_zero():
    """Softmax keeps to the largest: scores of 1e4 and -1e4 neither overflow nor vanish."""
    queries, keys, values, lengths = inputs((2, 2, 16), [70, 70])
    queries *= 1e4
    out = decode_attention(queries, keys, values, lengths)
    assert out.isfinite().all()
    best = torch.einsum("bhd,bhsd->bhs", queries, keys)[:, :, :70].argmax(-1)
    want = values.gather(2, best[:, :, None, None].expand(2, 2, 1, 16)).flatten(1)
    torch.testing.assert_close(out, want)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=2), st.sampled_from([(1, 1, 2), (4, 2, 6), (5, 1, 16)]),
    st.sampled_from(DOT_DTYPES), st.sampled_from([None, 1, 7, 50]), st.integers(0, 3), st.integers(0, 99),
)  # fmt: skip
def test_hypothesis_interpreter_equals_reference(lengths, heads, dtype, window, ahead, seed):
    given = inputs(heads, lengths, dtype=dtype, seed=seed)
    positions, query_positions = gapped(lengths, seed=seed, ahead=ahead)
    options = {"window": window, "positions": positions, "query_positions": query_positions}
    assert_right(decode_attention(*given, scale=0.5, **options), *given, 0.5, **options)


def test_interpreter_takes_strided_arguments():
    queries, keys, values, lengths = inputs((4, 2, 16))
    positions, query_positions = gapped(LENGTHS)
    options = {"window": 30, "positions": positions, "query_positions": query_positions}
    want = decode_attention(queries, keys, values, lengths, **options)
    strided = [torch.stack([t, torch.zeros_like(t)], dim=1)[:, 0] for t in (lengths, query_positions)]
    assert not strided[0].is_contiguous()
    options["query_positions"] = strided[1]
    options["positions"] = torch.cat([positions, positions], dim=1)[:, :SLOTS]
    wide = torch.stack([queries, queries], dim=2)[:, :, 0]
    assert torch.equal(decode_attention(wide, keys, values, strided[0], **options), want)


def test_splits_do_not_depend_on_the_batch_in_float32():
    device = LaunchTarget("some device", 132, enable_pdl=True)
    assert {num_kv_splits(device, batch, 8, 4) for batch in (1, 3, 64)} == {16}
    assert [num_kv_splits(device, batch, 8, 2) for batch in (1, 3, 8, 64)] == [64, 16, 8, 1]
    assert num_kv_splits(INTERPRETER, 3, 2, 4) == 2


def test_empty_batch_interpreter():
    queries, keys, values = normal(0, 4, 16), normal(0, 2, SLOTS, 16), normal(0, 2, SLOTS, 16)
    assert decode_attention(queries, keys, values, integers()).shape == (0, 64)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on the device the kernel always runs")
def test_without_the_interpreter_the_reference_runs(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    given = inputs((4, 2, 16), dtype=torch.float16)
    assert torch.equal(decode_attention(*given), decode_attention_reference(*given, 16**-0.5))


@pytest.mark.parametrize("window", [None, 4])
def test_opcheck_interpreter(window):
    queries, keys, values, lengths = inputs((2, 1, 16), [3, 5], 5)
    keys, values = keys.nan_to_num(), values.nan_to_num()
    extra = (None, None) if window is None else gapped([3, 5], 5)
    prefix = (None, None) if window is None else (integers(0, 0), integers(0, 0))
    torch.library.opcheck(
        torch.ops.latentmas.decode_attention.default, (queries, keys, values, lengths, 0.25, window, *extra, *prefix)
    )


QUERIES, CACHE = torch.zeros(2, 4, 6), torch.zeros(2, 2, 5, 6)
INT, POSITIONS = torch.zeros(2, dtype=torch.int32), torch.zeros(2, 5, dtype=torch.int64)
WINDOW = {"window": 3, "positions": POSITIONS, "query_positions": INT}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keys": CACHE[0]}, r"decode_attention: keys and values must be torch.float32 \[B, kv_heads, S, head_dim\]"),
        ({"values": torch.zeros(2, 2, 6, 6)}, "of equal strides with contiguous slots"),
        ({"keys": CACHE.half(), "values": CACHE.half()}, "got torch.float16"),
        ({"keys": torch.zeros(2, 5, 2, 6).transpose(1, 2)}, "equal strides"),
        ({"queries": torch.zeros(2, 24)}, r"queries must be \[2, a multiple of 2 heads, 6\]; got \[2, 24\]"),
        ({"queries": torch.zeros(3, 4, 6)}, r"got \[3, 4, 6\]"),
        ({"queries": torch.zeros(2, 3, 6)}, r"got \[2, 3, 6\]"),
        ({"queries": torch.zeros(2, 4, 8)}, r"got \[2, 4, 8\]"),
        ({"lengths": INT.long()}, r"lengths must be int32 \[2\]; got torch.int64"),
        ({"lengths": INT[:1]}, r"got torch.int32 \[1\]"),
        ({"window": 3}, "a window needs positions and query_positions"),
        ({**WINDOW, "query_positions": None}, "a window needs positions and query_positions"),
        ({**WINDOW, "positions": POSITIONS.int()}, r"positions must be int64 \[2, 5\]; got torch.int32"),
        ({**WINDOW, "positions": POSITIONS[:, :4]}, r"got torch.int64 \[2, 4\]"),
        ({**WINDOW, "query_positions": INT.long()}, r"query_positions must be int32 \[2\]; got torch.int64"),
        ({"prefix_row": INT}, "pass both prefix_row and prefix_len, or neither"),
        ({"prefix_row": INT.long(), "prefix_len": INT}, r"prefix_row must be int32 \[2\]; got torch.int64"),
        ({"prefix_row": INT, "prefix_len": INT[:1]}, r"prefix_len must be int32 \[2\]; got torch.int32 \[1\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, words):
    good = {"queries": QUERIES, "keys": CACHE, "values": CACHE.clone(), "lengths": INT}
    with pytest.raises(ValueError, match=words):
        decode_attention(**{**good, **change})
