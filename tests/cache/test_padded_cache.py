"""to_hf() knows its padding: in this package's calls without a mask, in plain transformers as right texts or an error."""

import copy
import pickle
import re

import pytest
import torch
from tiny_models import FAMILIES, ragged, real, tiny_model
from tokenizers_offline import character_tokenizer
from transformers import DynamicCache, masking_utils

from latentmas_kernels import LatentCache, accelerate, generate, latent_generate
from latentmas_kernels.cache.padded_cache import PaddedCache, real_columns
from latentmas_kernels.hf import ModelWrapper
from latentmas_kernels.warn_once import warn_once

LENGTHS, NEXT = [3, 14, 1, 6], [2, 5, 1, 3]
NEW = 8
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CONTRADICTED = (
    r"has \[16, 16, 16, 16\] ones over the past, but the cache holds \[5, 16, 3, 8\] tokens in its 16 columns"
)


def model_and_cache(name="llama"):
    """A model that stops nowhere, and a ragged cache of it: 5, 16, 3 and 8 tokens."""
    model = tiny_model(name)
    model.generation_config.eos_token_id = None
    ids, mask = ragged(LENGTHS)
    return model, latent_generate(model, ids, mask, latent_steps=2, aligner="ridge").past_key_values


def ones_over_both(latent_cache, new_mask):
    """The mask that published code makes."""
    return torch.cat([torch.ones_like(latent_cache.attention_mask()), new_mask], 1)


def new_tokens(sequences):
    return sequences[:, -NEW:].tolist()


# ---- our own calls -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3-mixed", "gpt2"])
@pytest.mark.parametrize("given", ["none", "new", "both"])
@pytest.mark.filterwarnings("ignore:.*runs on the eager engine:RuntimeWarning")
@torch.no_grad()
def test_our_calls_need_no_mask_over_it(name, given):
    model, latent_cache = model_and_cache(name)
    new, new_mask = ragged([5, 5, 5, 5] if given == "none" else NEXT, seed=2)
    mask = {"none": None, "new": new_mask, "both": latent_cache.attention_mask(new_mask)}[given]
    engine = "auto" if name in FAMILIES else "eager"
    wrapper = ModelWrapper(model, character_tokenizer(pad=False), aligner="ridge", engine=engine)
    for call in (
        lambda past: wrapper.generate_text_batch(new, mask, past_key_values=past, max_new_tokens=NEW, temperature=0)[0],
        lambda past: new_tokens(
            generate(model, new, mask, past_key_values=past, max_new_tokens=NEW, engine=engine).sequences
        ),
        lambda past: wrapper.generate_latent_batch(new, mask, latent_steps=2, past_key_values=past).lengths.tolist(),
        lambda past: wrapper.generate_latent_batch_hidden_state(new, mask, latent_steps=2, past_key_values=past)[
            1
        ].tolist(),
    ):
        assert call(latent_cache.to_hf()) == call(latent_cache)


@torch.no_grad()
def test_our_calls_refuse_a_mask_that_contradicts_it():
    model, latent_cache = model_and_cache()
    new, new_mask = ragged(NEXT, seed=2)
    wrapper = ModelWrapper(model, character_tokenizer(pad=False), aligner="ridge")
    ones, fewer = ones_over_both(latent_cache, new_mask), latent_cache.attention_mask(new_mask)
    fewer[1, 0] = 0
    for mask, words in ((ones, CONTRADICTED), (fewer, r"has \[5, 15, 3, 8\] ones .* holds \[5, 16, 3, 8\] tokens")):
        for call in (
            lambda past, mask=mask: wrapper.generate_text_batch(new, mask, past_key_values=past),
            lambda past, mask=mask: wrapper.generate_latent_batch(new, mask, latent_steps=1, past_key_values=past),
            lambda past, mask=mask: latent_generate(model, new, mask, past_key_values=past),
            lambda past, mask=mask: LatentCache.from_hf(past, mask[:, :16]),
        ):
            with pytest.raises(ValueError, match=words):
                call(latent_cache.to_hf())


