"""sample as compiled: the tokens of the reference, the step log, rows that end."""

import pytest
import torch
from launches import Recording, gpu
from ops.test_sample import logits_of

from latentmas_kernels.ops.sample import sample_reference
from latentmas_kernels.ops.triton.kv_table import KVTable
from latentmas_kernels.ops.triton.row_state import RowField
from latentmas_kernels.ops.triton.sample import Candidates, Settings, sample

SEED, DRAW = 0x1234567890ABCDEF, 2


def run(logits, *, do_sample, temperature=1.0, top_k=0, top_p=1.0, eos=(), active=None, capability=90, seeds=2):
    """Tokens, step log and row state behind a launch."""
    rows, vocabulary = logits.shape
    token_ids, step_log = torch.full((rows,), -1), torch.full((rows, 4), -9)
    row_state = torch.zeros(len(RowField), rows, dtype=torch.int32)
    row_state[RowField.ACTIVE] = 1 if active is None else torch.tensor(active)
    row_state[RowField.STEP] = DRAW
    kv_table = KVTable(step_log=step_log.data_ptr(), step_log_stride=step_log.stride(0)).tensor()
    settings = Settings(logits.device)
    settings.set(temperature, top_k, top_p, SEED, 0, 77, list(eos))
    candidates = Candidates(rows, vocabulary, logits.device, sampling=do_sample)
    with Recording(capability) as recording:
        sample(
            logits, token_ids, settings, candidates, row_state, kv_table, do_sample=do_sample, target=gpu(capability)
        )
    recording.know("step log", step_log)
    recording.run_seeds(seeds)
    return token_ids, step_log, row_state


@pytest.mark.parametrize("vocabulary", [1, 97, 1024, 2500])
@pytest.mark.parametrize("capability", [90, 80])
def test_greedy_takes_the_lowest_of_equals(capability, vocabulary):
    logits = logits_of(3, vocabulary).round()
    want = torch.stack([(row == row.max()).nonzero()[0, 0] for row in logits])
    tokens, step_log, row_state = run(logits, do_sample=False, capability=capability, seeds=3)
    assert torch.equal(tokens, want)
    assert torch.equal(step_log[:, DRAW], want)
    assert (step_log[:, [0, 1, 3]] == -9).all()
    assert row_state[RowField.STEP].tolist() == [DRAW + 1] * 3


@pytest.mark.parametrize("do_sample", [False, True])
def test_rows_end_at_a_token_and_stay_ended(do_sample):
    logits = torch.zeros(3, 100)
    logits[0, 5] = logits[1, 6] = logits[2, 5] = 50.0
    tokens, step_log, row_state = run(logits, do_sample=do_sample, eos=(5,), active=[1, 1, 0])
    assert tokens.tolist() == [5, 6, 77]
    assert step_log[:, DRAW].tolist() == [5, 6, 77]
    assert row_state[RowField.ACTIVE].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(0, 1.0, 1.0), (2, 1.0, 0.7), (40, 0.9, 1.5), (1, 1.0, 1.0), (20, 0.0, 1.0)]
)
@pytest.mark.parametrize("capability", [90, 80])
def test_draws_what_the_reference_draws(capability, top_k, top_p, temperature):
    logits = logits_of(2, 1500, seed=3)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    tokens, _, _ = run(logits, do_sample=True, capability=capability, **options)
    assert torch.equal(tokens, sample_reference(logits, True, temperature, top_k, top_p, SEED, DRAW))
