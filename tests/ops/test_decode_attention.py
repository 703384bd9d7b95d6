"""decode_attention over the slots of a row: the Triton kernel (in the interpreter where there is no GPU) against the torch
reference and float64. Norm, rotation and what is appended: test_decode_attention_append.py."""

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
HEADS = [(2, 2, 16), (4, 2, 64), (4, 1, 96), (8, 1, 128), (3, 1, 6), (2, 1, 8)]
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


def gapped(lengths, slots=SLOTS, seed=3):
    """Positions that rise with gaps, behind a row's length such as every window sees; and those of the queries, which are the
    last slots' own."""
    steps = torch.randint(1, 4, (len(lengths), slots), generator=torch.Generator().manual_seed(seed))
    positions = steps.cumsum(1)
    last = [int(positions[row, length - 1]) if length else 0 for row, length in enumerate(lengths)]
    for row, length in enumerate(lengths):
        positions[row, length:] = last[row]
    return positions.to(DEVICE), integers(*last)


def raw(queries, keys, values, lengths):
    """The last slot of each row as a new position: qkv, which holds its key and value, and slots. Poisons it in the buffers."""
    last = []
    for row, length in enumerate(lengths.tolist()):
        at = keys[row, :, length - 1], values[row, :, length - 1]
        last.append(torch.cat([t.clone() if length else torch.zeros_like(t) for t in at]))
        if length:
            for t in at:
                t.fill_(float("nan"))
    new = torch.stack(last) if last else queries.new_empty(0, 2 * keys.shape[1], keys.shape[3])
    return torch.cat([queries, new], dim=1).flatten(1), lengths - 1


