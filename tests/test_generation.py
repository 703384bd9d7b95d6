"""latent_generate() and generate(): semantics 1 to 7 against the plain loop, and what transformers makes of our cache."""

import copy
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numerics import summed_in_halves
from tiny_models import OTHERS, VOCAB, PlainLoop, feed_back, is_tied, ragged, real, tiny_model
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, StoppingCriteria, StoppingCriteriaList

from latentmas_kernels import LatentCache, build_aligner, generate, latent_generate
from latentmas_kernels.models.architecture import Architecture

LATENT_TOLERANCE = 5e-5
LENGTHS = [3, 19, 1, 11, 7]  # rows shorter and longer than a window of 8


def assert_latents_close(got, want, tolerance=LATENT_TOLERANCE):
    assert got.shape == want.shape
    worst = (got - want).abs().max().item()
    assert worst < tolerance, f"largest error {worst:.2e} at {(got - want).abs().argmax().item()}"


@pytest.mark.parametrize("kind", ["ridge", "identity", "soft"])
@torch.no_grad()
def test_ragged_chain_equals_plain_loop(family_model, kind):
    """Three agents over a ragged batch of 5: every row has the latents and the text of the plain loop for it alone."""
    model, steps = family_model, 6
    turns = [ragged(LENGTHS, seed=1), ragged([4, 2, 9, 5, 1], seed=2), ragged([5, 6, 2, 1, 8], seed=3)]
    cache, latent_outputs = None, []
    for ids, mask in turns[:2]:
        out = latent_generate(model, ids, mask, latent_steps=steps, past_key_values=cache, aligner=kind)
        cache = out.past_key_values
        latent_outputs.append(out)
    decoded = generate(model, *turns[2], past_key_values=cache, max_new_tokens=10, eos_token_id=None)

    for row in range(len(LENGTHS)):
        alone = PlainLoop(model, feed_back(model, "identity" if kind == "ridge" and is_tied(model) else kind))
        for (ids, mask), out in zip(turns[:2], latent_outputs, strict=True):
            latents, last = alone.run_latent(real(ids, mask, row), steps)
            assert_latents_close(out.latents[row], latents)
            assert_latents_close(out.last_hidden[row], last)
        assert decoded.sequences[row, -10:].tolist() == alone.decode(real(*turns[2], row), 10)


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_other_families_equal_plain_loop(name):
    """Scaled embeddings, capped logits, learned positions, experts, sinks: nothing in the engine is about one family."""
    model = tiny_model(name, tie_word_embeddings=name not in ("granite", "mixtral"))
    ids, mask = ragged([3, 14, 1])
    for kind in ("ridge", "soft"):
        latent = latent_generate(model, ids, mask, latent_steps=4, aligner=kind, engine="eager")
        decoded = generate(
            model,
            ids,
            mask,
            past_key_values=latent.past_key_values,
            max_new_tokens=6,
            eos_token_id=None,
            engine="eager",
        )
        for row in range(3):
            alone = PlainLoop(model, feed_back(model, "identity" if kind == "ridge" and is_tied(model) else kind))
            latents, _ = alone.run_latent(real(ids, mask, row), 4)
            assert_latents_close(latent.latents[row], latents)
            assert decoded.sequences[row, -6:].tolist() == alone.decode(real(ids, mask, row), 6)


@torch.no_grad()
def test_row_alone_equals_row_in_batch(family_model):
    ids, mask = ragged(LENGTHS)
    batch = latent_generate(family_model, ids, mask, latent_steps=5, aligner="ridge")
    decoded = generate(
        family_model, ids, mask, past_key_values=batch.past_key_values, max_new_tokens=8, eos_token_id=None
    )
    for row in range(len(LENGTHS)):
        alone_ids = real(ids, mask, row)
        alone = latent_generate(family_model, alone_ids, latent_steps=5, aligner="ridge")
        assert_latents_close(batch.latents[row], alone.latents[0])
        text = generate(
            family_model, alone_ids, past_key_values=alone.past_key_values, max_new_tokens=8, eos_token_id=None
        )
        assert decoded.sequences[row, -8:].tolist() == text.sequences[0, -8:].tolist()


@torch.no_grad()
def test_padding_side_and_value_do_not_matter(family_model):
    left_ids, left_mask = ragged(LENGTHS, side="left")
    right_ids, right_mask = ragged(LENGTHS, side="right")
    right_ids = right_ids.masked_fill(right_mask == 0, VOCAB + 1000)  # padding may be anything, even no token at all
    left = latent_generate(family_model, left_ids, left_mask, latent_steps=4, aligner="ridge")
    right = latent_generate(family_model, right_ids, right_mask, latent_steps=4, aligner="ridge")
    assert torch.equal(left.latents, right.latents)
    assert torch.equal(left.past_key_values.lengths, right.past_key_values.lengths)
    a = generate(family_model, left_ids, left_mask, past_key_values=left.past_key_values, max_new_tokens=6)
    b = generate(family_model, right_ids, right_mask, past_key_values=right.past_key_values, max_new_tokens=6)
    assert torch.equal(a.sequences, b.sequences)


