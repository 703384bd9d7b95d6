"""ModelWrapper: the methods of the LatentMAS code against the plain loop, row by row, and its chats against templates."""

import copy

import pytest
import torch
from tiny_models import FAMILIES, VOCAB, PlainLoop, feed_back, is_tied, ragged, real, tiny_model
from tokenizers_offline import SENTENCEPIECE, character_tokenizer, sentencepiece_tokenizer, with_tokens
from transformers import DynamicCache

from latentmas_kernels import LatentCache, build_aligner, latent_generate
from latentmas_kernels.hf.wrapper import ModelWrapper

TOLERANCE = 5e-5
LENGTHS = [3, 14, 1, 6]  # rows shorter and longer than a window of 8
STEPS, NEW = 4, 8
OF_OTHER_KINDS = ["gemma3", "granite", "gpt2"]  # scaled embeddings, scaled inside the model, learned positions


def wrapped(name="llama", **options):
    """A tiny model that stops nowhere, wrapped."""
    model = tiny_model(name)
    model.generation_config.eos_token_id = None
    engine = "auto" if name in FAMILIES else "eager"  # auto would warn that it has nothing faster
    return ModelWrapper(model, character_tokenizer(pad=False), **{"aligner": "ridge", "engine": engine, **options})


def plain(wrapper):
    kind = "identity" if is_tied(wrapper.model) else "ridge"
    return PlainLoop(wrapper.model, feed_back(wrapper.model, kind))


def text_of(wrapper, tokens):
    return wrapper.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def assert_close(got, want):
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    worst = (got - want).abs().max().item()
    assert worst < TOLERANCE, f"largest error {worst:.2e}"


# ---- generation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*FAMILIES, *OF_OTHER_KINDS])
@torch.no_grad()
def test_ragged_chain_equals_plain_loop(name, side):
    """Two agents run latent steps and a third decodes: every row as in the plain loop, and so the embeddings."""
    wrapper = wrapped(name)
    turns = [ragged(LENGTHS, side=side, seed=1), ragged([4, 2, 9, 1], side=side, seed=2)]
    last = ragged([5, 1, 2, 12], side=side, seed=3)

    cache = wrapper.generate_latent_batch(*turns[0], latent_steps=STEPS)
    cache, embeddings = wrapper.generate_latent_batch_hidden_state(*turns[1], latent_steps=STEPS, past_key_values=cache)
    texts, cache = wrapper.generate_text_batch(*last, max_new_tokens=NEW, temperature=0, past_key_values=cache)

    assert isinstance(cache, LatentCache)
    columns = turns[1][0].shape[1]
    assert embeddings.shape == (4, columns + STEPS, 48)
    for row in range(4):
        alone = plain(wrapper)
        alone.run_latent(real(*turns[0], row), STEPS)
        ids = real(*turns[1], row)
        latents, _ = alone.run_latent(ids, STEPS)
        fed = torch.cat([wrapper.model.get_input_embeddings()(ids)[0], latents])
        padding = columns + STEPS - len(fed)
        assert_close(embeddings[row, padding:], fed)
        assert torch.equal(embeddings[row, padding:-STEPS], fed[:-STEPS]), "of the prompt to the last bit"
        assert not embeddings[row, :padding].any()
        assert texts[row] == text_of(wrapper, alone.decode(real(*last, row), NEW))
        length = sum(int(mask[row].sum()) for _, mask in (*turns, last)) + 2 * STEPS + NEW - 1
        assert cache.lengths[row] == length
        assert_close(cache.keys[-1, row, :, length - 1], alone.cache.layers[-1].keys[0, :, -1])
    assert any(texts), "not special tokens alone"


