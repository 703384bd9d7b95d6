"""A gateway in front of a fake vLLM server, for each test that asks for one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served_gateway import ServedGateway


@pytest.fixture
def served(model: Any, tmp_path: Path) -> Iterator[ServedGateway]:
    with ServedGateway(model, tmp_path) as served:
        yield served
