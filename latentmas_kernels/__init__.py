"""Latent multi-agent reasoning on Hugging Face models: exact for ragged batches, fast where kernels exist."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from latentmas_kernels.errors import LatentMASError

if TYPE_CHECKING:
    from latentmas_kernels.alignment import Aligner, build_aligner
    from latentmas_kernels.cache import LatentCache, Segment
    from latentmas_kernels.diagnostics import Report, doctor
    from latentmas_kernels.generation import generate, latent_generate
    from latentmas_kernels.hf import accelerate, restore
    from latentmas_kernels.models.architecture import UnsupportedModelError
    from latentmas_kernels.outputs import GenerateOutput, LatentOutput, Metrics

__version__ = "0.1.0"

_MODULES = {
    "Aligner": "alignment",
    "GenerateOutput": "outputs",
    "LatentCache": "cache",
    "LatentOutput": "outputs",
    "Metrics": "outputs",
    "Report": "diagnostics",
    "Segment": "cache",
    "UnsupportedModelError": "models.architecture",
    "accelerate": "hf",
    "build_aligner": "alignment",
    "doctor": "diagnostics",
    "generate": "generation",
    "latent_generate": "generation",
    "restore": "hf",
}

__all__ = ["LatentMASError", *_MODULES]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; the command line reads chain files and prints --help without them.
    if name not in _MODULES:
        raise AttributeError(f"module 'latentmas_kernels' has no attribute {name!r}")
    return getattr(import_module(f"latentmas_kernels.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