@pytest.mark.parametrize("side", ["left", "right"])
def test_columns_of_the_embeddings_are_those_of_the_ids(side):
    """Also where a column is padding in every row, and where the padding is no token at all."""
    wrapper = wrapped()
    ids, mask = ragged([3, 1, 2], side=side)
    more = torch.zeros(3, 2, dtype=torch.int64)
    wide, wide_mask = torch.cat([more, ids, more], 1), torch.cat([more, mask, more], 1)
    wide = wide.masked_fill(wide_mask == 0, VOCAB + 1000)
    _, narrow = wrapper.generate_latent_batch_hidden_state(ids, mask, latent_steps=2)
    _, embeddings = wrapper.generate_latent_batch_hidden_state(wide, wide_mask, latent_steps=2)
    assert embeddings.shape == (3, 7 + 2, 48)
    assert not embeddings[:, :4].any()
    assert torch.equal(embeddings[:, 4:], narrow)


def test_embeddings_without_steps_and_without_a_mask():
    wrapper = wrapped()
    ids, _ = ragged([5, 5])
    cache, embeddings = wrapper.generate_latent_batch_hidden_state(ids, latent_steps=0)
    assert torch.equal(embeddings, wrapper.model.get_input_embeddings()(ids))
    assert cache.lengths.tolist() == [5, 5]


def test_embeddings_have_the_dtype_of_the_model():
    wrapper = ModelWrapper(tiny_model().bfloat16(), character_tokenizer(), aligner="ridge")
    ids, mask = ragged([4, 2])
    _, embeddings = wrapper.generate_latent_batch_hidden_state(ids, mask, latent_steps=2)
    assert embeddings.dtype == torch.bfloat16
    assert not embeddings.requires_grad


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*FAMILIES, *OF_OTHER_KINDS])
@torch.no_grad()
def test_embeddings_are_a_prompt_for_plain_transformers(name, side):
    """What a server does with them: one forward of the model over [B, L, D] ends where the latent steps ended."""
    wrapper = wrapped(name)
    ids, mask = ragged(LENGTHS, side=side)
    memory, embeddings = wrapper.generate_latent_batch_hidden_state(ids, mask, latent_steps=STEPS)
    columns = embeddings.shape[1]
    full = (torch.arange(columns)[None] >= columns - (mask.sum(1, keepdim=True) + STEPS)).long()
    cache = DynamicCache()
    out = wrapper.model.get_decoder()(
        inputs_embeds=embeddings, attention_mask=full, position_ids=(full.cumsum(1) - 1).clamp_min(0),
        past_key_values=cache,
    )  # fmt: skip
    assert_close(
        out.last_hidden_state[:, -1],
        latent_generate(wrapper.model, ids, mask, latent_steps=STEPS, aligner="ridge", engine="eager").last_hidden,
    )
    theirs = LatentCache.from_hf(cache, full)
    for row, length in enumerate(memory.lengths.tolist()):
        assert_close(memory.keys[:, row, :, :length], theirs.keys[:, row, :, :length])
        assert_close(memory.values[:, row, :, :length], theirs.values[:, row, :, :length])


@torch.no_grad()
def test_row_alone_equals_row_in_batch(family_model):
    family_model.generation_config.eos_token_id = None
    wrapper = ModelWrapper(family_model, character_tokenizer(), aligner="ridge")
    ids, mask = ragged(LENGTHS)
    cache, embeddings = wrapper.generate_latent_batch_hidden_state(ids, mask, latent_steps=STEPS)
    greedy = {"max_new_tokens": NEW, "temperature": 0}
    texts, _ = wrapper.generate_text_batch(ids, mask, past_key_values=cache, **greedy)
    for row, length in enumerate(LENGTHS):
        alone = real(ids, mask, row)
        own, fed = wrapper.generate_latent_batch_hidden_state(alone, latent_steps=STEPS)
        assert_close(embeddings[row, -(length + STEPS) :], fed[0])
        assert wrapper.generate_text_batch(alone, past_key_values=own, **greedy)[0] == [texts[row]]


