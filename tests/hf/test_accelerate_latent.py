"""Latent steps before decoding: generate(latent_steps=) of an accelerated model, and latent_decode."""

import functools

import pytest
import torch
from plain_and_accelerated import LENGTHS, Forced, Recorder
from tiny_models import ragged, real
from transformers import (
    DynamicCache,
    GenerationConfig,
)

from latentmas_kernels import LatentCache, latent_generate
from latentmas_kernels.hf import accelerate, latent_decode


@pytest.mark.parametrize("kind", ["ridge", "soft"])
@pytest.mark.parametrize(
    "options", [{}, {"logits_processor": [Forced()]}, {"output_scores": True}], ids=["alone", "processor", "scores"]
)
def test_latent_steps_before_decoding(pair, batch, kind, options):
    """The text continues latent_generate's cache: its last state chooses the first token."""
    accelerate(pair.ours, aligner=kind)
    got = pair.ours.generate(
        **batch, latent_steps=5, max_new_tokens=6, eos_token_id=None, return_dict_in_generate=True, **options
    )
    latent = latent_generate(pair.plain, **batch, latent_steps=5, aligner=kind, engine="eager")
    assert isinstance(got.past_key_values, LatentCache)
    assert got.past_key_values.lengths.tolist() == [n + 5 + 5 for n in LENGTHS]
    assert [s.kind for s in got.past_key_values.segments] == ["prompt", "latent", "text"]
    logits = pair.plain.get_output_embeddings()(latent.last_hidden)
    if "logits_processor" not in options:
        assert got.sequences[:, -6].tolist() == logits.argmax(-1).tolist()
    assert torch.equal(got.sequences[:, :-6], batch["input_ids"])
    cache = latent.past_key_values
    for layer in range(3):
        for row, n in enumerate(LENGTHS):
            mine, theirs = got.past_key_values.keys[layer, row, :, : n + 5], cache.keys[layer, row, :, : n + 5]
            torch.testing.assert_close(mine, theirs, atol=5e-5, rtol=0)


def test_latent_memory_is_handed_on(pair, batch):
    """Agent two extends agent one's cache, which is not changed; the mask covers the new tokens, or past and new."""
    cache = pair.ours.generate(**batch, latent_steps=3, max_new_tokens=2, return_dict_in_generate=True).past_key_values
    before = cache.lengths.clone()
    new, mask = ragged([4, 2, 6], seed=5)
    got = [
        pair.ours.generate(new, attention_mask=m, past_key_values=cache, latent_steps=2, max_new_tokens=5).tolist()
        for m in (mask, cache.attention_mask(mask))
    ]
    assert got[0] == got[1]
    assert torch.equal(cache.lengths, before)
    for row in range(3):
        alone = pair.ours.generate(
            real(new, mask, row), past_key_values=cache.select([row]), latent_steps=2, max_new_tokens=5
        )
        own = alone[0, -5:].tolist() if alone.shape[1] > 5 else alone[0].tolist()
        assert got[0][row][-5:][: len(own)] == own


def test_latent_steps_extend_the_callers_cache_in_place(pair):
    ids, _ = ragged([6])
    cache = DynamicCache(config=pair.ours.config)
    pair.ours.generate(ids, past_key_values=cache, latent_steps=4, max_new_tokens=3, eos_token_id=None)
    assert cache.get_seq_length() == 6 + 4 + 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "leave one of the two out"),
        ({"prompt_lookup_num_tokens": 2}, "leave one of the two out"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "cannot be taken in this call"),
        ({"latent_steps": -1}, "0 or more"),
        ({"latent_steps": 2.0}, "0 or more"),
        ({"latent_steps": True}, "0 or more"),
    ],
    ids=str,
)
def test_latent_steps_that_cannot_be_taken_are_refused(pair, options, message):
    with pytest.raises(ValueError, match=message):
        pair.ours.generate(ragged([6])[0], max_new_tokens=3, **{"latent_steps": 2, **options})


def test_latent_steps_of_a_configuration(pair, batch):
    want = pair.ours.generate(**batch, latent_steps=3, max_new_tokens=5).tolist()
    config = GenerationConfig(latent_steps=3, max_new_tokens=5, eos_token_id=2, pad_token_id=0)
    assert pair.ours.generate(**batch, generation_config=config).tolist() == want
    with pytest.raises(ValueError, match="latent steps were asked for"):
        pair.ours.generate(**batch, generation_config=config, num_beams=2)
    pair.ours.generation_config.latent_steps = 3
    assert pair.ours.generate(**batch, max_new_tokens=5).tolist() == want
    assert (
        pair.ours.generate(**batch, max_new_tokens=5, latent_steps=0).tolist()
        == pair.plain.generate(**batch, max_new_tokens=5).tolist()
    )


def test_latent_decode_on_a_plain_model(pair, batch):
    """The same without accelerate, by transformers' own way in."""
    decode = functools.partial(latent_decode, aligner="ridge")
    want = accelerate(pair.ours, aligner="ridge").generate(**batch, latent_steps=4, max_new_tokens=6)
    got = pair.plain.generate(**batch, custom_generate=decode, latent_steps=4, max_new_tokens=6)
    assert torch.equal(got, want)
    streamer = Recorder()
    again = pair.plain.generate(
        batch["input_ids"][1:2], custom_generate=functools.partial(latent_decode, streamer=streamer), max_new_tokens=4
    )
    assert streamer.pieces[:-1] == [[t] for t in again[0, -4:].tolist()]
    assert torch.equal(again, pair.plain.generate(batch["input_ids"][1:2], max_new_tokens=4))
    with pytest.raises(ValueError, match="beam search"):
        pair.plain.generate(**batch, custom_generate=latent_decode, num_beams=2, max_new_tokens=3)
