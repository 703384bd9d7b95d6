"""trace: tokens, norms and distances of latent steps, against the formulas written out in float64."""

import dataclasses
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, OTHERS, VOCAB, PlainLoop, feed_back, ragged, tiny_model
from torch import Tensor

from latentmas_kernels import LatentOutput, latent_generate, trace
from latentmas_kernels.cache.latent_cache import LatentCache
from latentmas_kernels.engines.base import cosine
from latentmas_kernels.models.architecture import Architecture, decoder_of, logits_of
from latentmas_kernels.outputs import Metrics
from latentmas_kernels.trace import LatentTrace, trace_of

EAGER = {"engine": "eager", "aligner": "identity"}
TOP = 4
STEPS = [5, 2, 3]
NUMBERS = ("probabilities", "norms", "distances", "cosines")


def latent_output_of(model: Any, steps: Any = STEPS, **options: Any) -> LatentOutput:
    ids, mask = ragged([3, 9, 1])
    return latent_generate(model, ids, mask, latent_steps=steps, output_states=True, **{**EAGER, **options})


@torch.no_grad()
def own_logits(model: Any, states: Tensor) -> Tensor:
    """What the model's own forward makes of states [N, D], float64: its decoder is made to give them."""

    def give(module: Any, inputs: Any, output: Any) -> Any:
        output.last_hidden_state = states[None]
        return output

    handle = decoder_of(model).register_forward_hook(give)
    try:
        return model(input_ids=torch.full((1, len(states)), 3)).logits[0].double()
    finally:
        handle.remove()


@torch.no_grad()
def reference(model: Any, output: LatentOutput, row: int, top: int = TOP) -> dict[str, Tensor]:
    """A row's own steps in float64, one at a time."""
    count = output.latent_steps[row]
    states, fed = output.states[row, :count], output.latents[row, :count].double()
    embeddings = model.get_input_embeddings()(torch.arange(VOCAB)).double()
    most = own_logits(model, states).softmax(-1).sort(dim=-1, descending=True)

    def cosine(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b) / (a.norm() * b.norm())

    to_all = torch.stack([torch.stack([cosine(step, e) for e in embeddings]) for step in fed])
    return {
        "tokens": most.indices[:, :top],
        "probabilities": most.values[:, :top],
        "norms": states.double().norm(dim=-1),
        "nearest": to_all.argmax(-1),
        "distances": 1 - to_all.max(-1).values,
        "cosines": torch.tensor([torch.nan] + [cosine(fed[t], fed[t - 1]) for t in range(1, count)]),
    }


def assert_reference(got: LatentTrace, model: Any, output: LatentOutput, top: int = TOP) -> None:
    for row, count in enumerate(output.latent_steps):
        want = reference(model, output, row, top)
        for name in ("tokens", "nearest"):
            assert torch.equal(getattr(got, name)[row, :count], want[name]), name
        for name in NUMBERS:
            values = getattr(got, name)[row, :count].double()
            torch.testing.assert_close(values, want[name].double(), atol=2e-6, rtol=2e-6, equal_nan=True, msg=name)


def equal(a: LatentTrace, b: LatentTrace) -> None:
    for field in dataclasses.fields(LatentTrace):
        torch.testing.assert_close(getattr(a, field.name), getattr(b, field.name), atol=1e-6, rtol=0, equal_nan=True)


# ---- against the formulas ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "gemma3", "granite", "cohere2", "gpt2"])
@pytest.mark.parametrize("aligner", ["identity", "soft"])
def test_steps_are_as_the_formulas_say(name, aligner):
    """Rows of different lengths; scaled embeddings, capped and scaled logits among the families."""
    model = tiny_model(name)
    output = latent_output_of(model, aligner=aligner)
    got = trace_of(model, output, top_k=TOP)
    assert got.steps == STEPS
    assert_reference(got, model, output)
    assert got.finite.all()