def test_text_ends_at_each_rows_end_token():
    """Rows end at different places; neither the end nor what fills a row behind it is part of its text."""
    wrapper = wrapped()
    ids, mask = ragged(LENGTHS)
    decoded = [plain(wrapper).decode(real(ids, mask, row), 12) for row in range(4)]
    end = decoded[0][4]
    assert wrapper.tokenizer.decode([end]).strip(), "a token that shows"
    wrapper.model.generation_config.eos_token_id = end
    wrapper.model.generation_config.pad_token_id = wrapper.tokenizer.convert_tokens_to_ids("x")
    cut = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in decoded]
    assert len({len(tokens) for tokens in cut}) > 1
    texts, cache = wrapper.generate_text_batch(ids, mask, max_new_tokens=12, temperature=0)
    assert texts == [text_of(wrapper, tokens[:-1] if tokens[-1] == end else tokens) for tokens in cut]
    assert cache.lengths.tolist() == [a + len(tokens) - 1 for a, tokens in zip(LENGTHS, cut, strict=True)]


@pytest.mark.parametrize("named", [True, False], ids=["with the model's own", "alone"])
def test_text_ends_where_the_chat_template_ends_a_turn(named):
    """A checkpoint may not name that token; what it names ends texts as well."""
    wrapper = wrapped()
    ids, mask = ragged(LENGTHS)
    decoded = [plain(wrapper).decode(real(ids, mask, row), 12) for row in range(4)]
    end, own = decoded[0][4], decoded[1][2]
    assert end != own
    token = wrapper.tokenizer.convert_ids_to_tokens(end)
    with_tokens(wrapper.tokenizer, token, special=False).chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '" + token + "' }}{% endfor %}"
    )
    wrapper.model.generation_config.eos_token_id = own if named else None
    ends = {end, own} if named else {end}
    texts, cache = wrapper.generate_text_batch(ids, mask, max_new_tokens=12, temperature=0)
    stops = [next((place for place, t in enumerate(tokens) if t in ends), 12) for tokens in decoded]
    assert stops[0] <= 4
    assert texts == [text_of(wrapper, tokens[:stop]) for tokens, stop in zip(decoded, stops, strict=True)]
    assert cache.lengths.tolist() == [n + min(stop, 11) for n, stop in zip(LENGTHS, stops, strict=True)]


def test_special_tokens_and_blanks_around_it_are_no_part_of_a_text():
    """A model that goes round in a circle of six tokens."""
    wrapper = wrapped()
    model, encode = wrapper.model, wrapper.tokenizer.convert_tokens_to_ids
    circle = [encode(token) for token in ["\n", "a", " ", "<unk>", "b", "<eos>"]]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for place, token in enumerate(circle):
            model.model.embed_tokens.weight[token, place] = 1
            model.lm_head.weight[circle[(place + 1) % 6], place] = 1
    texts, _ = wrapper.generate_text_batch(torch.tensor([[circle[-1]], [circle[1]]]), max_new_tokens=6, temperature=0)
    assert texts == ["a b", "b\na"]


def test_the_aligner_is_the_one_asked_for():
    model, (ids, mask) = tiny_model(), ragged(LENGTHS)
    for aligner in ("auto", "soft", "identity", build_aligner(model, "ridge")):
        wrapper = ModelWrapper(model, character_tokenizer(), aligner=aligner)
        want = latent_generate(model, ids, mask, latent_steps=3, aligner=aligner)
        cache = wrapper.generate_latent_batch(ids, mask, latent_steps=3)
        _, embeddings = wrapper.generate_latent_batch_hidden_state(ids, mask, latent_steps=3)
        assert torch.equal(embeddings[:, -3:], want.latents)
        assert torch.equal(cache.to_hf().layers[-1].keys, want.past_key_values.to_hf().layers[-1].keys)
    plain_wrapper = ModelWrapper(model, character_tokenizer())
    want = latent_generate(model, ids, mask, latent_steps=3)
    assert torch.equal(
        plain_wrapper.generate_latent_batch_hidden_state(ids, mask, latent_steps=3)[1][:, -3:], want.latents
    )


