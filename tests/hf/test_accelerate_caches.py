"""Caches in and out of an accelerated model's generate(), and the calls that it leaves to transformers."""

import copy
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from plain_and_accelerated import Pair
from tiny_models import ragged, tiny_model
from torch import Tensor
from transformers import (
    DynamicCache,
    StaticCache,
)

from latentmas_kernels.hf import accelerate

# ---- caches ---------------------------------------------------------------------------------------------------------


def caches(model: Any) -> dict[str, Any]:
    return {"dynamic": DynamicCache(config=model.config), "static": StaticCache(model.config, max_cache_len=60)}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "qwen3-mixed"])
@torch.no_grad()
def test_conversation_in_one_cache_changing_hands(monkeypatch, name, kind):
    """Four turns in one cache of transformers, extended in place: every second one by us, none of them noticed."""
    pair = Pair(name, monkeypatch)
    turns = [ragged([6, 6], seed=s)[0] for s in range(4)]
    histories = []
    for models in ((pair.plain,) * 4, (pair.ours, pair.plain) * 2, (pair.plain, pair.ours) * 2, (pair.ours,) * 4):
        cache, history = caches(pair.plain)[kind], torch.empty(2, 0, dtype=torch.int64)
        for model, turn in zip(models, turns, strict=True):
            whole = torch.cat([history, turn], dim=1)
            history = model.generate(
                whole, past_key_values=cache, max_new_tokens=5, eos_token_id=[12, 30], pad_token_id=1
            )
            assert cache.get_seq_length() == history.shape[1] - 1
        histories.append(history)
    assert all(torch.equal(h, histories[0]) for h in histories[1:])
    assert not pair.left


def test_new_tokens_only_with_a_mask_over_the_past(pair, batch):
    first = pair.generate(**batch, max_new_tokens=4, return_dict_in_generate=True, eos_token_id=None)
    new = torch.tensor([[5, 6], [7, 8], [9, 10]])
    answers = []
    for model, out in zip((pair.plain, pair.ours), first, strict=True):
        seen = torch.cat([batch["attention_mask"], torch.ones(3, 3 + 2, dtype=torch.int64)], dim=1)
        answers.append(
            model.generate(new, attention_mask=seen, past_key_values=out.past_key_values, max_new_tokens=6).tolist()
        )
    assert answers[0] == answers[1]


def test_cache_that_does_not_go_with_the_ids_fails_as_in_transformers(pair, batch):
    """New tokens without a mask over the past: transformers takes them for the whole conversation, which is shorter."""
    errors = []
    for model in (pair.plain, pair.ours):
        out = model.generate(**batch, max_new_tokens=9, return_dict_in_generate=True, eos_token_id=None)
        with pytest.raises(RuntimeError) as caught:
            model.generate(torch.tensor([[5]] * 3), past_key_values=out.past_key_values, max_new_tokens=3)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_without_use_cache(pair, batch):
    pair.assert_same(**batch, max_new_tokens=6, use_cache=False)
    want, got = pair.generate(**batch, max_new_tokens=6, use_cache=False, return_dict_in_generate=True)
    assert got.past_key_values is None
    assert want.past_key_values is None


def test_cache_implementation_by_name(pair, batch):
    want, got = pair.generate(**batch, max_new_tokens=6, cache_implementation="static", return_dict_in_generate=True)
    assert isinstance(got.past_key_values, StaticCache)
    assert got.past_key_values.get_seq_length() == want.past_key_values.get_seq_length()
    assert not pair.left


def test_past_of_another_model_is_refused(pair):
    other = tiny_model("llama", num_key_value_heads=4)
    ids, _ = ragged([5])
    past = other.generate(ids, max_new_tokens=2, return_dict_in_generate=True).past_key_values
    with pytest.raises(ValueError, match="another model: kv_heads 4 instead of 2"):
        pair.ours.generate(torch.cat([ids, ids], 1), past_key_values=past, max_new_tokens=3)