def test_shapes_and_dtypes(model):
    got = trace_of(model, latent_output_of(model), top_k=TOP)
    want = {
        "tokens": (torch.int64, (3, 5, TOP)),
        "probabilities": (torch.float32, (3, 5, TOP)),
        "norms": (torch.float32, (3, 5)),
        "nearest": (torch.int64, (3, 5)),
        "distances": (torch.float32, (3, 5)),
        "cosines": (torch.float32, (3, 5)),
        "finite": (torch.bool, (3, 5)),
    }
    assert {name: (getattr(got, name).dtype, tuple(getattr(got, name).shape)) for name in want} == want


def test_behind_the_end_of_a_row_is_nothing(model):
    output = latent_output_of(model)
    for row, count in enumerate(STEPS):  # whatever lies there is not looked at
        output.states[row, count:] = output.latents[row, count:] = torch.nan
    got = trace_of(model, output)
    for row, count in enumerate(STEPS):
        assert (got.tokens[row, count:] == -1).all()
        assert (got.nearest[row, count:] == -1).all()
        assert all(getattr(got, name)[row, count:].isnan().all() for name in NUMBERS)
    assert got.finite.all()
    equal(got, trace_of(model, latent_output_of(model)))


def test_rows_are_as_they_are_alone(model):
    output = latent_output_of(model)
    got = trace_of(model, output)
    for row, count in enumerate(STEPS):
        alone = dataclasses.replace(
            output,
            latents=output.latents[row : row + 1, :count],
            states=output.states[row : row + 1, :count],
            latent_steps=[count],
        )
        cut = {
            f.name: getattr(got, f.name)[row : row + 1, :count] for f in dataclasses.fields(got) if f.name != "steps"
        }
        equal(trace_of(model, alone), LatentTrace([count], **cut))


def test_a_row_that_settles_has_fewer_steps(model):
    output = latent_output_of(model, 6, settle=-1.0)
    assert output.latent_steps == [2, 2, 2]
    got = trace_of(model, output, top_k=TOP)
    assert got.norms.shape == (3, 2)
    assert_reference(got, model, output)


def test_cosines_are_those_that_settle_sees(model):
    output = latent_output_of(model, 6)
    for row, taken in enumerate(output.latent_steps):
        output.latents[row, taken // 2] = output.latents[row, taken // 2 - 1]
    output.latents[0, :2] = 0
    got = trace_of(model, output)
    want = cosine(output.latents[:, 1:], output.latents[:, :-1]).float()
    for row, taken in enumerate(output.latent_steps):
        assert torch.equal(got.cosines[row, 1:taken], want[row, : taken - 1])
    assert got.cosines[0, 1] == 0


def test_no_steps_at_all(model):
    got = trace_of(model, latent_output_of(model, 0))
    assert got.steps == [0, 0, 0]
    assert got.tokens.shape == (3, 0, 5)
    assert got.norms.shape == got.nearest.shape == got.finite.shape == (3, 0)


def test_the_whole_vocabulary_sums_to_one(model):
    got = trace_of(model, latent_output_of(model, 3), top_k=VOCAB)
    torch.testing.assert_close(got.probabilities.sum(-1), torch.ones(3, 3))
    assert torch.equal(got.tokens.sort(-1).values, torch.arange(VOCAB).expand(3, 3, VOCAB))


def test_embeddings_are_taken_as_the_module_gives_them(model):
    """A module that gives rows of its weight in another order: the token is the one it gives the row for."""
    output = latent_output_of(model)
    before = trace_of(model, output)
    plain = model.get_input_embeddings().weight.detach().clone()
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, out: plain[VOCAB - 1 - inputs[0]])
    after = trace_of(model, output)
    there = before.nearest >= 0
    assert torch.equal(after.nearest[there], VOCAB - 1 - before.nearest[there])
    torch.testing.assert_close(after.distances, before.distances, equal_nan=True)


