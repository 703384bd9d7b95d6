"""sample: the next token of each row from its logits.

    greedy      argmax, of equals the lowest index
    sampling    z = logits / temperature
                top-k: z_i >= the k-th largest z              top-p: z_i while the mass strictly above z_i is below top_p
                token = the first i whose cumulated mass, in the order of the vocabulary, exceeds u times the whole mass

The filters are transformers' (temperature, top-k, top-p, in this order), but equal logits stay or go together. u comes
from Philox 4x32-10, keyed by the seed and counted by draw * 65536 + row: one number per row and draw, the same on every
device.
"""

import torch
from torch import Tensor

from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.ops.triton.kv_table import KVTable
from latentmas_kernels.ops.triton.launch import runs_on, target_of
from latentmas_kernels.ops.triton.row_state import RowField
from latentmas_kernels.ops.triton.sample import Candidates, Settings
from latentmas_kernels.ops.triton.sample import sample as sample_kernel

_MASK = 0xFFFFFFFF


def philox_uniform(seed: int, counter: int) -> float:
    """Return a number in [0, 1) from a seed of 64 bits and a counter of 32."""
    c = [counter & _MASK, 0, 0, 0]
    k = [seed & _MASK, (seed >> 32) & _MASK]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & _MASK, (a >> 32) ^ c[3] ^ k[1], a & _MASK]
        k = [(k[0] + 0x9E3779B9) & _MASK, (k[1] + 0xBB67AE85) & _MASK]
    number = c[0] - (1 << 32) if c[0] >> 31 else c[0]
    number = -number - 1 if number < 0 else number
    return number * 4.6566127342e-10


def sample_reference(
    logits: Tensor, do_sample: bool, temperature: float, top_k: int, top_p: float, seed: int, draw: int
) -> Tensor:
    """Compute the formula in plain torch, float64."""
    if not do_sample:
        return logits.argmax(-1)
    z = logits.double() / temperature
    if top_k:
        z = z.masked_fill(z < z.topk(min(top_k, z.shape[-1]), dim=-1).values[:, -1:], float("-inf"))
    p = z.softmax(-1)
    if top_p < 1:
        falling, order = p.sort(dim=-1, descending=True, stable=True)
        above = falling.cumsum(-1) - falling
        # For equal logits the mass strictly above the first of them counts.
        first = (falling[:, :, None] == falling[:, None, :]).int().argmax(-1) if p.shape[-1] < 2048 else None
        above = above if first is None else above.gather(-1, first)
        keep = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, (above < top_p) | (falling == falling[:, :1]))
        p = p.masked_fill(~keep, 0)
    points = torch.tensor([philox_uniform(seed, draw * 65536 + row) for row in range(len(p))], dtype=p.dtype)
    reached = p.cumsum(-1)
    return (reached > points.to(p.device)[:, None] * reached[:, -1:]).int().argmax(-1)


@torch.library.custom_op("latentmas::sample", mutates_args=())
def _sample(
    logits: Tensor, do_sample: bool, temperature: float, top_k: int, top_p: float, seed: int, draw: int
) -> Tensor:
    if not runs_on(logits):
        return sample_reference(logits, do_sample, temperature, top_k, top_p, seed, draw)
    batch, vocab_size = logits.shape
    token_ids = torch.empty(batch, dtype=torch.int64, device=logits.device)
    row_state = torch.zeros(len(RowField), batch, dtype=torch.int32, device=logits.device)
    row_state[RowField.ACTIVE], row_state[RowField.STEP] = 1, draw
    step_log = torch.empty(batch, draw + 1, dtype=torch.int64, device=logits.device)
    kv_table = KVTable(step_log=step_log.data_ptr(), step_log_stride=step_log.stride(0)).tensor(logits.device)
    settings = Settings(logits.device)
    settings.set(temperature, top_k, top_p, seed, 0, 0, [])
    sample_kernel(
        logits, token_ids, settings, Candidates(batch, vocab_size, logits.device, sampling=do_sample), row_state, kv_table,
        do_sample=do_sample, target=target_of(logits.device),
    )  # fmt: skip
    return token_ids


@_sample.register_fake
def _(logits: Tensor, do_sample: bool, temperature: float, top_k: int, top_p: float, seed: int, draw: int) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


def sample(
    logits: Tensor,
    *,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = 50,
    top_p: float = 1.0,
    seed: int = 0,
    draw: int = 0,
) -> Tensor:
    """Choose a token per row.

    Runs the Triton kernels on CUDA and the torch reference elsewhere.

    Args:
        logits: float32 [B, V].
        do_sample: draw a token instead of the most likely.
        temperature: above 0.
        top_k: None or 0 is off.
        top_p: 1 is off.
        seed, draw: of the generator; the same two give the same tokens.

    Returns:
        int64 [B].

    Raises:
        LatentMASError: where an argument is out of its range.
    """
    if logits.dim() != 2 or logits.dtype != torch.float32:
        raise LatentMASError(f"sample: logits must be float32 [B, V]; got {logits.dtype} {list(logits.shape)}")
    if not temperature > 0 or not 0 <= top_p <= 1 or (top_k or 0) < 0:
        raise LatentMASError(
            f"sample: temperature must be above 0, top_p between 0 and 1, top_k 0 or more; got {temperature}, {top_p}, {top_k}"
        )
    return _sample(logits.contiguous(), do_sample, temperature, top_k or 0, top_p, seed, draw)
