"""What bench_engine.py does on a device only, and a dry run on the CPU does not reach."""

from dataclasses import replace

import bench_engine
import pytest

from latentmas_kernels.ops.triton.launch import INTERPRETER, LaunchTarget


@pytest.mark.parametrize(
    ("has_pdl", "kinds"), [(True, {False: "serial_us", True: "pdl_us"}), (False, {False: "serial_us"})]
)
def test_launch_cost_is_of_both_kinds_of_launch_that_there_are(monkeypatch, has_pdl, kinds):
    launched = []
    monkeypatch.setattr(LaunchTarget, "launch", lambda self, kernel, grid, **options: launched.append((self, options)))
    target = replace(INTERPRETER, enable_pdl=has_pdl)
    monkeypatch.setattr(bench_engine, "target_of", lambda device, captured: target)
    monkeypatch.setattr(bench_engine, "CudaGraphs", lambda device: lambda body: body)
    said = bench_engine.launch_cost("cpu", launches=3)
    assert {name for name in said if name.endswith("_us")} == set(kinds.values())
    assert {of.enable_pdl for of, _ in launched} == set(kinds)
    assert all(options["USE_PDL"] == of.enable_pdl for of, options in launched)
