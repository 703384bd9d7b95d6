"""`warn_once`, as the engines and what lies above them import it."""

from latentmas_kernels.once import warn_once

__all__ = ["warn_once"]