def still(width):
    """Frequencies that rotate nothing."""
    return torch.zeros(width // 2, device=DEVICE)


def attend(queries, keys, values, lengths, *, op=decode_attention, query_positions=None, **options):
    """The op with the last slot of each row as the new one, which it writes as it was."""
    qkv, slots = raw(queries, keys, values, lengths)
    query_positions = lengths if query_positions is None else query_positions
    return op(qkv, keys, values, slots, lengths, query_positions, still(keys.shape[3]), **options)


def attend_in_torch(
    queries, keys, values, lengths, scale=None, window=None, positions=None, query_positions=None, **prefix
):
    options = {"scale": scale, "window": window, "positions": positions, "query_positions": query_positions, **prefix}
    return attend(queries, keys.clone(), values.clone(), lengths, op=decode_attention_reference, **options)


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
    assert_as_good_as_torch(got, attend_in_torch(*given), exact(*given), size=size)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_interpreter_equals_reference_on_ragged_rows(heads, dtype):
    given = inputs(heads, dtype=dtype)
    out = attend(*given)
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
    out = attend(queries, keys, values, lengths, scale=0.3, **options)
    assert_right(out, queries, keys, values, lengths, 0.3, **options)


def with_prefixes(dtype):
    """Five rows of which three have their first slots in another row and NaN in their own: the arguments of `attend`, the rows
    and lengths of the prefixes, keys and values as each row sees them, and positions with gaps."""
    lengths, slots = [65, 200, 130, 70, 131], 210
    queries, keys, values, rows = inputs((4, 2, 16), lengths, slots, dtype=dtype)
    prefix_row, prefix_len = [1, 1, 4, 1, 4], [64, 0, 128, 37, 0]
    want = [t.clone() for t in (keys, values)]
    for row, (source, count) in enumerate(zip(prefix_row, prefix_len, strict=True)):
        for store, full in zip((keys, values), want, strict=True):
            full[row, :, :count] = store[source, :, :count]
    for row, count in enumerate(prefix_len):
        keys[row, :, :count] = values[row, :, :count] = float("nan")
    prefix = {"prefix_row": integers(*prefix_row), "prefix_len": integers(*prefix_len)}
    return (queries, keys, values, rows), prefix, want, gapped(lengths, slots)


@pytest.mark.parametrize("window", [None, 1, 40, 100, 1000])
@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_interpreter_reads_a_prefix_in_the_row_that_stores_it(dtype, window):
    """Prefixes in rows before and behind, whole rows or a part; the slots that a row does not use are NaN."""
    (queries, keys, values, rows), prefix, want, (positions, query_positions) = with_prefixes(dtype)
    options = {"window": window, "positions": positions, "query_positions": query_positions}
    out = attend(queries, keys, values, rows, scale=0.25, **options, **prefix)
    assert_right(out, queries, *want, rows, 0.25, **options)
    # Where a prefix is stored makes no difference in any bit.
    assert torch.equal(out, attend(queries, *want, rows, scale=0.25, **options))
    plain = attend_in_torch(queries, keys, values, rows, 0.25, **options, **prefix)
    assert torch.equal(plain, attend_in_torch(queries, *want, rows, 0.25, **options))


@pytest.mark.parametrize("part", [slice(0, 2), slice(2, 4), slice(4, 5)])
def test_interpreter_prefix_rows_may_be_outside_of_the_rows(part):
    """They count from the first row of the table."""
    lengths = [70, 66, 66, 65, 130]
    queries, keys, values, rows = inputs((4, 2, 16), lengths, 140)
    prefix_row, prefix_len = integers(0, 0, 4, 4, 4), integers(0, 64, 64, 64, 0)
    want = attend(queries, keys, values, rows, prefix_row=prefix_row, prefix_len=prefix_len)
    qkv, slots = raw(queries, keys, values, rows)
    kv_table = KVTable.of_layer(keys[part], values[part]).tensor(DEVICE)
    workspace, out = SplitWorkspace(len(rows[part]), 4, 2, 16, 2, DEVICE), poisoned(len(rows[part]), 64)
    kernel(
        qkv[part].contiguous(), kv_table, 0, slots[part], rows[part], rows[part], still(16), 1.0, None, None, 0.0, 0.25, None,
        workspace, out, target=TARGET, prefix_row=prefix_row[part] - part.start, prefix_len=prefix_len[part],
    )  # fmt: skip
    torch.testing.assert_close(out, want[part])


def test_interpreter_slots_outside_the_window_are_never_used():
    """NaN in a slot that fell out of the window does not show; where all others have, the new position has all the weight."""
    queries, keys, values, lengths = inputs((4, 2, 16))
    positions, query_positions = gapped(LENGTHS)
    options = {"window": 20, "positions": positions, "query_positions": query_positions}
    clean = attend(queries, keys, values, lengths, **options)
    left = (query_positions[:, None] - positions >= 20)[:, None, :, None]
    assert left.any()
    keys, values = (t.masked_fill(left, float("nan")) for t in (keys, values))
    assert torch.equal(attend(queries, keys, values, lengths, **options), clean)
    options["positions"] = positions - 1000
    gone = attend(queries, keys, values, lengths, **options)
    for row, length in enumerate(LENGTHS):
        new = values[row, :, length - 1] if length else torch.zeros_like(values[row, :, 0])
        assert torch.equal(gone[row], new.repeat_interleave(2, dim=0).flatten())


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("n_splits", [1, 4, 16])
def test_interpreter_any_number_of_splits_in_poisoned_buffers(n_splits, window):
    """Also more splits than there are runs of slots; the second layer of a buffer, the first poisoned. The counters are 0
    again."""
    queries, keys, values, lengths = inputs((4, 2, 16))
    positions, query_positions = gapped(LENGTHS)
    want = [t.clone() for t in (keys, values)]
    qkv, slots = raw(queries, keys, values, lengths)
    workspace, out = SplitWorkspace(len(LENGTHS), 4, 2, 16, n_splits, DEVICE), poisoned(len(LENGTHS), 64)
    workspace.out.fill_(float("nan"))
    workspace.lse.fill_(float("nan"))
    layers = [torch.stack([torch.full_like(t, float("nan")), t]) for t in (keys, values)]
    kv_table = KVTable.of(*layers, positions).tensor(DEVICE)
    kernel(
        qkv, kv_table, 1, slots, lengths, query_positions, still(16), 1.0, None, None, 0.0, 0.25, window, workspace, out,
        target=TARGET,
    )  # fmt: skip
    assert_right(out, queries, *want, lengths, 0.25, window, positions, query_positions)
    assert not workspace.split_counters.any()
    for (first, second), wanted in zip(layers, want, strict=True):
        assert first.isnan().all()
        torch.testing.assert_close(second, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_interpreter_capacity_costs_and_changes_nothing(dtype):
    queries, keys, values, lengths = inputs((4, 2, 16), dtype=dtype)
    want = attend(queries, keys, values, lengths)
    larger = [torch.cat([t, torch.full_like(t, float("nan")), t], dim=2) for t in (keys, values)]
    assert torch.equal(attend(queries, *larger, lengths), want)
    views = [t[:, :, :SLOTS] for t in larger]
    assert torch.equal(attend(queries, *views, lengths), want)


def test_interpreter_float32_rows_are_the_same_alone_and_in_a_batch():
    queries, keys, values, lengths = inputs((4, 2, 16), [37, 70, 0, 1, 12])
    together = attend(queries, keys, values, lengths)
    for row in range(5):
        only = slice(row, row + 1)
        assert torch.equal(attend(queries[only], keys[only], values[only], lengths[only]), together[only])


@pytest.mark.parametrize("slot", [0, 36, 69])
@pytest.mark.parametrize("which", ["keys", "values", "queries"])
def test_interpreter_nan_comes_out_in_its_row_only(which, slot):
    queries, keys, values, lengths = inputs((4, 2, 16), [37, 70, 1])
    clean = attend(queries, keys, values, lengths)
    if which == "queries":
        queries[1] = float("nan")
    else:
        (keys if which == "keys" else values)[1, :, slot] = float("nan")
    out = attend(queries, keys, values, lengths)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


def test_interpreter_scores_far_from_zero():
    """Softmax keeps to the largest: scores of 1e4 and -1e4 neither overflow nor vanish."""
    queries, keys, values, lengths = inputs((2, 2, 16), [70, 70])
    queries *= 1e4
    out = attend(queries, keys, values, lengths)
    assert out.isfinite().all()
    best = torch.einsum("bhd,bhsd->bhs", queries, keys)[:, :, :70].argmax(-1)
    want = values.gather(2, best[:, :, None, None].expand(2, 2, 1, 16)).flatten(1)
    torch.testing.assert_close(out, want)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=2), st.sampled_from([(1, 1, 2), (4, 2, 6), (5, 1, 16)]),
    st.sampled_from(DOT_DTYPES), st.sampled_from([None, 1, 7, 50]), st.integers(0, 99),
)  # fmt: skip
def test_hypothesis_interpreter_equals_reference(lengths, heads, dtype, window, seed):
    given = inputs(heads, lengths, dtype=dtype, seed=seed)
    positions, query_positions = gapped(lengths, seed=seed)
    options = {"window": window, "positions": positions, "query_positions": query_positions}
    assert_right(attend(*given, scale=0.5, **options), *given, 0.5, **options)


