"""Drives CMake with Ninja to build latentmas_kernels._C; everything else about the package is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def cxx_compiler() -> str | None:
    """The compiler that CMake would take: $CXX, or the first common name on the path."""
    named = os.environ.get("CXX", "").split()
    return shutil.which(named[0]) if named else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


class CMakeBuild(build_ext):
    """Builds with CMake. Without a C++ compiler the package installs all the same and runs on torch; a compiler that is
    there and fails is an error."""

    def build_extension(self, ext: Extension) -> None:
        if cxx_compiler() is None:
            ext.optional = True  # setuptools must not look for a file that was never made
            self.warn(
                "latentmas-kernels: no C++ compiler found (looked at $CXX, c++, g++, clang++). Installing without the "
                "native kernels; install g++ or clang++ and install again to get them."
            )
            return
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        ninja = shutil.which("ninja")
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), *generator,
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]  # fmt: skip
        # An isolated build runs its cmake and ninja from a folder that is gone the next time; a cache that
        # remembers them cannot be used again.
        shutil.rmtree(build, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel"], check=True)

    def copy_extensions_to_source(self) -> None:
        if cxx_compiler() is not None:
            super().copy_extensions_to_source()


setup(ext_modules=[Extension("latentmas_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
