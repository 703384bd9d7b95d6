"""A shared prefix ends where an engine's blocks do: what each of them reads at once is in one row."""

import pytest

from latentmas_kernels.cache.buffer import PREFIX_BLOCK
from latentmas_kernels.extension import extension


def test_triton_kernels_load_blocks_that_divide_a_prefix_block():
    pytest.importorskip("triton")
    from latentmas_kernels.ops.triton.decode_attention import BLOCK_SLOTS

    assert {2, 4} <= set(BLOCK_SLOTS), "bytes of bfloat16, float16 and float32"
    assert all(PREFIX_BLOCK % slots == 0 for slots in BLOCK_SLOTS.values())


def test_the_extension_splits_rows_where_a_prefix_may_end():
    slots = getattr(extension(), "KV_SPLIT_SLOTS", None)
    if slots is None:
        pytest.skip("there is no extension, or it is a build that does not export KV_SPLIT_SLOTS")
    assert PREFIX_BLOCK % slots == 0
