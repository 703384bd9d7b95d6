"""What transformers documents of generate(), on accelerated models: one test each, beside the plain model.

Caches and what is left to transformers are in test_accelerate_caches.py, latent steps in test_accelerate_latent.py, options
and their combinations in test_accelerate_grid.py, and what becomes of an accelerated model in test_after_accelerate.py.
"""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from plain_and_accelerated import LENGTHS, Forced, Pair, Recorder
from tiny_models import VOCAB, ragged, real
from tokenizers_offline import character_tokenizer
from torch import Tensor
from transformers import (
    GenerationConfig,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    WatermarkingConfig,
)
from transformers.generation import GenerateDecoderOnlyOutput

from latentmas_kernels import latent_generate
from latentmas_kernels.engines import EagerEngine, NativeEngine
from latentmas_kernels.hf import accelerate, restore

# ---- what to read ---------------------------------------------------------------------------------------------------


def test_prompt_by_any_name(pair, batch):
    want = pair.assert_same(**batch, max_new_tokens=6)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert torch.equal(pair.assert_same(ids, attention_mask=mask, max_new_tokens=6), want)
    assert torch.equal(pair.assert_same(inputs=ids, attention_mask=mask, max_new_tokens=6), want)


def test_no_prompt_starts_from_bos(pair):
    assert pair.assert_same(max_new_tokens=5)[0, 0] == pair.plain.generation_config.bos_token_id


def test_mask_is_inferred_from_padding_tokens(pair, batch):
    ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 0)  # 0 is the padding token
    assert torch.equal(
        pair.assert_same(ids, max_new_tokens=6)[:, -6:], pair.assert_same(**batch, max_new_tokens=6)[:, -6:]
    )


def test_padding_in_the_middle(pair, batch):
    ids = torch.cat([batch["input_ids"], batch["input_ids"].flip(0)], dim=1)
    mask = torch.cat([batch["attention_mask"], batch["attention_mask"].flip(0)], dim=1)
    mask[:, -1] = 1
    pair.assert_same(ids, attention_mask=mask, max_new_tokens=6)


def test_right_padding_is_read_right_here(pair):
    """The one place where tokens differ on purpose: transformers goes on behind the padding and says so in its log."""
    ids, mask = ragged(LENGTHS, side="right")
    got = pair.ours.generate(ids, attention_mask=mask, max_new_tokens=6, eos_token_id=None)
    for row in range(len(LENGTHS)):
        alone = pair.plain.generate(real(ids, mask, row), max_new_tokens=6, eos_token_id=None)
        assert got[row, -6:].tolist() == alone[0, -6:].tolist()


def test_row_of_nothing_but_padding_is_refused(pair, batch):
    batch["attention_mask"][1] = 0
    with pytest.raises(ValueError, match=r"all zeros in row \[1\]"):
        pair.ours.generate(**batch, max_new_tokens=3)


def test_embeddings_instead_of_ids(pair, batch):
    embeds = pair.plain.get_input_embeddings()(batch["input_ids"])  # with a gradient, as users get it
    mask = batch["attention_mask"]
    for own_ids in ({}, {"input_ids": batch["input_ids"]}):
        got = [
            m.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=6, **own_ids)
            for m in (pair.plain, pair.ours)
        ]
        assert torch.equal(got[0], got[1])
        assert got[1].shape[1] == 6 + (batch["input_ids"].shape[1] if own_ids else 0)
    assert not pair.left


def test_penalty_with_embeddings_of_padded_rows(pair, batch):
    """transformers takes the padding of the prompt for tokens to leave out, and leaves out that many new ones."""
    embeds = pair.plain.get_input_embeddings()(batch["input_ids"])
    options = {"repetition_penalty": 0.3, "max_new_tokens": 8, "eos_token_id": None}
    got = [
        m.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **options)
        for m in (pair.plain, pair.ours)
    ]
    assert torch.equal(got[0], got[1])
    assert not pair.left


def test_unknown_argument_is_an_error(pair, batch):
    with pytest.raises(ValueError, match="latent_step'"):
        pair.ours.generate(**batch, latent_step=3)


def test_own_position_ids_go_to_transformers(pair, batch):
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    pair.assert_same(**batch, position_ids=positions, max_new_tokens=5)
    pair.assert_same(**batch, position_ids=positions * 3, max_new_tokens=5, left="position_ids")


# ---- how to choose --------------------------------------------------------------------------------------------------