# ---- what is left to transformers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"num_beams": 3}, "beam search"),
        ({"num_beams": 2, "do_sample": True}, "beam search"),
        ({"prompt_lookup_num_tokens": 2}, "assisted decoding"),
        ({"prefill_chunk_size": 4, "max_new_tokens": 6}, "prefill_chunk_size"),
    ],
    ids=["beams", "beam sampling", "prompt lookup", "chunked prefill"],
)
def test_left_to_transformers(pair, options, left):
    ids, _ = ragged([8])
    pair.assert_same(ids, **{"max_new_tokens": 8, **options}, left=left)


def test_a_buffer_that_does_not_fit_is_left_to_a_cache_that_grows(pair, batch, monkeypatch):
    """max_new_tokens is often a generous limit: transformers' cache takes only what the text comes to."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=50_000))
    pair.assert_same(**batch, max_new_tokens=40, left="slots needs")
    with pytest.raises(ValueError, match="latent_steps=2 cannot be taken in this call, since a cache of 3 rows"):
        pair.ours.generate(**batch, max_new_tokens=40, latent_steps=2)


def test_assisted_decoding_by_an_accelerated_assistant(pair):
    assistant = accelerate(tiny_model("llama", num_hidden_layers=1))
    ids, _ = ragged([8])
    want = pair.plain.generate(ids, max_new_tokens=10)
    assert torch.equal(pair.ours.generate(ids, max_new_tokens=10, assistant_model=assistant), want)
    assert any("assisted decoding" in reason for reason in pair.left)


def test_engine_by_name_does_not_fall_back(pair, batch):
    native = accelerate(copy.deepcopy(pair.plain), engine="native")
    assert torch.equal(native.generate(**batch, max_new_tokens=5), pair.plain.generate(**batch, max_new_tokens=5))
    with pytest.raises(ValueError, match=r"engine='native' does not cover this call, since prefill_chunk_size"):
        native.generate(**batch, max_new_tokens=5, prefill_chunk_size=2)
    with pytest.raises(ValueError, match="supported are"):
        accelerate(pair.plain, engine="fast")


def test_engine_by_name_refuses_beams_too(pair):
    native = accelerate(copy.deepcopy(pair.plain), engine="native")
    with pytest.raises(ValueError, match="engine='native' does not cover beam search"):
        native.generate(ragged([6])[0], max_new_tokens=3, num_beams=2)


def test_synced_gpus_are_left_to_transformers(pair, batch):
    for model in (pair.plain, pair.ours):
        with pytest.raises(ValueError, match="process group"):
            model.generate(**batch, max_new_tokens=3, synced_gpus=True)
    assert "in step" in pair.left[-1]


def test_autocast_is_left_to_transformers(pair, batch):
    with torch.autocast("cpu", torch.bfloat16):
        pair.assert_same(**batch, max_new_tokens=6, left="autocast")


class Sink(DynamicCache):
    """A cache with an update() of its own: keeps the last four tokens."""

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(keys, values, layer, *args, **kwargs)
        return keys[:, :, -4:], values[:, :, -4:]


def test_cache_of_the_callers_own_kind_is_left_to_transformers(pair):
    answers = []
    for model in (pair.plain, pair.ours):
        cache = Sink(config=model.config)
        try:
            answers.append(model.generate(ragged([1])[0], past_key_values=cache, max_new_tokens=3).tolist())
        except RuntimeError as error:  # what its masks make of it is transformers' affair
            answers.append(str(error))
    assert answers[0] == answers[1]
    assert "Sink" in pair.left[-1]


def test_latent_cache_is_no_cache_for_other_loops(pair):
    cache = pair.ours.generate(ragged([6])[0], latent_steps=2, max_new_tokens=2, return_dict_in_generate=True)
    past = cache.past_key_values
    for options in ({"num_beams": 2}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="give it to_hf"):
            pair.ours.generate(
                torch.tensor([[5]]), attention_mask=past.attention_mask(torch.ones(1, 1)), past_key_values=past,
                max_new_tokens=3, **options,
            )  # fmt: skip
