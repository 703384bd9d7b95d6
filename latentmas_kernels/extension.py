"""The C++ extension: loaded once, or the reason why it is missing."""

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    if importlib.util.find_spec("latentmas_kernels._C") is None:
        return None, "not built: no C++ compiler was found at install time; install g++ or clang++, then install again"
    try:
        _C = importlib.import_module("latentmas_kernels._C")
        _C.active_isa()  # raises where LATENTMAS_ISA names what this processor cannot run
    except ImportError as error:
        return None, f"built, but it does not load ({error}); install the package again on this machine"
    return _C, f"{_C.active_isa()} (this processor runs: {_C.available_isas()}), threads: {_C.threads()}"


def extension() -> Any:
    """Return the C++ extension module, or None where it was not built or does not load."""
    return _load()[0]


def extension_state() -> str:
    """Return one line: the instruction set in use, or why the extension is missing."""
    return _load()[1]
