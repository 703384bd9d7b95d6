"""Options and closing table of the pytest benchmarks; pytest-benchmark does the timing."""

import statistics
from typing import Any

import pytest
import torch
from bandwidth import conditions, merge_json, read_bandwidth
from shapes import SHAPES
from sweeps import Race

from latentmas_kernels.ops.triton.launch import interpreted

STEP_OPTIONS = ("shape", "batch", "kv", "dtype")


def pytest_addoption(parser: pytest.Parser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.addoption(
        "--device", default=default, choices=["cpu", "cuda"], help="where to measure (default: %(default)s)"
    )
    parser.addoption("--results", metavar="JSON", help="merge the numbers into this file")
    group = parser.getgroup("sizes of the ops of a step, all combinations")
    group.addoption("--shape", nargs="+", default=["qwen3-0.6b", "qwen3-8b"], choices=SHAPES)
    group.addoption("--batch", nargs="+", type=int, default=[1, 16])
    group.addoption("--kv", nargs="+", type=int, default=[2048], help="slots in use, where an op reads them")
    group.addoption("--dtype", nargs="+", default=["bfloat16"], choices=["float32", "bfloat16"])


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """One process, whatever pyproject says: benchmarks side by side would measure each other."""
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError(
            "the benchmarks of the ops need pytest-benchmark, which is not installed: pip install pytest-benchmark"
        )
    config.option.numprocesses, config.option.dist = 0, "no"
    config.option.benchmark_columns = config.option.benchmark_columns or ["median", "iqr", "rounds"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" not in metafunc.fixturenames:
        return
    for name in STEP_OPTIONS:
        if name in metafunc.fixturenames:
            words = metafunc.config.getoption(f"--{name}")
            values = [getattr(torch, word) for word in words] if name == "dtype" else words
            metafunc.parametrize(
                name, values, ids=[f"{name}{word}" if isinstance(word, int) else word for word in words]
            )


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    if config.getoption("--device") == "cpu" and not interpreted():
        reason = "Triton needs CUDA; TRITON_INTERPRET=1 makes a dry run on the CPU (--shape tiny --dtype float32)"
        for item in items:
            if "shape" in item.fixturenames:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


@pytest.fixture
def race(benchmark: Any, device: str) -> Race:
    """Times an op beside torch; the read bandwidth of this process is measured right before."""
    return Race(benchmark, device, read_bandwidth(device, repeats=5))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """One line per case: what it takes, what that is of the bandwidth, and how it stands to torch."""
    session = getattr(config, "_benchmarksession", None)
    rows = {
        bench.name: dict(bench.extra_info) for bench in getattr(session, "benchmarks", []) if "ms" in bench.extra_info
    }
    if not rows:
        return
    about = conditions(config.getoption("--device"))
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    terminalreporter.section("per call, medians of alternating rounds")
    terminalreporter.write_line(
        f"{about['date']}  {about['device']}, {about['torch_threads']} torch threads  {versions}"
    )
    seen = [row["bandwidth_gb_s"] for row in rows.values()]
    spread = f"{min(seen):.1f} to {max(seen):.1f}, median {statistics.median(seen):.1f} GB/s"
    terminalreporter.write_line(f"read bandwidth (bw), measured in this process before every case: {spread}")
    width = max(len(name) for name in rows) - len("test_")
    head = f"{'case':<{width}} {'kernel':>7} {'batch':>5} {'dtype':>9} "
    terminalreporter.write_line(head + f"{'ms':>9} {'GB/s':>8} {'% bw':>6} {'torch ms':>9} {'faster':>7}")
    for name, row in rows.items():
        terminalreporter.write_line(
            f"{name.removeprefix('test_'):<{width}} {row['kernel']:>7} {row['batch']:>5} {row['dtype']:>9} {row['ms']:9.4f} "
            f"{row['gb_s']:8.1f} {row['percent_of_bandwidth']:5.0f}% {row['torch_ms']:9.4f} {row['faster_than_torch']:6.2f}x"
        )
    if config.getoption("--results"):
        merge_json(config.getoption("--results"), "ops", {name: {**row, **about} for name, row in rows.items()})