@torch.no_grad()
def test_poisoned_slots_are_never_read(family_model):
    ids, mask = ragged(LENGTHS)
    clean = latent_generate(family_model, ids, mask, latent_steps=5, aligner="ridge")
    poisoned = LatentCache.for_model(Architecture.of(family_model), batch=5, capacity=64)
    poisoned.keys.fill_(float("nan"))
    poisoned.values.fill_(float("nan"))
    poisoned.positions.fill_(-1)  # a position that every query would see
    out = latent_generate(family_model, ids, mask, latent_steps=5, aligner="ridge", past_key_values=poisoned.donate())
    assert torch.equal(out.latents, clean.latents)
    a = generate(family_model, ids, mask, past_key_values=out.past_key_values.donate(), max_new_tokens=6)
    b = generate(family_model, ids, mask, past_key_values=clean.past_key_values, max_new_tokens=6)
    assert torch.equal(a.sequences, b.sequences)


@pytest.mark.parametrize("kind", ["ridge", "soft"])
@torch.no_grad()
def test_forty_steps_stay_on_the_plain_path(kind):
    model = tiny_model("qwen3-mixed")
    ids, mask = ragged([13])
    out = latent_generate(model, ids, mask, latent_steps=40, aligner=kind)
    want, _ = PlainLoop(model, feed_back(model, kind)).run_latent(ids, 40)
    cosine = torch.cosine_similarity(out.latents[0], want, dim=-1)
    error = (out.latents[0] - want).abs().amax(-1)
    assert cosine.min() > 1 - 1e-6, f"cosine leaves at step {cosine.argmin().item()}: {cosine.min().item()}"
    assert error.max() < LATENT_TOLERANCE, f"error by step: {error.tolist()}"


@torch.no_grad()
def test_far_positions():
    model = tiny_model("llama", max_position_embeddings=4096)
    ids, mask = ragged([2900, 1200])
    out = latent_generate(model, ids, mask, latent_steps=3, aligner="ridge")
    for row in range(2):
        latents, _ = PlainLoop(model, feed_back(model, "ridge")).run_latent(real(ids, mask, row), 3)
        assert_latents_close(out.latents[row], latents)


@pytest.mark.parametrize("heads", [(8, 8), (8, 4), (8, 2), (8, 1)])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@torch.no_grad()
def test_head_shapes(heads, head_dim):
    model = tiny_model(
        "llama", num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=head_dim, num_hidden_layers=2
    )
    ids, mask = ragged([5, 2, 9])
    out = latent_generate(model, ids, mask, latent_steps=2, aligner="ridge")
    for row in range(3):
        latents, _ = PlainLoop(model, feed_back(model, "ridge")).run_latent(real(ids, mask, row), 2)
        assert_latents_close(out.latents[row], latents)


@torch.no_grad()
def test_batch_of_nineteen():
    model = tiny_model("qwen2-mixed")
    lengths = [1 + (7 * row) % 17 for row in range(19)]
    ids, mask = ragged(lengths)
    out = generate(model, ids, mask, max_new_tokens=5, eos_token_id=None)
    for row in range(19):
        assert out.sequences[row, -5:].tolist() == PlainLoop(model, feed_back(model, "ridge")).decode(
            real(ids, mask, row), 5
        )


@pytest.mark.parametrize("kind", ["ridge", "soft"])
@torch.no_grad()
def test_bfloat16_error_is_that_of_plain_bfloat16(family_model, kind):
    """Against float32 on the same rounded weights: at most twice the error of the plain bfloat16 loop."""
    ids, mask = ragged([9, 4, 1])
    half = family_model.bfloat16()
    full = copy.deepcopy(half).float()
    want = torch.stack(
        [PlainLoop(full, feed_back(full, kind)).run_latent(real(ids, mask, row), 1)[1] for row in range(3)]
    )
    plain = torch.stack(
        [PlainLoop(half, feed_back(half, kind)).run_latent(real(ids, mask, row), 1)[1] for row in range(3)]
    )
    ours = latent_generate(half, ids, mask, latent_steps=1, aligner=kind).last_hidden
    assert ours.dtype == torch.bfloat16
    assert (ours - want).norm() <= 2 * (plain - want).norm()