def test_config_object_and_model_defaults(pair, batch):
    config = GenerationConfig(max_new_tokens=7, repetition_penalty=1.5, eos_token_id=[4, 5], pad_token_id=0)
    as_object = pair.assert_same(**batch, generation_config=config)
    for model in (pair.plain, pair.ours):
        model.generation_config = copy.deepcopy(config)
    assert torch.equal(pair.assert_same(**batch), as_object)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4, "eos_token_id": [5, 80], "min_new_tokens": 4},
        {"no_repeat_ngram_size": 2},
        {"sequence_bias": [[[11], 5.0], [[12, 13], -5.0]]},
        {"bad_words_ids": [[14], [20, 21]]},
        {"suppress_tokens": [14, 15], "begin_suppress_tokens": [8]},
        {"forced_bos_token_id": 9, "forced_eos_token_id": 4},
        {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 7},
        {"renormalize_logits": True},
        {"remove_invalid_values": True},
        {"guidance_scale": 1.5},
        {"encoder_repetition_penalty": 1.5},
        {"watermarking_config": WatermarkingConfig(bias=2.5, seeding_scheme="selfhash")},
    ],
    ids=lambda o: next(iter(o)),
)
def test_every_processor(pair, batch, options):
    if "sequence_bias" in options:
        options["sequence_bias"] = [[list(k), v] for k, v in options["sequence_bias"]]
    pair.assert_same(**batch, max_new_tokens=8, **options)


def test_guidance_keeps_torchs_threads(pair, batch, monkeypatch):
    """Its processor runs the model; the others are better off without (engines/torch_threads.py)."""
    entered: list[int] = []

    @contextmanager
    def noted() -> Iterator[None]:
        entered.append(1)
        yield

    monkeypatch.setattr("latentmas_kernels.engines.stepwise.one_torch_thread", noted)
    pair.ours.generate(**batch, max_new_tokens=2, guidance_scale=1.5)
    assert not entered
    pair.ours.generate(**batch, max_new_tokens=2, no_repeat_ngram_size=2)
    assert entered


def test_prefix_allowed_tokens(pair, batch):
    got = pair.assert_same(**batch, max_new_tokens=5, prefix_allowed_tokens_fn=_odd)
    assert (got[:, -5:] % 2 == 1).all()


def _odd(row: int, ids: Tensor) -> list[int]:
    return list(range(1, VOCAB, 2))


def test_custom_processor(pair, batch):
    got = pair.assert_same(**batch, max_new_tokens=5, logits_processor=[Forced()])
    assert got[0, -5:].tolist() == [9, 10, 11, 12, 13]


def test_custom_processor_takes_precedence(pair, batch):
    """A processor of a kind that generate() would have made stands in for it."""
    options = {"do_sample": True, "temperature": 9.0, "top_k": 1, "max_new_tokens": 5}
    pair.assert_same(**batch, **options, logits_processor=[TemperatureLogitsWarper(0.5)])


def test_sampling_repeats_with_its_seed(pair, batch):
    def drawn(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return pair.ours.generate(**batch, do_sample=True, max_new_tokens=10, temperature=1.5).tolist()

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_return_sequences_are_neighbours(pair, batch):
    got = pair.ours.generate(**batch, do_sample=True, max_new_tokens=6, num_return_sequences=4, temperature=2.0)
    assert got.shape[0] == 4 * len(LENGTHS)
    assert torch.equal(got[:, :-6], batch["input_ids"].repeat_interleave(4, dim=0))
    assert len({tuple(row.tolist()) for row in got[:4]}) > 1
    with pytest.raises(ValueError, match="num_return_sequences"):  # transformers' own
        pair.ours.generate(**batch, num_return_sequences=2)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"top_k": 7},
        {"top_p": 0.7, "top_k": 0},
        {"min_p": 0.2, "top_k": 0},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.6},
        {"repetition_penalty": 0.5, "top_k": 0, "min_new_tokens": 1},
    ],
    ids=str,
)
def test_engine_draws_from_transformers_distribution(pair, options, monkeypatch):
    """Where the engine draws by itself, its first two tokens come as often as transformers' scores say."""
    monkeypatch.setattr(
        "latentmas_kernels.hf.decode.decode_stepwise", lambda *a, **k: pytest.fail("one step at a time")
    )
    draws, ids = 4000, ragged([6])[0]
    scored = pair.plain.generate(
        ids, do_sample=True, max_new_tokens=1, output_scores=True, return_dict_in_generate=True, **options
    )
    p = scored.scores[0][0].softmax(-1)
    got = pair.ours.generate(ids, do_sample=True, max_new_tokens=2, num_return_sequences=draws, **options)
    first = torch.bincount(got[:, -2], minlength=VOCAB) / draws
    assert not first[p == 0].any(), "a token that transformers never takes"
    _assert_drawn_from(first, p, draws)
    likely = int(p.argmax())  # and the second, behind the most likely first
    behind = got[got[:, -2] == likely, -1]
    prefix = torch.cat([ids, torch.tensor([[likely]])], dim=1)
    scored = pair.plain.generate(
        prefix, do_sample=True, max_new_tokens=1, output_scores=True, return_dict_in_generate=True,
        **{**options, "min_new_tokens": None},
    )  # fmt: skip
    if len(behind) > 300 and "min_new_tokens" not in options:
        _assert_drawn_from(
            torch.bincount(behind, minlength=VOCAB) / len(behind), scored.scores[0][0].softmax(-1), len(behind)
        )
    assert not pair.left


