"""Latent steps per row, recorded states, and embeddings for other models."""

import copy
import itertools

import pytest
import torch
from tiny_models import OTHERS, PlainLoop, feed_back, is_tied, ragged, real, tiny_model

from latentmas_kernels import LatentCache, Segment, build_aligner, generation, latent_generate
from latentmas_kernels.engines import EagerEngine, HFGraphEngine, LatentParams, NativeEngine
from latentmas_kernels.engines.base import converged, cosine
from latentmas_kernels.models.architecture import Architecture

ENGINES = ["eager", "native"]
KINDS = ["ridge", "identity", "soft"]
LENGTHS = [3, 19, 1, 11, 7]
STEPS = [1, 6, 3, 6, 2]
TOLERANCE = 5e-5


def assert_same(got, want, *, engine="native", tolerance=TOLERANCE):
    """Bit for bit on the native engine."""
    if engine == "native":
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(got, want, atol=tolerance, rtol=0)


def assert_same_slots(cache, row, other, other_row, engine):
    length = int(cache.lengths[row])
    assert length == int(other.lengths[other_row])
    assert torch.equal(cache.positions[row, :length], other.positions[other_row, :length])
    for mine, theirs in ((cache.keys, other.keys), (cache.values, other.values)):
        assert_same(mine[:, row, :, :length], theirs[:, other_row, :, :length], engine=engine)


# ---- steps of each row ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "engine"),
    [
        *((name, engine) for name in ("qwen3-mixed", "llama-tied", "mistral-window") for engine in ENGINES),
        *((name, "eager") for name in ("gemma2", "gpt2", "cohere2")),
    ],
)
def test_each_row_thinks_as_it_does_alone(name, engine, kind):
    model = tiny_model(name)
    ids, mask = ragged(LENGTHS)
    options = {"aligner": kind, "engine": engine, "output_states": True}
    out = latent_generate(model, ids, mask, latent_steps=STEPS, **options)
    assert out.latent_steps == STEPS
    assert out.metrics.latent_tokens == sum(STEPS)
    assert list(out.latents.shape) == list(out.states.shape) == [5, 6, 48]
    cache = out.past_key_values
    ends = tuple(n + steps for n, steps in zip(LENGTHS, STEPS, strict=True))
    assert cache.lengths.tolist() == cache.next_position.tolist() == list(ends)
    assert cache.segments[-1] == Segment(None, "latent", tuple(LENGTHS), ends)
    for row, steps in enumerate(STEPS):
        alone = latent_generate(model, real(ids, mask, row), latent_steps=steps, **options)
        assert_same(out.latents[row, :steps], alone.latents[0], engine=engine)
        assert_same(out.states[row, :steps], alone.states[0], engine=engine)
        assert_same(out.last_hidden[row], alone.last_hidden[0], engine=engine)
        assert torch.equal(out.last_hidden[row], out.states[row, steps - 1])
        assert not out.latents[row, steps:].any()
        assert not out.states[row, steps:].any()
        assert_same_slots(cache, row, alone.past_key_values, 0, engine)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_asking_for_more_changes_nothing(engine, kind):
    """One number for all, a number for each, and states that are recorded: the same latents."""
    model = tiny_model("qwen2-mixed")
    ids, mask = ragged(LENGTHS)
    options = {"aligner": kind, "engine": engine}
    plain = latent_generate(model, ids, mask, latent_steps=4, **options)
    assert plain.states is None
    assert plain.crossed == []
    for more in (
        {"latent_steps": [4] * 5},
        {"latent_steps": 4, "output_states": True},
        {"latent_steps": 4, "settle": 1.0},
        {"latent_steps": 4, "cross": [build_aligner(model, "identity" if kind == "ridge" else kind)]},
    ):
        out = latent_generate(model, ids, mask, **options, **more)
        assert torch.equal(out.latents, plain.latents)
        assert torch.equal(out.last_hidden, plain.last_hidden)
        assert out.latent_steps == [4] * 5
        assert (out.states is not None) == ("output_states" in more)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_recorded_states_are_those_of_the_plain_loop(family_model, kind):
    """On both engines: the state behind each step, in the order of the steps."""
    ids, mask = ragged([3, 14, 1])
    steps = [2, 4, 3]
    kind_of_loop = "identity" if kind == "ridge" and is_tied(family_model) else kind
    for engine in ENGINES:
        out = latent_generate(
            family_model, ids, mask, latent_steps=steps, aligner=kind, engine=engine, output_states=True
        )
        for row in range(3):
            seeds, back = [], feed_back(family_model, kind_of_loop)
            loop = PlainLoop(family_model, lambda h, z, seeds=seeds, back=back: (seeds.append(h), back(h, z))[1])
            latents, last = loop.run_latent(real(ids, mask, row), steps[row])
            assert_same(out.latents[row, : steps[row]], latents, engine="eager")
            assert_same(out.states[row, : steps[row]], torch.cat([*seeds[1:], last[None]]), engine="eager")