def test_the_engine_is_the_one_asked_for():
    wrapper = wrapped(engine="no such engine")
    ids, _ = ragged([3])
    for call in (wrapper.generate_latent_batch, wrapper.generate_latent_batch_hidden_state):
        with pytest.raises(ValueError, match="no such engine"):
            call(ids, latent_steps=1)
    with pytest.raises(ValueError, match="no such engine"):
        wrapper.generate_text_batch(ids)


# ---- sampling ------------------------------------------------------------------------------------------------------


def test_sampling_is_repeated_by_a_seed_and_temperature_zero_is_greedy():
    wrapper = wrapped()
    ids, mask = ragged(LENGTHS)

    def said(seed, **options):
        torch.manual_seed(seed)
        return wrapper.generate_text_batch(ids, mask, max_new_tokens=24, **options)[0]

    greedy = [text_of(wrapper, plain(wrapper).decode(real(ids, mask, row), 24)) for row in range(4)]
    assert said(1, temperature=0) == said(2, temperature=0) == greedy
    assert said(1, temperature=5.0) == said(1, temperature=5.0)
    assert said(1, temperature=5.0) != said(2, temperature=5.0)
    assert said(1) == said(1, temperature=0.7, top_p=0.95)
    assert said(1) != greedy, "samples by default"
    assert said(1, temperature=5.0, top_p=1e-6) == greedy


@pytest.mark.parametrize("top_k", [None, 5])
def test_nothing_but_temperature_and_top_p_shapes_the_distribution(top_k):
    """From the same, nearly even logits at each step come more tokens than a top-k of 50 lets through."""
    wrapper = wrapped()
    with torch.no_grad():
        wrapper.model.model.embed_tokens.weight[:] = wrapper.model.model.embed_tokens.weight[0].clone()
        wrapper.model.lm_head.weight.mul_(1e-3)
    wrapper.model.generation_config.top_k = top_k
    torch.manual_seed(0)
    texts, _ = wrapper.generate_text_batch(torch.tensor([[5]]), max_new_tokens=400, top_p=1.0)
    assert len(set(texts[0])) > 70


# ---- the past ------------------------------------------------------------------------------------------------------


def calls(wrapper, ids, mask, past):
    """Each method on the same inputs; the returned caches."""
    return [
        wrapper.generate_latent_batch(ids, mask, latent_steps=2, past_key_values=past),
        wrapper.generate_latent_batch_hidden_state(ids, mask, latent_steps=2, past_key_values=past)[0],
        wrapper.generate_text_batch(ids, mask, max_new_tokens=3, past_key_values=past)[1],
    ]


def test_latent_cache_as_past_is_not_changed():
    """Not even where it has room for what comes."""
    wrapper = wrapped()
    past = latent_generate(wrapper.model, *ragged(LENGTHS), latent_steps=2, aligner="ridge", max_cache_len=64)
    past = past.past_key_values
    before = copy.deepcopy(past)
    for cache in calls(wrapper, *ragged([2, 5, 1, 3], seed=2), past):
        assert cache is not past
        assert (cache.lengths > past.lengths).all()
        assert torch.equal(past.lengths, before.lengths)
        assert past.segments == before.segments
        assert past.capacity == 64
        used = int(before.lengths.max())
        assert torch.equal(past.attention_mask(), before.attention_mask())
        for theirs, ours in zip(past.to_hf().layers, before.to_hf().layers, strict=True):
            assert theirs.keys.shape[2] == used
            assert torch.equal(theirs.keys, ours.keys)
            assert torch.equal(theirs.values, ours.values)