def in_one_pass(model, back, turns, latents_by_turn, new_ids):
    """What the plain model makes of one row's whole chain, all of its positions in one forward without a cache.

    It reads the embeddings that the engine fed back and the tokens that the engine wrote, so that no step inherits the
    rounding of those before it.

    Args:
        back: what `feed_back` made of the model.
        turns: the row's own ids, [1, T] each, of the agents with latent steps and of the one that decodes.
        latents_by_turn: the latents of the former, [steps, D] each.
        new_ids: the tokens of the one that writes, [n].

    Returns:
        What `back` makes of every position that a latent came from, [all steps, D], and the logits that the tokens were
        taken from, [n, V].
    """
    embed = model.get_input_embeddings()
    parts, came_from, end = [], [], 0
    for ids, latents in zip(turns, [*latents_by_turn, embed(new_ids[:-1])], strict=True):
        parts += [embed(ids)[0], latents.to(model.dtype)]
        came_from.append(torch.arange(len(latents)) + end + ids.shape[1] - 1)
        end += ids.shape[1] + len(latents)
    came_from[-1] = torch.cat([came_from[-1], torch.tensor([end - 1])])
    out = model(inputs_embeds=torch.cat(parts)[None], output_hidden_states=True)
    hidden, logits = out.hidden_states[-1][0], out.logits[0]
    thinking = torch.cat(came_from[:-1])
    return back(hidden[thinking], logits[thinking]), logits[came_from[-1]]


@pytest.mark.real_model
@torch.no_grad()
def test_default_model_ragged_chain(default_model, default_tokenizer):
    """Semantics 1 on a real model: in a ragged batch of 5 each row gets what the plain model makes of that row alone.

    The bound is four times the rounding of plain float32 here: the larger distance from float64 of the model as it is and of
    the same model with its sums in another order. One order alone may be right by chance.
    """
    exact = copy.deepcopy(default_model).double()
    orders = default_model, summed_in_halves(default_model)
    texts = [
        "Hello",
        "What is the capital of France?",
        "2 + 2 =",
        "Name a colour, any colour you like, but only one.",
        "Why?",
    ]
    rows = [default_tokenizer(t).input_ids for t in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    for kind in ("identity", "soft"):
        first = latent_generate(default_model, ids, mask, latent_steps=5, aligner=kind)
        second = latent_generate(
            default_model, ids, mask, latent_steps=5, aligner=kind, past_key_values=first.past_key_values
        )
        decoded = generate(
            default_model, ids, mask, past_key_values=second.past_key_values, max_new_tokens=12, eos_token_id=None
        )
        backs = [feed_back(model, kind) for model in (exact, *orders)]
        for row in range(5):
            turns, latents = [real(ids, mask, row)] * 3, [first.latents[row], second.latents[row]]
            new_ids = decoded.sequences[row, -12:]
            (want, logits), *plain = (
                in_one_pass(model, back, turns, latents, new_ids)
                for model, back in zip((exact, *orders), backs, strict=True)
            )
            noise, logit_noise = (
                max((order[part] - true).abs().max().item() for order in plain)
                for part, true in enumerate((want, logits))
            )
            assert_latents_close(torch.cat(latents), want, 4 * noise)
            # Greedy: no other token is better by more than the rounding of two logits.
            behind = logits.amax(-1) - logits.gather(-1, new_ids[:, None])[:, 0]
            assert behind.max() <= 2 * logit_noise


def count_lm_head(model, call):
    """Positions that went through the lm_head during a call."""
    seen = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda m, args, out: seen.append(args[0].shape[:-1].numel())
    )
    try:
        call()
    finally:
        hook.remove()
    return seen


def test_lm_head_runs_only_where_it_must(family_model):
    ids, mask = ragged(LENGTHS)
    for kind in ("ridge", "identity"):
        assert (
            count_lm_head(
                family_model,
                lambda k=kind: latent_generate(family_model, ids, mask, latent_steps=4, aligner=k, engine="eager"),
            )
            == []
        )
    # soft feedback: once behind the prompt and behind every step but the last, each time on one position per row
    assert (
        count_lm_head(
            family_model,
            lambda: latent_generate(family_model, ids, mask, latent_steps=4, aligner="soft", engine="eager"),
        )
        == [5] * 4
    )
    assert (
        count_lm_head(
            family_model,
            lambda: latent_generate(family_model, ids, mask, latent_steps=0, aligner="soft", engine="eager"),
        )
        == []
    )
    assert (
        count_lm_head(
            family_model, lambda: generate(family_model, ids, mask, max_new_tokens=3, eos_token_id=None, engine="eager")
        )
        == [5] * 3
    )