@torch.no_grad()
def test_what_was_rebuilt_from_its_tensors_is_understood_too():
    """Old code takes caches to pieces; columns of zeros are padding in any cache, other padding needs the mask."""
    model, latent_cache = model_and_cache()
    new, new_mask = ragged(NEXT, seed=2)
    theirs = latent_cache.to_hf()
    plain = DynamicCache(ddp_cache_data=[(layer.keys.clone(), layer.values.clone()) for layer in theirs.layers])
    want = new_tokens(generate(model, new, new_mask, past_key_values=latent_cache, max_new_tokens=NEW).sequences)
    warn_once.cache_clear()
    with pytest.warns(
        RuntimeWarning, match=r"\[11, 13, 8\] columns in the rows \[0, 2, 3\] of a DynamicCache hold zeros"
    ):
        assert new_tokens(generate(model, new, new_mask, past_key_values=plain, max_new_tokens=NEW).sequences) == want
    assert new_tokens(generate(model, new, new_mask, past_key_values=plain, max_new_tokens=NEW).sequences) == want
    with pytest.raises(ValueError, match=CONTRADICTED):
        generate(model, new, ones_over_both(latent_cache, new_mask), past_key_values=plain)
    for layer in plain.layers:  # what transformers' own forward leaves in padding
        layer.keys = layer.keys.masked_fill((latent_cache.attention_mask() == 0)[:, None, :, None], 0.5)
    mask = latent_cache.attention_mask(new_mask)
    assert new_tokens(generate(model, new, mask, past_key_values=plain, max_new_tokens=NEW).sequences) == want


def test_nothing_but_zeros_and_layers_that_were_cut_apart_are_refused():
    _, latent_cache = model_and_cache()
    theirs = latent_cache.to_hf()
    zeros = PaddedCache(ddp_cache_data=[(torch.zeros_like(x.keys), torch.zeros_like(x.values)) for x in theirs.layers])
    with pytest.raises(ValueError, match="this PaddedCache holds nothing but zeros"):
        LatentCache.from_hf(zeros)
    for columns in (15, 17):
        theirs = latent_cache.to_hf()
        layer = theirs.layers[1]
        layer.keys, layer.values = (torch.cat([s, s], 2)[:, :, :columns] for s in (layer.keys, layer.values))
        with pytest.raises(ValueError, match=f"layer 1 of this PaddedCache counts {columns} columns, layer 0 16"):
            LatentCache.from_hf(theirs)


# ---- tokens whose embedding is zero ----------------------------------------------------------------------------------

ZERO = 0  # the token


def with_a_zero_token():
    """As an embedding with a padding_idx: at the beginning of a row such a token leaves zeros in every layer."""
    model = tiny_model("llama")
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.model.embed_tokens.weight[ZERO] = 0
    return model


def cached(model, ids):
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    return cache


BEGINNINGS = torch.tensor([[ZERO, 5, 6, 7, 8], [ZERO, 9, ZERO, 4, 3]])
GOES_ON = torch.tensor([[9, 10], [11, 12]])


def plain_tokens(model, ids):
    ones = torch.ones_like(ids)
    return new_tokens(model.generate(ids, attention_mask=ones, **GREEDY))


@torch.no_grad()
def test_a_mask_tells_that_columns_of_zeros_are_first_tokens():
    model = with_a_zero_token()
    want = plain_tokens(model, torch.cat([BEGINNINGS, GOES_ON], 1))
    ones = torch.ones(2, 7, dtype=torch.int64)
    theirs = cached(model, BEGINNINGS)
    out = generate(model, GOES_ON, ones, past_key_values=theirs, max_new_tokens=NEW)
    assert new_tokens(out.sequences) == want
    assert out.past_key_values.lengths.tolist() == [5 + 2 + NEW - 1] * 2
    latent_cache = LatentCache.from_hf(theirs, ones[:, :5])
    assert new_tokens(generate(model, GOES_ON, past_key_values=latent_cache, max_new_tokens=NEW).sequences) == want
    with accelerate(model):
        whole = torch.cat([BEGINNINGS, GOES_ON], 1)
        assert new_tokens(model.generate(whole, past_key_values=theirs, attention_mask=ones, **GREEDY)) == want


@torch.no_grad()
def test_without_a_mask_they_are_padding_with_one_warning():
    model = with_a_zero_token()
    warn_once.cache_clear()
    theirs = cached(model, BEGINNINGS)
    with pytest.warns(
        RuntimeWarning, match=r"\[1, 1\] columns in the rows \[0, 1\] of a DynamicCache .* A mask over the past"
    ):
        assert LatentCache.from_hf(theirs).lengths.tolist() == [4, 4]
    assert LatentCache.from_hf(theirs).lengths.tolist() == [4, 4], "and no second warning"


