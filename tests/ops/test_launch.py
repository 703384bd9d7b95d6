"""Launches: on the device of their tensors, with the options that bits and order of kernels depend on."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from latentmas_kernels.ops.triton.launch import INTERPRETER, LaunchTarget, target_of


class Recorder:
    """Stands in for a kernel: keeps the options of each launch and the device that was current."""

    def __init__(self, current: list[torch.device]) -> None:
        self.current, self.launches = current, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((grid, args, options, list(self.current)))


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices that `torch.cuda.device` has made current, innermost last."""
    entered: list[torch.device] = []

    @contextlib.contextmanager
    def device(of):
        entered.append(torch.device(of))
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    return entered


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch):
    """Every CUDA device is one of sm_90."""
    properties = SimpleNamespace(name="a GPU", major=9, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    target_of.cache_clear()
    yield
    target_of.cache_clear()


def test_a_kernel_runs_on_the_device_of_its_target(current):
    kernel, device = Recorder(current), torch.device("cuda", 1)
    LaunchTarget("a GPU", 132, enable_pdl=False, device=device).launch(kernel, (3, 2), "x", BLOCK=4)
    grid, args, options, devices = kernel.launches[0]
    assert (grid, args, options["BLOCK"]) == ((3, 2), ("x",), 4)
    assert devices == [device]
    assert current == []


def test_a_kernel_on_the_cpu_changes_no_device(current):
    kernel = Recorder(current)
    INTERPRETER.launch(kernel, (1,))
    assert kernel.launches[0][3] == []


def test_a_target_names_its_device(hopper):
    assert target_of(torch.device("cuda", 1)).device == torch.device("cuda", 1)
    assert target_of(torch.device("cpu")) is INTERPRETER


def test_only_captured_launches_start_before_the_kernel_ahead_of_them_has_ended(hopper, current):
    """Outside of a step the kernel ahead may be the one that writes the weights, which are read before the wait."""
    alone, captured = (target_of(torch.device("cuda", 0), captured=c) for c in (False, True))
    assert (alone.enable_pdl, captured.enable_pdl) == (False, True)
    kernel = Recorder(current)
    alone.launch(kernel, (1,))
    captured.launch(kernel, (1,))
    assert ["launch_pdl" in options for _, _, options, _ in kernel.launches] == [False, True]


@pytest.mark.parametrize("captured", [False, True])
def test_sums_are_fused_whatever_the_default_of_triton(hopper, current, captured):
    kernel = Recorder(current)
    target_of(torch.device("cuda", 0), captured=captured).launch(kernel, (1,))
    assert kernel.launches[0][2]["enable_fp_fusion"] is True
