"""rerotate_keys as compiled."""

import pytest
import torch
from launches import Recording, gpu
from numerics import DTYPES, assert_as_good_as_torch
from ops.test_rerotate_keys import SIZES, exact, inputs

from latentmas_kernels.ops.rerotate_keys import rerotate_keys_reference
from latentmas_kernels.ops.triton.rerotate_keys import rerotate_keys


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("capability", [90, 80])
def test_rotates_what_moved_and_touches_nothing_else(capability, size, dtype):
    keys, shifts, frequency = inputs(*size, dtype)
    ours, plain, slots = keys.clone(), keys.clone(), size[3]
    with Recording(capability) as recording:
        rerotate_keys(ours, shifts, frequency, target=gpu(capability, enable_pdl=False))
    recording.run_seeds(2)
    rerotate_keys_reference(plain, shifts, frequency)
    assert_as_good_as_torch(ours[..., :slots, :], plain[..., :slots, :], exact(keys, shifts, frequency))
    assert ours[..., slots:, :].isnan().all()
    still = (shifts == 0)[None, :, None, :, None].expand_as(ours[..., :slots, :])
    assert torch.equal(ours[..., :slots, :][still], keys[..., :slots, :][still])
