"""rmsnorm as compiled: of its own, and as the end of a latent step."""

import pytest
import torch
from launches import Recording, gpu
from numerics import DTYPES, assert_as_good_as_torch, integers, poisoned
from ops.test_rmsnorm import EPS, SIZES, exact, inputs

from latentmas_kernels.ops.rmsnorm import rmsnorm_reference
from latentmas_kernels.ops.triton.kv_table import KVTable
from latentmas_kernels.ops.triton.rmsnorm import rmsnorm
from latentmas_kernels.ops.triton.row_state import RowField


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("capability", [90, 80])
def test_writes_its_rows_only(capability, size, dtype):
    x, norm_weight = inputs(*size, dtype)
    board = poisoned(size[0] + 1, size[1], dtype=dtype)
    with Recording(capability) as recording:
        rmsnorm(x, norm_weight, EPS, board[: size[0]], target=gpu(capability))
    recording.run_seeds(2)
    assert board[size[0] :].isnan().all()
    assert_as_good_as_torch(board[: size[0]], rmsnorm_reference(x, norm_weight, EPS), exact(x, norm_weight, EPS))


def test_rows_that_took_no_part_keep_their_state_and_the_others_record_it():
    x, norm_weight = inputs(3, 100, torch.bfloat16)
    out = torch.full_like(x, 7.0)
    states = poisoned(3, 4, 100, dtype=torch.bfloat16)
    row_state = torch.zeros(len(RowField), 3, dtype=torch.int32)
    row_state[RowField.SLOT] = integers(5, -1, 0)
    row_state[RowField.STEP] = integers(1, 2, 4)
    log = torch.empty_like(states)
    kv_table = KVTable(step_log=log.data_ptr(), step_log_stride=log.stride(0), states=states.data_ptr()).tensor()
    with Recording(90) as recording:
        rmsnorm(x, norm_weight, EPS, out, target=gpu(90), row_state=row_state, kv_table=kv_table)
    recording.know("states", states)
    recording.run_seeds(3)
    assert (out[1] == 7).all()
    assert_as_good_as_torch(out[::2], rmsnorm_reference(x, norm_weight, EPS)[::2], exact(x, norm_weight, EPS)[::2])
    assert torch.equal(states[0, 0], out[0])
    assert torch.equal(states[2, 3], out[2])
    assert states.isnan().all(-1).sum() == 12 - 2
