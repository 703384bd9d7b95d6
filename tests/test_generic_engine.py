"""The generic tier against the eager engine, with plain calls for graphs: models that no packed family covers."""

import pytest
import torch
from conftest import FAMILIES, OTHERS, ragged, tiny_model

from latentmas_kernels import build_aligner, generate, latent_generate
from latentmas_kernels.architecture import Architecture
from latentmas_kernels.engines import EagerEngine, GenericEngine, generic
from latentmas_kernels.engines.once import warn_once
from latentmas_kernels.prompt import Prompt


def both(model):
    architecture = Architecture.of(model)
    return GenericEngine(model, architecture), EagerEngine(model, architecture)


def read(model, lengths, room=40):
    ids, mask = ragged(lengths)
    return latent_generate(model, ids, mask, latent_steps=0, max_cache_len=room, engine="eager")


def assert_same(ours, theirs):
    assert ours.lengths.tolist() == theirs.lengths.tolist()
    for row, length in enumerate(ours.lengths.tolist()):
        assert torch.equal(ours.positions[row, :length], theirs.positions[row, :length])
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(a[:, row, :, :length], b[:, row, :, :length], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*OTHERS, "qwen3-mixed"])
@torch.no_grad()
def test_latent_and_token_steps_equal_eager(name):
    """Ragged rows whose unused slots hold NaN, windows that the memory outgrows, a row that sits steps out."""
    model = tiny_model(name)
    engine, eager = both(model)
    start = read(model, [12, 5, 9])
    aligner = build_aligner(model, "identity")
    caches = [start.past_key_values.fork(40) for _ in range(2)]
    for cache in caches:
        for row, length in enumerate(cache.lengths.tolist()):
            cache.keys[:, row, :, length:] = cache.values[:, row, :, length:] = float("nan")
    ours, theirs = (
        e.think(c, start.last_hidden, aligner, 3, None) for e, c in zip((engine, eager), caches, strict=True)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    for counts in ([1, 1, 1], [1, 0, 1], [0, 0, 1]):
        prompt = Prompt(torch.tensor(counts), torch.tensor([[5], [6], [7]]))
        a, b = (e.extend(c, prompt, logits=True) for e, c in zip((engine, eager), caches, strict=True))
        torch.testing.assert_close(a[prompt.counts > 0], b[prompt.counts > 0], rtol=1e-4, atol=5e-5)
        assert_same(*caches)


@torch.no_grad()
def test_soft_feedback_equals_eager():
    model = tiny_model("gemma3")
    engine, eager = both(model)
    aligner = build_aligner(model, "soft")
    ids, mask = ragged([6, 3])
    seen = []
    caches = [read(model, [6, 3]).past_key_values.fork(20) for _ in range(2)]
    seed = eager.extend(caches[0].fork(20), Prompt(torch.tensor([1, 1]), torch.tensor([[4], [5]])), logits=True)
    ours = engine.think(caches[0], seed, aligner, 3, seen.append)
    theirs = eager.think(caches[1], seed, aligner, 3, None)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    assert seen == [0, 1, 2]
    assert_same(*caches)


@torch.no_grad()
def test_windows_are_kept_and_caches_told_apart():
    """A larger memory takes a larger window, a smaller one reuses what is there; another cache is copied in again."""
    model = tiny_model("olmo2")
    engine, eager = both(model)
    aligner = build_aligner(model, "identity")
    for lengths, room in (([4, 6], 20), ([300, 20], 320), ([5, 2], 20), ([4, 6], 20)):
        start = read(model, lengths, room)
        caches = [start.past_key_values.fork(room) for _ in range(2)]
        for _ in range(2):
            ours, theirs = (
                e.think(c, start.last_hidden, aligner, 1, None) for e, c in zip((engine, eager), caches, strict=True)
            )
            torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=2e-5)
    assert sorted(engine.state.windows) == [(2, 256), (2, 512)]
    assert len(engine.state.graphs) == 2


@torch.no_grad()
def test_a_forward_that_cannot_be_captured_runs_eagerly(monkeypatch):
    model = tiny_model("olmo2")
    engine, eager = both(model)

    def refuse(body):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(engine.state, "capture", refuse)
    refuse.release = lambda: None
    start = read(model, [4])
    warn_once.cache_clear()
    with pytest.warns(
        RuntimeWarning, match=r"could not be captured \(operation not permitted when stream is capturing\)"
    ):
        ours = engine.think(
            start.past_key_values.fork(20), start.last_hidden, build_aligner(model, "identity"), 2, None
        )
    theirs = eager.think(start.past_key_values.fork(20), start.last_hidden, build_aligner(model, "identity"), 2, None)
    assert torch.equal(ours[0], theirs[0])
    assert not engine.state.windows


def test_what_is_no_candidate_says_why():
    model = tiny_model("gpt2")
    architecture = Architecture.of(model)
    assert generic.why_not(model, architecture) == "the model is on cpu, not on a CUDA device"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["gemma3", "gpt2", "olmo2"])
def test_on_a_device_chains_equal_eager(name):
    assert name not in FAMILIES
    model = tiny_model(name).cuda()
    ids, mask = (t.cuda() for t in ragged([7, 4]))
    out = {}
    for engine in ("cuda", "eager"):
        thought = latent_generate(model, ids, mask, latent_steps=3, aligner="identity", engine=engine)
        out[engine] = generate(
            model, ids, mask, past_key_values=thought.past_key_values, max_new_tokens=6, engine=engine
        )
    assert out["cuda"].metrics.engine == "cuda (generic)"
    assert torch.equal(out["cuda"].sequences, out["eager"].sequences)
