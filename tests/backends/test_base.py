"""What a decoder is asked and given: prompts of tokens and embeddings, checks before they are sent, steps of all requests."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latentmas.backends.base import GenerationRequest, LockstepTokens, PromptEmbeds, check_requests
from tiny_models import TINY, tiny_model

from latentmas_kernels import LatentCache
from latentmas_kernels.models.architecture import Architecture

MODEL = tiny_model("llama")
WIDTH = TINY["hidden_size"]


def thought(number, width=WIDTH, dtype=torch.float32):
    return torch.full((width,), float(number), dtype=dtype)


def request(prompt=(5, 6), *, slot_inputs=(), row=None, most=4):
    return GenerationRequest(list(prompt), most, (2,), row=row, slot_inputs=slot_inputs)


# ---- embeddings and tokens -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 96), st.floats(-9, 9, width=32).map(thought)), max_size=12))
def test_what_was_fed_and_the_prompt_behind_it_are_in_their_order(slots):
    got = PromptEmbeds.of(request([8, 9], slot_inputs=slots), WIDTH, torch.float32)
    if all(isinstance(slot, int) for slot in slots):
        assert got is None
        return
    whole = [*slots, 8, 9]
    assert got.embeds.shape == (len(whole), WIDTH)
    assert got.is_token == [isinstance(slot, int) for slot in whole]
    assert got.ids == [slot if isinstance(slot, int) else 0 for slot in whole]
    for row, slot in zip(got.embeds, whole, strict=True):
        assert torch.equal(row, thought(0) if isinstance(slot, int) else slot)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_have_the_dtype_of_the_model_that_reads_them(dtype):
    fed = [torch.full((WIDTH,), 1 / 3)]
    got = PromptEmbeds.of(request(slot_inputs=fed), WIDTH, dtype)
    assert got.embeds.dtype == dtype
    assert torch.equal(got.embeds[0], torch.full((WIDTH,), 1 / 3).to(dtype))


@pytest.mark.parametrize("fed", [[], [1, 2, 3]])
def test_tokens_alone_need_no_embeddings(fed):
    assert PromptEmbeds.of(request(slot_inputs=fed), WIDTH, torch.float32) is None


def test_embedded_is_what_the_model_makes_of_the_tokens():
    embedding = MODEL.get_input_embeddings()
    got = PromptEmbeds.of(request([3, 9], slot_inputs=[7, thought(2), 5]), WIDTH, torch.float32)
    whole = got.embed_tokens(embedding)
    assert torch.equal(whole[[0, 2, 3, 4]], embedding(torch.tensor([7, 5, 3, 9])))
    assert torch.equal(whole[1], thought(2))
    assert not whole.requires_grad
    assert not got.embeds[[0, 2, 3, 4]].any(), "the prompt itself is as it was"


def test_thoughts_of_another_width_are_refused():
    """vLLM's engine would end."""
    with pytest.raises(ValueError, match=r"position 1 has the shape \[5\]; this model reads \[48\].*target_model"):
        PromptEmbeds.of(request(slot_inputs=[3, thought(1, 5)]), WIDTH, torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
def test_thoughts_that_are_not_finite_are_refused(value):
    """Also those that are too large for the model's dtype only."""
    spoilt = thought(1)
    spoilt[7] = value
    fed = [thought(1), spoilt]
    with pytest.raises(ValueError, match="what the agents thought holds NaN or Inf"):
        PromptEmbeds.of(request(slot_inputs=fed), WIDTH, torch.float16)


# ---- what is checked before it is sent -----------------------------------------------------------------------------


def memory(lengths):
    cache = LatentCache.for_model(Architecture.of(MODEL), len(lengths), 50)
    cache.lengths = torch.tensor(lengths)
    return cache


@pytest.mark.parametrize(
    ("row", "lengths", "tokens"),
    [(None, None, 2), (None, [30, 40], 2), (0, [30, 40], 32), (1, [30, 40], 42)],
)
def test_requests_may_be_as_long_as_the_engine_was_started_for(row, lengths, tokens):
    """To the token: memory of its row, prompt and text."""
    cache = None if lengths is None else memory(lengths)
    asked = [request(most=1), request(row=row, most=4)]
    check_requests(asked, cache, tokens + 4, "kv")
    slots = tokens - 2
    with pytest.raises(
        ValueError,
        match=rf"request 1 has {tokens} tokens \({slots} of memory\) and may write 4 more; vLLM was started for {tokens + 3} ",
    ):
        check_requests(asked, cache, tokens + 3, "kv")


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="request 1 has an empty prompt; the text needs one token or more"):
        check_requests([request(), request([])], None, 100, "kv")


