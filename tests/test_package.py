"""`import latentmas_kernels`: what it gives by itself, without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

import latentmas_kernels


def in_a_new_process(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "expression",
    [
        "hf.ModelWrapper", "cache.LatentCache", "ops.realign", "engines.open_engine", "alignment.build_aligner",
        "generation.generate", "trace.LatentTrace", "diagnostics.doctor", "outputs.LatentOutput", "models.__path__",
    ],
)  # fmt: skip
def test_modules_are_attributes_of_the_package(expression):
    in_a_new_process(f"import latentmas_kernels; latentmas_kernels.{expression}")


def test_they_are_modules_that_there_are_and_are_listed():
    folder = Path(latentmas_kernels.__file__).parent
    for name in latentmas_kernels._SUBMODULES:
        assert (folder / f"{name}.py").is_file() or (folder / name).is_dir()
    assert set(latentmas_kernels._SUBMODULES) < set(dir(latentmas_kernels))


def test_the_import_alone_does_not_wait_for_torch():
    assert in_a_new_process("import sys, latentmas_kernels; print('torch' in sys.modules)") == "False\n"


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'latentmas_kernels' has no attribute 'thoughts'"):
        latentmas_kernels.thoughts  # noqa: B018
