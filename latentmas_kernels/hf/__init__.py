"""Drop-in for programs that use transformers: accelerate(model), latent_decode, ModelWrapper."""

from latentmas_kernels.hf.accelerated import accelerate, restore
from latentmas_kernels.hf.decode import latent_decode
from latentmas_kernels.hf.wrapper import ModelWrapper

__all__ = ["ModelWrapper", "accelerate", "latent_decode", "restore"]