# ---- rows that settle ----------------------------------------------------------------------------------------------


def cosines(latents):
    """[B, n - 1], of each embedding to the one before."""
    return torch.cosine_similarity(latents[:, 1:].double(), latents[:, :-1].double(), dim=-1)


def steps_until(cosine, settle, limits):
    """Per row, counted by hand."""
    return [
        next((i + 2 for i, c in enumerate(row[: limit - 1]) if c >= settle), limit)
        for row, limit in zip(cosine.tolist(), limits, strict=True)
    ]


def threshold_of(cosine, limits):
    """Halfway between two observed cosines that are well apart, so that the rows end at as many steps as possible."""
    seen = cosine.flatten().sort().values
    between = [(float(a + b) / 2) for a, b in itertools.pairwise(seen) if b - a > 1e-3]
    return max(between, key=lambda t: len(set(steps_until(cosine, t, limits))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["llama", "qwen3-mixed", "qwen2"])
def test_rows_settle_when_the_plain_loop_does(name, engine, kind):
    """And have the latents of a call with just as many steps."""
    model, limits = tiny_model(name), [8, 8, 8, 3, 8]
    ids, mask = ragged(LENGTHS)
    options = {"aligner": kind, "engine": engine, "output_states": True}
    back = feed_back(model, kind)
    with torch.no_grad():
        loops = [PlainLoop(model, back).run_latent(real(ids, mask, row), 8)[0] for row in range(5)]
    cosine = cosines(torch.stack(loops))
    settle = threshold_of(cosine, limits)
    want = steps_until(cosine, settle, limits)
    assert len(set(want)) >= 3, "or the test would say little"
    seen = []
    out = latent_generate(model, ids, mask, latent_steps=limits, settle=settle, on_step=seen.append, **options)
    assert out.latent_steps == want
    assert seen == list(range(max(want)))
    assert out.latents.shape[1] == out.states.shape[1] == max(want)
    same = latent_generate(model, ids, mask, latent_steps=want, **options)
    assert_same(out.latents, same.latents, engine=engine)
    assert_same(out.states, same.states, engine=engine)
    assert_same(out.last_hidden, same.last_hidden, engine=engine)
    assert out.past_key_values.segments == same.past_key_values.segments
    for row in range(5):
        assert_same(out.latents[row, : want[row]], loops[row][: want[row]], engine="eager")
        assert_same_slots(out.past_key_values, row, same.past_key_values, row, engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_ends_of_what_settles(model, engine):
    """From -1 every row does with its second step, and not before; at None and, short of standing still, at 1 none does."""
    ids, mask = ragged([4, 6, 2])
    options = {"aligner": "ridge", "engine": engine}
    assert latent_generate(model, ids, mask, latent_steps=5, settle=-1, **options).latent_steps == [2, 2, 2]
    assert latent_generate(model, ids, mask, latent_steps=[1, 5, 2], settle=-1.0, **options).latent_steps == [1, 2, 2]
    for settle in (1, 1.0, None):
        assert latent_generate(model, ids, mask, latent_steps=5, settle=settle, **options).latent_steps == [5, 5, 5]
    assert latent_generate(model, ids, mask, latent_steps=0, settle=-1, **options).latent_steps == [0, 0, 0]


@pytest.mark.parametrize("engine", ENGINES)
def test_settling_is_seen_in_the_numbers_that_are_fed(engine):
    """In bfloat16 the embeddings are rounded before they are compared."""
    model = tiny_model("llama").bfloat16()
    ids, mask = ragged(LENGTHS)
    options = {"aligner": "ridge", "engine": engine}
    latents = latent_generate(model, ids, mask, latent_steps=8, **options).latents
    settle = threshold_of(cosines(latents), [8] * 5)
    want = steps_until(cosines(latents), settle, [8] * 5)
    out = latent_generate(model, ids, mask, latent_steps=8, settle=settle, **options)
    assert len(set(want)) >= 3
    assert out.latent_steps == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cosine_is_that_of_float64_and_1_for_the_same_bits(dtype):
    now, before = torch.randn(2, 200, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = cosine(now, before)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.cosine_similarity(now.double(), before.double(), dim=-1), rtol=0, atol=1e-14)
    assert (cosine(now, now) == 1).all()
    assert (cosine(now, -now) == -1).all()
    zero, bad = torch.zeros_like(now[0]), torch.full_like(now[0], torch.nan)
    assert [cosine(*pair).item() for pair in ((now[0], zero), (zero, now[0]), (zero, zero))] == [0, 0, 0]
    assert all(cosine(*pair).isnan() for pair in ((now[0], bad), (bad, bad), (zero, bad)))
    assert converged(torch.stack([now, now], dim=1), 1, 1.0).all()
    assert not converged(torch.stack([now[0], bad])[None], 1, -1.0).any()


def test_without_settle_nothing_is_asked_of_the_device():
    nowhere = torch.empty(3, 4, 5, device="meta")
    for step, settle in ((2, None), (0, 0.5)):
        ends = converged(nowhere, step, settle)
        assert ends.device.type == "cpu"
        assert ends.tolist() == [False] * 3


ALL_ENGINES = [EagerEngine, NativeEngine, HFGraphEngine]


@pytest.mark.parametrize(("settle", "want"), [(0.0, 2), (0.01, 4)])
@pytest.mark.parametrize("engine", ALL_ENGINES)
@torch.no_grad()
def test_zero_embeddings_have_a_cosine_of_0(model, engine, settle, want):
    """Neither NaN nor 1."""
    model.model.norm.weight.zero_()
    cache = latent_generate(tiny_model("llama"), *ragged([6, 3]), latent_steps=0, max_cache_len=20).past_key_values
    latent_params, aligner = LatentParams(torch.tensor([4, 4]), settle), build_aligner(model, "identity")
    latent = engine(model, Architecture.of(model)).run_latent(cache, torch.zeros(2, 48), aligner, latent_params, None)
    assert latent.steps.tolist() == [want, want]


@pytest.mark.parametrize("engine", ALL_ENGINES)
@torch.no_grad()
def test_the_same_bits_twice_have_settled_at_1(model, engine):
    """Layers that add nothing: the state of a step points to where its input did, soon bit for bit."""
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    rows, runner, aligner = 16, engine(model, Architecture.of(model)), build_aligner(model, "identity")
    past = latent_generate(model, *ragged([3] * rows), latent_steps=0, max_cache_len=40)
    ends = []
    for settle in (None, 1.0):
        latent_params = LatentParams(torch.full((rows,), 12), settle)
        ends.append(runner.run_latent(past.past_key_values.fork(), past.last_hidden, aligner, latent_params, None))
    free = ends[0].latents
    same = (free[:, 1:] == free[:, :-1]).all(-1)
    still = same.any(dim=1)
    assert still.sum() > rows / 2, "or the test would say nothing"
    latest = 2 + same.int().argmax(dim=1)
    assert (ends[1].steps <= latest)[still].all()


# ---- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("settles", [False, True])
def test_an_exception_between_steps_leaves_the_memory_as_it_was(model, engine, settles):
    """Also where some rows have ended before."""
    ids, mask = ragged([6, 3, 9])
    options = {"engine": engine, "aligner": "ridge"}
    cache = latent_generate(model, ids, mask, latent_steps=2, max_cache_len=60, **options).past_key_values
    ended = {"latent_steps": [1, 6, 2]}
    if settles:
        cosine = cosines(latent_generate(model, ids, mask, past_key_values=cache, latent_steps=6, **options).latents)
        ended = {"latent_steps": 6, "settle": threshold_of(cosine, [6] * 3)}
        assert len(set(steps_until(cosine, ended["settle"], [6] * 3))) > 1
    before, segments = cache.fork(), list(cache.segments)

    def stop(step):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latent_generate(model, ids, mask, past_key_values=cache.donate(), on_step=stop, **options, **ended)
    assert cache.segments == segments
    assert cache.next_position.tolist() == before.next_position.tolist()
    for row in range(3):
        assert_same_slots(cache, row, before, row, "native")
    again, want = (latent_generate(model, ids, mask, past_key_values=c, **options, **ended) for c in (cache, before))
    assert torch.equal(again.latents, want.latents)
    assert again.latent_steps == want.latent_steps


@pytest.mark.parametrize(("keep", "words"), [({"output_states": True}, r" \(first in step 2\)"), ({}, "")])
def test_a_state_that_is_no_number_names_the_row_and_the_step(model, keep, words):
    ids, mask = ragged([4, 6])
    calls = []

    def broken(module, args, out):
        calls.append(1)
        return torch.where((torch.arange(2)[:, None, None] == 1) & (len(calls) >= 3), float("nan"), out)

    model.get_decoder().norm.register_forward_hook(broken)
    with pytest.raises(ValueError, match=rf"after the latent steps in row \[1\]{words}; supported are finite"):
        latent_generate(model, ids, mask, latent_steps=[4, 3], aligner="identity", engine="eager", **keep)


def wrong():
    wide = tiny_model("llama", hidden_size=64)
    model = tiny_model("llama")
    yield "rows that only read", {"latent_steps": [0, 3]}, "need calls of their own; got latent_steps=[0, 3]"
    yield "too few", {"latent_steps": [3]}, "or 2 of them; got [3]"
    yield "too many", {"latent_steps": [3, 4, 5]}, "or 2 of them; got [3, 4, 5]"
    yield "none", {"latent_steps": []}, "or 2 of them; got []"
    yield "a bool", {"latent_steps": True}, "0 or more, or 2 of them; got True"
    yield "bools", {"latent_steps": [2, True]}, "got [2, True]"
    yield "a float among them", {"latent_steps": [2, 3.0]}, "got [2, 3.0]"
    yield "a float", {"latent_steps": 2.0}, "got 2.0"
    yield "negative", {"latent_steps": [2, -1]}, "got [2, -1]"
    yield (
        "too long for the positions",
        {"latent_steps": [2, 507]},
        "513 positions (past 0 + prompt 6 + latent steps 507)",
    )
    yield (
        "too long for the space",
        {"latent_steps": [9, 2], "max_cache_len": 12},
        "row 0 needs 13 slots (past 0 + prompt 4",
    )
    for settle in (2.0, -1.5, float("nan")):
        yield f"settle {settle}", {"settle": settle}, f"settle is a cosine, from -1 to 1, or None; got {settle}"
    soft, ridge = (build_aligner(model, kind, target_model=wide) for kind in ("soft", "ridge"))
    yield "soft beside ridge", {"cross": [ridge, soft]}, "got 'soft' beside 'ridge'"
    yield "ridge beside soft", {"cross": [ridge], "aligner": "soft"}, "got 'ridge' beside 'soft'"
    back = build_aligner(wide, "ridge", target_model=model)
    yield "settle of another type", {"settle": True}, "settle is a cosine, from -1 to 1, or None; got True"
    yield (
        "a number of steps that is none",
        {"latent_steps": [2, True]},
        "latent_steps must be an integer of 0 or more, or 2",
    )
    yield "from another model", {"cross": [back]}, "[48, 64]"


@pytest.mark.parametrize(("change", "words"), [pytest.param(c, w, id=n) for n, c, w in wrong()])
def test_bad_input_is_refused_before_any_work(model, change, words):
    ids, mask = ragged([4, 6])
    model.get_decoder().register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (compared below)
        latent_generate(model, ids, mask, **{"latent_steps": 2, "aligner": "ridge", "engine": "eager", **change})
    assert words in str(caught.value)


# ---- for other models ----------------------------------------------------------------------------------------------


class Crossing:
    """The plain loop's feedback, which notes what another model would be fed, by the formulas in float64."""

    def __init__(self, model, target, kind):
        self.back = feed_back(model, "identity" if kind == "ridge" and is_tied(model) else kind)
        embedding = target.get_input_embeddings()
        self.rows = embedding(torch.arange(embedding.weight.shape[0])).double()
        self.noted = []
        if kind == "ridge":
            u = model.get_output_embeddings().weight.double()
            self.w = torch.linalg.solve(u.T @ u + 1e-5 * torch.eye(len(u.T), dtype=torch.float64), u.T @ self.rows)
        self.kind = kind

    def __call__(self, hidden, logits):
        if self.kind == "ridge":
            y = hidden.double() @ self.w
        else:
            top, tokens = logits.double().topk(10)
            y = (top.softmax(-1)[..., None] * self.rows[tokens]).sum(-2)
        self.noted.append(y * self.rows.norm(dim=1).mean() / y.norm(dim=-1, keepdim=True))
        return self.back(hidden, logits)


@pytest.mark.parametrize("kind", ["ridge", "soft"])
@pytest.mark.parametrize(
    ("name", "engine"),
    [
        *((name, engine) for name in ("qwen3-mixed", "llama-tied") for engine in ENGINES),
        *((name, "eager") for name in OTHERS),
    ],
)
@torch.no_grad()
def test_what_another_model_is_fed_equals_float64(name, engine, kind):
    """Of another width; logits that a model scales or caps are those that its own forward gives."""
    capped = {"final_logit_softcapping": 0.5} if name.startswith("gemma") else {}
    model, target = tiny_model(name, **capped), tiny_model("qwen2", hidden_size=64)
    exact = model if name in ("gpt-oss", "mixtral") else copy.deepcopy(model).double()  # experts have no float64
    ids, mask = ragged([3, 14, 1])
    steps = [4, 2, 1]
    cross = [build_aligner(model, kind, target_model=other) for other in (target, model)]
    out = latent_generate(model, ids, mask, latent_steps=steps, aligner=kind, engine=engine, cross=cross)
    assert out.states is None
    assert [list(c.shape) for c in out.crossed] == [[3, 4, 64], [3, 4, 48]]
    for row, count in enumerate(steps):
        crossing = Crossing(exact, target, kind)
        PlainLoop(exact, crossing).run_latent(real(ids, mask, row), count)
        want = torch.cat(crossing.noted)
        assert (out.crossed[0][row, :count] - want).abs().max() < 2 * TOLERANCE
        assert (out.crossed[1][row, :count] - out.latents[row, :count]).abs().max() < TOLERANCE
        assert not out.crossed[0][row, count:].any()
        assert not out.crossed[1][row, count:].any()


@pytest.mark.parametrize("kind", ["ridge", "soft"])
@pytest.mark.parametrize("engine", ENGINES)
def test_another_model_is_fed_nothing_where_there_were_no_latent_steps(model, engine, kind):
    ids, mask = ragged([3, 14])
    cross = [build_aligner(model, kind, target_model=tiny_model("llama", hidden_size=64))]
    out = latent_generate(
        model, ids, mask, latent_steps=0, aligner=kind, engine=engine, cross=cross, output_states=True
    )
    assert [list(c.shape) for c in out.crossed] == [[2, 0, 64]]
    assert list(out.states.shape) == [2, 0, 48]


@pytest.mark.parametrize("engine", ENGINES)
def test_what_another_bfloat16_model_is_fed(engine):
    """W_a: at most twice the error of the eager engine. Soft: what the model itself was fed, but for the rounding of logits
    and of the result; an error bound would be about ties at the tenth token."""
    half, target = tiny_model("llama").bfloat16(), tiny_model("llama", hidden_size=64).bfloat16()
    full, wide = copy.deepcopy(half).float(), copy.deepcopy(target).float()
    ids, mask = ragged([3, 14])
    want, plain, ours = (
        latent_generate(
            m, ids, mask, latent_steps=2, aligner="ridge", engine=e, cross=[build_aligner(m, "ridge", target_model=t)]
        ).crossed[0]
        for m, t, e in ((full, wide, "eager"), (half, target, "eager"), (half, target, engine))
    )
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - want).norm() <= 2 * (plain.float() - want).norm()
    cross = [build_aligner(half, "soft", target_model=half)]
    out = latent_generate(half, ids, mask, latent_steps=3, aligner="soft", engine=engine, cross=cross)
    error = (out.crossed[0].float() - out.latents.float()).norm(dim=-1) / out.latents.float().norm(dim=-1)
    assert error.max() < 2 * torch.finfo(torch.bfloat16).eps


# ---- engines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [EagerEngine, NativeEngine])
def test_engines_end_each_row_at_its_own_step(engine):
    """Straight through `run_latent`: the cache has grown by what each row took, and nothing else was written."""
    model = tiny_model("qwen2-mixed")
    runner = engine(model, Architecture.of(model))
    cache = LatentCache.for_model(Architecture.of(model), 3, 12)
    cache.buffer.fill_(float("nan"))
    seed = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latent = runner.run_latent(
            cache, seed, build_aligner(model, "ridge"), LatentParams(torch.tensor([2, 5, 1])), None
        )
    assert latent.states is None
    assert latent.steps.tolist() == cache.lengths.tolist() == [2, 5, 1]
    assert latent.latents.isfinite().all()
    for row, count in enumerate([2, 5, 1]):
        assert cache.buffer[:, :, row, :, :count].isfinite().all()
        assert cache.buffer[:, :, row, :, count:].isnan().all()


@pytest.mark.parametrize("engine", ENGINES)
def test_soft_crossings_never_hold_the_logits_of_all_steps(model, engine, monkeypatch):
    largest, real_logits = [0], generation.logits_of

    def logits_of(*args):
        logits = real_logits(*args)
        largest[0] = max(largest[0], logits.numel())
        return logits

    monkeypatch.setattr(generation, "logits_of", logits_of)
    cross = [build_aligner(model, "soft", target_model=tiny_model("llama", hidden_size=64))]
    latent_generate(model, *ragged([4, 6]), latent_steps=9, aligner="soft", engine=engine, cross=cross)
    assert largest[0] == 2 * model.config.vocab_size