def hf_past(wrapper, ids, mask):
    """What plain transformers leaves behind a left-padded batch."""
    cache = DynamicCache(config=wrapper.model.config)
    with torch.no_grad():
        wrapper.model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), past_key_values=cache
        )
    return cache


def test_transformers_cache_as_past_is_not_changed():
    wrapper = wrapped()
    ids, mask = ragged(LENGTHS)
    past = hf_past(wrapper, ids, mask)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in past.layers]
    new, new_mask = ragged([2, 5, 1, 3], seed=2)
    for cache in calls(wrapper, new, torch.cat([mask, new_mask], 1), past):
        assert isinstance(cache, LatentCache)
        assert past.get_seq_length() == ids.shape[1]
        for layer, (keys, values) in zip(past.layers, before, strict=True):
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)


@pytest.mark.parametrize("name", ["llama", "qwen3-mixed", "gpt2"])
@torch.no_grad()
def test_goes_on_from_a_padded_transformers_cache(name):
    """With the mask over past and new, as codebases on transformers hand it over."""
    wrapper = wrapped(name)
    first, (new, new_mask) = ragged(LENGTHS), ragged([2, 5, 1, 3], side="right", seed=2)
    full = torch.cat([first[1], new_mask], 1)
    cache, embeddings = wrapper.generate_latent_batch_hidden_state(
        new, full, latent_steps=STEPS, past_key_values=hf_past(wrapper, *first)
    )
    ones = torch.ones(4, 1, dtype=torch.int64)
    texts, _ = wrapper.generate_text_batch(
        ones * 9, cache.attention_mask(ones), past_key_values=cache, max_new_tokens=NEW, temperature=0
    )
    assert embeddings.shape == (4, 5 + STEPS, 48)
    for row in range(4):
        alone = plain(wrapper)
        alone.forward(input_ids=real(*first, row))
        latents, _ = alone.run_latent(real(new, new_mask, row), STEPS)
        assert_close(embeddings[row, -STEPS:], latents)
        assert texts[row] == text_of(wrapper, alone.decode(torch.tensor([[9]]), NEW))


@torch.no_grad()
def test_transformers_goes_on_from_what_comes_back():
    wrapper = wrapped("qwen3")
    _, cache = wrapper.generate_text_batch(*ragged(LENGTHS), max_new_tokens=5, temperature=0)
    new, new_mask = ragged([2, 5, 1, 3], seed=2)
    texts, _ = wrapper.generate_text_batch(new, new_mask, past_key_values=cache, max_new_tokens=NEW, temperature=0)
    theirs = wrapper.model.generate(
        new, past_key_values=cache.to_hf(), attention_mask=cache.attention_mask(new_mask), max_new_tokens=NEW,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert texts == [text_of(wrapper, row) for row in theirs[:, -NEW:]]


def test_what_comes_back_can_be_saved(tmp_path):
    wrapper = wrapped()
    cache = wrapper.generate_latent_batch(*ragged(LENGTHS), latent_steps=STEPS)
    cache.save(tmp_path / "cache.safetensors", wrapper.model)
    loaded = LatentCache.load(tmp_path / "cache.safetensors", wrapper.model)
    new, new_mask = ragged([2, 5, 1, 3], seed=2)
    said = [
        wrapper.generate_text_batch(new, new_mask, past_key_values=past, max_new_tokens=NEW, temperature=0)[0]
        for past in (cache, loaded)
    ]
    assert said[0] == said[1]
    assert any(said[0])


# ---- chats ---------------------------------------------------------------------------------------------------------

BOS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ('user', 'assistant') %}{{ raise_exception('No such role here') }}{% endif %}"
    "{{ '<' + message['role'] + '>' + message['content'] + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
REASONING = BOS + "{% if add_generation_prompt and not enable_thinking | default(true) %}{{ '()' }}{% endif %}"
ASK, ASK_MORE = [{"role": "user", "content": "Hi"}], [{"role": "user", "content": "Hello, you."}]