def test_interpreter_takes_strided_arguments():
    queries, keys, values, lengths = inputs((4, 2, 16))
    positions, query_positions = gapped(LENGTHS)
    options = {"window": 30, "positions": positions, "query_positions": query_positions}
    want = attend(queries, keys, values, lengths, **options)
    strided = [torch.stack([t, torch.zeros_like(t)], dim=1)[:, 0] for t in (lengths, query_positions)]
    assert not strided[0].is_contiguous()
    options["query_positions"] = strided[1]
    options["positions"] = torch.cat([positions, positions], dim=1)[:, :SLOTS]
    wide = torch.stack([queries, queries], dim=2)[:, :, 0]
    assert torch.equal(attend(wide, keys, values, strided[0], **options), want)


def test_splits_do_not_depend_on_the_batch_in_float32():
    device = LaunchTarget("some device", 132, enable_pdl=True)
    assert {num_kv_splits(device, batch, 8, 4) for batch in (1, 3, 64)} == {16}
    assert [num_kv_splits(device, batch, 8, 2) for batch in (1, 3, 8, 64)] == [32, 8, 4, 1]
    assert num_kv_splits(INTERPRETER, 3, 2, 4) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_empty_batch_interpreter(dtype):
    queries, keys, values = (normal(0, *shape, dtype=dtype) for shape in ((4, 16), (2, SLOTS, 16), (2, SLOTS, 16)))
    assert attend(queries, keys, values, integers()).shape == (0, 64)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on the device the kernel always runs")
