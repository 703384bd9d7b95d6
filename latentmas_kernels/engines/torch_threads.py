"""Limit torch's threads, which would occupy the cores that the native engine's threads need."""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Run torch's operators of the calling thread on that thread alone inside the block.

    An operator on 32,768 elements or more, such as an argmax over logits, runs on all of torch's OpenMP threads, and those
    spin for milliseconds behind it, on the cores that the next native step needs: 12.9 ms a token instead of 6.1 (135M, two
    cores, a processor of the caller's). `torch.set_num_threads` would reach threads that others start meanwhile; OpenMP's
    own setting is one of the calling thread.
    """
    runtime = _openmp()
    if runtime is None:
        yield
        return
    before = torch.get_num_threads()  # this also sets the number, as torch does at a thread's first operator
    runtime.omp_set_num_threads(1)
    try:
        yield
    finally:
        runtime.omp_set_num_threads(before)


@functools.cache
def _openmp() -> Any:
    """Return the OpenMP runtime that torch is linked with, or None where torch uses none, or has none under these names."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        library.omp_set_num_threads  # noqa: B018
    except (OSError, AttributeError):
        return None
    return library
