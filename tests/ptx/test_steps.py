"""Whole decode steps of a two-layer model as compiled, two in a row, against the eager engine on the same KV cache."""

import copy
from typing import Any

import pytest
import torch
from launches import Recording, gpu
from numerics import assert_as_good_as_torch, normal
from tiny_models import tiny_model
from torch import Tensor

from latentmas_kernels.alignment import Aligner
from latentmas_kernels.cache.latent_cache import LatentCache
from latentmas_kernels.engines.base import LatentParams
from latentmas_kernels.engines.cuda_step import DecodeStep
from latentmas_kernels.engines.eager import EagerEngine
from latentmas_kernels.inputs import Prompt
from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.models.packed_weights import pack_weights

STEPS, SLOTS, WIDTH, VOCAB = 2, 192, 96, 97
LENGTHS = [70, 37, 130, 5, 64, 65, 1, 90]
PRECISIONS = [torch.bfloat16, torch.float32]


def model_of(dtype: torch.dtype) -> Any:
    """Widths that are no powers of two; norms per head; windows in one of the layers."""
    return tiny_model(
        "qwen3-mixed", hidden_size=WIDTH, intermediate_size=144, num_hidden_layers=2, head_dim=32, sliding_window=48,
        layer_types=["sliding_attention", "full_attention"],
    ).to(dtype)  # fmt: skip


@torch.no_grad()
def filled(model: Any, batch: int) -> tuple[EagerEngine, LatentCache, Tensor]:
    """The eager engine, a cache with NaN behind the length of every row, and the states at their ends."""
    engine = EagerEngine(model, Architecture.of(model))
    cache = LatentCache.for_model(engine.architecture, batch, SLOTS)
    cache.buffer.fill_(float("nan"))
    lengths = torch.tensor(LENGTHS[:batch])
    ids = torch.randint(3, VOCAB, (batch, int(lengths.max())), generator=torch.Generator().manual_seed(1))
    return engine, cache, engine.extend(cache, Prompt(lengths, input_ids=ids), logits=False)


def exact_engine(model: Any, cache: LatentCache) -> tuple[EagerEngine, LatentCache]:
    """The same model and cache in float64."""
    double = copy.deepcopy(model).double()
    engine = EagerEngine(double, Architecture.of(double))
    wide = LatentCache.for_model(engine.architecture, len(cache.lengths), SLOTS)
    counts = cache.lengths.clone()
    # A prompt of the same lengths makes the bookkeeping; the contents are those of the cache.
    with torch.no_grad():
        ids = torch.full((len(counts), int(counts.max())), 5)
        engine.extend(wide, Prompt(counts, input_ids=ids), logits=False)
    wide.buffer.copy_(cache.buffer.double().nan_to_num(0))
    return engine, wide


def recorded(recording: Recording, cache: LatentCache, **tensors: Tensor) -> None:
    """Name what the step reaches through its table of addresses."""
    recording.know("KV buffer", cache.buffer)
    recording.know("positions", cache.positions)
    for name, tensor in tensors.items():
        recording.know(name, tensor)


@pytest.mark.parametrize("with_weight", [False, True], ids=["identity", "ridge"])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_latent_steps(batch, dtype, with_weight):
    model = model_of(dtype)
    eager, cache, seed = filled(model, batch)
    weight = normal(WIDTH, WIDTH, seed=9, scale=WIDTH**-0.5) if with_weight else None
    aligner = Aligner("ridge" if with_weight else "identity", 3.0, weight=weight)
    params = LatentParams(torch.full((batch,), STEPS))
    exact, wide = exact_engine(model, cache)
    with torch.no_grad():
        plain = eager.run_latent(cache.fork(SLOTS), seed.clone(), aligner, params, None)
        want = exact.run_latent(wide, seed.double(), aligner, params, None)

    ours, log = cache.fork(SLOTS), torch.full((batch, STEPS, WIDTH), float("nan"), dtype=dtype)
    for row, length in enumerate(LENGTHS[:batch]):
        ours.keys[:, row, :, length:] = ours.values[:, row, :, length:] = float("nan")
    weights = pack_weights(model, eager.architecture)
    step = DecodeStep(weights, eager.architecture, batch, gpu(90))
    step.bind(ours, slice(0, batch), torch.ones(batch, dtype=torch.bool), log, params)
    step.hidden.copy_(seed)
    with Recording(90) as recording:
        for _ in range(STEPS):
            step.latent(weights, aligner)
    recorded(recording, ours, log=log)
    recording.run_seeds(2)
    assert_as_good_as_torch(step.hidden, plain.last_hidden, want.last_hidden)
    assert_as_good_as_torch(log, plain.latents, want.latents)
    assert step.lengths.tolist() == [length + STEPS for length in LENGTHS[:batch]]
    for row, length in enumerate(LENGTHS[:batch]):
        assert ours.positions[row, length : length + STEPS].tolist() == [length, length + 1]
        assert ours.keys[:, row, :, length : length + STEPS].isfinite().all()
        assert ours.keys[:, row, :, length + STEPS :].isnan().all()


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_token_steps(batch, dtype, do_sample):
    """One row has ended: it stores nothing but padding."""
    model = model_of(dtype)
    eager, cache, _ = filled(model, batch)
    active = torch.arange(batch) != 1
    first = torch.arange(10, 10 + batch)
    ours, log = cache.fork(SLOTS), torch.full((batch, STEPS), -9)
    for row, length in enumerate(LENGTHS[:batch]):
        ours.keys[:, row, :, length:] = ours.values[:, row, :, length:] = float("nan")
    weights = pack_weights(model, eager.architecture)
    step = DecodeStep(weights, eager.architecture, batch, gpu(90))
    step.allocate(do_sample=do_sample)
    step.settings.set(0.8, 5, 0.9, 1234, 0, 0, [])
    step.bind(ours, slice(0, batch), active, log)
    step.token_ids.copy_(first)
    with Recording(90) as recording:
        for _ in range(STEPS):
            step.token(weights, do_sample=do_sample)
    recorded(recording, ours, log=log)
    recording.run_seeds(2)

    exact, wide = exact_engine(model, cache)
    plain_cache, tokens = cache.fork(SLOTS), first
    with torch.no_grad():
        for i in range(STEPS):
            prompt = Prompt(active.long(), tokens[:, None])
            plain = eager.extend(plain_cache, prompt, logits=True)
            want = exact.extend(wide, prompt, logits=True)
            tokens = log[:, i]
            if not do_sample:
                assert torch.equal(tokens[active], plain.argmax(-1)[active])
    # Ours are float32 also where the model is not.
    assert_as_good_as_torch(step.logits[active].to(dtype), plain[active], want[active])
    assert (log[~active] == 0).all()
    assert step.lengths.tolist() == [n + STEPS * int(a) for n, a in zip(LENGTHS, active, strict=False)]