def test_no_list_of_hidden_states_is_collected(model, monkeypatch):
    decoder = model.get_decoder()
    outputs = []
    decoder.register_forward_hook(lambda m, args, out: outputs.append(out))
    latent_generate(model, *ragged([4]), latent_steps=2, aligner="ridge", engine="eager")
    assert len(outputs) == 3
    assert all(out.hidden_states is None for out in outputs)


@torch.no_grad()
def test_zero_steps_is_a_prefill_that_is_kept(model):
    ids, mask = ragged(LENGTHS)
    out = latent_generate(model, ids, mask, latent_steps=0)
    assert out.latents.shape == (5, 0, 48)
    assert out.past_key_values.lengths.tolist() == LENGTHS
    _, last = PlainLoop(model, feed_back(model, "ridge")).run_latent(real(ids, mask, 1), 0)
    assert_latents_close(out.last_hidden[1], last)


@torch.no_grad()
def test_embeddings_in(model):
    ids, mask = ragged(LENGTHS)
    embeds = model.get_input_embeddings()(ids).masked_fill(mask[..., None] == 0, 1e30)
    by_ids = latent_generate(model, ids, mask, latent_steps=3, aligner="ridge")
    by_embeds = latent_generate(model, inputs_embeds=embeds, attention_mask=mask, latent_steps=3, aligner="ridge")
    assert torch.equal(by_ids.latents, by_embeds.latents)


def new_tokens_for(model):
    """Ragged new tokens; of one length where a window would count the padding between past and new in transformers."""
    windowed = any(Architecture.of(model).windows)
    return ragged([5] * 5 if windowed else [2, 5, 3, 1, 5], seed=5)


@torch.no_grad()
def test_transformers_continues_from_our_cache(family_model):
    ids, mask = ragged(LENGTHS)
    new, new_mask = new_tokens_for(family_model)
    cache = latent_generate(family_model, ids, mask, latent_steps=6, aligner="ridge").past_key_values
    ours = generate(family_model, new, new_mask, past_key_values=cache, max_new_tokens=9, eos_token_id=None)
    theirs = family_model.generate(
        new, past_key_values=cache.to_hf(), attention_mask=cache.attention_mask(new_mask), max_new_tokens=9,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(ours.sequences[:, -9:], theirs[:, -9:])


@pytest.mark.real_model
@torch.no_grad()
def test_transformers_continues_on_the_default_model(default_model, default_tokenizer):
    tokenized = default_tokenizer(
        ["Tell me about the sea.", "Why?"], padding=True, padding_side="left", return_tensors="pt"
    )
    cache = latent_generate(default_model, **tokenized, latent_steps=5, aligner="soft").past_key_values
    ours = generate(default_model, **tokenized, past_key_values=cache, max_new_tokens=16, eos_token_id=None)
    theirs = default_model.generate(
        tokenized.input_ids, past_key_values=cache.to_hf(), attention_mask=cache.attention_mask(tokenized.attention_mask),
        max_new_tokens=16, do_sample=False, eos_token_id=None,
    )  # fmt: skip
    assert torch.equal(ours.sequences[:, -16:], theirs[:, -16:])


@torch.no_grad()
def test_we_continue_from_a_transformers_cache(family_model):
    """A padded cache of transformers, with the mask over past + new, as any codebase would hand it over."""
    ids, mask = ragged(LENGTHS)
    new, new_mask = new_tokens_for(family_model)
    both = torch.cat([mask, new_mask], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    past = family_model(ids, attention_mask=mask, position_ids=positions, use_cache=True).past_key_values
    before = [layer.keys.clone() for layer in past.layers]
    ours = generate(family_model, new, both, past_key_values=past, max_new_tokens=7, eos_token_id=None)
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, past.layers, strict=True)), (
        "the caller's cache changed"
    )
    theirs = family_model.generate(
        new,
        past_key_values=past,
        attention_mask=both,
        max_new_tokens=7,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(ours.sequences[:, -7:], theirs[:, -7:])


class LastTokenDivides(StoppingCriteria):
    """Ends the rows whose last token is a multiple of `divisor`."""

    def __init__(self, divisor):
        self.divisor = divisor

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % self.divisor == 0


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    new=st.integers(1, 12),
    minimum=st.integers(0, 6),
    ends=st.lists(st.integers(0, VOCAB - 1), max_size=40, unique=True),
    penalty=st.sampled_from([None, 1.3]),
    divisor=st.sampled_from([None, 7]),
)
@torch.no_grad()
def test_generate_equals_transformers(lengths, new, minimum, ends, penalty, divisor):
    """Greedy decoding with stop tokens, minimum lengths, processors and criteria: the sequences of model.generate()."""
    model = tiny_model("llama")
    ids, mask = ragged(lengths)
    options = {
        "max_new_tokens": new,
        "min_new_tokens": min(minimum, new),
        "eos_token_id": ends or None,
        "pad_token_id": 0,
        "do_sample": False,
        "logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)] if penalty else []),
        "stopping_criteria": StoppingCriteriaList([LastTokenDivides(divisor)] if divisor else []),
    }
    ids = ids.masked_fill(mask == 0, 0)
    theirs = model.generate(ids, attention_mask=mask, **options)
    ours = generate(model, ids, mask, **options).sequences
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize(
    "options", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}, {"temperature": 1.4, "top_k": 20, "top_p": 0.9}]
)
def test_sampling_draws_what_transformers_draws(model, options):
    ids, mask = ragged([6, 6])
    torch.manual_seed(3)
    theirs = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=True, eos_token_id=None, pad_token_id=0, **options
    )
    torch.manual_seed(3)
    ours = generate(model, ids, mask, max_new_tokens=12, do_sample=True, eos_token_id=None, engine="eager", **options)
    assert ours.sequences.tolist() == theirs.tolist()


