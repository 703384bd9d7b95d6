"""Shared by the tests of the ops: the device, seeded inputs, poisoned buffers, the bound on an op's error.

Also a measure of how much a model's float32 rounds: the same model with its sums in another order.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from latentmas_kernels.ops.triton.launch import interpreted, target_of
from latentmas_kernels.ops.triton.tiles import GemmConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TARGET = target_of(DEVICE)
"""Triton's interpreter where there is no GPU (conftest.py turns it on)."""
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DOT_DTYPES = DTYPES if DEVICE.type == "cuda" else DTYPES[:2]
"""tl.dot on bfloat16 gives garbage in the interpreter."""
# Products of 5 rows and, on tensor cores, of 19: blocks that do not divide either, K whole, in two parts and in three, and in
# four, of which two are empty.
TILES = [
    (5, GemmConfig(1, 32, 64, 1, dot=False, num_warps=4, num_stages=1)),
    (5, GemmConfig(4, 16, 64, 2, dot=False, num_warps=4, num_stages=1)),
    (5, GemmConfig(4, 64, 16, 3, dot=False, num_warps=4, num_stages=1)),
    (19, GemmConfig(16, 32, 32, 1, dot=True, num_warps=4, num_stages=2)),
    (19, GemmConfig(32, 16, 64, 2, dot=True, num_warps=4, num_stages=2)),
    (19, GemmConfig(16, 64, 16, 3, dot=True, num_warps=4, num_stages=2)),
    (5, GemmConfig(2, 32, 64, 4, dot=False, num_warps=4, num_stages=1)),
]
TILE_NAMES = [f"rows{rows}-split{tile.split}{'-dot' if tile.dot else ''}" for rows, tile in TILES]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=draw) * scale).to(dtype).to(DEVICE)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def assert_as_good_as_torch(got: Tensor, plain: Tensor, exact: Tensor, *, size: Tensor | None = None) -> None:
    """Error against float64 at most twice that of plain torch in the same dtype, and a bit of grace.

    The grace is the error of rounding the exact result to the output's dtype, half an eps of it: no result in that dtype
    does better but by chance, and plain torch is exact by chance where there are few elements. `size` is the sum of the
    magnitudes that a product adds up: where they cancel, one float32 bit of them is more than one of the sum.
    """
    assert got.dtype == plain.dtype
    assert got.shape == plain.shape == exact.shape
    # The interpreter truncates when it rounds to bfloat16, which makes up to twice the error of rounding to nearest.
    slack = 2.0 if got.dtype == torch.bfloat16 and interpreted() else 1.0
    ours, theirs = (got.double() - exact).norm(), (plain.double() - exact).norm()
    grace = torch.finfo(got.dtype).eps / 2 * exact.norm()
    if size is not None:
        grace += torch.finfo(torch.float32).eps * size.double().norm()
    assert ours <= slack * (2 * theirs + grace), f"{ours:.3e} against {theirs:.3e} of plain torch, grace {grace:.3e}"


class _InHalves(nn.Module):
    """A linear layer that adds up the two halves of its inputs apart."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.half = linear, linear.in_features // 2

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear.weight
        low = nn.functional.linear(x[..., : self.half], weight[:, : self.half], self.linear.bias)
        return low + nn.functional.linear(x[..., self.half :], weight[:, self.half :])


def summed_in_halves(model: Any) -> Any:
    """A copy of a transformers model that computes the same in another order: products in halves, attention written out.

    The distance of the two from float64 measures the rounding, whatever the instruction set; torch's own order may be lucky on
    one processor and not on the next.
    """
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    for name, module in list(other.named_modules()):
        if isinstance(module, nn.Linear):
            other.set_submodule(name, _InHalves(module))
    return other
