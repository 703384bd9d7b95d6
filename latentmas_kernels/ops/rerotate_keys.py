"""rerotate_keys: move rotated keys to other positions (where a cache is cut or merged).

    k[l, b, h, j] <- rope(k[l, b, h, j], shift[b, j])             keys [L, B, Hkv, S, hd], in place; shift [B, n], n <= S

Rotations add up, so RoPE at p followed by RoPE at d is RoPE at p + d; the scaling of cosine and sine is in the keys
already and is not applied again. float32 inside. Slots with a shift of 0 are not touched, bit for bit.
"""

import torch
from torch import Tensor

from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.ops.rope import rotate
from latentmas_kernels.ops.triton.launch import runs_on, target_of
from latentmas_kernels.ops.triton.rerotate_keys import rerotate_keys as rerotate_keys_kernel


def rerotate_keys_reference(keys: Tensor, shifts: Tensor, inv_freq: Tensor) -> None:
    """Compute the formula in plain torch. Modifies `keys`."""
    slots = shifts.shape[1]
    moved = shifts != 0
    angle = shifts.float()[:, :, None] * inv_freq
    used = keys[:, :, :, :slots]
    rotated = rotate(used, angle[None, :, None]).to(keys.dtype)
    used.copy_(torch.where(moved[None, :, None, :, None], rotated, used))


@torch.library.custom_op("latentmas::rerotate_keys", mutates_args=("keys",))
def _rerotate_keys(keys: Tensor, shifts: Tensor, inv_freq: Tensor) -> None:
    if not runs_on(keys):
        rerotate_keys_reference(keys, shifts, inv_freq)
        return
    rerotate_keys_kernel(keys, shifts, inv_freq, target=target_of(keys.device))


@_rerotate_keys.register_fake
def _(keys: Tensor, shifts: Tensor, inv_freq: Tensor) -> None:
    return None


def rerotate_keys(keys: Tensor, shifts: Tensor, inv_freq: Tensor) -> None:
    """Rotate cached keys by a shift of their positions. This modifies `keys`.

    Runs the Triton kernel on CUDA and the torch reference elsewhere.

    Args:
        keys: [L, B, Hkv, S, hd], slots contiguous. Modified.
        shifts: int64 [B, n], the shift of each of the first n slots; negative is towards the start.
        inv_freq: float32 [hd / 2], of the model's rotary module.

    Raises:
        LatentMASError: where shapes or dtypes do not fit together.
    """
    if keys.dim() != 5 or keys.stride()[3:] != (keys.shape[4], 1) or keys.shape[4] % 2:
        raise LatentMASError(
            f"rerotate_keys: keys must be [L, B, Hkv, S, hd] with contiguous slots; got {list(keys.shape)} with strides "
            f"{keys.stride()}"
        )
    if (
        shifts.dim() != 2
        or len(shifts) != keys.shape[1]
        or shifts.shape[1] > keys.shape[3]
        or shifts.dtype != torch.int64
    ):
        raise LatentMASError(
            f"rerotate_keys: shifts must be int64 [{keys.shape[1]}, up to {keys.shape[3]}]; got {shifts.dtype} "
            f"{list(shifts.shape)}"
        )
    if list(inv_freq.shape) != [keys.shape[4] // 2] or inv_freq.dtype != torch.float32:
        raise LatentMASError(
            f"rerotate_keys: inv_freq must be float32 [{keys.shape[4] // 2}]; got {inv_freq.dtype} {list(inv_freq.shape)}"
        )
    _rerotate_keys(keys, shifts.contiguous(), inv_freq.contiguous())
