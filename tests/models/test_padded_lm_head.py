"""An lm_head with more rows than the input embedding: what has no embedding is never chosen, mixed or shown."""

import pytest
import torch
from tiny_models import VOCAB, PlainLoop, feed_back, ragged, real, tiny_model
from torch import nn

from latentmas_kernels import accelerate, build_aligner, generate, latent_generate
from latentmas_kernels.engines import EagerEngine, HFGraphEngine, LatentParams
from latentmas_kernels.inputs import Prompt
from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.trace import trace_of
from latentmas_kernels.warn_once import warn_once

MORE = 40
ENGINES = ["eager", "native"]


@torch.no_grad()
def padded_model(name="llama", *, bias=False):
    """A model, and the same one with rows behind its lm_head that would win every choice."""
    plain, padded = tiny_model(name), tiny_model(name)
    for model in (plain, padded):
        model.generation_config.eos_token_id = None
        if bias:
            model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, VOCAB))
    width = padded.config.hidden_size
    head = nn.Linear(width, VOCAB + MORE, bias=bias)
    head.weight[:VOCAB] = padded.lm_head.weight
    head.weight[VOCAB:] = 20 * torch.randn(MORE, width, generator=torch.Generator().manual_seed(0))
    if bias:
        head.bias[:VOCAB], head.bias[VOCAB:] = padded.lm_head.bias, 90.0
    padded.lm_head = head
    return plain, padded.eval()


def test_the_rows_behind_would_win():
    """Plain transformers looks one of them up in the embedding, and fails."""
    _, padded = padded_model()
    ids, _ = ragged([5])
    assert int(padded(input_ids=ids).logits[0, -1].argmax()) >= VOCAB
    with pytest.raises(IndexError):
        padded.generate(ids, max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_text_is_that_of_the_model_without_them(name, engine, bias):
    plain, padded = padded_model(name, bias=bias)
    ids, mask = ragged([3, 7, 5])
    want = generate(plain, ids, mask, max_new_tokens=8, engine="eager").sequences
    assert torch.equal(generate(padded, ids, mask, max_new_tokens=8, engine=engine).sequences, want)
    for row in range(3):
        loop = PlainLoop(plain, feed_back(plain, "identity"))
        assert loop.decode(real(ids, mask, row), 8) == want[row, -8:].tolist()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("options", [{"top_k": None}, {"top_k": 5}, {"top_p": 0.9}, {"temperature": 3.0}], ids=str)
def test_sampling_draws_what_the_model_without_them_draws(engine, options):
    plain, padded = padded_model()
    ids, mask = ragged([3, 7, 5])
    drawn = []
    for model in (plain, padded):
        torch.manual_seed(3)
        drawn.append(generate(model, ids, mask, max_new_tokens=12, do_sample=True, engine=engine, **options).sequences)
    assert torch.equal(*drawn)
    assert int(drawn[1].max()) < VOCAB


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["auto", "soft", "ridge"])
def test_latents_are_those_of_the_model_without_them(kind, engine):
    plain, padded = padded_model()
    ids, mask = ragged([3, 7, 5])
    want, got = (
        latent_generate(model, ids, mask, latent_steps=5, aligner=kind, engine=engine, output_states=True)
        for model in (plain, padded)
    )
    assert got.metrics.aligner == want.metrics.aligner
    torch.testing.assert_close(got.latents, want.latents, rtol=1e-4, atol=1e-5)
    shown = [trace_of(model, output, top_k=VOCAB) for model, output in ((plain, want), (padded, got))]
    assert torch.equal(shown[0].tokens[..., :5], shown[1].tokens[..., :5])
    assert int(shown[1].tokens.max()) < VOCAB
    with pytest.raises(ValueError, match=f"top_k must be an integer from 1 to {VOCAB}"):
        trace_of(padded, got, top_k=VOCAB + 1)


def test_auto_measures_the_same():
    plain, padded = padded_model()
    want, got = build_aligner(plain, "auto"), build_aligner(padded, "auto")
    assert (got.kind, got.kl_nats) == (want.kind, pytest.approx(want.kl_nats))


@pytest.mark.parametrize("bos", [VOCAB + 3, [VOCAB + 3]])
def test_auto_begins_with_a_token_that_there_is(bos):
    _, padded = padded_model()
    padded.generation_config.bos_token_id = bos
    assert build_aligner(padded, "auto").kl_nats


def test_latents_for_another_model_are_made_of_tokens_that_there_are():
    """Of the first step and of all others alike, although the other model has an embedding for each row."""
    plain, padded = padded_model()
    other = tiny_model("llama", vocab_size=VOCAB + MORE)
    ids, mask = ragged([3, 7])
    crossed = [
        latent_generate(
            model, ids, mask, latent_steps=4, aligner="soft", cross=[build_aligner(model, "soft", target_model=other)]
        ).crossed[0]
        for model in (plain, padded)
    ]
    torch.testing.assert_close(crossed[0], crossed[1], rtol=1e-4, atol=1e-5)


def test_accelerated_models_write_the_same_and_leave_scores_to_transformers():
    plain, padded = padded_model()
    ids, _ = ragged([5])
    options = {"max_new_tokens": 6, "do_sample": False}
    want = plain.generate(ids, **options)
    accelerate(padded)
    assert torch.equal(padded.generate(ids, **options), want)
    warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="scores of tokens that have no input embedding"), pytest.raises(IndexError):
        padded.generate(ids, **options, output_logits=True, return_dict_in_generate=True)


def test_a_smaller_lm_head_is_as_it_was():
    """The embedding may have more rows than the lm_head: no token is chosen of those."""
    model = tiny_model("llama")
    model.lm_head = nn.Linear(model.config.hidden_size, VOCAB - 20, bias=False)
    model.eval()
    model.generation_config.eos_token_id = None
    ids, mask = ragged([3, 7])
    token_ids = [generate(model, ids, mask, max_new_tokens=6, engine=engine).sequences for engine in ENGINES]
    assert torch.equal(*token_ids)
    latents = [latent_generate(model, ids, mask, latent_steps=4, aligner="soft", engine=e).latents for e in ENGINES]
    torch.testing.assert_close(*latents, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_generic_tier_leaves_them_out():
    """With plain calls for graphs, as on a CUDA device."""
    plain, padded = padded_model()
    ids, mask = ragged([3, 7])
    outcomes = []
    for kind, model in ((EagerEngine, plain), (HFGraphEngine, padded)):
        engine = kind(model, Architecture.of(model))
        cache = latent_generate(model, ids, mask, latent_steps=0, max_cache_len=20, engine="eager").past_key_values
        logits = engine.extend(cache, Prompt(torch.ones(2, dtype=torch.int64), ids[:, -1:]), logits=True)
        latent_params = LatentParams(torch.tensor([3, 3]))
        latent_output = engine.run_latent(cache, logits, build_aligner(model, "soft"), latent_params, None)
        outcomes.append((logits, latent_output.latents))
    for want, got in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