def _assert_drawn_from(frequency: Tensor, p: Tensor, draws: int) -> None:
    """Each within five standard deviations, which one in a million misses by chance."""
    deviation = (p * (1 - p) / draws).sqrt()
    assert ((frequency - p).abs() <= 5 * deviation + 1 / draws).all()


# ---- when to stop ---------------------------------------------------------------------------------------------------


def test_list_of_end_tokens(pair, batch):
    free = pair.assert_same(**batch, max_new_tokens=10, eos_token_id=None)
    ends = [int(free[0, -8]), int(free[1, -4])]
    got = pair.assert_same(**batch, max_new_tokens=10, eos_token_id=ends, pad_token_id=1)
    assert got.shape[1] <= free.shape[1]
    assert 1 in got[0, -9:]


def test_max_length_counts_the_prompt(pair, batch):
    assert pair.assert_same(**batch, max_length=12).shape[1] <= 12
    with pytest.raises(ValueError, match="max_length"):
        pair.ours.generate(**batch, max_length=4)


def test_default_length_is_that_of_transformers(pair, batch):
    assert pair.assert_same(**batch, eos_token_id=None).shape[1] == batch["input_ids"].shape[1] + 20


def test_text_beyond_the_models_positions(monkeypatch, caplog):
    short = Pair("llama", monkeypatch, max_position_embeddings=16)
    ids, _ = ragged([9])
    assert short.assert_same(ids, max_new_tokens=30, eos_token_id=None).shape[1] == 39


class Bound(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        assert scores is None
        return input_ids[:, -1] > 60


def test_custom_criterion_ends_rows_one_by_one(pair, batch):
    pair.assert_same(**batch, max_new_tokens=12, stopping_criteria=[Bound()])
    pair.assert_same(**batch, max_new_tokens=12, stopping_criteria=[Bound()], eos_token_id=None)


def test_own_length_criterion_takes_precedence(pair, batch):
    criteria = StoppingCriteriaList([MaxLengthCriteria(11)])
    assert pair.assert_same(**batch, max_new_tokens=30, stopping_criteria=criteria, eos_token_id=None).shape[1] == 11


def test_stop_strings(pair):
    tokenizer = character_tokenizer()
    ids, _ = ragged([5])
    free = pair.assert_same(ids, max_new_tokens=12, eos_token_id=None)
    stop = tokenizer.decode(free[0, -6])
    got = pair.assert_same(ids, max_new_tokens=12, eos_token_id=None, stop_strings=[stop], tokenizer=tokenizer)
    assert got.shape[1] < free.shape[1]


def test_max_time(pair, batch):
    got = pair.ours.generate(**batch, max_new_tokens=400, eos_token_id=None, max_time=1e-6)
    assert got.shape[1] == batch["input_ids"].shape[1] + 1


# ---- what comes back ------------------------------------------------------------------------------------------------


def test_dict_with_scores_and_logits(pair, batch):
    want, got = pair.generate(
        **batch, max_new_tokens=6, return_dict_in_generate=True, output_scores=True, output_logits=True,
        repetition_penalty=1.7, eos_token_id=[8, 14],
    )  # fmt: skip
    assert isinstance(got, GenerateDecoderOnlyOutput)
    assert torch.equal(got.sequences, want.sequences)
    for mine, theirs in ((got.scores, want.scores), (got.logits, want.logits)):
        assert len(mine) == got.sequences.shape[1] - batch["input_ids"].shape[1]
        for a, b in zip(mine, theirs, strict=True):  # ended rows too
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    scores = [m.compute_transition_scores(o.sequences, o.scores) for m, o in ((pair.plain, want), (pair.ours, got))]
    torch.testing.assert_close(scores[0], scores[1], atol=2e-5, rtol=0)


def test_attentions_and_hidden_states_come_from_transformers(pair, batch):
    want, got = pair.generate(
        **batch, max_new_tokens=3, return_dict_in_generate=True, output_attentions=True, output_hidden_states=True
    )
    assert "attentions or hidden states" in pair.left[-1]
    assert torch.equal(got.sequences, want.sequences)
    assert torch.equal(got.hidden_states[1][-1], want.hidden_states[1][-1])


def test_streamer_gets_the_prompt_and_each_token(pair):
    ids, _ = ragged([5])
    for options in ({}, {"logits_processor": [Forced()]}, {"do_sample": True, "top_k": 1}):
        pieces = []
        for model in (pair.plain, pair.ours):
            streamer = Recorder()
            model.generate(ids, max_new_tokens=5, streamer=streamer, **options)
            pieces.append(streamer.pieces)
        assert pieces[0] == pieces[1]
        assert pieces[1][0] == ids.tolist()
        assert pieces[1][-1] == "end"
        assert len(pieces[1]) == 7
    assert not pair.left


def test_error_in_a_streamer_reaches_the_caller(pair):
    class Broken(Recorder):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.pieces) == 3:
                raise RuntimeError("nobody reads")

    with pytest.raises(RuntimeError, match="nobody reads"):
        pair.ours.generate(ragged([5])[0], max_new_tokens=5, streamer=Broken())


