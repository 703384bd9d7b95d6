"""Warnings that are issued once per process, however often their cause occurs."""

import functools
import warnings


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
