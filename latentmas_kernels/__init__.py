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
    "alignment": "Aligner build_aligner",
    "cache": "LatentCache Segment",
    "diagnostics": "Report doctor",
    "generation": "generate latent_generate",
    "hf": "accelerate restore",
    "models.architecture": "UnsupportedModelError",
    "outputs": "GenerateOutput LatentOutput Metrics",
}
_SUBMODULES = ("alignment", "cache", "diagnostics", "engines", "generation", "hf", "models", "ops", "outputs", "trace")
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = ["LatentMASError", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; the command line reads chain files and prints --help without them.
    if name in _SUBMODULES:
        return import_module(f"latentmas_kernels.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'latentmas_kernels' has no attribute {name!r}")
    return getattr(import_module(f"latentmas_kernels.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