def chat(template=None, *, pad=False, side="right"):
    tokenizer = character_tokenizer(template, pad=pad)
    tokenizer.padding_side = side
    return ModelWrapper(tiny_model(), tokenizer)


def test_a_chat_is_what_the_template_makes_of_it():
    wrapper = chat(BOS)
    talk = [*ASK, {"role": "assistant", "content": "What?"}]
    assert wrapper.render_chat(ASK) == "<bos><user>Hi|<assistant>"
    assert wrapper.render_chat(talk, add_generation_prompt=False) == "<bos><user>Hi|<assistant>What?|"
    prompt, ids, mask, tokens = wrapper.prepare_chat_input(talk, add_generation_prompt=False)
    assert prompt == "<bos><user>Hi|<assistant>What?|"
    assert tokens == ["<bos>", *"<user>Hi|<assistant>What?|"]
    assert ids.tolist() == [wrapper.tokenizer.convert_tokens_to_ids(tokens)]
    assert ids.dtype == mask.dtype == torch.int64
    assert mask.tolist() == [[1] * len(tokens)]


def test_without_a_template_a_chat_is_paragraphs():
    wrapper = chat()
    talk = [{"role": "system", "content": "Be brief."}, *ASK]
    assert wrapper.render_chat(talk) == "System: Be brief.\n\nUser: Hi\n\nAssistant:"
    assert wrapper.render_chat(talk, add_generation_prompt=False) == "System: Be brief.\n\nUser: Hi"


@pytest.mark.parametrize("template", [BOS, None], ids=["template", "no template"])
def test_a_chat_begins_with_one_bos(template):
    """Written by the template, or added by the tokenizer where there is none."""
    wrapper = chat(template)
    _, ids, _, tokens = wrapper.prepare_chat_input(ASK)
    assert tokens[0] == "<bos>"
    assert tokens.count("<bos>") == 1
    assert ids[0].tolist().count(wrapper.tokenizer.bos_token_id) == 1
    for row in wrapper.prepare_chat_batch([ASK, ASK_MORE])[3]:
        assert row[0] == "<bos>"
        assert row.count("<bos>") == 1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [True, False], ids=["padding token", "no padding token"])
def test_a_batch_is_left_padded_and_the_tokenizer_stays_as_it_was(side, pad):
    wrapper = chat(BOS, pad=pad, side=side)
    tokenizer = wrapper.tokenizer
    if pad:
        tokenizer.pad_token = "<unk>"
    prompts, ids, mask, tokens = wrapper.prepare_chat_batch([ASK, ASK_MORE, ASK])
    assert prompts == [wrapper.render_chat(messages) for messages in (ASK, ASK_MORE, ASK)]
    assert ids.dtype == mask.dtype == torch.int64
    filler = tokenizer.convert_tokens_to_ids("<unk>") if pad else 0
    for row, messages in enumerate([ASK, ASK_MORE, ASK]):
        _, alone, _, alone_tokens = wrapper.prepare_chat_input(messages)
        padding = ids.shape[1] - alone.shape[1]
        assert ids[row].tolist() == [filler] * padding + alone[0].tolist()
        assert mask[row].tolist() == [0] * padding + [1] * alone.shape[1]
        assert tokens[row] == alone_tokens
    assert mask.sum(1).tolist() == [ids.shape[1] - 9, ids.shape[1], ids.shape[1] - 9]
    assert tokenizer.padding_side == side
    assert tokenizer.pad_token == ("<unk>" if pad else None)
    assert len(tokenizer) == len(character_tokenizer())


