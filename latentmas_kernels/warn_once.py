"""Warnings that are issued once per process, however often their cause occurs."""

import functools
import warnings


@functools.cache
def warn_once(message: str) -> None:
    """Warn of the caller's caller, unless the same message was given before."""
    warnings.warn(message, RuntimeWarning, stacklevel=3)
