"""Caches with ragged rows, gaps and segments, whose unused slots are poisoned."""

import torch
from tiny_models import tiny_model

from latentmas_kernels import LatentCache
from latentmas_kernels.models.architecture import Architecture

MODELS = {torch.float32: tiny_model("llama"), torch.bfloat16: tiny_model("llama").bfloat16()}


def append(cache, counts, kind, draw):
    """Random keys and values for counts[b] more positions of each row."""
    counts = torch.tensor(counts)
    start, slots = cache.lengths, cache.reserve(counts, max(1, int(counts.max())))
    for layer in range(len(cache)):
        states = [torch.randn(len(counts), 2, max(1, int(counts.max())), 16, generator=draw) for _ in range(2)]
        cache.write(layer, *(s.to(cache.keys.dtype) for s in states), slots)
    cache.advance(counts)
    cache.add_segment(kind, start)


def poisoned(batch, capacity, dtype=torch.float32):
    """An empty cache of the tiny model whose unused slots would be noticed."""
    cache = LatentCache.for_model(Architecture.of(MODELS[dtype]), batch, capacity)
    cache.buffer.fill_(float("nan"))
    cache.positions.fill_(-77)
    return cache


def example(dtype=torch.float32):
    """Ragged rows with a gap in the positions of one, and three segments."""
    draw = torch.Generator().manual_seed(0)
    cache = poisoned(3, 16, dtype)
    append(cache, [4, 2, 1], "prompt", draw)
    cache.next_position = cache.next_position + torch.tensor([0, 5, 0])
    append(cache, [3, 3, 3], "latent", draw)
    cache.name_segments("planner")
    append(cache, [2, 0, 1], "text", draw)
    return cache
