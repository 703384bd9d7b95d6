"""The rule for tiles: bytes in flight on every multiprocessor, whatever the product, within what the hardware has."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentmas_kernels.ops.triton.launch import INTERPRETER, LaunchTarget
from latentmas_kernels.ops.triton.tiles import (
    BYTES_IN_FLIGHT,
    EXACT_ROWS,
    TENSOR_CORE_ROWS,
    bytes_in_flight,
    default_tile,
    programs_per_multiprocessor,
    tile_for,
    weight_bytes,
)

ROWS, MULTIPROCESSORS = st.integers(1, 200), st.sampled_from([16, 108, 132, 148])
PRODUCT = (
    ROWS,
    st.integers(1, 160_000),
    st.integers(1, 20_000),
    st.sampled_from([2, 4]),
    st.booleans(),
    MULTIPROCESSORS,
)


def target(multiprocessors: int) -> LaunchTarget:
    return LaunchTarget("a GPU", multiprocessors, enable_pdl=True)


@settings(deadline=None)
@given(*PRODUCT)
def test_a_tile_covers_k_in_parts_that_are_not_empty(m, n, k, itemsize, gated, multiprocessors):
    tile = default_tile(target(multiprocessors), m, n, k, itemsize, gated=gated)
    part = math.ceil(math.ceil(k / tile.split) / tile.block_k) * tile.block_k  # as in the kernel
    assert (tile.split - 1) * part < k <= tile.split * part


@settings(deadline=None)
@given(*PRODUCT)
def test_a_tile_fits_its_kernel_and_the_hardware(m, n, k, itemsize, gated, multiprocessors):
    tile = default_tile(target(multiprocessors), m, n, k, itemsize, gated=gated)
    assert all(size & (size - 1) == 0 for size in tile[:3])
    assert tile.dot == (itemsize == 2 and m >= TENSOR_CORE_ROWS)
    if tile.dot:
        assert tile.block_m >= 16
        assert min(tile.block_n, tile.block_k) >= 16
        assert programs_per_multiprocessor(tile, itemsize, gated=gated) >= 2
    else:
        assert tile.block_m in (1, 2, 4)
        vectors, threads = tile.block_k * itemsize // 16, 32 * tile.num_warps
        assert vectors % threads == 0  # all threads lie along K
        assert vectors * tile.block_n * (2 if gated else 1) == 8 * threads
        assert programs_per_multiprocessor(tile, itemsize, gated=gated) >= 4


@settings(deadline=None)
@given(
    st.integers(1, 64), st.integers(16, 2000), st.integers(8, 320), st.sampled_from([2, 4]), st.booleans(),
    st.sampled_from([108, 132, 148]),
)  # fmt: skip
def test_every_multiprocessor_has_programs_and_bytes_in_flight(m, n, k, itemsize, gated, multiprocessors):
    """From widths of 1024 and 512 on. With 64 rows of x in shared memory there is room for less of the weights."""
    n, k, gpu = 64 * n, 64 * k, target(multiprocessors)
    tile = default_tile(gpu, m, n, k, itemsize, gated=gated)
    rows = EXACT_ROWS if itemsize == 4 else m
    wanted = min(BYTES_IN_FLIGHT, weight_bytes(n, k, itemsize, gated) / multiprocessors)
    share = 0.7 if tile.block_m == 64 else 0.85
    assert bytes_in_flight(gpu, tile, rows, n, k, itemsize, gated=gated) >= share * wanted
    assert math.ceil(n / tile.block_n) * tile.split >= multiprocessors


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 64])
def test_shapes_of_models_have_all_of_it(rows):
    """Hidden sizes and projections of Qwen3 from 0.6B to 8B and of Llama 1B, on 132 multiprocessors."""
    for n, k, gated in [
        (4096, 1024, False), (1024, 2048, False), (3072, 1024, True), (1024, 3072, False), (151936, 1024, False),
        (4096, 2048, False), (2048, 2048, False), (6144, 2048, True), (2048, 6144, False), (6144, 2560, False),
        (2560, 4096, False), (9728, 2560, True), (2560, 9728, False), (6144, 4096, False), (4096, 4096, False),
        (12288, 4096, True), (4096, 12288, False), (3072, 2048, False), (8192, 2048, True), (2048, 8192, False),
    ]:  # fmt: skip
        tile = default_tile(target(132), rows, n, k, 2, gated=gated)
        wanted = min(BYTES_IN_FLIGHT, weight_bytes(n, k, 2, gated) / 132)
        share = 0.97 if rows < 64 else 0.8  # shared memory also holds the rows of x
        assert bytes_in_flight(target(132), tile, rows, n, k, 2, gated=gated) >= share * wanted, (n, k, gated, tile)
        assert rows > 1 or tile.split == 1  # one row never waits for other programs


@settings(deadline=None)
@given(ROWS, st.integers(1, 20_000), st.integers(1, 20_000), st.booleans(), MULTIPROCESSORS)
def test_in_float32_the_tile_is_the_same_for_every_batch(m, n, k, gated, multiprocessors):
    """Else a row's bits would depend on the batch."""
    gpu = target(multiprocessors)
    tile = default_tile(gpu, m, n, k, 4, gated=gated)
    assert tile == default_tile(gpu, 1, n, k, 4, gated=gated)
    assert tile.block_m == EXACT_ROWS


def test_the_interpreter_has_a_tile_of_its_own():
    tile = tile_for(INTERPRETER, 19, 4096, 4096, 2)
    assert (tile.block_m, tile.dot) == (EXACT_ROWS, False)
