"""The C++ steps under the address, undefined-behaviour and thread sanitizers: odd sizes, every instruction set, 1 to 3
threads."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0])
FLAGS = "-O1 -g -fno-sanitize-recover=all -fno-omit-frame-pointer -fsanitize="


@pytest.mark.skipif(COMPILER is None or shutil.which("cmake") is None, reason="needs a C++ compiler and CMake")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_steps_are_clean(sanitizers, tmp_path):
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DLATENTMAS_CHECK=ON", "-DCMAKE_BUILD_TYPE=None",
        f"-DCMAKE_CXX_FLAGS={FLAGS}{sanitizers}",
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", str(tmp_path), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run([tmp_path / "check_steps"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "all agree\n"), done.stdout + done.stderr