@torch.no_grad()
def test_ended_rows_store_nothing_more(model):
    """A row's cache holds its prompt and its text but the last token, however long the others go on."""
    ids, mask = ragged([5, 5, 5], seed=4)
    free = generate(model, ids, mask, max_new_tokens=8, eos_token_id=None).sequences[:, 5:]
    end = int(free[0, 2])
    out = generate(model, ids, mask, max_new_tokens=8, eos_token_id=end)
    for row in range(3):
        text = free[row].tolist()
        kept = text.index(end) + 1 if end in text else 8
        assert out.sequences[row, 5 : 5 + kept].tolist() == text[:kept]
        assert int(out.past_key_values.lengths[row]) == 5 + kept - 1
    assert out.metrics.decode_tokens == int((out.past_key_values.lengths - 4).sum())


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    new=st.integers(1, 10),
    ends=st.just([]) | st.lists(st.integers(0, VOCAB - 1), max_size=30, unique=True),
    divisor=st.sampled_from([None, 3, 7]),
)
@example(lengths=[3, 5, 4], new=10, ends=[], divisor=7)
@torch.no_grad()
def test_rows_report_how_long_they_are_and_why_they_ended(lengths, new, ends, divisor):
    """Their own tokens up to the end token or what a criterion stops, else all; metrics and cache count the same.

    As in transformers, a row that a criterion stopped goes on with the batch where there are no end tokens.
    """
    ids, mask = ragged(lengths)
    out = generate(
        tiny_model("llama"), ids, mask, max_new_tokens=new, eos_token_id=ends or None, pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([LastTokenDivides(divisor)] if divisor else []),
    )  # fmt: skip
    steps = out.sequences.shape[1] - ids.shape[1]
    for row, tokens in enumerate(out.sequences[:, ids.shape[1] :].tolist()):
        stops = [i for i, token in enumerate(tokens) if token in ends or (divisor and token % divisor == 0)]
        own = stops[0] + 1 if stops and ends else steps
        assert out.new_tokens[row] == own
        assert out.finish_reasons[row] == ("stop" if stops else "length")
        assert tokens[own:] == [0] * (steps - own)
        assert int(out.past_key_values.lengths[row]) == lengths[row] + own - 1
    assert steps == (new if "length" in out.finish_reasons else max(out.new_tokens))
    assert out.metrics.decode_tokens == sum(out.new_tokens)


def test_an_end_token_at_the_limit_is_an_end(model):
    """The text is whole, so it was not cut."""
    ids, mask = ragged([5, 3])
    decoded = generate(model, ids, mask, max_new_tokens=4, eos_token_id=None)
    assert decoded.finish_reasons == ["length", "length"]
    end = int(decoded.sequences[0, -1])
    assert end not in decoded.sequences[0, 5:-1].tolist() + decoded.sequences[1, 5:].tolist()
    out = generate(model, ids, mask, max_new_tokens=4, eos_token_id=end)
    assert out.finish_reasons == ["stop", "length"]
    assert out.new_tokens == [4, 4]


def test_numbers_of_steps_may_be_those_of_numpy(model):
    ids, mask = ragged([4, 6])
    for steps, want in ((np.int64(2), [2, 2]), ([np.int32(1), 3], [1, 3]), (torch.tensor(2), [2, 2])):
        assert latent_generate(model, ids, mask, latent_steps=steps, aligner="identity").latent_steps == want


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_steps_are_told_of_as_they_begin(model, steps):
    """Each by its number from 0, after the forward of the step before it."""
    forwards, seen = [], []
    model.get_decoder().register_forward_hook(lambda *_: forwards.append(1))
    latent_generate(
        model, *ragged(LENGTHS), latent_steps=steps, aligner="identity", engine="eager",
        on_step=lambda step: seen.append((step, len(forwards))),
    )  # fmt: skip
    assert seen == [(step, step + 1) for step in range(steps)], "the first forward reads the prompt"
    assert len(forwards) == steps + 1