# ---- what must not go wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_dtype_is_not_ours(pair, batch, dtype):
    want = pair.plain.generate(**batch, max_new_tokens=8)
    torch.set_default_dtype(dtype)
    try:
        got = pair.ours.generate(**batch, max_new_tokens=8)
        stepwise = pair.ours.generate(**batch, max_new_tokens=8, logits_processor=[_same])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)
    assert torch.equal(stepwise, want)


def _same(input_ids: Tensor, scores: Tensor) -> Tensor:
    return scores


@pytest.mark.parametrize("padding", [-1, VOCAB, 10**9])
def test_padding_token_without_an_embedding_is_an_error_where_it_is_fed(pair, batch, padding):
    first = int(pair.plain.generate(**batch, max_new_tokens=1)[0, -1])
    options = {"max_new_tokens": 8, "eos_token_id": [first], "pad_token_id": padding, "return_dict_in_generate": True}
    for model in (pair.plain, pair.ours):
        with pytest.raises(IndexError):
            model.generate(**batch, **options)


def test_a_token_without_an_embedding_is_never_chosen(pair):
    """Of a padded lm_head; transformers chooses one, and cannot feed it in."""
    ids = ragged([4])[0]
    for model in (pair.plain, pair.ours):
        model.lm_head = torch.nn.Linear(48, 5000, bias=False)
        torch.nn.init.normal_(model.lm_head.weight, generator=torch.Generator().manual_seed(0))
    with pytest.raises(IndexError):
        pair.plain.generate(ids, max_new_tokens=12, eos_token_id=None)
    assert int(pair.ours.generate(ids, max_new_tokens=12, eos_token_id=None).max()) < VOCAB


def test_temperature_that_overflows_is_an_error(pair, batch):
    for model, error in ((pair.plain, RuntimeError), (pair.ours, ValueError)):
        with pytest.raises(error):
            model.generate(**batch, max_new_tokens=2, do_sample=True, temperature=1e-39)


def test_warper_passed_to_greedy_decoding(pair, batch):
    pair.assert_same(**batch, max_new_tokens=6, logits_processor=[TopPLogitsWarper(0.1, filter_value=0.0)])
    pair.assert_same(**batch, max_new_tokens=6, logits_processor=[TemperatureLogitsWarper(1e-3)])


def test_warper_with_settings_of_its_own(pair, batch):
    """They are not those of the engine's loop: top-p of nearly nothing, but never fewer than forty tokens."""
    ids = batch["input_ids"][1:2]
    options = {"do_sample": True, "top_k": 0, "top_p": 0.5, "max_new_tokens": 1, "num_return_sequences": 200}
    got = pair.ours.generate(ids, **options, logits_processor=[TopPLogitsWarper(1e-6, min_tokens_to_keep=40)])
    assert len(got[:, -1].unique()) > 10
    filled = TopKLogitsWarper(2, filter_value=5.0)
    got = pair.ours.generate(ids, **{**options, "top_k": 9, "top_p": None}, logits_processor=[filled])
    assert len(got[:, -1].unique()) > 10