@torch.no_grad()
def test_where_a_mask_of_ones_could_be_wrong_the_conversion_takes_it():
    """One row begins with zeros, the other does not: so does a padded batch."""
    model = with_a_zero_token()
    for first in ([[ZERO, 5, 6], [9, 5, 6]], [[ZERO, ZERO, 6], [ZERO, ZERO, 7]]):
        ids = torch.tensor(first)
        theirs, ones = cached(model, ids), torch.ones(2, 5, dtype=torch.int64)
        with pytest.raises(
            ValueError, match=r"pass LatentCache.from_hf\(cache, mask over the past\), which believes the mask"
        ):
            generate(model, GOES_ON, ones, past_key_values=theirs)
        latent_cache = LatentCache.from_hf(theirs, ones[:, :3])
        assert new_tokens(
            generate(model, GOES_ON, past_key_values=latent_cache, max_new_tokens=NEW).sequences
        ) == plain_tokens(model, torch.cat([ids, GOES_ON], 1))


@pytest.mark.parametrize("way", ["to_hf", "hf", "legacy", "forward", "forward, no mask", "converted"])
@torch.no_grad()
def test_a_padded_cache_tells_them_from_padding(way):
    model = with_a_zero_token()
    ids, mask = torch.tensor([[3, 3, ZERO, 4, 5], [ZERO, ZERO, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    if way in ("forward, no mask", "converted"):
        ids, mask = BEGINNINGS, torch.ones_like(BEGINNINGS)
    if way == "to_hf":
        theirs = latent_generate(model, ids, mask, latent_steps=0).past_key_values.to_hf()
    elif way in ("hf", "legacy"):
        wrapper = ModelWrapper(model, character_tokenizer(pad=False), cache=way)
        theirs = wrapper.generate_latent_batch(ids, mask, latent_steps=0)
    elif way == "converted":  # by a call that goes on from a cache of transformers
        wrapper = ModelWrapper(model, character_tokenizer(pad=False), cache="hf")
        both = torch.ones(2, 7, dtype=torch.int64)
        theirs = wrapper.generate_latent_batch(GOES_ON, both, latent_steps=0, past_key_values=cached(model, ids))
        theirs.crop(-2)
    else:
        theirs = PaddedCache()
        given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if way == "forward" else {}
        model(ids, past_key_values=theirs, **given)
    assert torch.equal(theirs.attention_mask(), mask)
    got = new_tokens(generate(model, GOES_ON, past_key_values=theirs, max_new_tokens=NEW).sequences)
    for row in range(2):
        alone = torch.cat([real(ids, mask, row), GOES_ON[row : row + 1]], 1)
        assert got[row] == plain_tokens(model, alone)[0]


# ---- plain transformers --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_plain_generate_with_its_mask_gives_our_texts(family_model):
    family_model.generation_config.eos_token_id = None
    latent_cache = latent_generate(family_model, *ragged(LENGTHS), latent_steps=2, aligner="ridge").past_key_values
    new, _ = ragged([5, 5, 5, 5], seed=2)  # windows are counted in columns, so no padding between
    want = generate(family_model, new, past_key_values=latent_cache, max_new_tokens=NEW).sequences
    theirs = latent_cache.to_hf()
    mask = theirs.attention_mask(torch.ones_like(new))
    assert torch.equal(mask, latent_cache.attention_mask(torch.ones_like(new)))
    assert torch.equal(family_model.generate(new, past_key_values=theirs, attention_mask=mask, **GREEDY), want)
    assert theirs.attention_mask().sum(1).tolist() == [n + 5 + NEW - 1 for n in latent_cache.lengths.tolist()]


@pytest.mark.parametrize("given", ["ones", "new", "none"])
@torch.no_grad()
def test_plain_generate_refuses_other_masks(family_model, given):
    latent_cache = latent_generate(family_model, *ragged(LENGTHS), latent_steps=2, aligner="ridge").past_key_values
    new, new_mask = ragged([5, 5, 5, 5], seed=2)
    theirs = latent_cache.to_hf()
    mask = {
        "ones": {"attention_mask": ones_over_both(latent_cache, new_mask)},
        "new": {"attention_mask": new_mask},
        "none": {},
    }
    with pytest.raises(ValueError, match=r"position_ids|ones over the past|must be") as caught:
        family_model.generate(new, past_key_values=theirs, **mask[given], **GREEDY)
    assert "[5, 16, 3, 8]" in str(caught.value)
    assert "attention_mask(new)" in str(caught.value)
    assert theirs.get_seq_length() == 16, "nothing was added"


@pytest.mark.parametrize("given", ["both", "new", "none"])
@torch.no_grad()
def test_a_plain_forward_needs_positions_and_no_mask(family_model, given):
    latent_cache = latent_generate(family_model, *ragged(LENGTHS), latent_steps=2, aligner="ridge").past_key_values
    new, new_mask = ragged([5, 5, 5, 5], seed=2)
    full = latent_cache.attention_mask(new_mask)
    inputs = {"both": {"attention_mask": full}, "new": {"attention_mask": new_mask}, "none": {}}[given]
    with pytest.raises(ValueError, match=r"position_ids that begin with \[16\]; behind \[5, 16, 3, 8\]"):
        family_model(new, past_key_values=latent_cache.to_hf(), **inputs)
    theirs = latent_cache.to_hf()
    out = family_model(new, past_key_values=theirs, position_ids=(full.cumsum(1) - 1)[:, -5:], **inputs)
    want = generate(family_model, new, past_key_values=latent_cache, max_new_tokens=1, eos_token_id=None)
    assert torch.equal(out.logits[:, -1].argmax(-1), want.sequences[:, -1])
    assert_same_cache(LatentCache.from_hf(theirs), want.past_key_values)


def assert_same_cache(got, want):
    assert torch.equal(got.lengths, want.lengths)
    for row, length in enumerate(want.lengths.tolist()):
        for ours, theirs in ((got.keys, want.keys), (got.values, want.values)):
            assert torch.allclose(ours[:, row, :, :length], theirs[:, row, :, :length], atol=5e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_among_new_tokens_is_known_from_then_on(side):
    """Also where nothing held was padding before."""
    model = tiny_model("llama")
    for lengths in (LENGTHS, [6, 6, 6, 6]):
        latent_cache = latent_generate(model, *ragged(lengths), latent_steps=2, aligner="ridge").past_key_values
        new, new_mask = ragged(NEXT, side=side, seed=2)
        full = latent_cache.attention_mask(new_mask)
        theirs = latent_cache.to_hf()
        positions = (full.cumsum(1) - 1).clamp_min(0)[:, -5:]
        model(new, past_key_values=theirs, attention_mask=full, position_ids=positions)
        assert torch.equal(theirs.attention_mask(), full)
        want = latent_generate(model, new, new_mask, latent_steps=0, past_key_values=latent_cache).past_key_values
        assert_same_cache(LatentCache.from_hf(theirs), want)
        ones = torch.ones(4, theirs.get_seq_length() + 5, dtype=torch.int64)
        with pytest.raises(
            ValueError, match=rf"(behind|holds) {re.escape(str(full.sum(1).tolist()))}( cached)? tokens"
        ):
            model.generate(new, past_key_values=theirs, attention_mask=ones, **GREEDY)


@pytest.mark.parametrize("name", ["mistral-window", "qwen3-mixed"])
@torch.no_grad()
def test_padding_that_would_use_a_window_up_is_refused(name):
    """Windows of 8 columns; within them padding does no harm."""
    model, latent_cache = model_and_cache(name)
    new, new_mask = ragged(NEXT, seed=2)
    mask = latent_cache.attention_mask(new_mask)
    with pytest.raises(ValueError, match=r"row 0 has 7 tokens in 10 columns, .* sliding window of 8 in columns"):
        model.generate(new, past_key_values=latent_cache.to_hf(), attention_mask=mask, **GREEDY)
    short = latent_generate(model, torch.tensor([[5, 6, 7], [8, 9, 10]]), latent_steps=0).past_key_values
    new, new_mask = ragged([3, 1], seed=2)
    one = {**GREEDY, "max_new_tokens": 1}
    got = model.generate(new, past_key_values=short.to_hf(), attention_mask=short.attention_mask(new_mask), **one)
    want = generate(model, new, new_mask, past_key_values=short, max_new_tokens=1).sequences
    assert torch.equal(got[:, -1], want[:, -1])


@torch.no_grad()
def test_where_nothing_is_padding_it_is_a_cache_like_any_other():
    model = tiny_model("llama")
    ids, _ = ragged([5, 5])
    latent_cache = latent_generate(model, ids, latent_steps=2, aligner="ridge").past_key_values
    plain = DynamicCache(ddp_cache_data=[(layer.keys, layer.values) for layer in latent_cache.to_hf().layers])
    for mask in (None, torch.ones(2, 12, dtype=torch.int64)):
        want = model(ids, past_key_values=copy.deepcopy(plain), attention_mask=mask).logits
        assert torch.equal(model(ids, past_key_values=latent_cache.to_hf(), attention_mask=mask).logits, want)
    seen = torch.ones(5, 12, dtype=torch.bool).tril(7)[None, None].expand(2, 1, 5, 12)
    assert torch.allclose(model(ids, past_key_values=latent_cache.to_hf(), attention_mask=seen).logits, want, atol=1e-5)


@torch.no_grad()
def test_a_mask_that_it_cannot_read_and_a_forward_that_does_not_ask_are_refused():
    model, latent_cache = model_and_cache()
    new, new_mask = ragged([5, 5, 5, 5], seed=2)
    positions = (latent_cache.attention_mask(new_mask).cumsum(1) - 1)[:, -5:]
    four = torch.ones(4, 1, 5, 21, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"must be \[4, 5\] \(new tokens\) or \[4, 21\] .*; got \[4, 1, 5, 21\]"):
        model(new, past_key_values=latent_cache.to_hf(), attention_mask=four, position_ids=positions)
    with pytest.raises(ValueError, match=r"got \[4, 9\]"):
        model(new, past_key_values=latent_cache.to_hf(), attention_mask=torch.ones(4, 9), position_ids=positions)
    theirs = latent_cache.to_hf()
    with pytest.raises(ValueError, match="the model did not ask transformers' mask functions"):
        theirs.update(torch.ones(4, 2, 5, 16), torch.ones(4, 2, 5, 16), 0)
    assert theirs.get_seq_length() == 16


def test_the_mask_functions_of_this_transformers_ask():
    """Fails where a version makes its masks in another way: then ragged memories are refused there by `update`."""
    assert masking_utils._preprocess_mask_arguments.__module__ == "transformers.masking_utils"
    assert masking_utils._preprocess_mask_arguments.__wrapped__ is not None


@torch.no_grad()
def test_a_uniform_latent_cache_refuses_a_mask_with_padding():
    """generate() of transformers takes the placeholders of what is cached for padding where they equal pad_token_id."""
    model = tiny_model("llama")
    ids, _ = ragged([5, 5])
    latent_cache = latent_generate(model, ids, latent_steps=2, aligner="ridge", max_cache_len=40).past_key_values
    whole = torch.cat([torch.zeros(2, 7, dtype=torch.int64), ids], 1)
    for past in (latent_cache, latent_cache.to_hf()):
        with pytest.raises(ValueError, match=r"attention_mask has \[[05], [05]\] ones"):
            model.generate(whole, past_key_values=past, **GREEDY)
    assert latent_cache.lengths.tolist() == [7, 7]


# ---- accelerated models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["none", "new", "both", "whole"])
@torch.no_grad()
def test_accelerated_generate_needs_no_mask_over_it(given, monkeypatch):
    model, latent_cache = model_and_cache()
    left = []
    monkeypatch.setattr("latentmas_kernels.hf.decode.warn_once", left.append)
    new, new_mask = ragged([20] * 4 if given == "none" else [2, 20, 1, 3], seed=2)
    want = new_tokens(generate(model, new, new_mask, past_key_values=latent_cache, max_new_tokens=NEW).sequences)
    theirs, both = latent_cache.to_hf(), latent_cache.attention_mask(new_mask)
    inputs = {
        "none": {},
        "new": {"attention_mask": new_mask},
        "both": {"attention_mask": both},
        "whole": {"attention_mask": both},
    }
    ids = torch.cat([torch.full((4, 16), 5), new], 1) if given == "whole" else new
    assert new_tokens(accelerate(model).generate(ids, past_key_values=theirs, **inputs[given], **GREEDY)) == want
    assert not left
    assert torch.equal(theirs.attention_mask()[:, : 16 + new.shape[1]], both)
    want = generate(model, new, new_mask, past_key_values=latent_cache, max_new_tokens=NEW).past_key_values
    assert_same_cache(LatentCache.from_hf(theirs), want)


@torch.no_grad()
def test_accelerated_generate_refuses_ones_over_it():
    model, latent_cache = model_and_cache()
    new, new_mask = ragged(NEXT, seed=2)
    theirs = latent_cache.to_hf()
    with pytest.raises(ValueError, match=CONTRADICTED):
        accelerate(model).generate(
            new, past_key_values=theirs, attention_mask=ones_over_both(latent_cache, new_mask), **GREEDY
        )
    assert theirs.get_seq_length() == 16


# ---- as transformers and old code handle caches --------------------------------------------------------------------


def chosen(rows):
    return lambda cache, mask: (cache.batch_select_indices(torch.tensor(rows)), mask[rows])[1]


@pytest.mark.parametrize(
    "change",
    [
        chosen([2, 0]),
        lambda cache, mask: (cache.reorder_cache(torch.tensor([1, 1, 3, 2])), mask[[1, 1, 3, 2]])[1],
        lambda cache, mask: (cache.batch_repeat_interleave(2), mask.repeat_interleave(2, 0))[1],
        lambda cache, mask: (cache.crop(-2), mask[:, :-2])[1],
    ],
    ids=["select", "reorder", "repeat", "crop"],
)
def test_what_transformers_does_to_a_cache_keeps_the_padding_known(change):
    _, latent_cache = model_and_cache()
    cache = latent_cache.to_hf()
    mask = change(cache, latent_cache.attention_mask())
    assert torch.equal(cache.attention_mask(), mask)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_know_it_too(copied):
    model, latent_cache = model_and_cache()
    cache = copied(latent_cache.to_hf())
    assert isinstance(cache, PaddedCache)
    assert torch.equal(cache.attention_mask(), latent_cache.attention_mask())
    new, new_mask = ragged(NEXT, seed=2)
    with pytest.raises(ValueError, match=CONTRADICTED):
        model.generate(new, past_key_values=cache, attention_mask=ones_over_both(latent_cache, new_mask), **GREEDY)


def test_columns_cut_by_hand_keep_the_padding_known():
    _, latent_cache = model_and_cache()
    cache = latent_cache.to_hf()
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[..., 4:, :].contiguous(), layer.values[..., 4:, :].contiguous()
    assert torch.equal(cache.attention_mask(), latent_cache.attention_mask()[:, 4:])


def test_after_a_reset_nothing_in_it_is_a_token():
    """Older versions of transformers fill it with zeros, newer ones empty it."""
    _, latent_cache = model_and_cache()
    cache = latent_cache.to_hf()
    cache.reset()
    assert cache.get_seq_length() == 0 or not cache.attention_mask().any()
    assert real_columns(PaddedCache()) is None
    with pytest.raises(ValueError, match="an empty PaddedCache has no rows"):
        PaddedCache().attention_mask()


@torch.no_grad()
def test_an_empty_one_learns_the_padding_of_its_first_prompt():
    model, _ = model_and_cache()
    ids, mask = ragged(LENGTHS)
    cache, plain = PaddedCache(), DynamicCache()
    got = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert torch.equal(got, model.generate(ids, attention_mask=mask, past_key_values=plain, **GREEDY))
    assert torch.equal(cache.attention_mask()[:, :14], mask)
    want = generate(model, ids, mask, max_new_tokens=NEW)
    assert_same_cache(LatentCache.from_hf(cache), want.past_key_values)


@torch.no_grad()
def test_whether_new_columns_hold_padding_is_asked_once_per_forward(monkeypatch):
    """And not in every layer, where a GPU would wait for the answer."""
    model, latent_cache = model_and_cache()
    new, new_mask = ragged(NEXT, seed=2)
    full, theirs = latent_cache.attention_mask(new_mask), latent_cache.to_hf()
    asked, whole = [], PaddedCache.update

    def update(self, *args, **kwargs):
        with monkeypatch.context() as inside:
            inside.setattr(torch.Tensor, "__bool__", lambda tensor: asked.append(tensor) or bool(tensor.item()))
            return whole(self, *args, **kwargs)

    monkeypatch.setattr(PaddedCache, "update", update)
    positions = (full.cumsum(1) - 1).clamp_min(0)[:, -5:]
    model(new, past_key_values=theirs, attention_mask=full, position_ids=positions)
    assert not asked
    assert torch.equal(theirs.attention_mask(), full)


@torch.no_grad()
def test_beams_behind_a_ragged_cache():
    """reorder_cache in the middle of transformers' own loop."""
    model, latent_cache = model_and_cache()
    new, new_mask = ragged([5, 5, 5, 5], seed=2)
    beams = {**GREEDY, "num_beams": 3}
    theirs = latent_cache.to_hf()
    theirs.batch_repeat_interleave(3)
    got = model.generate(new, past_key_values=theirs, attention_mask=latent_cache.attention_mask(new_mask), **beams)
    for row in range(4):
        alone = latent_cache.select([row]).to_hf()
        alone.batch_repeat_interleave(3)
        mask = latent_cache.select([row]).attention_mask(new_mask[row : row + 1])
        want = model.generate(real(new, new_mask, row), past_key_values=alone, attention_mask=mask, **beams)
        assert torch.equal(got[row], want[0])
