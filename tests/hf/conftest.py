"""Fixtures for the drop-in: a plain and an accelerated model, and a ragged batch."""

import pytest
from plain_and_accelerated import LENGTHS, Pair
from tiny_models import ragged
from torch import Tensor


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Pair:
    return Pair("llama", monkeypatch)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    ids, mask = ragged(LENGTHS)
    return {"input_ids": ids, "attention_mask": mask}
