"""RoPE in plain torch, for the references of the ops.

(x1, x2) -> (x1 c - x2 s, x2 c + x1 s)        the two halves of a head; c and s of angle i are those of x1[i] and x2[i]
"""

import torch
from torch import Tensor


def rotate(x: Tensor, angle: Tensor, scaling: float = 1.0) -> Tensor:
    """Apply RoPE to x [..., hd] by angles [..., hd / 2], in float32."""
    low, high = x.float().chunk(2, dim=-1)
    cosine, sine = angle.cos() * scaling, angle.sin() * scaling
    return torch.cat([low * cosine - high * sine, high * cosine + low * sine], dim=-1)
