"""decode_attention as compiled: ragged rows, windows, shared prefixes, any number of KV splits; NaN behind every length."""

import pytest
import torch
from launches import Recording, gpu
from numerics import DTYPES, poisoned
from ops.test_decode_attention import HEADS, assert_right, gapped, inputs, raw, still, with_prefixes
from ops.test_decode_attention_append import SIZES, frequencies
from ops.test_decode_attention_append import assert_right as assert_appended
from ops.test_decode_attention_append import inputs as append_inputs
from ops.test_decode_attention_append import run as run_op

from latentmas_kernels.ops.decode_attention import decode_attention_reference
from latentmas_kernels.ops.triton.decode_attention import SplitWorkspace, decode_attention
from latentmas_kernels.ops.triton.kv_table import KVTable


def run(queries, keys, values, lengths, *, n_splits, capability=90, window=None, positions=None, query_positions=None,
        prefix_row=None, prefix_len=None, seeds=2):  # fmt: skip
    """The output of a launch on the second layer of a buffer, the first poisoned. The last slot of each row is the new one."""
    batch, heads, width = queries.shape
    kv_heads = keys.shape[1]
    want = [t.clone() for t in (keys, values)]
    qkv, slots = raw(queries, keys, values, lengths)
    workspace = SplitWorkspace(batch, heads, kv_heads, width, n_splits, queries.device)
    out = poisoned(batch, heads * width, dtype=queries.dtype)
    layers = [torch.stack([torch.full_like(t, float("nan")), t]) for t in (keys, values)]
    positions = torch.full(keys.shape[::2], -(1 << 40)) if positions is None else positions
    kv_table = KVTable.of(*layers, positions).tensor()
    frequency = still(width)
    query_positions = lengths if query_positions is None else query_positions
    with Recording(capability) as recording:
        decode_attention(
            qkv, kv_table, 1, slots, lengths, query_positions, frequency, 1.0, None, None, 0.0, width**-0.5, window, workspace,
            out, target=gpu(capability), prefix_row=prefix_row, prefix_len=prefix_len,
        )  # fmt: skip
    for name, tensor in zip(("keys", "values", "positions"), (*layers, positions), strict=True):
        recording.know(name, tensor)
    recording.run_seeds(seeds)
    assert not workspace.split_counters.any()
    for (first, second), wanted in zip(layers, want, strict=True):
        assert first.isnan().all()
        torch.testing.assert_close(second, wanted, rtol=0, atol=0, equal_nan=True)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS[:-2])
@pytest.mark.parametrize("capability", [90, 80])
def test_ragged_rows(capability, heads, dtype):
    given = inputs(heads, dtype=dtype)
    clean = [t.clone() for t in given]
    out = run(*given, n_splits=4, capability=capability)
    assert_right(out, *clean, heads[2] ** -0.5)
    assert torch.equal(out[0], torch.zeros_like(out[0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS[-2:])
def test_heads_smaller_than_a_matrix_of_tensor_cores(heads, dtype):
    given = inputs(heads, dtype=dtype)
    clean = [t.clone() for t in given]
    assert_right(run(*given, n_splits=2), *clean, heads[2] ** -0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [1, 30, 64, 1000])
def test_windows_over_positions_with_gaps(window, dtype):
    lengths = [0, 1, 37, 70]
    queries, keys, values, rows = inputs((4, 2, 16), lengths, dtype=dtype)
    positions, query_positions = gapped(lengths)
    options = {"window": window, "positions": positions, "query_positions": query_positions}
    out = run(queries, keys.clone(), values.clone(), rows, n_splits=4, **options)
    assert_right(out, queries, keys, values, rows, 0.25, **options)


@pytest.mark.parametrize("n_splits", [1, 16])
def test_any_number_of_splits(n_splits):
    given = inputs((4, 2, 64), [200, 65, 1], 210, dtype=torch.bfloat16)
    clean = [t.clone() for t in given]
    assert_right(run(*given, n_splits=n_splits, seeds=3), *clean, 64**-0.5)


@pytest.mark.parametrize("window", [None, 100])
def test_a_prefix_in_the_row_that_stores_it(window):
    (queries, keys, values, rows), prefix, want, (positions, query_positions) = with_prefixes(torch.bfloat16)
    options = {"window": window, "positions": positions, "query_positions": query_positions}
    out = run(queries, keys, values, rows, n_splits=4, **options, **prefix)
    assert_right(out, queries, *want, rows, 0.25, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("size", SIZES)
def test_norm_rotation_and_what_is_appended(size, norm, dtype):
    rows, heads, kv_heads, width = size
    qkv, norm_weights, *cache = append_inputs(*size, dtype)
    given = qkv, norm_weights if norm else (None, None), *cache
    frequency, scaling = frequencies(width), 1.25 if norm else 1.0

    def compiled(
        qkv, keys, values, slots, lengths, positions, frequency, *, attention_scaling, query_norm, key_norm, eps
    ):
        workspace, out = (
            SplitWorkspace(rows, heads, kv_heads, width, 2, qkv.device),
            poisoned(rows, heads * width, dtype=dtype),
        )
        kv_table = KVTable.of_layer(keys, values).tensor()
        with Recording(90) as recording:
            decode_attention(
                qkv, kv_table, 0, slots, lengths, positions, frequency, attention_scaling, query_norm, key_norm, eps,
                width**-0.5, None, workspace, out, target=gpu(90),
            )  # fmt: skip
        recording.know("keys", keys)
        recording.know("values", values)
        recording.run_seeds(2)
        return out

    results = run_op(compiled, *given, frequency, scaling)
    assert_appended(results, run_op(decode_attention_reference, *given, frequency, scaling), given, frequency, scaling)