@pytest.mark.parametrize(("row", "lengths", "rows"), [(0, None, 0), (2, [3, 4], 2), (-1, [3, 4], 2)])
def test_a_row_that_there_is_not_is_refused(row, lengths, rows):
    cache = None if lengths is None else memory(lengths)
    with pytest.raises(ValueError, match=f"request 0 goes on from row {row} of a memory of {rows} rows"):
        check_requests([request(row=row)], cache, 100, "kv")


@pytest.mark.parametrize("fed", [[], [1, 2], [1, 2, 3, 4]])
def test_embeddings_of_a_memory_are_given_for_every_slot(fed):
    """What is not given would be left out of the memory in silence."""
    cache = memory([5, 3])
    check_requests([request(row=1, slot_inputs=[1, 2, 3]), request(row=None)], cache, 100, "embeds")
    check_requests([request(row=1, slot_inputs=fed)], cache, 100, "kv")
    with pytest.raises(ValueError, match=f"request 0 says what {len(fed)} slots were fed, and its memory has 3; .*kv"):
        check_requests([request(row=1, slot_inputs=fed)], cache, 100, "embeds")


# ---- steps ---------------------------------------------------------------------------------------------------------


def pieces(draw, texts):
    """(request, new tokens, ended) in any interleaving; an end may come with the last tokens, or by itself."""
    left = [[*text] for text in texts]
    told = [False] * len(texts)
    while not all(told):
        number = draw(st.sampled_from([n for n, end in enumerate(told) if not end]))
        take = draw(st.integers(1, 3))
        new, left[number] = left[number][:take], left[number][take:]
        told[number] = not left[number] and (not new or draw(st.booleans()))
        yield number, new, told[number]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(3, 90), min_size=1, max_size=7), min_size=1, max_size=4), st.data())
def test_however_tokens_come_each_step_is_told_once_and_in_order(texts, data):
    """With the token of each request, and not before all that have not ended have made it."""
    told = []
    made, ended = [0] * len(texts), [False] * len(texts)
    steps = LockstepTokens(len(texts), lambda step, tokens: told.append((step, tokens)))
    for number, new, end in pieces(data.draw, texts):
        made[number] += len(new)
        ended[number] |= end
        steps.add(number, new, end)
        unfinished = [made[n] for n in range(len(texts)) if not ended[n]]
        assert len(told) == min(unfinished, default=max(made)), "as soon as it can be told, and no sooner"
    assert steps.ids == texts
    assert [step for step, _ in told] == list(range(1, max(map(len, texts)) + 1))
    for step, tokens in told:
        assert tokens.dtype == torch.int64
        assert tokens.shape == (len(texts),)
        for number, text in enumerate(texts):
            if step <= len(text):
                assert int(tokens[number]) == text[step - 1]


def test_nobody_need_listen():
    steps = LockstepTokens(2, None)
    steps.add(0, [4, 5], True)
    steps.add(1, [6], False)
    steps.add(1, [7, 8], True)
    assert steps.ids == [[4, 5], [6, 7, 8]]


def test_a_request_that_wrote_nothing_holds_nobody_up():
    told = []
    steps = LockstepTokens(2, lambda step, tokens: told.append((step, tokens.tolist())))
    steps.add(0, [], True)
    steps.add(1, [6, 7], True)
    assert [step for step, _ in told] == [1, 2]
    assert [row[1] for _, row in told] == [6, 7]
