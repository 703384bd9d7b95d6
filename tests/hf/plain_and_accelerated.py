"""A plain model beside an accelerated one of the same weights."""

import copy
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, tiny_model
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from latentmas_kernels import accelerate

LENGTHS = [3, 9, 1]


class Pair:
    """A plain model and an accelerated one of the same weights; what the latter left to transformers is in `left`."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch, **overrides: Any) -> None:
        self.plain = tiny_model(name, **overrides)
        self.ours = accelerate(copy.deepcopy(self.plain))
        self.left: list[str] = []
        for module in ("decode", "accelerated"):
            monkeypatch.setattr(f"latentmas_kernels.hf.{module}.warn_once", self.left.append)

    def generate(self, *args: Any, seed: int = 0, **kwargs: Any) -> tuple[Any, Any]:
        outs = []
        for model in (self.plain, self.ours):
            torch.manual_seed(seed)
            outs.append(model.generate(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
        return outs[0], outs[1]

    def assert_same(self, *args: Any, left: str | None = None, **kwargs: Any) -> Tensor:
        """The same tokens, by our engine, or by transformers for a reason that has `left` in it."""
        want, got = self.generate(*args, **kwargs)
        assert torch.equal(got, want)
        assert bool(self.left) == (left is not None), self.left
        assert left is None or left in self.left[-1]
        return got


class Recorder(BaseStreamer):
    """Keeps what it gets."""

    def __init__(self) -> None:
        self.pieces: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.tolist())

    def end(self) -> None:
        self.pieces.append("end")


class Forced(LogitsProcessor):
    """A processor that nobody knows: the token is the number of those before it."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, input_ids.shape[1] % VOCAB] = 0
        return forced