def test_options_go_to_the_template():
    wrapper = chat(REASONING)
    assert wrapper.render_chat(ASK) == "<bos><user>Hi|<assistant>"
    quiet = "<bos><user>Hi|<assistant>()"
    assert wrapper.render_chat(ASK, enable_thinking=False) == quiet
    assert wrapper.prepare_chat_input(ASK, enable_thinking=False)[0] == quiet
    assert wrapper.prepare_chat_batch([ASK], enable_thinking=False)[0] == [quiet]
    with pytest.raises(ValueError, match=r"got enable_thinking, but the tokenizer has no chat template"):
        chat().render_chat(ASK, enable_thinking=False)


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_text_behind_others_has_no_space_in_front(kind):
    wrapper = ModelWrapper(tiny_model(), sentencepiece_tokenizer(kind))
    for text in ("\n\nHi", "Hi", " Hi", "[/INST]"):
        ids = wrapper.tokenize_text(text)[0].tolist()
        whole = wrapper.tokenizer("Ask." + text, add_special_tokens=False).input_ids
        assert whole[-len(ids) :] == ids
        assert wrapper.tokenizer.decode(ids) == text


def test_a_template_of_parts_shows_the_messages():
    template = (
        "{% for message in messages %}<{{ message['role'] }}>{% for part in message['content'] %}{{ part['text'] }}"
        "{% endfor %}|{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    wrapper = chat(template)
    assert wrapper.render_chat(ASK) == wrapper.prepare_chat_input(ASK)[0] == "<user>Hi|<assistant>"
    with pytest.raises(ValueError, match="does not write the user's message as it is"):
        chat("Say:").prepare_chat_batch([ASK, ASK_MORE])
    with pytest.raises(ValueError, match="fails on a conversation of user: TypeError"):
        chat("{{ messages[0]['content'] + 1 }}").render_chat(ASK)


def test_text_is_tokenized_without_special_tokens():
    wrapper = chat(BOS)
    ids = wrapper.tokenize_text("Hi you")
    assert ids.tolist() == [wrapper.tokenizer.convert_tokens_to_ids(list("Hi you"))]
    assert ids.dtype == torch.int64


def test_tensors_are_on_the_models_device():
    wrapper = ModelWrapper(tiny_model().to("meta"), character_tokenizer(BOS))
    assert wrapper.device == torch.device("meta")
    tensors = [*wrapper.prepare_chat_input(ASK)[1:3], *wrapper.prepare_chat_batch([ASK, ASK_MORE])[1:3]]
    assert all(tensor.device == wrapper.device for tensor in [*tensors, wrapper.tokenize_text("Hi")])


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("messages", [[], [ASK, ASK_MORE], ASK[0], "Hi", [None]], ids=repr)
@pytest.mark.parametrize("template", [BOS, None], ids=["template", "no template"])
def test_what_is_no_conversation_is_refused(messages, template):
    """An empty one, a batch of them, one message by itself, a text."""
    wrapper = chat(template)
    for call in (
        wrapper.render_chat,
        wrapper.prepare_chat_input,
        lambda given: wrapper.prepare_chat_batch([ASK, given]),
    ):
        with pytest.raises(ValueError, match="messages must be one conversation, a list of at least one dictionary"):
            call(messages)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="batch_messages is empty; every batch needs at least one conversation"):
        chat(BOS).prepare_chat_batch([])


def test_roles_are_up_to_the_template():
    with pytest.raises(
        ValueError, match="refuses a conversation of judge: No such role here; set tokenizer.chat_template"
    ):
        chat(BOS).prepare_chat_batch([ASK, [{"role": "judge", "content": "Hi"}]])


@pytest.mark.parametrize("message", [{"role": "user"}, {"content": "Hi"}, {"role": "user", "content": ["Hi"]}])
def test_without_a_template_messages_need_a_role_and_a_text(message):
    with pytest.raises(ValueError, match="every message needs a role and a content, both strings"):
        chat().render_chat([*ASK, message])


