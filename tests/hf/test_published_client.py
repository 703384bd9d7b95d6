"""ModelWrapper for code that was written for the published LatentMAS class: a small client of that kind, and what forks use."""

import argparse
import copy
import gc
import sys
import types
import warnings

import pytest
import torch
from tiny_models import PlainLoop, feed_back, ragged, real, tiny_model
from tokenizers_offline import character_tokenizer
from transformers import Cache, DynamicCache

from latentmas_kernels import LatentCache, build_aligner, latent_generate
from latentmas_kernels.cache.padded_cache import PaddedCache
from latentmas_kernels.hf import ModelWrapper
from latentmas_kernels.hf.legacy_cache import LegacyCache
from latentmas_kernels.hf.wrapper import _past_length

STEPS, NEW = 3, 8
TOLERANCE = 5e-5
QUESTIONS = ["Hi", "What is it, then?", "No", "Six of you?"]
ROLES = ["Plan: ", "Look again: ", "Answer: "]


@pytest.fixture
def folder(tmp_path):
    """A tiny untied model that stops nowhere, and its tokenizer, as files."""
    model = tiny_model("llama", vocab_size=128)
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "model")
    character_tokenizer(pad=False).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture(autouse=True)
def warnings_are_seen():
    """Those of from_legacy_cache are expected; others are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("ignore", message="from_legacy_cache", category=RuntimeWarning)
        yield


class Client:
    """Agents in the manner of the published method class: it reads lengths off the past and cuts it by itself."""

    def __init__(self, model, latent_only=False, sequential_info_only=False):
        self.model, self.latent_only, self.sequential_info_only = model, latent_only, sequential_info_only

    def tokens(self, role, questions):
        prompts, *_ = self.model.prepare_chat_batch([[{"role": "user", "content": role + q}] for q in questions])
        encoded = self.model.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        return encoded["input_ids"].to(self.model.device), encoded["attention_mask"].to(self.model.device)

    def cut(self, past, keep):
        layers = past.to_legacy_cache() if isinstance(past, Cache) else past
        layers = tuple(tuple(t[..., t.shape[-2] - keep :, :].contiguous() for t in layer) for layer in layers)
        return past.__class__.from_legacy_cache(layers) if isinstance(past, Cache) else layers

    def answers(self, questions):
        past = None
        for role in ROLES[:-1]:
            ids, mask = self.tokens(role, questions)
            before = _past_length(past)
            past = self.model.generate_latent_batch(ids, attention_mask=mask, latent_steps=STEPS, past_key_values=past)
            if self.latent_only or self.sequential_info_only:
                past = self.cut(past, STEPS if self.latent_only else past[0][0].shape[-2] - before)
        ids, mask = self.tokens(ROLES[-1], questions)
        texts, _ = self.model.generate_text_batch(ids, mask, max_new_tokens=NEW, temperature=0, past_key_values=past)
        return texts


def published(wrapper, question, *, latent_only=False, sequential_info_only=False, aligner="identity"):
    """The same for one question, written out on plain transformers: cuts keep the last columns, positions count columns."""
    loop = PlainLoop(wrapper.model, feed_back(wrapper.model, aligner))
    client = Client(wrapper)
    for role in ROLES[:-1]:
        before = loop.cache.get_seq_length()
        loop.run_latent(client.tokens(role, [question])[0], STEPS)
        if latent_only or sequential_info_only:
            keep = STEPS if latent_only else loop.cache.get_seq_length() - before
            loop.cache = DynamicCache(
                ddp_cache_data=[(x.keys[..., -keep:, :], x.values[..., -keep:, :]) for x in loop.cache.layers]
            )
    tokens = loop.decode(client.tokens(ROLES[-1], [question])[0], NEW)
    return wrapper.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def close(got, want):
    assert got.shape == want.shape
    return (got - want).abs().max().item() < TOLERANCE


# ---- the client ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cut", [{}, {"latent_only": True}, {"sequential_info_only": True}], ids=["whole", "latent", "agent"]
)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_published_client_runs_after_the_swap(folder, cut, side):
    """One question at a time and all in one ragged batch, whatever it cuts: the texts of the published loop on each alone."""
    wrapper = ModelWrapper(
        folder, torch.device("cpu"), use_vllm=False, args=argparse.Namespace(latent_space_realign=False)
    )
    wrapper.tokenizer.padding_side = side
    want = [published(wrapper, question, **cut) for question in QUESTIONS]
    assert [Client(wrapper, **cut).answers([question])[0] for question in QUESTIONS] == want
    assert Client(wrapper, **cut).answers(QUESTIONS) == want
    assert len(set(want)) > 1


@torch.no_grad()
def test_a_subclass_with_an_init_of_its_own_runs(folder):
    class Theirs(ModelWrapper):
        def __init__(self, model_name, device, use_vllm=False, args=None):
            loaded = ModelWrapper(model_name, device)
            self.model_name, self.device, self.args = model_name, torch.device(device), args
            self.model, self.tokenizer = loaded.model, loaded.tokenizer
            self.HF_model, self.HF_device, self.vllm_device = self.model, device, device
            self.embedding_layer = self.model.get_input_embeddings()
            self.latent_space_realign = bool(getattr(args, "latent_space_realign", False))

    for realign, kind in ((False, "identity"), (True, "ridge")):
        theirs = Theirs(folder, "cpu", args=argparse.Namespace(latent_space_realign=realign))
        want = [published(theirs, question, aligner=kind) for question in QUESTIONS]
        assert Client(theirs).answers(QUESTIONS) == want


# ---- the constructor -----------------------------------------------------------------------------------------------


def test_by_name_it_has_the_published_settings(folder):
    for wrapper in (
        ModelWrapper(folder, "cpu"),
        ModelWrapper(folder, torch.device("cpu"), False, None),
        ModelWrapper(model_name=folder, device="cpu", use_vllm=False, args=argparse.Namespace()),
    ):
        assert wrapper.model_name == folder
        assert wrapper.device == wrapper.HF_device == wrapper.vllm_device == torch.device("cpu")
        assert (wrapper.use_vllm, wrapper.vllm_engine, wrapper.cache) == (False, None, "legacy")
        assert (wrapper.latent_space_realign, wrapper.aligner) == (False, "identity")
        assert wrapper.HF_model is wrapper.model
        assert wrapper.embedding_layer is wrapper.model.get_input_embeddings()
        assert not wrapper.model.training
        assert wrapper.tokenizer.pad_token_id is not None, "old code pads by itself"
    realigned = ModelWrapper(folder, "cpu", args=argparse.Namespace(latent_space_realign=True))
    assert realigned.aligner == "ridge"
    assert ModelWrapper(folder, "cpu", aligner="soft", cache="hf").aligner == "soft"


def test_a_model_keeps_our_settings_and_a_namespace_may_change_them():
    model, tokenizer = tiny_model(), character_tokenizer()
    wrapper = ModelWrapper(model, tokenizer)
    assert (wrapper.cache, wrapper.aligner, wrapper.args) == ("latent", "auto", None)
    assert ModelWrapper(model, tokenizer, args=argparse.Namespace(latent_space_realign=False)).aligner == "identity"
    wrapper.latent_space_realign = True
    assert wrapper.aligner == "ridge"
    assert ModelWrapper(model=model, tokenizer=tokenizer, device="meta").device == torch.device("meta")
    wrapper.device = torch.device("meta")
    assert wrapper.tokenize_text("Hi").device == wrapper.vllm_device == torch.device("meta")
    assert wrapper.HF_device == torch.device("cpu")


@pytest.mark.parametrize(
    "arguments",
    [
        lambda model, tokenizer: ((), {}),
        lambda model, tokenizer: ((model,), {}),
        lambda model, tokenizer: (("some/model", tokenizer), {}),
        lambda model, tokenizer: ((model, tokenizer), {"model_name": "some/model"}),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments):
    given, named = arguments(tiny_model(), character_tokenizer())
    with pytest.raises(
        ValueError, match="ModelWrapper takes a model and its tokenizer, or a model's name and a device"
    ):
        ModelWrapper(*given, **named)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), 0])
def test_a_device_beside_a_model_is_refused(device):
    """It stands where the tokenizer belongs: found out at the first text, otherwise."""
    with pytest.raises(
        ValueError, match=r"where the tokenizer of LlamaForCausalLM belongs; .*ModelWrapper\(model\.to\("
    ):
        ModelWrapper(tiny_model("llama"), device)


def test_other_kinds_of_caches_are_refused():
    with pytest.raises(ValueError, match="got cache='tuple'; supported are 'latent', 'hf', 'legacy'"):
        ModelWrapper(tiny_model(), character_tokenizer(), cache="tuple")


@torch.no_grad()
def test_the_published_setting_of_an_untied_model_is_the_rescale_alone():
    """Never what "auto" takes: that measures W_a and soft feedback."""
    model = tiny_model()
    embedding = model.get_input_embeddings().weight
    hidden = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    want = hidden * embedding.norm(dim=1).mean() / hidden.norm(dim=1, keepdim=True)
    aligner = build_aligner(model, "identity")
    assert close(aligner(hidden), want)
    assert close(ModelWrapper(model, character_tokenizer(), aligner="identity")._apply_latent_realignment(hidden), want)
    assert build_aligner(model, "auto").kind != "identity"
    with pytest.raises(ValueError, match="soft feedback is made of logits"):
        ModelWrapper(model, character_tokenizer(), aligner="soft")._apply_latent_realignment(hidden)


# ---- caches --------------------------------------------------------------------------------------------------------


def wrapped(cache="legacy", **options):
    model = tiny_model("qwen3-mixed")
    model.generation_config.eos_token_id = None
    return ModelWrapper(model, character_tokenizer(pad=False), **{"aligner": "ridge", "cache": cache, **options})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["hf", "legacy"])
@torch.no_grad()
def test_a_cache_in_columns_is_the_latent_one(kind, side):
    """Through latent steps, latent steps with embeddings, and decoding; every call adds as many columns to all rows."""
    latent, columns = wrapped("latent"), wrapped(kind)
    turns = [
        ragged(lengths, side=side, seed=seed)
        for seed, lengths in enumerate([[3, 14, 1, 6], [2, 5, 1, 3], [4, 2, 9, 1]])
    ]
    pasts, widths = [None, None], []
    for ids, mask in turns[:2]:
        pasts = [
            wrapper.generate_latent_batch(ids, mask, latent_steps=STEPS, past_key_values=past)
            for wrapper, past in zip((latent, columns), pasts, strict=True)
        ]
        widths.append(ids.shape[1] + STEPS)
        assert pasts[1].get_seq_length() == sum(widths) == _past_length(pasts[1])
        assert pasts[1].attention_mask()[:, -STEPS:].all()
        assert torch.equal(pasts[1].attention_mask()[:, -widths[-1] : -STEPS], mask)
    assert isinstance(pasts[1], LegacyCache if kind == "legacy" else PaddedCache)
    before = pasts[1].layers[0].keys
    both = [
        wrapper.generate_latent_batch_hidden_state(*turns[2], latent_steps=STEPS, past_key_values=past)
        for wrapper, past in zip((latent, columns), pasts, strict=True)
    ]
    assert close(both[1][1], both[0][1])
    said = [
        wrapper.generate_text_batch(*turns[2], max_new_tokens=NEW, temperature=0, past_key_values=past)
        for wrapper, past in zip((latent, columns), pasts, strict=True)
    ]
    assert said[1][0] == said[0][0]
    assert pasts[1].layers[0].keys is before, "what is given is not changed"
    for got, want in ((both[1][0], both[0][0]), (said[1][1], said[0][1])):
        own = LatentCache.from_hf(got)
        assert torch.equal(own.lengths, want.lengths)
        for row, length in enumerate(want.lengths.tolist()):
            assert close(own.keys[:, row, :, :length], want.keys[:, row, :, :length])
            assert close(own.values[:, row, :, :length], want.values[:, row, :, :length])
            assert not got.layers[1].keys[row, :, (got.attention_mask() == 0)[row]].any()


@torch.no_grad()
def test_rows_that_end_early_leave_padding_behind_them():
    wrapper = wrapped()
    ids, mask = ragged([3, 14, 1, 6])
    texts, _ = wrapper.generate_text_batch(ids, mask, max_new_tokens=12, temperature=0, skip_special_tokens=False)
    decoded = wrapper.tokenizer(texts, add_special_tokens=False)["input_ids"]
    wrapper.model.generation_config.eos_token_id = decoded[0][3]
    _, past = wrapper.generate_text_batch(ids, mask, max_new_tokens=12, temperature=0)
    latent = wrapped("latent")
    latent.model.generation_config.eos_token_id = decoded[0][3]
    _, want = latent.generate_text_batch(ids, mask, max_new_tokens=12, temperature=0)
    assert len(set((want.lengths - mask.sum(1)).tolist())) > 1
    assert past.attention_mask().sum(1).tolist() == want.lengths.tolist()
    more, more_mask = ragged([2, 5, 1, 3], seed=2)
    said = [
        w.generate_text_batch(more, more_mask, max_new_tokens=NEW, temperature=0, past_key_values=p)[0]
        for w, p in ((wrapper, past), (latent, want))
    ]
    assert said[0] == said[1]


def test_old_code_reads_and_cuts_a_legacy_cache():
    past = wrapped().generate_latent_batch(*ragged([3, 14, 1, 6]), latent_steps=STEPS)
    assert len(past) == len(past.key_cache) == len(past.value_cache) == 3
    assert past[0][0].shape == past[-1][1].shape == (4, 2, 17, 16)
    assert [pair[0] is layer.keys for pair, layer in zip(past, past.layers, strict=True)] == [True] * 3
    assert past[:2][1][1] is past.value_cache[1] is past.layers[1].values
    assert past.get_seq_length() == _past_length(past) == ModelWrapper._past_length(past) == 17
    again = fresh_warnings(lambda: type(past).from_legacy_cache(past.to_legacy_cache()))
    assert torch.equal(again.attention_mask(), past.attention_mask())
    again.crop(12)
    assert torch.equal(again[1][0], past[1][0][:, :, :12])
    again.crop(-2)
    assert again.get_seq_length() == 10
    again.crop(40)
    assert again.get_seq_length() == 10
    assert _past_length(None) == _past_length(()) == _past_length(LegacyCache.from_legacy_cache(None)) == 0
    assert _past_length(past.to_legacy_cache()) == 17


@pytest.mark.parametrize(
    ("cut", "warned"),
    [
        (lambda t: t, False),
        (lambda t: t[..., -17:, :].contiguous(), False),
        (lambda t: t[..., :5, :].clone(), False),
        (lambda t: t[..., -5:, :], True),
        (lambda t: torch.cat([t[..., :2, :], t[..., 4:, :]], -2), True),
    ],
    ids=["as they are", "all columns", "the first columns", "the last columns", "a hole"],
)
@pytest.mark.parametrize("way", ["from_legacy_cache", "key_cache[i]", "key_cache", "key_cache[:]"])
@torch.no_grad()
def test_cuts_by_hand_take_effect_and_warn_where_keys_stay_rotated(way, cut, warned):
    past = wrapped().generate_latent_batch(*ragged([3, 14, 1, 6]), latent_steps=STEPS)
    want = [(cut(keys), cut(values)) for keys, values in past.to_legacy_cache()]

    def cut_by_hand():
        if way == "from_legacy_cache":
            return type(past).from_legacy_cache(want)
        if way == "key_cache[i]":
            for i in range(len(past)):
                past.key_cache[i] = cut(past.key_cache[i])
                past.value_cache[i] = cut(past.value_cache[i])
        elif way == "key_cache":
            past.key_cache = [cut(keys) for keys in past.key_cache]
            past.value_cache = (cut(values) for values in past.value_cache)
        else:
            past.key_cache[:] = map(cut, past.key_cache)
            past.value_cache[:] = map(cut, past.value_cache)
        return past

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = fresh_warnings(cut_by_hand)
    assert got.get_seq_length() == want[0][0].shape[-2]
    for layer, (keys, values) in zip(got.layers, want, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    assert [("key_cache" in str(one.message)) for one in caught] == [True] * warned
    if way != "key_cache":  # which sets through [:], one call further down
        assert [one.filename for one in caught] == [__file__] * warned, "it names the line that cuts"
    held = got.get_seq_length()
    ids, mask = ragged([2, 5, 1, 3], seed=2)
    again = wrapped().generate_latent_batch(ids, mask, latent_steps=1, past_key_values=got)
    assert again.get_seq_length() == held + ids.shape[1] + 1


def test_layers_of_a_legacy_cache_are_neither_added_nor_removed():
    """An error, where a list that is made at each reading would take it silently."""
    past = wrapped().generate_latent_batch(*ragged([3, 5]), latent_steps=1)
    keys = past.key_cache[0]

    def remove():
        del past.key_cache[0]

    for change in (remove, lambda: past.key_cache.append(keys), lambda: past.value_cache.pop()):
        with pytest.raises(TypeError, match=r"set one by one .*LegacyCache\.from_legacy_cache"):
            change()
    with pytest.raises(ValueError, match="got 1 tensors for the keys of a cache of 3 layers"):
        past.key_cache = [keys]
    assert len(past) == 3
    assert past.layers[0].keys is keys


def fresh_warnings(call):
    from latentmas_kernels.warn_once import warn_once

    warn_once.cache_clear()
    return call()


@torch.no_grad()
def test_tuples_and_caches_of_other_kinds_go_in():
    """What non-Cache code passes on, an empty past, a LatentCache, and a cache of transformers with a mask over it."""
    wrapper, latent = wrapped(), wrapped("latent")
    ids, mask = ragged([3, 14, 1, 6])
    more, more_mask = ragged([2, 5, 1, 3], seed=2)
    cache = latent.generate_latent_batch(ids, mask, latent_steps=STEPS)
    past = wrapper.generate_latent_batch(ids, mask, latent_steps=STEPS, past_key_values=())
    garbage = DynamicCache(
        ddp_cache_data=[(k.masked_fill((past.attention_mask() == 0)[:, None, :, None], 0.5), v) for k, v in past]
    )
    want = latent.generate_text_batch(more, more_mask, max_new_tokens=NEW, temperature=0, past_key_values=cache)[0]
    pairs = past.to_legacy_cache()
    for given, over in (
        (past, False),
        (pairs, False),
        (list(map(list, pairs)), False),
        (cache, False),
        (garbage, True),
    ):
        full = past.attention_mask(more_mask) if over else more_mask
        texts, back = wrapper.generate_text_batch(more, full, max_new_tokens=NEW, temperature=0, past_key_values=given)
        assert texts == want
        assert isinstance(back, LegacyCache)
        assert back.attention_mask().sum(1).tolist() == (cache.lengths + more_mask.sum(1) + NEW - 1).tolist()
        seen = past.attention_mask()
        for each in ("generate_text_batch", "generate_latent_batch"):
            options = {"max_new_tokens": NEW, "temperature": 0} if "text" in each else {"latent_steps": 1}
            if given is not cache:
                options["past_attention_mask"] = seen
            getattr(wrapper, each)(more, more_mask, past_key_values=given, **options)
    fresh = copy.deepcopy(cache)
    fresh.reset()
    want = latent.generate_latent_batch(ids, mask, latent_steps=STEPS).lengths.tolist()
    assert latent.generate_latent_batch(ids, mask, latent_steps=STEPS, past_key_values=fresh.donate()) is fresh
    assert fresh.lengths.tolist() == want
    fresh.reset()
    for given in (fresh, DynamicCache(), LegacyCache()):
        back = wrapper.generate_latent_batch(ids, mask, latent_steps=STEPS, past_key_values=given)
        assert back.attention_mask().sum(1).tolist() == want
    with pytest.raises(ValueError, match=r"a tuple of \(keys, values\) by layer; got dict"):
        wrapper.generate_latent_batch(ids, mask, latent_steps=STEPS, past_key_values={"a": 1})
    window = DynamicCache(config=wrapper.model.config)
    wrapper.model(real(ids, mask, 1), past_key_values=window)
    with pytest.raises(ValueError, match="do not keep all of its 14 columns.*use cache='latent'"):
        wrapper.generate_latent_batch(more[:1], latent_steps=1, past_key_values=window)
    assert latent.generate_latent_batch(more[1:2], latent_steps=1, past_key_values=window).lengths.tolist() == [20]


@torch.no_grad()
def test_a_past_attention_mask_must_be_that_of_the_past():
    wrapper, latent = wrapped(), wrapped("latent")
    ids, mask = ragged([3, 14, 1, 6])
    past = wrapper.generate_latent_batch(ids, mask, latent_steps=STEPS)
    cache = latent.generate_latent_batch(ids, mask, latent_steps=STEPS)
    columns = torch.cat([torch.zeros(4, 5), past.attention_mask()], 1)  # of a layout with more padding
    want = latent.generate_text_batch(ids, mask, max_new_tokens=NEW, temperature=0, past_key_values=cache)[0]
    for w, given, over in ((wrapper, past, past.attention_mask()), (latent, cache, columns)):
        texts, _ = w.generate_text_batch(
            ids, mask, max_new_tokens=NEW, temperature=0, past_key_values=given, past_attention_mask=over
        )
        assert texts == want
    ones = torch.ones(4, 17)
    for w, given, words in ((wrapper, past, "ones over the past"), (latent, cache, "past_attention_mask has")):
        with pytest.raises(ValueError, match=rf"{words}.* \[6, 17, 4, 9\] tokens") as caught:
            w.generate_latent_batch(ids, mask, latent_steps=1, past_key_values=given, past_attention_mask=ones)
        assert "[17, 17, 17, 17] ones" in str(caught.value)
        with pytest.raises(ValueError, match=r"attention_mask covers the new tokens \(\[4, 14\]\); got \[4, 31\]"):
            w.generate_latent_batch(
                ids, past.attention_mask(mask), latent_steps=1, past_key_values=given, past_attention_mask=ones
            )


# ---- cuts, what is returned, sampling ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["latent", "hf", "legacy"])
@pytest.mark.parametrize("what", ["latent_only", "sequential_info_only"])
@torch.no_grad()
def test_cuts_by_keyword_are_exact(kind, what):
    """The same keys as under `keep`, at their own positions or rotated to new ones; rows as they are alone."""
    wrapper = wrapped(kind)
    ids, mask = ragged([3, 14, 1, 6])
    more, more_mask = ragged([2, 5, 1, 3], seed=2)
    first = wrapper.generate_latent_batch(ids, mask, latent_steps=STEPS)
    got = wrapper.generate_latent_batch(more, more_mask, latent_steps=STEPS, past_key_values=first, **{what: True})
    whole = latent_generate(
        wrapper.model, more, more_mask, latent_steps=STEPS, aligner="ridge",
        past_key_values=latent_generate(wrapper.model, ids, mask, latent_steps=STEPS, aligner="ridge").past_key_values,
    ).past_key_values  # fmt: skip
    kept = torch.full((4,), STEPS) if what == "latent_only" else more_mask.sum(1) + STEPS
    slot = torch.arange(int(whole.lengths.max()))
    ends = whole.lengths.clone()
    whole.keep((slot < ends[:, None]) & (slot >= (ends - kept)[:, None]))
    if kind == "latent":
        assert torch.equal(got.next_position, ends)
    else:
        assert torch.equal(got.attention_mask().sum(1), kept)
        whole.rebase(wrapper.model)
        got = LatentCache.from_hf(got)
    assert torch.equal(got.lengths, kept)
    for row, length in enumerate(kept.tolist()):
        assert close(got.keys[:, row, :, :length], whole.keys[:, row, :, :length])


def test_a_model_whose_keys_cannot_be_moved_is_refused_before_it_runs(monkeypatch):
    model = tiny_model("gpt2")
    wrapper = ModelWrapper(model, character_tokenizer(), aligner="ridge", cache="legacy", engine="eager")
    monkeypatch.setattr("latentmas_kernels.hf.wrapper.latent_generate", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(ValueError, match="position"):
        wrapper.generate_latent_batch(torch.tensor([[5, 6]]), latent_steps=2, latent_only=True)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_latents_and_states_on_request(side):
    wrapper = wrapped()
    ids, mask = ragged([3, 14, 1, 6], side=side)
    past, latents = wrapper.generate_latent_batch(ids, mask, latent_steps=STEPS, return_latent_embeds=True)
    again, states = wrapper.generate_latent_batch(ids, mask, latent_steps=STEPS, return_hidden_states=True)
    assert torch.equal(past[0][0], again[0][0])
    assert latents.shape == (4, STEPS, 48)
    assert torch.equal(torch.stack(states["latent_vectors"][1:], 1), latents)
    assert states["latent_vectors"][0] is states["input_hidden"]
    for row in range(4):
        loop = PlainLoop(wrapper.model, feed_back(wrapper.model, "ridge"))
        want, last = loop.run_latent(real(ids, mask, row), STEPS)
        assert close(latents[row], want)
        assert close(states["final_hidden"][row], last)
        assert torch.equal(states["input_hidden"][row], wrapper.embedding_layer(real(ids, mask, row))[0, -1])
    none, states = wrapper.generate_latent_batch(ids, mask, latent_steps=0, return_hidden_states=True)
    assert none.get_seq_length() == 14
    assert len(states["latent_vectors"]) == 1


def test_what_does_not_go_together_is_refused():
    wrapper, (ids, mask) = wrapped(), ragged([3, 5])
    for options, words in (
        ({"return_latent_embeds": True, "return_hidden_states": True}, "pass one"),
        ({"latent_only": True, "latent_steps": 0}, "latent_only keeps nothing where latent_steps is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            wrapper.generate_latent_batch(ids, mask, **{"latent_steps": 2, **options})
    with pytest.raises(ValueError, match="got do_sample=True with temperature=0"):
        wrapper.generate_text_batch(ids, mask, do_sample=True, temperature=0)


def test_sampling_as_old_code_asks_for_it():
    wrapper, (ids, mask) = wrapped("latent"), ragged([3, 14, 1, 6])

    def said(**options):
        torch.manual_seed(1)
        return wrapper.generate_text_batch(ids, mask, max_new_tokens=24, **options)[0]

    greedy = said(temperature=0)
    assert said(do_sample=False, temperature=0.7) == said(do_sample=False, temperature=None, top_p=None) == greedy
    assert said(temperature=None, top_p=None) == said(do_sample=True, temperature=1.0, top_p=1.0) != greedy
    assert said(do_sample=True) == said() == said(temperature=0.7, top_p=0.95)


@torch.no_grad()
def test_a_donated_memory_is_extended_or_grows():
    wrapper = wrapped("latent")
    ids, mask = ragged([3, 5])
    roomy = wrapper.generate_latent_batch(ids, mask, latent_steps=2, max_cache_len=40)
    tight = wrapper.generate_latent_batch(ids, mask, latent_steps=2)
    assert (roomy.capacity, tight.capacity) == (40, 7)
    buffer, want = roomy.buffer, wrapper.generate_latent_batch(ids, mask, latent_steps=2, past_key_values=tight)
    for cache in (roomy, tight):
        got = wrapper.generate_latent_batch(ids, mask, latent_steps=2, past_key_values=cache.donate())
        assert got is cache
        assert torch.equal(got.lengths, want.lengths)
        assert close(got.keys[:, 1, :, :14], want.keys[:, 1, :, :14])
    assert roomy.buffer is buffer
    assert tight.capacity == 14
    with pytest.raises(ValueError, match="max_cache_len is 8"):
        wrapper.generate_latent_batch_hidden_state(ids, mask, latent_steps=5, max_cache_len=8)


# ---- vLLM ----------------------------------------------------------------------------------------------------------


def test_without_vllm_it_says_what_to_do(folder, monkeypatch):
    monkeypatch.setattr("latentmas.backends.vllm.launch.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"vLLM is not installed here; docs/vllm.md says"):
        ModelWrapper("a model that is not looked for", "cpu", use_vllm=True)
    with pytest.raises(ValueError, match=r"has no vLLM: pass use_vllm=True \(docs/vllm.md"):
        ModelWrapper(folder, "cpu").vllm_generate_text_batch(["Hi"])


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in for our backend, which tests with a real vLLM hold to our own engine: what it was started with, got, and how
    often it was ended."""
    started, sent, ended = [], [], []

    class Backend:
        def __init__(self, *given, **named):
            started.append((given, named))

        def close(self):
            ended.append(self)

        def write(self, cache, requests, on_tokens=None):
            assert cache is None
            sent.extend(requests)
            return [types.SimpleNamespace(ids=[*request.prompt[:2], 2]) for request in requests]

    module = types.SimpleNamespace(Vllm=Backend)
    monkeypatch.setattr("latentmas.backends.vllm.launch.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "latentmas.backends.vllm.engine", module)
    return types.SimpleNamespace(started=started, sent=sent, ended=ended)


@pytest.mark.parametrize("way", ["close", "with", "an error in with", "no reference"])
def test_the_vllm_that_was_started_ends_with_the_wrapper(folder, vllm, way):
    wrapper = ModelWrapper(folder, "cpu", use_vllm=True)
    assert len(vllm.started) == 1
    assert vllm.ended == []
    if way == "close":
        wrapper.close()
    elif way == "with":
        with wrapper as same:
            assert same is wrapper
            assert vllm.ended == []
    elif way == "an error in with":
        with pytest.raises(KeyboardInterrupt), wrapper:
            raise KeyboardInterrupt
    else:
        del wrapper
        gc.collect()
        assert len(vllm.ended) == 1
        return
    assert len(vllm.ended) == 1
    assert (wrapper.use_vllm, wrapper.vllm_engine) == (False, None)
    with pytest.raises(ValueError, match="has no vLLM"):
        wrapper.vllm_generate_text_batch(["Hi"])
    wrapper.close()
    del wrapper
    gc.collect()
    assert len(vllm.ended) == 1, "once"


def test_a_wrapper_without_vllm_can_be_closed(folder):
    with ModelWrapper(folder, "cpu") as wrapper:
        pass
    assert wrapper.tokenize_text("Hi").shape[0] == 1


def test_vllm_gets_prompts_and_settings_and_gives_texts(folder, vllm):
    started, sent = vllm.started, vllm.sent
    args = argparse.Namespace(
        tensor_parallel_size=2, gpu_memory_utilization=0.5, device2="cpu", use_second_HF_model=True
    )
    wrapper = ModelWrapper(folder, "meta", use_vllm=True, args=args)
    wrapper.model.generation_config.eos_token_id = [2, 3]
    ((given, named),) = started
    assert given == (folder, wrapper.model)
    assert named == {"kv_transfer": "embeds", "settings": {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.5}}
    assert wrapper.use_vllm
    assert (wrapper.device, wrapper.vllm_device, wrapper.HF_device) == (torch.device("meta"),) * 2 + (
        torch.device("cpu"),
    )
    prompts = ["Hi", "What?"]
    texts = wrapper.vllm_generate_text_batch(prompts, max_new_tokens=7, temperature=0.6, top_p=0.9)
    assert [request.prompt for request in sent] == [wrapper.tokenizer(text)["input_ids"] for text in prompts]
    assert {(r.max_new_tokens, r.temperature, r.top_p, r.end_ids) for r in sent} == {(7, 0.6, 0.9, (2, 3))}
    assert len({request.seed for request in sent}) == 2
    assert texts == [wrapper.tokenizer.decode(r.prompt[:2], skip_special_tokens=True).strip() for r in sent]
