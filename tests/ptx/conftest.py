"""These tests are not part of `make test`: they compile kernels, which Triton does not where its interpreter is on.

`make test-ptx` runs them, in processes of their own with TRITON_INTERPRET=0, for the oldest and the newest version of Triton;
`make test-ptx-short` for the newest only, and of every test of a kernel one case, which fits into CI.
"""

import os
from collections.abc import Iterator

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "0":
    collect_ignore_glob = ["test_*.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--short", action="store_true", help="of every test of a kernel the case in the middle only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--short"):
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        of_emulator = item.path.name.startswith("test_emulator")
        cases.setdefault(item.nodeid if of_emulator else item.nodeid.partition("[")[0], []).append(item)
    items[:] = [of_one[len(of_one) // 2] for of_one in cases.values()]


@pytest.fixture(autouse=True)
def poisoned_allocations() -> Iterator[None]:
    """`torch.empty` holds NaN: buffers that a launcher makes for itself are poisoned as well."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
