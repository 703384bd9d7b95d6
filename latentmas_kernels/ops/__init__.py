"""The fused operations: one file each with the formula, the torch reference and the dispatch to the native kernels."""

from latentmas_kernels.ops.realign import realign

__all__ = ["realign"]
