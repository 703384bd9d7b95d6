"""Latent multi-agent reasoning on Hugging Face models: exact for ragged batches, fast where kernels exist."""

from latentmas_kernels.alignment import Aligner, build_aligner
from latentmas_kernels.cache.latent_cache import LatentCache, Segment
from latentmas_kernels.doctor import Report, doctor
from latentmas_kernels.generation import GenerateOutput, LatentOutput, Metrics, generate, latent_generate
from latentmas_kernels.hf import accelerate, restore
from latentmas_kernels.models.architecture import UnsupportedModelError

__version__ = "0.1.0"

__all__ = [
    "Aligner",
    "GenerateOutput",
    "LatentCache",
    "LatentOutput",
    "Metrics",
    "Report",
    "Segment",
    "UnsupportedModelError",
    "accelerate",
    "build_aligner",
    "doctor",
    "generate",
    "latent_generate",
    "restore",
]
