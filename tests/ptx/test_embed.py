"""embed as compiled: looks tokens up and advances the rows."""

import pytest
import torch
from launches import Recording, gpu
from numerics import DTYPES, integers, normal, poisoned

from latentmas_kernels.ops.triton.embed import embed
from latentmas_kernels.ops.triton.kv_table import KVTable
from latentmas_kernels.ops.triton.row_state import RowField


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 33, 576, 1100])
@pytest.mark.parametrize("capability", [90, 80])
def test_looks_up_and_advances_active_rows(capability, width, dtype):
    """Every warp reads a row's state; the thread that stores it must come last."""
    embedding, token_ids = normal(50, width, dtype=dtype), torch.tensor([49, 0, 7])
    row_state = torch.zeros(len(RowField), 3, dtype=torch.int32)
    row_state[RowField.ACTIVE] = integers(1, 0, 1)
    row_state[RowField.LENGTH] = integers(4, 9, 0)
    row_state[RowField.POSITION] = integers(13, 8, -1)
    positions = torch.full((3, 10), -5)
    kv_table = KVTable(positions=positions.data_ptr(), position_stride=positions.stride(0)).tensor()
    out = poisoned(3, width, dtype=dtype)
    with Recording(capability) as recording:
        embed(token_ids, embedding, out, row_state, kv_table, target=gpu(capability))
    recording.know("positions", positions)
    recording.run_seeds(4)
    assert torch.equal(out, embedding[token_ids])
    assert row_state[RowField.LENGTH].tolist() == [5, 9, 1]
    assert row_state[RowField.POSITION].tolist() == [14, 8, 0]
    assert row_state[RowField.SLOT].tolist() == [4, -1, 0]
    assert positions[0].tolist() == [-5] * 4 + [14] + [-5] * 5
    assert (positions[1] == -5).all()
    assert positions[2].tolist() == [0] + [-5] * 9
