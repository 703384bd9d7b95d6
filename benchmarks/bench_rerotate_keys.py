"""rerotate_keys over all slots of a layer's keys (`--kv` of them), beside its formula in torch."""

from functools import partial

import torch
from shapes import sizes_of
from sweeps import Race, cold, require_correct

from latentmas_kernels.ops.rerotate_keys import rerotate_keys_reference
from latentmas_kernels.ops.triton.launch import target_of
from latentmas_kernels.ops.triton.rerotate_keys import rerotate_keys


def test_rerotate_keys(race: Race, device: str, shape: str, batch: int, kv: int, dtype: torch.dtype) -> None:
    s = sizes_of(shape)
    width = s["head_dim"]
    # Clones: both sides write, and rotations keep the size of what they turn.
    stores = cold(device, dtype, 1, batch, s["num_key_value_heads"], kv, width)[:16].clone()
    shifts = torch.full((batch, kv), -7, dtype=torch.int64, device=device)
    inv_freq = 1e6 ** -(torch.arange(0, width, 2, device=device) / width)
    low, high = stores[0].double().chunk(2, dim=-1)
    angle = (shifts.float()[:, :, None] * inv_freq).double()[None, :, None]
    exact = torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()], dim=-1)
    ops = partial(rerotate_keys, target=target_of(stores.device)), rerotate_keys_reference
    results = []
    for op in ops:
        keys = stores[0].clone()
        op(keys, shifts, inv_freq)
        results.append(keys)
    require_correct(*results, exact)
    race(
        *([partial(op, keys, shifts, inv_freq) for keys in stores] for op in ops),
        moved=2 * stores[0].nbytes + shifts.nbytes, kernel="Triton", batch=batch, dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