def test_telling_of_steps_changes_nothing(model):
    ids, mask = ragged(LENGTHS)
    quiet = latent_generate(model, ids, mask, latent_steps=4, aligner="ridge")
    seen = latent_generate(model, ids, mask, latent_steps=4, aligner="ridge", on_step=lambda step: None)
    assert torch.equal(seen.latents, quiet.latents)
    assert torch.equal(seen.last_hidden, quiet.last_hidden)


def test_streamer_gets_prompt_then_tokens(model):
    class Listener:
        def __init__(self):
            self.heard, self.ended = [], False

        def put(self, value):
            self.heard.append(value.tolist())

        def end(self):
            self.ended = True

    listener = Listener()
    ids, mask = ragged([4])
    out = generate(model, ids, mask, max_new_tokens=3, eos_token_id=None, streamer=listener)
    assert listener.ended
    assert listener.heard[0] == ids.tolist()
    assert [t for [t] in listener.heard[1:]] == out.sequences[0, 4:].tolist()


def test_metrics_count_real_tokens(model):
    ids, mask = ragged(LENGTHS)
    latent = latent_generate(model, ids, mask, latent_steps=3, aligner="identity", engine="eager")
    m = latent.metrics
    assert (m.engine, m.aligner, m.prefill_tokens, m.latent_tokens, m.decode_tokens) == (
        "eager",
        "identity",
        sum(LENGTHS),
        15,
        0,
    )
    assert min(m.setup_seconds, m.prefill_seconds, m.latent_seconds) > 0
    per_slot = 2 * 3 * 2 * 16 * 4  # keys and values, layers, heads, width, bytes
    assert m.kv_bytes == (sum(LENGTHS) + 15) * per_slot


# ---- the cache: never changed unless donated -------------------------------------------------------------------------


def snapshot(cache):
    return (
        cache.lengths.clone(),
        cache.next_position.clone(),
        list(cache.segments),
        cache.keys[..., : int(cache.lengths.max()), :].clone(),
    )


def assert_unchanged(cache, before):
    after = snapshot(cache)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])
    assert after[2] == before[2]
    used = before[0][:, None] > torch.arange(before[3].shape[3])  # slots behind a row's end are nobody's
    assert torch.equal(after[3].transpose(2, 3)[:, used], before[3].transpose(2, 3)[:, used])


@torch.no_grad()
def test_memory_is_forked(model):
    ids, mask = ragged(LENGTHS)
    cache = latent_generate(model, ids, mask, latent_steps=2, aligner="ridge").past_key_values
    before = snapshot(cache)
    one = latent_generate(model, ids, mask, latent_steps=2, aligner="ridge", past_key_values=cache)
    two = generate(model, ids, mask, past_key_values=cache, max_new_tokens=3)
    assert_unchanged(cache, before)
    assert one.past_key_values is not cache
    assert two.past_key_values is not cache


@torch.no_grad()
def test_donated_memory_is_extended_in_place(model):
    ids, mask = ragged(LENGTHS)
    cache = latent_generate(model, ids, mask, latent_steps=2, aligner="ridge", max_cache_len=64).past_key_values
    assert cache.capacity == 64
    want = latent_generate(model, ids, mask, latent_steps=2, aligner="ridge", past_key_values=cache)
    out = latent_generate(model, ids, mask, latent_steps=2, aligner="ridge", past_key_values=cache.donate())
    assert out.past_key_values is cache
    assert torch.equal(out.latents, want.latents)
    again = latent_generate(model, ids, mask, latent_steps=1, aligner="ridge", past_key_values=cache)
    assert again.past_key_values is not cache, "a donation is for one call"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@torch.no_grad()
def test_interruption_leaves_cache_and_model_as_they_were(model, error):
    ids, mask = ragged(LENGTHS)
    cache = latent_generate(
        model, ids, mask, latent_steps=2, aligner="ridge", max_cache_len=64, engine="eager"
    ).past_key_values
    before = snapshot(cache)
    want = latent_generate(model, ids, mask, latent_steps=4, aligner="ridge", past_key_values=cache, engine="eager")
    calls = []

    def interrupt(module, args):
        calls.append(1)
        if len(calls) == 3:  # in the middle of the second latent step
            raise error

    hook = model.get_decoder().layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        latent_generate(
            model, ids, mask, latent_steps=4, aligner="ridge", past_key_values=cache.donate(), engine="eager"
        )
    hook.remove()
    assert_unchanged(cache, before)
    out = latent_generate(model, ids, mask, latent_steps=4, aligner="ridge", past_key_values=cache, engine="eager")
    assert torch.equal(out.latents, want.latents)