def test_a_token_that_is_fed_is_nearest_to_itself(model):
    """And a token whose embedding is zero has no direction: it is nearest to nothing."""
    output = latent_output_of(model, 33)
    ids = 1 + torch.arange(3 * 33).view(3, 33) % (VOCAB - 1)
    ids[1, 1] = ids[1, 0]
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0
        output.latents.copy_(2.5 * model.get_input_embeddings()(ids))
    got = trace_of(model, output)
    assert torch.equal(got.nearest, ids)
    assert got.distances.min() >= 0
    assert got.distances.max() < 1e-6
    assert got.cosines[1, 1] == pytest.approx(1, abs=1e-6)
    assert got.cosines[:, 0].isnan().all()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize(("steps", "rows"), [(1, 1), (2, 10), (7, 96), (1000, 1000)])
def test_pieces_of_any_size_give_the_same(name, steps, rows, monkeypatch):
    model = tiny_model(name)
    output = latent_output_of(model)
    whole = trace_of(model, output)
    monkeypatch.setattr(trace, "STEPS", steps)
    monkeypatch.setattr(trace, "VOCABULARY_ROWS", rows)
    equal(trace_of(model, output), whole)


def test_logits_and_embeddings_are_made_in_pieces(model, monkeypatch):
    """Never more steps through the lm_head, nor more rows of the embedding, than a piece has."""
    monkeypatch.setattr(trace, "STEPS", 3)
    monkeypatch.setattr(trace, "VOCABULARY_ROWS", 20)
    output, heads, rows = latent_output_of(model), [], []
    model.get_output_embeddings().register_forward_hook(lambda m, inputs, out: heads.append(len(inputs[0])))
    model.get_input_embeddings().register_forward_hook(lambda m, inputs, out: rows.append(len(inputs[0])))
    trace_of(model, output)
    assert heads == [3, 3, 3, 1]
    assert rows == [20, 20, 20, 20, 17]


def test_bfloat16_is_read_in_float32():
    """Probabilities sum to one and cosines are those of the embeddings that were fed, finer than bfloat16 could tell."""
    model = tiny_model("llama").bfloat16()
    output = latent_output_of(model)
    assert output.states.dtype == torch.bfloat16
    got = trace_of(model, output, top_k=VOCAB)
    torch.testing.assert_close(got.probabilities[0].sum(-1), torch.ones(5))
    assert_reference(got=trace_of(model, output, top_k=1), model=model, output=output, top=1)


def test_the_output_stays_as_it_was(model):
    output = latent_output_of(model)
    states, latents = output.states.clone(), output.latents.clone()
    trace_of(model, output)
    assert torch.equal(output.states, states)
    assert torch.equal(output.latents, latents)


# ---- the lm_head ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
@torch.no_grad()
def test_logits_of_the_last_state_are_the_models_own(name):
    model, (ids, _) = tiny_model(name), ragged([7, 7])
    states = model.get_decoder()(input_ids=ids).last_hidden_state
    assert torch.equal(logits_of(model, states), model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("name", "option"),
    [("gemma2", {"final_logit_softcapping": 0.5}), ("gemma3", {"final_logit_softcapping": 0.5}),
     ("granite", {"logits_scaling": 7.0}), ("cohere2", {"logit_scale": 0.25})],
)  # fmt: skip
@torch.no_grad()
def test_caps_and_scales_that_matter(name, option):
    """At the usual cap of 30 the logits of a tiny model would not show it."""
    model, (ids, _) = tiny_model(name, **option), ragged([7, 7])
    states = model.get_decoder()(input_ids=ids).last_hidden_state
    got = logits_of(model, states)
    assert torch.equal(got, model(input_ids=ids).logits)
    assert not torch.allclose(got, model.get_output_embeddings()(states), atol=1e-2)
    output = latent_output_of(model)
    assert_reference(trace_of(model, output, top_k=TOP), model, output)