def test_without_the_interpreter_the_reference_runs(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    given = inputs((4, 2, 16), dtype=torch.float16)
    assert torch.equal(attend(*given), attend_in_torch(*given, 16**-0.5))


@pytest.mark.parametrize("window", [None, 4])
def test_opcheck_interpreter(window):
    queries, keys, values, lengths = inputs((2, 1, 16), [3, 5], 5)
    qkv, slots = raw(queries, keys, values, lengths)
    keys, values = keys.nan_to_num(), values.nan_to_num()
    positions, query_positions = gapped([3, 5], 5)
    norms = (None, None) if window is None else (normal(16), normal(16))
    prefix = (None, None) if window is None else (integers(0, 0), integers(0, 0))
    torch.library.opcheck(
        torch.ops.latentmas.decode_attention.default,
        (qkv, keys, values, slots, lengths, query_positions, still(16), 1.0, *norms, 1e-6, 0.25, window,
         None if window is None else positions, *prefix),
    )  # fmt: skip


CACHE, INT = torch.zeros(2, 2, 5, 6), torch.zeros(2, dtype=torch.int32)
POSITIONS, NORM = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keys": CACHE[0]}, r"decode_attention: keys and values must be torch.float32 \[B, kv_heads, S, head_dim\]"),
        ({"values": torch.zeros(2, 2, 6, 6)}, "of equal strides with contiguous slots"),
        ({"keys": CACHE.half(), "values": CACHE.half()}, "got torch.float16"),
        ({"keys": torch.zeros(2, 5, 2, 6).transpose(1, 2)}, "equal strides"),
        ({"keys": CACHE.mT.contiguous().mT, "values": CACHE.mT.contiguous().mT}, "contiguous slots"),
        ({"keys": CACHE[..., :5].contiguous(), "values": CACHE[..., :5].contiguous()}, "an even head_dim; got 5"),
        ({"qkv": torch.zeros(2, 8, 6)}, r"qkv must be \[2, \(a multiple of 2 \+ 4\) \* 6\]; got \[2, 8, 6\]"),
        ({"qkv": torch.zeros(3, 48)}, r"got \[3, 48\]"),
        ({"qkv": torch.zeros(2, 42)}, r"got \[2, 42\]"),
        ({"qkv": torch.zeros(2, 47)}, r"got \[2, 47\]"),
        ({"qkv": torch.zeros(2, 24)}, r"got \[2, 24\]"),
        ({"slots": INT.long()}, r"slots must be int32 \[2\]; got torch.int64"),
        ({"lengths": INT[:1]}, r"lengths must be int32 \[2\]; got torch.int32 \[1\]"),
        ({"query_positions": INT.long()}, r"query_positions must be int32 \[2\]; got torch.int64"),
        ({"inv_freq": torch.zeros(2)}, r"inv_freq must be float32 \[3\]; got torch.float32 \[2\]"),
        ({"inv_freq": torch.zeros(3).double()}, "got torch.float64"),
        ({"query_norm": NORM}, "weights of both norms per head, or of none"),
        ({"query_norm": NORM, "key_norm": NORM[:3]}, r"norms per head must be \[6\]; got \[6\] and \[3\]"),
        ({"window": 3}, "a window needs positions"),
        ({"window": 3, "positions": POSITIONS.int()}, r"positions must be int64 \[2, 5\]; got torch.int32"),
        ({"window": 3, "positions": POSITIONS[:, :4]}, r"got torch.int64 \[2, 4\]"),
        ({"prefix_row": INT}, "pass both prefix_row and prefix_len, or neither"),
        ({"prefix_row": INT.long(), "prefix_len": INT}, r"prefix_row must be int32 \[2\]; got torch.int64"),
        ({"prefix_row": INT, "prefix_len": INT[:1]}, r"prefix_len must be int32 \[2\]; got torch.int32 \[1\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, words):
    good = {
        "qkv": torch.zeros(2, 48), "keys": CACHE, "values": CACHE.clone(), "slots": INT, "lengths": INT + 1,
        "query_positions": INT, "inv_freq": torch.zeros(3),
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        decode_attention(**{**good, **change})
