"""The KV cache that agents hand on: a preallocated buffer, edits, files, and the way to and from transformers."""

from latentmas_kernels.cache.latent_cache import LatentCache
from latentmas_kernels.cache.segments import Segment

__all__ = ["LatentCache", "Segment"]
