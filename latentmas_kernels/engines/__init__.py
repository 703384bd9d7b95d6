"""Engines: prefill, latent steps and decoding on a LatentCache."""

from latentmas_kernels.engines.base import Engine, LatentParams, LatentResult, SamplingParams, SupportsDecode
from latentmas_kernels.engines.cuda import CudaEngine
from latentmas_kernels.engines.eager import EagerEngine
from latentmas_kernels.engines.hf_graph import HFGraphEngine
from latentmas_kernels.engines.native import NativeEngine
from latentmas_kernels.engines.registry import (
    check_engine_options,
    engine_names,
    fast_engine,
    open_engine,
    weight_names,
)

__all__ = [
    "CudaEngine",
    "EagerEngine",
    "Engine",
    "HFGraphEngine",
    "LatentParams",
    "LatentResult",
    "NativeEngine",
    "SamplingParams",
    "SupportsDecode",
    "check_engine_options",
    "engine_names",
    "fast_engine",
    "open_engine",
    "weight_names",
]  # fmt: skip
