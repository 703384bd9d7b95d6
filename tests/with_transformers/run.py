"""Runs transformers' own tests on accelerated models: `make test-transformers TRANSFORMERS=path/to/checkout`.

The tests come from a checkout of transformers at the version that is installed. A test that fails is run again on plain
models; one that passes there must be in differences.toml, and one that is in differences.toml must still fail.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import transformers

HERE = Path(__file__).parent
SUITES = [
    "tests/generation/test_utils.py",
    "tests/utils/test_cache_utils.py",
    *(f"tests/models/{name}/test_modeling_{name}.py" for name in ("llama", "mistral", "qwen2", "qwen3")),
]
# Models spread over processes, and exports: nothing in them is decoded, and they take hours on a CPU.
LEFT_OUT = [
    "is_fsdp_test", "is_tensor_parallel_test", "is_expert_parallel_test", "torch_export_test", "onnx_export_test",
    "executorch_export_test",
]  # fmt: skip


def check_version(checkout: Path) -> None:
    source = checkout / "src/transformers/__init__.py"
    if not source.is_file():
        sys.exit(f"{checkout} is no checkout of transformers: it has no src/transformers/__init__.py")
    found = re.search(r'^__version__ = "(.+)"', source.read_text(), re.MULTILINE)
    version = found[1] if found else "unknown"
    if version != transformers.__version__:
        sys.exit(
            f"{checkout} is transformers {version}, and {transformers.__version__} is installed: check out "
            f"v{transformers.__version__}, or install what the checkout holds"
        )


def run(checkout: Path, tests: list[str], *options: str) -> dict[str, Any]:
    """What became of each test, by node id, and who ran the decoding loops."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes, names = Path(folder, "outcomes.json"), Path(folder, "tests")
        names.write_text("\n".join(tests))  # more than a command line may hold
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "accelerated_models"]
        command += [f"--outcomes={outcomes}", "-m", f"not ({' or '.join(LEFT_OUT)})", *options, f"@{names}"]
        path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
        # One thread for each of pytest's processes; this package's own threads too.
        limits = {"OMP_NUM_THREADS": "1", "LATENTMAS_NUM_THREADS": "1"}
        environment = {"HF_HUB_OFFLINE": "1", **os.environ, **limits, "PYTHONPATH": path}
        done = subprocess.run(command, cwd=checkout, env=environment)
        if done.returncode > 1 or not outcomes.exists():
            sys.exit(f"pytest ended with {done.returncode} before the tests did")
        return json.loads(outcomes.read_text())


def verdict(ours: dict[str, str], plain: dict[str, str], listed: dict[str, str]) -> tuple[list[str], bool]:
    """What is to be said, and whether all is as differences.toml says.

    Args:
        ours: what became of each test on accelerated models.
        plain: the same on plain models, of the tests that failed.
        listed: why, by patterns of node ids.
    """
    lines, good = [], True
    for test, outcome in sorted(ours.items()):
        why = next((why for pattern, why in listed.items() if fnmatchcase(test, f"*::{pattern}")), None)
        fails = outcome == "failed" and plain[test] != "failed"
        if fails and why is not None:
            lines.append(f"differs, as listed: {test}\n    {why}")
        elif fails:
            lines.append(f"DIFFERS: {test}\n    it passes on plain models and is not in differences.toml")
            good = False
        elif outcome == "passed" and why is not None:
            lines.append(f"PASSES: {test}\n    it is in differences.toml: take it out")
            good = False
    return lines, good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog="Further options go to pytest, as --option=value.")
    parser.add_argument("checkout", type=Path)
    parser.add_argument("tests", nargs="*", default=SUITES, help="files of the checkout; default: %(default)s")
    parser.add_argument("--differences", type=Path, default=HERE / "differences.toml")
    arguments, options = parser.parse_known_args()
    checkout = arguments.checkout.resolve()
    check_version(checkout)
    ran = run(checkout, arguments.tests, *options)
    ours = ran["outcomes"]
    failed = [test for test, outcome in ours.items() if outcome == "failed"]
    plain = run(checkout, failed, "--plain", *options)["outcomes"] if failed else {}
    lines, good = verdict(ours, plain, tomllib.loads(arguments.differences.read_text()))
    counts, loops = Counter(ours.values()), ran["loops"]
    both = sum(outcome == "failed" for outcome in plain.values())
    print(*lines, sep="\n")
    for reason, calls in loops.items():
        if reason not in ("all", "engine"):
            print(f"{calls} calls of generate() in transformers' own loop, since {reason}")
    print(
        f"transformers {transformers.__version__} on accelerated models: {counts['passed']} passed, {counts['skipped']} "
        f"skipped ({ran['need_the_hub']} need the Hub), {counts['failed']} failed, of which {both} fail on plain models too; "
        f"of {loops['all']} calls of generate() that are greedy or sample, {loops['engine']} ran on an engine"
    )
    sys.exit(not good)


if __name__ == "__main__":
    main()
