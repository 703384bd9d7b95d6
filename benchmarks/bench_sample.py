"""sample, greedy and with temperature, top-k and top-p, beside torch.

torch's side draws by the exponential trick, as transformers' multinomial does inside, since that one cannot be captured.
"""

from functools import partial

import pytest
import torch
from shapes import sizes_of
from sweeps import Race, cold
from torch import Tensor

from latentmas_kernels.ops.sample import sample_reference
from latentmas_kernels.ops.triton.kv_table import KVTable
from latentmas_kernels.ops.triton.launch import target_of
from latentmas_kernels.ops.triton.row_state import RowField
from latentmas_kernels.ops.triton.sample import Candidates, Settings, sample

SETTINGS = {"greedy": None, "top_k": (0.7, 50, 1.0), "top_p": (0.7, 0, 0.95)}


def plain(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    z = logits / temperature
    if top_k:
        z = z.masked_fill(z < z.topk(top_k).values[:, -1:], float("-inf"))
    p = z.softmax(-1)
    if top_p < 1:
        falling, order = p.sort(dim=-1, descending=True)
        p = torch.zeros_like(p).scatter(-1, order, falling.masked_fill(falling.cumsum(-1) - falling >= top_p, 0))
    return (p / torch.empty_like(p).exponential_()).argmax(-1)


@pytest.mark.parametrize("kind", SETTINGS)
def test_sample(race: Race, device: str, shape: str, batch: int, kind: str) -> None:
    target = target_of(torch.device(device))
    inputs = 3 * cold(device, torch.float32, batch, sizes_of(shape)["vocab_size"])[:64]
    tokens = torch.full((batch,), -1, dtype=torch.int64, device=device)
    row_state = torch.zeros(len(RowField), batch, dtype=torch.int32, device=device)
    row_state[RowField.ACTIVE] = 1
    step_log = torch.zeros(1 << 16, dtype=torch.int64, device=device)  # a place for every call of the benchmark
    kv_table = KVTable(step_log=step_log.data_ptr(), step_log_stride=0).tensor(device)  # the rows share the log
    chosen, settings = SETTINGS[kind], Settings(torch.device(device))
    settings.set(*(chosen or (1.0, 0, 1.0)), 5, 0, 0, [])
    candidates = Candidates(batch, inputs.shape[2], torch.device(device), sampling=chosen is not None)

    def ours(logits: Tensor) -> None:
        sample(logits, tokens, settings, candidates, row_state, kv_table, do_sample=chosen is not None, target=target)

    ours(inputs[0])
    expected = sample_reference(inputs[0], chosen is not None, *(chosen or (1.0, 0, 1.0)), seed=5, draw=0)
    if tokens.tolist() != expected.tolist():
        pytest.fail(f"wrong tokens, so no time: {tokens.tolist()}, expected {expected.tolist()}")
    race(
        [partial(ours, logits) for logits in inputs],
        [partial(plain, logits, *chosen) if chosen else partial(torch.argmax, logits, -1) for logits in inputs],
        moved=inputs[0].nbytes, kernel="Triton", batch=batch, dtype="float32",
    )  # fmt: skip