def test_the_larger_of_two_least_lengths_counts(pair):
    ids = ragged([4])[0]
    first = int(pair.plain.generate(ids, max_new_tokens=1)[0, -1])
    for least in ({"min_new_tokens": 5}, {"min_length": 9}):
        pair.assert_same(ids, max_new_tokens=9, eos_token_id=first, pad_token_id=0, **least)


def test_length_criterion_of_the_callers_own_kind(pair, batch):
    class New(MaxLengthCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] - 9 >= self.max_length)

    assert pair.assert_same(**batch, max_new_tokens=30, stopping_criteria=[New(4)], eos_token_id=None).shape[1] == 13


def test_criteria_come_before_the_streamer(pair):
    for model in (pair.plain, pair.ours):
        order: list[str] = []

        class Noted(Recorder):
            def put(self, value: Tensor, order: list[str] = order) -> None:
                order.append("put")

        def criterion(ids: Tensor, scores: Any, order: list[str] = order, **kwargs: Any) -> Tensor:
            order.append("criterion")
            return torch.zeros(1, dtype=torch.bool)

        model.generate(ragged([4])[0], max_new_tokens=2, streamer=Noted(), stopping_criteria=[criterion])
        assert order == ["put", "criterion", "put", "criterion", "put"]


def test_donated_memory_survives_an_error(pair, batch):
    """And can be used again, to the same end."""
    cache = latent_generate(pair.plain, **batch, latent_steps=2, aligner="ridge", max_cache_len=60).past_key_values
    want = pair.ours.generate(**batch, past_key_values=cache, max_new_tokens=6).tolist()
    before = cache.lengths.clone(), list(cache.segments)

    def broken(input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > 11:
            raise KeyError("processor")
        return scores

    with pytest.raises(KeyError):
        pair.ours.generate(**batch, past_key_values=cache.donate(), max_new_tokens=6, logits_processor=[broken])
    assert torch.equal(cache.lengths, before[0])
    assert cache.segments == before[1]
    assert pair.ours.generate(**batch, past_key_values=cache.donate(), max_new_tokens=6).tolist() == want


# ---- several at once ------------------------------------------------------------------------------------------------


def test_two_threads_on_one_model(monkeypatch):
    """Also its very first calls, which move the weights: every answer is that of a single thread."""
    pair = Pair("llama", monkeypatch)
    prompts = [ragged([3 + i, 12 - i], seed=i) for i in range(6)]
    options = [{}, {"logits_processor": [Forced()]}, {"repetition_penalty": 1.4}]
    jobs = [(i, j) for i in range(len(prompts)) for j in range(len(options))]
    want = {
        (i, j): pair.plain.generate(
            prompts[i][0], attention_mask=prompts[i][1], max_new_tokens=12, **options[j]
        ).tolist()
        for i, j in jobs
    }
    got: dict[tuple[int, int], list] = {}
    start = threading.Barrier(4)

    def work(mine: list[tuple[int, int]]) -> None:
        start.wait()
        for i, j in mine:
            ids, mask = prompts[i]
            got[i, j] = pair.ours.generate(ids, attention_mask=mask, max_new_tokens=12, **options[j]).tolist()

    threads = [threading.Thread(target=work, args=(jobs[k::4],)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == want
    assert not pair.left


def test_engine_is_the_native_one(pair, batch, monkeypatch):
    """What the tests above rest on: no call of theirs ran in transformers' forward."""
    decoded = []
    decode = NativeEngine.decode
    monkeypatch.setattr(NativeEngine, "decode", lambda self, *a: decoded.append(1) or decode(self, *a))
    monkeypatch.setattr(EagerEngine, "extend", lambda *a, **k: pytest.fail("the eager engine"))
    pair.ours.generate(**batch, max_new_tokens=4)
    assert decoded


def test_what_cannot_be_accelerated(pair):
    with pytest.raises(ValueError, match="takes a transformers model that can generate"):
        accelerate(pair.plain.model)


def test_restore_of_a_plain_model_does_nothing(pair):
    assert restore(pair.plain) is pair.plain
