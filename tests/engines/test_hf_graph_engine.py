"""The HF graph engine against the eager engine, with EagerReplay for graphs: models that no packed family covers."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace

import pytest
import torch
from tiny_models import FAMILIES, OTHERS, ragged, tiny_model
from transformers import GenerationConfig
from transformers.models.gemma2 import modeling_gemma2

from latentmas_kernels import build_aligner, generate, latent_generate
from latentmas_kernels.engines import EagerEngine, HFGraphEngine, LatentParams, hf_graph
from latentmas_kernels.engines.cuda_graphs import CallOrder, CaptureError, EagerReplay
from latentmas_kernels.inputs import Prompt
from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.warn_once import warn_once


def both(model):
    architecture = Architecture.of(model)
    return HFGraphEngine(model, architecture), EagerEngine(model, architecture)


def read(model, lengths, room=40):
    ids, mask = ragged(lengths)
    return latent_generate(model, ids, mask, latent_steps=0, max_cache_len=room, engine="eager")


def assert_same(ours, theirs):
    assert ours.lengths.tolist() == theirs.lengths.tolist()
    for row, length in enumerate(ours.lengths.tolist()):
        assert torch.equal(ours.positions[row, :length], theirs.positions[row, :length])
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(a[:, row, :, :length], b[:, row, :, :length], rtol=1e-4, atol=1e-5)


def every(batch, steps, **options):
    """So many steps for each row."""
    return LatentParams(torch.full((batch,), steps), **options)


def assert_same_steps(ours, theirs):
    assert torch.equal(ours.steps, theirs.steps)
    pairs = [(ours.latents, theirs.latents), (ours.last_hidden, theirs.last_hidden)]
    assert (ours.states is None) == (theirs.states is None)
    if theirs.states is not None:
        pairs.append((ours.states, theirs.states))
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", [*OTHERS, "qwen3-mixed"])
@torch.no_grad()
def test_latent_and_token_steps_equal_eager(name):
    """Ragged rows whose unused slots hold NaN, windows that the cache outgrows, a row that does not take part in some steps."""
    model = tiny_model(name)
    engine, eager = both(model)
    start = read(model, [12, 5, 9])
    aligner = build_aligner(model, "identity")
    caches = [start.past_key_values.fork(40) for _ in range(2)]
    for cache in caches:
        for row, length in enumerate(cache.lengths.tolist()):
            cache.keys[:, row, :, length:] = cache.values[:, row, :, length:] = float("nan")
    ours, theirs = (
        e.run_latent(c, start.last_hidden, aligner, every(3, 3), None)
        for e, c in zip((engine, eager), caches, strict=True)
    )
    assert_same_steps(ours, theirs)
    for counts in ([1, 1, 1], [1, 0, 1], [0, 0, 1]):
        prompt = Prompt(torch.tensor(counts), torch.tensor([[5], [6], [7]]))
        a, b = (e.extend(c, prompt, logits=True) for e, c in zip((engine, eager), caches, strict=True))
        torch.testing.assert_close(a[prompt.counts > 0], b[prompt.counts > 0], rtol=1e-4, atol=5e-5)
        assert_same(*caches)


def poisoned(cache):
    """Return a copy with NaN in every slot that a row does not use: behind its end, and before the end of a shared prefix."""
    cache = cache.fork()
    for row, (length, prefix_len) in enumerate(zip(cache.lengths.tolist(), cache.prefix_len.tolist(), strict=True)):
        for store in (cache.keys, cache.values):
            store[:, row, :, length:] = store[:, row, :, :prefix_len] = float("nan")
    return cache


def run_both(engines, start, seed, aligner, latent_params, on_step=None):
    """Compare latents and caches of both engines, and that slots of others are not written; return the steps of each row."""
    caches = [poisoned(start) for _ in engines]
    latents = [e.run_latent(c, seed, aligner, latent_params, on_step) for e, c in zip(engines, caches, strict=True)]
    assert_same_steps(*latents)
    for row, (length, prefix_len) in enumerate(zip(caches[0].lengths.tolist(), start.prefix_len.tolist(), strict=True)):
        assert caches[0].keys[:, row, :, length:].isnan().all()
        assert caches[0].values[:, row, :, :prefix_len].isnan().all()
    for cache in caches:
        cache.make_private()
    assert_same(*caches)
    return latents[0].steps.tolist()


@pytest.fixture
def captures(monkeypatch):
    """The graphs that are captured."""
    captured, real = [], EagerReplay.__call__
    monkeypatch.setattr(EagerReplay, "__call__", lambda *of: (captured.append(of[1]), real(*of))[1])
    return captured


@pytest.mark.parametrize("name", ["gemma3", "olmo2", "gpt2", "qwen3-mixed"])
@torch.no_grad()
def test_rows_end_as_on_eager_in_one_captured_step(name, captures, monkeypatch):
    model = tiny_model(name)
    engines = both(model)
    read_in = read(model, [12, 5, 9])
    start, seed, aligner = read_in.past_key_values, read_in.last_hidden, build_aligner(model, "identity")
    free = engines[1].run_latent(start.fork(), seed, aligner, every(3, 6), None).latents
    cosines = torch.cosine_similarity(free[:, 1:], free[:, :-1], dim=-1)
    levels = [(cosines[:, i].sort().values[:2].mean().item()) for i in range(5)]  # between two rows
    ends = set()
    monkeypatch.setattr(engines[0].eager, "run_latent", None)  # it must not be needed
    for latent_params in (
        every(3, 2), LatentParams(torch.tensor([3, 1, 5])), LatentParams(torch.tensor([3, 1, 5]), record=True),
        every(3, 3, stop_cosine=-1.0), every(3, 3, stop_cosine=1.0, record=True),
        *(LatentParams(torch.tensor([6, 6, 4]), stop_cosine=level, record=True) for level in levels),
    ):  # fmt: skip
        taken = run_both(engines, start, seed, aligner, latent_params)
        ends.add(tuple(taken))
        if latent_params.stop_cosine == -1.0:
            assert taken == [2, 2, 2]
    assert len(ends) > 4
    assert len(captures) == 1


@torch.no_grad()
def test_settled_batches_are_looked_at_now_and_then(monkeypatch):
    monkeypatch.setattr(hf_graph, "SYNC_EVERY", 4)
    model = tiny_model("olmo2")
    engine, _ = both(model)
    start, seen = read(model, [4, 6]), []
    latent = engine.run_latent(
        start.past_key_values,
        start.last_hidden,
        build_aligner(model, "identity"),
        every(2, 20, stop_cosine=-1.0),
        seen.append,
    )
    assert seen == [0, 1, 2, 3]
    assert latent.latents.shape[1] == 2
    assert start.past_key_values.lengths.tolist() == [6, 8]


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "qwen3-mixed"])
@torch.no_grad()
def test_lent_slots_are_copied_in_from_where_they_lie(name):
    """And nothing is written over a shared prefix; tokens behind it too."""
    model = tiny_model(name)
    engines = both(model)
    read_in = read(model, [66, 40, 129], 140)
    start = read_in.past_key_values.fork_rows(2, 145)
    assert start.prefix_len.tolist() == [0, 64, 0, 0, 0, 128]
    # Rows that start alike must not stay alike.
    seed = read_in.last_hidden.repeat_interleave(2, 0) + 0.1 * torch.randn(
        6, 48, generator=torch.Generator().manual_seed(0)
    )
    aligner = build_aligner(model, "identity")
    run_both(engines, start, seed, aligner, LatentParams(torch.tensor([2, 3, 1, 2, 4, 3]), record=True))
    caches = [poisoned(start) for _ in engines]
    prompt = Prompt(torch.tensor([1, 1, 0, 1, 1, 1]), torch.arange(5, 11)[:, None])
    a, b = (e.extend(c, prompt, logits=True) for e, c in zip(engines, caches, strict=True))
    torch.testing.assert_close(a[prompt.counts > 0], b[prompt.counts > 0], rtol=1e-4, atol=5e-5)
    for cache in caches:
        cache.make_private()
    assert_same(*caches)


@pytest.mark.parametrize(
    "latent_params",
    [LatentParams(torch.tensor([3, 1])), every(2, 3, record=True), every(2, 3, stop_cosine=-1.0), every(2, 1)],
)
@torch.no_grad()
def test_soft_feedback_of_rows_that_end_equals_eager(latent_params):
    model = tiny_model("gemma3")
    engines = both(model)
    start = read(model, [6, 3]).past_key_values
    tokens = Prompt(torch.tensor([1, 1]), torch.tensor([[4], [5]]))
    seed = engines[1].extend(start, tokens, logits=True)
    run_both(engines, start, seed, build_aligner(model, "soft"), latent_params)


@torch.no_grad()
def test_soft_feedback_equals_eager():
    model = tiny_model("gemma3")
    engine, eager = both(model)
    aligner = build_aligner(model, "soft")
    ids, mask = ragged([6, 3])
    seen = []
    caches = [read(model, [6, 3]).past_key_values.fork(20) for _ in range(2)]
    seed = eager.extend(caches[0].fork(20), Prompt(torch.tensor([1, 1]), torch.tensor([[4], [5]])), logits=True)
    ours = engine.run_latent(caches[0], seed, aligner, every(2, 3), seen.append)
    theirs = eager.run_latent(caches[1], seed, aligner, every(2, 3), None)
    assert_same_steps(ours, theirs)
    assert seen == [0, 1, 2]
    assert_same(*caches)


@torch.no_grad()
def test_windows_are_kept_and_caches_told_apart():
    """A larger cache takes a larger StaticBatch, a smaller one reuses those there are; another cache is copied in again."""
    model = tiny_model("olmo2")
    engine, eager = both(model)
    aligner = build_aligner(model, "identity")
    for lengths, room in (([4, 6], 20), ([300, 20], 320), ([5, 2], 20), ([4, 6], 20)):
        start = read(model, lengths, room)
        caches = [start.past_key_values.fork(room) for _ in range(2)]
        for _ in range(2):
            ours, theirs = (
                e.run_latent(c, start.last_hidden, aligner, every(2, 1), None)
                for e, c in zip((engine, eager), caches, strict=True)
            )
            assert_same_steps(ours, theirs)
    assert sorted(engine.state.batches) == [(2, 256), (2, 512)]
    assert len(engine.state.graphs) == 2


def interrupted(step):
    if step == 2:
        raise KeyboardInterrupt


def run_on_another(engine, eager, cache, start):
    """A call on another cache that uses the same StaticBatch and is interrupted; its graph exists already."""
    seed, aligner = torch.ones(1, 48), build_aligner(eager.model, "identity")
    engine.run_latent(start.fork(40), seed, aligner, every(1, 1), None)
    engine.extend(cache, Prompt(torch.tensor([1]), torch.tensor([[8]])), logits=True)
    other = start.fork(40)
    other.crop(-9)
    with pytest.raises(KeyboardInterrupt), other.transaction():
        engine.run_latent(other, seed, aligner, every(1, 5), interrupted)


def read_again(engine, eager, cache, start):
    cache.crop(-11)
    eager.extend(cache, Prompt(torch.tensor([11]), torch.arange(30, 41)[None]), logits=False)


def fail(engine, eager, cache, start):
    with suppress(ZeroDivisionError), cache.transaction():
        engine.extend(cache, Prompt(torch.tensor([1]), torch.tensor([[9]])), logits=True)
        raise ZeroDivisionError


CHANGES = {
    "interrupted": run_on_another,
    "rewound": read_again,
    "rebased": lambda engine, eager, cache, start: cache.rebase(eager.model),
    "kept": lambda engine, eager, cache, start: cache.keep(torch.arange(int(cache.lengths[0]))[None] % 5 > 0),
    "rolled back": fail,
    "reset": lambda engine, eager, cache, start: cache.reset(),
    "reordered": lambda engine, eager, cache, start: cache.reorder_cache(torch.tensor([0])),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_window_is_used_again_only_for_the_content_that_is_in_it(change):
    """Lengths alone do not tell: what was cut and written again may be as long as before."""
    model = tiny_model("olmo2")
    engine, eager = both(model)
    start = read(model, [20]).past_key_values
    start.keep((torch.arange(20)[None] < 5) | (torch.arange(20)[None] > 7))
    start = start.fork(40)
    caches = [start.fork() for _ in range(2)]
    token = Prompt(torch.tensor([1]), torch.tensor([[5]]))
    for e, cache in zip((engine, eager), caches, strict=True):
        e.extend(cache, token, logits=True)
        CHANGES[change](e, eager, cache, start)
        e.extend(cache, token, logits=True)
    a, b = (e.extend(c, token, logits=True) for e, c in zip((engine, eager), caches, strict=True))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-5)
    assert_same(*caches)


@torch.no_grad()
def test_tokens_in_a_row_are_not_copied_in_again(monkeypatch):
    model = tiny_model("olmo2")
    engine, _ = both(model)
    loaded, real = [], hf_graph.StaticBatch.copy_in
    monkeypatch.setattr(hf_graph.StaticBatch, "copy_in", lambda self, cache: (loaded.append(cache), real(self, cache)))
    caches = [read(model, [20]).past_key_values.fork(40) for _ in range(2)]
    token = Prompt(torch.tensor([1]), torch.tensor([[5]]))
    for which in (0, 0, 0, 1, 1, 0):
        engine.extend(caches[which], token, logits=True)
    assert [caches.index(cache) for cache in loaded] == [0, 1, 0]


@torch.no_grad()
def test_a_forward_that_cannot_be_captured_runs_eagerly(monkeypatch):
    model = tiny_model("olmo2")
    (engine, eager), tried = both(model), []

    def refuse(self, *reads):
        tried.append(reads)
        raise CaptureError("RuntimeError: operation not permitted when stream is capturing")

    monkeypatch.setattr(EagerReplay, "__call__", refuse)
    start = read(model, [4])
    warn_once.cache_clear()

    def latents(of):
        aligner = build_aligner(model, "identity")
        return of.run_latent(start.past_key_values.fork(300), start.last_hidden, aligner, every(1, 2), None).latents

    words = (
        r"runs latent steps on the eager engine: a step could not be captured \(RuntimeError: operation not permitted"
    )
    with pytest.warns(RuntimeWarning, match=words):
        ours = latents(engine)
    assert torch.equal(ours, latents(eager))
    assert not engine.state.batches
    assert torch.equal(ours, latents(engine))
    assert len(tried) == 1, "it is not tried again"


@torch.no_grad()
def test_a_size_that_does_not_fit_runs_eagerly_and_others_stay_captured(monkeypatch):
    model = tiny_model("olmo2")
    (engine, eager), tried, real = both(model), [], EagerReplay.__call__

    def fit(self, body, batch, *reads):
        tried.append(len(batch.rows))
        if len(batch.rows) > 1:
            raise torch.OutOfMemoryError("as a capture says it")
        return real(self, body, batch, *reads)

    monkeypatch.setattr(EagerReplay, "__call__", fit)
    aligner = build_aligner(model, "identity")
    warn_once.cache_clear()
    for lengths in ([4, 6], [4], [4, 6], [4]):
        start = read(model, lengths)
        with pytest.warns(RuntimeWarning, match="out of memory") if not tried else nullcontext():
            ours, theirs = (
                one.run_latent(start.past_key_values.fork(20), start.last_hidden, aligner, every(len(lengths), 2), None)
                for one in (engine, eager)
            )
        assert_same_steps(ours, theirs)
    assert tried == [2, 1]


@torch.no_grad()
def test_a_graph_serves_all_aligners_that_read_the_same(captures):
    model, target = tiny_model("gemma3"), tiny_model("gemma3")
    engine, _ = both(model)
    start = read(model, [4])
    token = Prompt(torch.tensor([1]), torch.tensor([[5]]))

    def run(aligner):
        cache = start.past_key_values.fork(20)
        seed = engine.eager.extend(cache, token, logits=True) if aligner.needs_logits else start.last_hidden
        engine.run_latent(cache, seed, aligner, every(1, 2), None)
        return len(captures)

    assert [run(replace(build_aligner(model, "identity"), reason=name)) for name in ("one", "another")] == [1, 1]
    aligner = build_aligner(model, "soft", target_model=target)
    assert run(aligner) == run(aligner) == 2
    target.get_input_embeddings().weight = torch.nn.Parameter(target.get_input_embeddings().weight.clone())
    assert run(aligner) == 3, "the graph reads weights that are gone"


@torch.no_grad()
def test_replays_are_calls_in_order_on_the_models_device(monkeypatch):
    inside, devices, real = [], [], EagerReplay.__call__

    def capture(self, *reads):
        assert inside
        replay = real(self, *reads)
        return lambda: (replay(), inside[0])

    @contextmanager
    def call(self, device):
        devices.append(device)
        inside.append(self)
        yield
        inside.pop()

    monkeypatch.setattr(EagerReplay, "__call__", capture)
    monkeypatch.setattr(CallOrder, "call", call)
    model = tiny_model("olmo2")
    engine, _ = both(model)
    start = read(model, [4])
    engine.run_latent(start.past_key_values, start.last_hidden, build_aligner(model, "identity"), every(1, 2), None)
    engine.extend(start.past_key_values, Prompt(torch.tensor([1]), torch.tensor([[5]])), logits=True)
    assert devices == [model.device] * 3


@torch.no_grad()
def test_calls_of_two_threads_do_not_mix():
    """They share the static tensors of their size."""
    model = tiny_model("olmo2")
    starts, aligner = [read(model, [4]), read(model, [7])], build_aligner(model, "identity")

    @torch.no_grad()  # of each thread
    def latents(which):
        engine, start = both(model)[0], starts[which]
        return engine.run_latent(start.past_key_values.fork(40), start.last_hidden, aligner, every(1, 4), None).latents

    want, order = [latents(0), latents(1)], [0, 1] * 8
    with ThreadPoolExecutor(3) as pool:
        got = list(pool.map(latents, order))
    assert all(torch.equal(one, want[which]) for one, which in zip(got, order, strict=True))


def wider(model):
    model.model.layers[1].self_attn.scaling *= 2


def narrower(model):
    model.config.sliding_window = 3


def another_activation(model):
    del model.model.layers[0].mlp.act_fn  # a function goes where a module was only once that is gone
    model.model.layers[0].mlp.act_fn = torch.nn.functional.relu


def steered(model):
    """By a hook, which the graph of before does not have in it."""
    model.model.layers[1].register_forward_hook(lambda module, args, output: output * 2)


@pytest.mark.parametrize("edit", [wider, narrower, another_activation, steered])
@torch.no_grad()
def test_a_step_is_captured_again_where_the_model_was_edited(edit):
    """A graph has the numbers in it that the host read while it was captured."""
    model = tiny_model("gemma2")
    aligner = build_aligner(model, "identity")

    def state_and_latents():
        engine, eager = both(model)
        start = read(model, [12, 5])
        ours, theirs = (
            one.run_latent(start.past_key_values.fork(20), start.last_hidden, aligner, every(2, 3), None)
            for one in (engine, eager)
        )
        assert_same_steps(ours, theirs)
        return engine.state, ours.latents

    state, latents = state_and_latents()
    assert state_and_latents()[0] is state
    edit(model)
    edited, other = state_and_latents()
    assert edited is not state
    assert not torch.allclose(other, latents, atol=1e-3)
    assert state_and_latents()[0] is edited


def steered_below(model, monkeypatch):
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def of_another_function(model, monkeypatch):
    right = modeling_gemma2.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_gemma2, "apply_rotary_pos_emb", lambda q, k, cos, sin: right(q, k, cos, -sin * 0.5))


def of_another_forward(model, monkeypatch):
    right = modeling_gemma2.Gemma2MLP.forward
    monkeypatch.setattr(modeling_gemma2.Gemma2MLP, "forward", lambda self, x: right(self, x) * 2)


def state_of(model):
    return both(model)[0].state


@pytest.mark.parametrize("edit", [steered_below, of_another_function, of_another_forward])
def test_a_graph_ends_with_hooks_and_functions_that_are_put_in(edit, monkeypatch):
    model = tiny_model("gemma2")
    state = state_of(model)
    edit(model, monkeypatch)
    assert state_of(model) is not state
    assert state_of(model) is state_of(model)


def test_a_graph_ends_with_a_hook_on_all_modules():
    model = tiny_model("gemma2")
    state = state_of(model)
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        assert state_of(model) is not state
    finally:
        hook.remove()


def test_a_graph_stays_with_what_no_forward_reads():
    """What generate() goes by, and the hooks of transformers that only look."""
    model = tiny_model("gemma2")
    state = state_of(model)
    model.generation_config = GenerationConfig(max_length=77)
    model.config.use_cache = not model.config.use_cache
    model.config.pad_token_id, model.config.eos_token_id, model.config.bos_token_id = 3, 4, 5
    with torch.no_grad():
        model(torch.tensor([[5, 6]]), output_hidden_states=True)
    assert model.model.layers[0]._forward_hooks
    assert state_of(model) is state


@torch.no_grad()
def test_memory_report_counts_the_static_tensors():
    model = tiny_model("olmo2")
    assert hf_graph.memory_report(model) == {}
    engine, _ = both(model)
    cache = read(model, [5]).past_key_values
    engine.extend(cache, Prompt(torch.tensor([1]), torch.tensor([[5]])), logits=True)
    (name, size), *others = hf_graph.memory_report(model).items()
    assert (name, others) == ("tensors of 1 x 256 slots", [])
    assert size > 256 * cache.slot_bytes


@torch.no_grad()
def test_the_report_does_not_wait_for_a_call_nor_break_where_one_adds_a_batch():
    model = tiny_model("olmo2")
    engine, _ = both(model)
    batches = engine.state.batches

    class Adding:
        @property
        def nbytes(self):
            batches[2, 256] = self
            return 7

    batches[1, 256] = Adding()
    with engine.order.lock, ThreadPoolExecutor(1) as pool:
        report = pool.submit(hf_graph.memory_report, model).result(timeout=60)
    assert report == {"tensors of 1 x 256 slots": 7}


def test_what_is_no_candidate_says_why():
    model = tiny_model("gpt2")
    architecture = Architecture.of(model)
    assert hf_graph.unsupported_reason(model, architecture) == "the model is on cpu, not on a CUDA device"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["gemma3", "gpt2", "olmo2"])
def test_on_a_device_chains_equal_eager(name):
    assert name not in FAMILIES
    model = tiny_model(name).cuda()
    ids, mask = (t.cuda() for t in ragged([7, 4]))
    out = {}
    for engine in ("cuda", "eager"):
        latent = latent_generate(model, ids, mask, latent_steps=3, aligner="identity", engine=engine)
        out[engine] = generate(
            model, ids, mask, past_key_values=latent.past_key_values, max_new_tokens=6, engine=engine
        )
    assert out["cuda"].metrics.engine == "cuda (generic)"
    assert torch.equal(out["cuda"].sequences, out["eager"].sequences)
