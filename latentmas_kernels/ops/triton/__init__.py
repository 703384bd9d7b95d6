"""Triton kernels, one file per op of latentmas_kernels.ops, under the same name."""
