"""rerotate_keys: the Triton kernel (in the interpreter where there is no GPU) against the torch reference and float64."""

import pytest
import torch
from numerics import DEVICE, DTYPES, assert_as_good_as_torch, normal, poisoned

from latentmas_kernels.ops.rerotate_keys import rerotate_keys, rerotate_keys_reference
from latentmas_kernels.ops.rope import rotate

# layers, rows, KV heads, slots, head_dim
SIZES = [(1, 1, 4, 5, 16), (2, 3, 1, 37, 64), (1, 2, 2, 16, 96), (2, 1, 1, 17, 128), (1, 19, 1, 3, 6)]


def frequencies(width):
    return (1 / 10000.0 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)).float().to(DEVICE)


def inputs(layers, rows, heads, slots, width, dtype, behind=3):
    """Keys with NaN in the last slots, and shifts of the others: there and back, far, and none."""
    keys = normal(layers, rows, heads, slots + behind, width, dtype=dtype)
    keys[..., slots:, :] = float("nan")
    shifts = torch.randint(-50, 50, (rows, slots), generator=torch.Generator().manual_seed(1))
    shifts[:, ::5], shifts[:, 1::7] = 0, 130000
    return keys, shifts.to(DEVICE), frequencies(width)


def exact(keys, shifts, frequency):
    angle = (shifts.float()[..., None] * frequency).double()[None, :, None]
    low, high = keys.double()[..., : shifts.shape[1], :].chunk(2, dim=-1)
    return torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()], dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_interpreter_equals_reference_and_touches_nothing_else(size, dtype):
    keys, shifts, frequency = inputs(*size, dtype)
    ours, plain = keys.clone(), keys.clone()
    assert rerotate_keys(ours, shifts, frequency) is None
    rerotate_keys_reference(plain, shifts, frequency)
    slots = size[3]
    assert_as_good_as_torch(ours[..., :slots, :], plain[..., :slots, :], exact(keys, shifts, frequency))
    assert ours[..., slots:, :].isnan().all()
    still = (shifts == 0)[None, :, None, :, None].expand_as(ours[..., :slots, :])
    assert torch.equal(ours[..., :slots, :][still], keys[..., :slots, :][still])


def test_interpreter_turns_add_up():
    """Keys rotated to p and shifted by d are the keys rotated to p + d."""
    raw, frequency = normal(2, 3, 2, 20, 64), frequencies(64)
    positions = torch.arange(20, device=DEVICE).expand(3, 20) * 3
    shifts = torch.arange(60, device=DEVICE).view(3, 20) - 30

    def at(where):
        return rotate(raw, (where.float()[..., None] * frequency)[None, :, None])

    keys = at(positions)
    rerotate_keys(keys, shifts, frequency)
    torch.testing.assert_close(keys, at(positions + shifts), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 2e-3 * 4), (torch.bfloat16, 2e-2 * 4)]
)
def test_interpreter_the_way_back_restores(dtype, tolerance):
    keys, shifts, frequency = inputs(1, 2, 2, 20, 64, dtype, behind=0)
    moved = keys.clone()
    rerotate_keys(moved, shifts, frequency)
    assert (moved.float() - keys.float()).abs().max() > 0.5
    rerotate_keys(moved, -shifts, frequency)
    torch.testing.assert_close(moved, keys, rtol=0, atol=tolerance)


def test_interpreter_shifts_of_0_leave_every_bit():
    keys, shifts, frequency = inputs(2, 3, 1, 20, 16, torch.float16)
    keys[0, 1, 0, 3] = float("inf")
    before = keys.clone().view(torch.int16)
    rerotate_keys(keys, torch.zeros_like(shifts), frequency)
    assert torch.equal(keys.view(torch.int16), before)


def test_interpreter_nan_stays_in_its_slot():
    keys, shifts, frequency = inputs(1, 2, 1, 20, 16, torch.float32, behind=0)
    keys[0, 1, 0, 3, 4] = float("nan")
    rerotate_keys(keys, shifts, frequency)
    assert keys.isnan().any(-1).nonzero().tolist() == [[0, 1, 0, 3]]


def test_interpreter_takes_views_of_a_buffer():
    """Some rows of a larger buffer, a transposed shift and every other frequency; the other rows stay poisoned."""
    keys, shifts, frequency = inputs(2, 3, 2, 9, 16, torch.float32, behind=0)
    want = keys.clone()
    rerotate_keys(want, shifts, frequency)
    buffer = poisoned(2, 5, 4, 9, 16)
    view = buffer[:, 1:4, ::2]
    view.copy_(keys)
    strided = torch.stack([frequency, torch.zeros_like(frequency)], dim=1)[:, 0]
    rerotate_keys(view, shifts.T.contiguous().T, strided)
    assert torch.equal(view, want)
    assert int(buffer.isfinite().sum()) == view.numel()


@pytest.mark.parametrize("size", [(2, 3, 1, 0, 16), (0, 3, 1, 4, 16), (2, 0, 1, 4, 16)])
def test_nothing_to_do_interpreter(size):
    keys, shifts, frequency = inputs(*size, torch.float32)
    before = keys.clone()
    rerotate_keys(keys, shifts, frequency)
    assert torch.equal(keys.isnan(), before.isnan())


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on the device the kernel always runs")
def test_without_the_interpreter_the_reference_runs(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    keys, shifts, frequency = inputs(1, 2, 2, 9, 16, torch.float16, behind=0)
    want = keys.clone()
    rerotate_keys_reference(want, shifts, frequency)
    rerotate_keys(keys, shifts, frequency)
    assert torch.equal(keys, want)


def test_opcheck_interpreter():
    torch.library.opcheck(torch.ops.latentmas.rerotate_keys.default, inputs(1, 2, 1, 5, 16, torch.float32, behind=0))


KEYS = torch.zeros(1, 2, 1, 5, 4)
SHIFTS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("keys", "shifts", "inv_freq", "words"),
    [
        (KEYS[0], SHIFTS, torch.zeros(2), r"rerotate_keys: keys must be \[L, B, Hkv, S, hd\] with contiguous slots"),
        (KEYS[..., ::2], SHIFTS, torch.zeros(1), "contiguous slots"),
        (torch.zeros(1, 2, 1, 5, 3), SHIFTS, torch.zeros(1), r"got \[1, 2, 1, 5, 3\]"),
        (KEYS, SHIFTS[0], torch.zeros(2), r"shifts must be int64 \[2, up to 5\]; got torch.int64 \[3\]"),
        (KEYS, SHIFTS[:1], torch.zeros(2), r"got torch.int64 \[1, 3\]"),
        (KEYS, torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2), r"got torch.int64 \[2, 6\]"),
        (KEYS, SHIFTS.int(), torch.zeros(2), "got torch.int32"),
        (KEYS, SHIFTS, torch.zeros(4), r"inv_freq must be float32 \[2\]; got torch.float32 \[4\]"),
        (KEYS, SHIFTS, torch.zeros(2).half(), "got torch.float16"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(keys, shifts, inv_freq, words):
    with pytest.raises(ValueError, match=words):
        rerotate_keys(keys, shifts, inv_freq)