def test_text_without_tokens_is_refused():
    with pytest.raises(ValueError, match="the text '' has no tokens"):
        chat(BOS).tokenize_text("")
    with pytest.raises(ValueError, match="the text '' has no tokens"):
        chat("{{ messages[0]['content'] }}").prepare_chat_batch([ASK, [{"role": "user", "content": ""}]])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.1}, r"temperature must be 0 \(greedy\) or more; got -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": float("inf")}, "temperature must be 0"),
        ({"top_p": 0}, "top_p must be more than 0 and at most 1"),
        ({"top_p": 95}, "top_p must be more than 0 and at most 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of 1 or more"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        chat().generate_text_batch(torch.tensor([[5]]), **options)


def test_a_model_that_cannot_run_is_refused_at_once():
    with pytest.raises(ValueError, match="is in training mode"):
        ModelWrapper(tiny_model().train(), character_tokenizer())
    with pytest.raises(ValueError, match="got a Linear, which is no transformers model"):
        ModelWrapper(torch.nn.Linear(2, 2), character_tokenizer())


# ---- a real model --------------------------------------------------------------------------------------------------


@pytest.mark.real_model
@torch.no_grad()
def test_two_agents_on_the_default_model(default_model, default_tokenizer):
    """A batch of two questions through a planner with latent steps and a judge that answers, as such a codebase calls them."""
    questions = ["What is the capital of France?", "Add 17 and 25, then name the sum."]
    plan = [[{"role": "user", "content": f"Think about how to answer: {question}"}] for question in questions]
    answer = [
        [{"role": "system", "content": "Answer in one sentence."}, {"role": "user", "content": question}]
        for question in questions
    ]
    side, pad = default_tokenizer.padding_side, default_tokenizer.pad_token
    wrapper = ModelWrapper(default_model, default_tokenizer, aligner="identity")

    prompts, ids, mask, tokens = wrapper.prepare_chat_batch(plan)
    cache = wrapper.generate_latent_batch(ids, mask, latent_steps=6)
    _, answer_ids, answer_mask, _ = wrapper.prepare_chat_batch(answer)
    texts, _ = wrapper.generate_text_batch(
        answer_ids, answer_mask, max_new_tokens=24, temperature=0, past_key_values=cache
    )

    assert len({len(row) for row in tokens}) == 2, "rows of two lengths"
    assert (default_tokenizer.padding_side, default_tokenizer.pad_token) == (side, pad)
    ends = default_model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    for row in range(2):
        assert prompts[row] == default_tokenizer.apply_chat_template(
            plan[row], tokenize=False, add_generation_prompt=True
        )
        want = default_tokenizer(prompts[row], add_special_tokens=False, return_tensors="pt").input_ids
        assert torch.equal(real(ids, mask, row), want)
        alone = PlainLoop(default_model, feed_back(default_model, "identity"))
        alone.run_latent(want, 6)
        decoded = alone.decode(real(answer_ids, answer_mask, row), 24)
        stop = next((place for place, token in enumerate(decoded) if token in ends), len(decoded))
        assert texts[row] == default_tokenizer.decode(decoded[:stop], skip_special_tokens=True).strip()
        assert texts[row]


@pytest.mark.real_model
def test_a_checkpoint_that_does_not_name_the_templates_end_stops_there(default_model, default_tokenizer, monkeypatch):
    """Without it the default model writes on: `<|im_end|>`, a user's turn of its own, and so forth."""
    wrapper = ModelWrapper(default_model, default_tokenizer, aligner="identity")
    _, ids, mask, _ = wrapper.prepare_chat_batch([[{"role": "user", "content": "Say hello, in one word."}], ASK])
    want, cache = wrapper.generate_text_batch(ids, mask, max_new_tokens=48, temperature=0)
    assert (cache.lengths < mask.sum(1) + 47).any(), "one of them ends before it has to"
    monkeypatch.setattr(default_model.generation_config, "eos_token_id", None)
    got, unnamed = wrapper.generate_text_batch(ids, mask, max_new_tokens=48, temperature=0)
    assert got == want
    assert torch.equal(unnamed.lengths, cache.lengths)
