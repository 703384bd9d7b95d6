"""Warnings that say something once per process, however often it happens."""

import functools
import warnings


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
