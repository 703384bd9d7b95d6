"""realign as compiled: of its own, and as the begin of a latent step."""

import pytest
import torch
from emulator import transfers
from launches import Recording, gpu
from numerics import integers, normal, poisoned
from ops.test_realign import SIZES, assert_as_good_as_torch, inputs

from latentmas_kernels.ops.triton.kv_table import KVTable
from latentmas_kernels.ops.triton.realign import StepBuffers, realign
from latentmas_kernels.ops.triton.row_state import RowField
from latentmas_kernels.ops.triton.skinny_gemm import Workspace
from latentmas_kernels.ops.triton.tiles import tile_for


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("with_weight", [True, False])
def test_equals_reference(with_weight, size, dtype):
    hidden, weight = inputs(*size, dtype)

    def compiled(hidden, weight, target_norm):
        width = hidden.shape[1] if weight is None else weight.shape[0]
        out = poisoned(hidden.shape[0], width, dtype=dtype)
        with Recording(90) as recording:
            realign(hidden, weight, target_norm, out, target=gpu(90))
        recording.run_seeds(2)
        return out

    assert_as_good_as_torch(compiled, hidden, weight if with_weight else None, 2.5)


def test_four_rows_read_the_matrix_once(monkeypatch):
    """Each byte of it, by one thread."""

    def bytes_read(rows):
        hidden, weight = inputs(rows, 512, 96, torch.bfloat16)
        read, note_read = [], transfers.note_read

        def count(warp, buffer, starts, width, *, atomic):
            if buffer.name == "weight_ptr":
                read.append(len(starts) * width)
            note_read(warp, buffer, starts, width, atomic=atomic)

        with Recording(90) as recording:
            realign(hidden, weight, 1.0, poisoned(rows, 96, dtype=torch.bfloat16), target=gpu(90))
        with monkeypatch.context() as patch:
            patch.setattr(transfers, "note_read", count)
            recording.run()
        return sum(read), weight.nbytes

    for rows in (1, 3, 4):
        read, held = bytes_read(rows)
        assert read == held, f"{rows} rows read {read} bytes of {held}"


def workspace_for(capability, batch, width):
    workspace = Workspace(torch.empty(0))
    workspace.reserve(tile_for(gpu(capability), batch, width, width, 4), batch, width, gated=False)
    workspace.split_k_partials.fill_(float("nan"))
    return workspace


@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize("width", [100, 1100])
@pytest.mark.parametrize("capability", [90, 80])
def test_step_advances_rows_and_ends_those_that_are_done(capability, width, with_weight):
    """Rows: goes on, at its limit, does not take part, repeats itself up to its cosine."""
    batch, dtype = 4, torch.bfloat16
    hidden, weight = normal(batch, width, dtype=dtype), normal(width, width, seed=1, scale=width**-0.5)
    y = (hidden.double() @ weight.double().T) if with_weight else hidden.double()
    want = 3 * y / y.norm(dim=-1, keepdim=True)
    row_state = torch.zeros(len(RowField), batch, dtype=torch.int32)
    row_state[RowField.ACTIVE] = integers(1, 1, 0, 1)
    row_state[RowField.LENGTH] = integers(4, 9, 2, 0)
    row_state[RowField.POSITION] = integers(3, 8, 1, -1)
    row_state[RowField.STEP] = integers(1, 1, 0, 1)
    row_state[RowField.LIMIT] = integers(5, 2, 5, 5)
    row_state[RowField.STOP_COSINE] = torch.tensor([2.0, 2.0, 0.9, 0.9]).view(torch.int32)
    step_log = poisoned(batch, 4, width, dtype=dtype)
    step_log[:, 0] = want.to(dtype)
    positions = torch.full((batch, 12), -5)
    kv_table = KVTable(
        positions=positions.data_ptr(), position_stride=12, step_log=step_log.data_ptr(), step_log_stride=4 * width
    ).tensor()
    buffers = StepBuffers(row_state, kv_table, poisoned(batch, width), workspace_for(capability, batch, width))
    out = poisoned(batch, width, dtype=dtype)
    with Recording(capability) as recording:
        realign(hidden, weight if with_weight else None, 3.0, out, target=gpu(capability), step=buffers)
    recording.know("positions", positions)
    recording.know("step log", step_log)
    recording.run_seeds(4)
    assert ((out.double() - want).norm() / want.norm()) < 2.5e-3  # rounded to bfloat16
    assert row_state[RowField.ACTIVE].tolist() == [1, 0, 0, 0]
    assert row_state[RowField.LENGTH].tolist() == [5, 10, 2, 1]
    assert row_state[RowField.POSITION].tolist() == [4, 9, 1, 0]
    assert row_state[RowField.SLOT].tolist() == [4, 9, -1, 0]
    assert row_state[RowField.STEP].tolist() == [2, 2, 1, 2]
    assert [positions[0, 4].item(), positions[1, 9].item(), positions[3, 0].item()] == [4, 9, 0]
    assert (positions != -5).sum() == 3
    assert torch.equal(step_log[[0, 1, 3], 1], out[[0, 1, 3]])
    assert step_log[2, 1:].isnan().all()
