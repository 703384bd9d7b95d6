"""Facts that Python, Triton and C++ each have: they agree. And the functions of latentmas_kernels.ops are all there."""

import inspect

import pytest
import torch

from latentmas_kernels import extension as native
from latentmas_kernels import ops
from latentmas_kernels.alignment import TOP_K
from latentmas_kernels.cache.buffer import PREFIX_BLOCK
from latentmas_kernels.ops import realign as realign_op
from latentmas_kernels.ops.triton import kv_table, row_state
from latentmas_kernels.ops.triton import realign as triton_realign

MIN_NORM = inspect.getmodule(realign_op).MIN_NORM
needs_extension = pytest.mark.skipif(native.extension() is None, reason=native.extension_state())


@needs_extension
def test_a_shared_prefix_is_whole_kv_splits():
    assert native.extension().KV_SPLIT_SLOTS == PREFIX_BLOCK


def test_the_smallest_norm_is_that_of_the_triton_kernel():
    assert triton_realign.MIN_NORM.value == MIN_NORM


@needs_extension
def test_the_smallest_norm_is_that_of_the_cpu_kernel():
    assert torch.tensor(MIN_NORM, dtype=torch.float32).item() == native.extension().MIN_NORM


@needs_extension
def test_the_cosine_that_is_never_reached():
    assert native.extension().NEVER_COSINE == row_state.NEVER_COSINE > 1


@needs_extension
def test_soft_feedback_fits_the_cpu_kernel():
    assert native.extension().MAX_SOFT_TOKENS >= TOP_K


def test_device_tables_have_a_constant_for_each_field():
    """The constants that the kernels address a field with are the places of the fields on Python's side."""
    fields = kv_table.KVTable._fields
    assert [getattr(kv_table, f"_{name.upper()}").value for name in fields] == list(range(len(fields)))
    assert list(row_state.RowField) == list(range(len(row_state.RowField)))
    read_by_kernels = [field for field in row_state.RowField if not field.name.startswith("PREFIX")]
    assert [getattr(row_state, f"_{field.name}").value for field in read_by_kernels] == read_by_kernels


def test_every_op_is_exported_with_its_reference():
    names = {name.removesuffix("_reference") for name in ops.__all__}
    assert set(ops.__all__) == names | {f"{name}_reference" for name in names}
    assert all(inspect.isfunction(getattr(ops, name)) and getattr(ops, name).__doc__ for name in ops.__all__)
    assert all(f"    {name} " in ops.__doc__ for name in names)
