"""The KV cache that agents pass on: a preallocated buffer, edits, files, and conversion to and from transformers."""

from latentmas_kernels.cache.edits import CacheSlice
from latentmas_kernels.cache.latent_cache import LatentCache
from latentmas_kernels.cache.segments import Segment

__all__ = ["CacheSlice", "LatentCache", "Segment"]