@pytest.mark.parametrize("call", ["latent_generate", "generate"])
@torch.no_grad()
def test_whoever_is_told_of_steps_may_interrupt_them(model, call):
    """The donated cache is then as before."""
    ids, mask = ragged(LENGTHS)
    cache = latent_generate(model, ids, mask, latent_steps=2, aligner="ridge", max_cache_len=64).past_key_values
    before, seen = snapshot(cache), []

    def tell(step):
        seen.append(step)
        if len(seen) == 3:
            raise KeyboardInterrupt

    run, options = {
        "latent_generate": (latent_generate, {"latent_steps": 4, "aligner": "ridge", "on_step": tell}),
        "generate": (generate, {"max_new_tokens": 9, "streamer": SimpleNamespace(put=tell, end=tell)}),
    }[call]
    with pytest.raises(KeyboardInterrupt):
        run(model, ids, mask, past_key_values=cache.donate(), **options)
    assert len(seen) == 3
    assert_unchanged(cache, before)


# ---- bad input ------------------------------------------------------------------------------------------------------


def bad_inputs():
    ids, mask = ragged([4, 6])
    yield "max_cache_len", {"max_cache_len": 9}, ["10 slots", "max_cache_len is 9", "max_cache_len=10"]
    yield "positions", {"latent_steps": 510}, ["516 positions", "512", "latent steps"]
    yield "negative steps", {"latent_steps": -1}, ["latent_steps", "-1"]
    yield "steps of another type", {"latent_steps": 2.5}, ["latent_steps", "2.5"]
    yield "mask shape", {"attention_mask": mask[:, :3]}, ["[2, 6]", "[2, 3]"]
    yield "mask values", {"attention_mask": mask * 3}, ["0 (padding) and 1", "3"]
    yield "empty row", {"attention_mask": mask * torch.tensor([[1], [0]])}, ["all zeros in row [1]"]
    yield "device", {"input_ids": ids.to("meta")}, ["input_ids is on meta", "cpu"]
    yield "vocabulary", {"input_ids": ids + 90}, ["token ids 0 to 96"]
    yield "negative ids", {"input_ids": ids - 90}, ["token ids 0 to 96"]
    yield "ids of another type", {"input_ids": ids.float()}, ["integers", "float32"]
    yield "no inputs", {"input_ids": None}, ["either input_ids or inputs_embeds"]
    yield "empty", {"input_ids": ids[:, :0], "attention_mask": None}, ["empty"]
    yield "embedding width", {"input_ids": None, "inputs_embeds": torch.zeros(2, 6, 40)}, ["[B, T, 48]", "[2, 6, 40]"]
    yield "embedding NaN", {"input_ids": None, "inputs_embeds": torch.full((2, 6, 48), float("nan"))}, ["NaN"]
    yield "aligner", {"aligner": "magic"}, ["'magic'", "'ridge'"]
    yield "aligner type", {"aligner": 3}, ["int"]
    yield "engine", {"engine": "warp"}, ["'warp'", "'eager'"]
    yield "past type", {"past_key_values": ((ids, ids),)}, ["LatentCache", "tuple"]


@pytest.mark.parametrize(("change", "words"), [pytest.param(c, w, id=n) for n, c, w in bad_inputs()])
def test_bad_input_is_refused_before_any_work(model, change, words):
    ids, mask = ragged([4, 6])
    model.get_decoder().register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the words are checked below)
        latent_generate(
            model,
            **{
                "engine": "eager",
                "input_ids": ids,
                "attention_mask": mask,
                "latent_steps": 4,
                "aligner": "ridge",
                **change,
            },
        )
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_new_tokens": 0}, ["max_new_tokens", "0"]),
        ({"min_new_tokens": 9}, ["min_new_tokens", "9"]),
        ({"max_new_tokens": 600}, ["605 positions", "512"]),
        ({"do_sample": True, "temperature": -1.0}, ["temperature"]),
        ({"engine": "warp"}, ["'warp'"]),
    ],
)
def test_generate_refuses_bad_input_before_any_work(model, change, words):
    ids, mask = ragged([4, 6])
    model.get_decoder().register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        generate(model, ids, mask, **{"engine": "eager", "max_new_tokens": 4, **change})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: tiny_model("llama", num_hidden_layers=2), ["layers 2 instead of 3"]),
        (lambda: tiny_model("llama", num_key_value_heads=4), ["kv_heads 4 instead of 2"]),
        (lambda: tiny_model("llama", head_dim=8), ["head_dim 8 instead of 16"]),
        (lambda: tiny_model("llama").bfloat16(), ["torch.bfloat16 instead of torch.float32"]),
    ],
)
@pytest.mark.parametrize("as_hf", [False, True])
def test_cache_of_another_model_is_refused(model, other, words, as_hf):
    ids, mask = ragged([4, 6])
    cache = latent_generate(other(), ids, mask, latent_steps=1, aligner="identity").past_key_values
    with pytest.raises(ValueError, match="cache of another model") as caught:
        latent_generate(model, ids, mask, past_key_values=cache.to_hf() if as_hf else cache)
    for word in words:
        assert word in str(caught.value)