# ---- NaN -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def broken_output(model: Any, steps: int, at: int, value: float) -> LatentOutput:
    """Latent steps of a plain loop, whose state becomes `value` in one place at step `at` and is fed back."""
    ids, _ = ragged([6])
    loop, back = PlainLoop(model, feed_back(model, "identity")), feed_back(model, "identity")
    calls = 0

    def poison(module: Any, inputs: Any, state: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at + 1:  # the first call reads the prompt
            state[..., 3] = value
        return state

    handle = model.get_decoder().norm.register_forward_hook(poison)
    hidden, logits = loop.forward(input_ids=ids)
    latents, states = [], []
    for _ in range(steps):
        latents.append(back(hidden, logits))
        hidden, logits = loop.forward(inputs_embeds=latents[-1][:, None])
        states.append(hidden)
    handle.remove()
    cache = LatentCache.for_model(Architecture.of(model), 1, 1)
    return LatentOutput(
        cache, torch.stack(latents, 1), hidden, Metrics("plain"), [steps], states=torch.stack(states, 1)
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_state_that_breaks_is_seen_where_it_does(model, value):
    """The step whose state breaks was fed a good embedding; the ones behind it were not. Those before are as ever."""
    got = trace_of(model, broken_output(model, 6, at=4, value=value))
    good = trace_of(model, broken_output(model, 6, at=99, value=value))
    assert good.finite.all()
    assert got.finite.tolist() == [[True, True, True, False, False, False]]
    assert (got.tokens[0, 3:] == -1).all()
    assert got.probabilities[0, 3:].isnan().all()
    assert got.norms[0, 3:].isnan().all()
    assert got.nearest[0, 4:].tolist() == [-1, -1]
    assert got.distances[0, 4:].isnan().all()
    assert got.cosines[0, 4:].isnan().all()
    for name, upto in {"tokens": 3, "probabilities": 3, "norms": 3, "nearest": 4, "distances": 4, "cosines": 4}.items():
        torch.testing.assert_close(getattr(got, name)[:, :upto], getattr(good, name)[:, :upto], equal_nan=True)
        assert (getattr(good, name)[:, 1:] == getattr(good, name)[:, 1:]).all(), "nothing there is NaN by itself"


def test_a_row_that_breaks_leaves_the_others_alone(model):
    output = latent_output_of(model, 3)
    good = trace_of(model, output)
    output.states[1, 1, 5] = torch.nan
    output.latents[1, 2, 0] = torch.inf
    got = trace_of(model, output)
    assert got.finite.tolist() == [[True] * 3, [True, False, False], [True] * 3]
    assert got.nearest[1].tolist() == [*good.nearest[1, :2].tolist(), -1]
    for field in dataclasses.fields(LatentTrace)[1:]:
        torch.testing.assert_close(getattr(got, field.name)[::2], getattr(good, field.name)[::2], equal_nan=True)


@torch.no_grad()
def test_logits_that_overflow_are_no_tokens(model):
    """The state is finite and stays so; what the lm_head makes of it is not."""
    output = latent_output_of(model, 2)
    model.get_output_embeddings().weight[9] = 3e38
    output.states[0, 0] = 10.0
    got = trace_of(model, output)
    assert got.tokens[0, 0].tolist() == [-1] * 5
    assert got.probabilities[0, 0].isnan().all()
    assert got.norms[0, 0] == pytest.approx(10 * 48**0.5)
    assert got.finite.all()


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_states_must_have_been_kept(model):
    ids, mask = ragged([3])
    output = latent_generate(model, ids, mask, latent_steps=2, **EAGER)
    with pytest.raises(ValueError, match="pass output_states=True to latent_generate"):
        trace_of(model, output)


@pytest.mark.parametrize("top_k", [0, -1, VOCAB + 1, 2.0, True])
def test_top_k_out_of_range(model, top_k):
    with pytest.raises(
        ValueError, match=f"top_k must be an integer from 1 to {VOCAB}, the size of the vocab.*{top_k!r}"
    ):
        trace_of(model, latent_output_of(model, 1), top_k=top_k)


def test_another_model_is_refused(model):
    with pytest.raises(
        ValueError, match="the states have a width of 48, but LlamaForCausalLM has 32: pass the model tha"
    ):
        trace_of(tiny_model("llama", hidden_size=32), latent_output_of(model, 1))