def test_cache_of_another_batch_and_wrong_past_mask_are_refused(model):
    ids, mask = ragged([4, 6])
    cache = latent_generate(model, ids, mask, latent_steps=1, aligner="identity").past_key_values
    with pytest.raises(ValueError, match="has 2 rows, the inputs have 1"):
        latent_generate(model, ids[:1], past_key_values=cache)
    with pytest.raises(ValueError, match=r"\[7, 7\] ones over the past, past_key_values holds \[5, 7\]"):
        latent_generate(model, ids, torch.cat([torch.ones(2, 7, dtype=torch.int64), mask], 1), past_key_values=cache)


@torch.no_grad()
def test_donated_cache_that_is_too_small_grows(model):
    """A branch keeps its content, and so does the cache where memory is short."""
    ids, mask = ragged([4, 6])
    cache = latent_generate(model, ids, mask, latent_steps=1, aligner="identity").past_key_values
    want = latent_generate(model, ids, mask, latent_steps=10, aligner="identity", past_key_values=cache)
    branch, before = cache.branch(), snapshot(cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
        with pytest.raises(ValueError, match="a cache of 2 rows of 23 slots needs"):
            latent_generate(model, ids, mask, latent_steps=10, aligner="identity", past_key_values=cache.donate())
    assert_unchanged(cache, before)
    out = latent_generate(model, ids, mask, latent_steps=10, aligner="identity", past_key_values=cache)
    assert out.past_key_values is cache, "the donation still stood"
    assert cache.capacity == 23
    assert torch.equal(out.latents, want.latents)
    assert branch.lengths.tolist() == [5, 7]
    assert torch.equal(branch.keys[:, 0, :, :5], want.past_key_values.keys[:, 0, :, :5])


@pytest.mark.parametrize("call", [latent_generate, generate])
def test_memory_that_is_not_there_is_refused_before_any_work(model, monkeypatch, call):
    """10 latent steps, or 11 new tokens of which the last is not fed in, behind 4 and 6: two rows of 16 slots."""
    ids, mask = ragged([4, 6])
    build_aligner(model, "identity")
    need = 2 * 16 * 2 * 3 * 2 * 16 * 4  # rows, slots; keys and values, layers, heads, width, bytes
    options = {"latent_steps": 10, "aligner": "identity"} if call is latent_generate else {"max_new_tokens": 11}
    options["engine"] = "eager"
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=need))
    call(model, ids, mask, **options)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=need - 1))
    model.get_decoder().register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="a cache of 2 rows of 16 slots needs .* free on cpu are"):
        call(model, ids, mask, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_are_refused_before_any_work_and_seen_after_a_change(model, value):
    ids, mask = ragged([4, 6])
    latent_generate(model, ids, mask, latent_steps=1, aligner="identity", engine="eager")
    with torch.no_grad():
        model.get_decoder().layers[1].mlp.up_proj.weight[3, 4] = value
    model.get_decoder().register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    for call in (latent_generate, generate):
        with pytest.raises(ValueError, match="NaN or Inf in 1 of its weights.*up_proj"):
            call(model, ids, mask, engine="eager")


@pytest.mark.parametrize("steps", [0, 3])
def test_bad_hidden_state_names_the_row(model, steps):
    ids, mask = ragged([4, 6])
    norm = model.get_decoder().norm
    norm.register_forward_hook(lambda m, args, out: torch.where(torch.arange(2)[:, None, None] == 1, float("nan"), out))
    with pytest.raises(ValueError, match=r"NaN or Inf after the prompt in row \[1\].*bfloat16 or float32"):
        latent_generate(model, ids, mask, latent_steps=steps, aligner="identity", engine="eager")


def test_aligner_of_another_model_is_refused(model):
    ids, mask = ragged([4, 6])
    with pytest.raises(ValueError, match=r"\[40, 40\].*\[48, 48\]"):
        latent_generate(model, ids, mask, aligner=build_aligner(tiny_model("llama", hidden_size=40), "ridge"))


def test_gradients_are_refused(model):
    embeds = torch.zeros(1, 3, model.config.hidden_size, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"requires a gradient, which no call here computes; pass inputs_embeds.detach"
    ):
        latent_generate(model, inputs_embeds=embeds)
