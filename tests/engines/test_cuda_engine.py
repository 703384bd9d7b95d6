"""The CUDA engine against the eager one: chains, ragged batches, windows, sampling. In the interpreter, graphs are calls."""

import contextlib
import copy
import gc
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import FAMILIES, VOCAB, ragged, tiny_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LogitsProcessorList, StoppingCriteriaList, SuppressTokensLogitsProcessor

from latentmas_kernels import LatentCache, accelerate, build_aligner, generate, latent_generate
from latentmas_kernels.engines import EagerEngine, LatentParams, SamplingParams, cuda, open_engine
from latentmas_kernels.engines.cuda import CudaEngine, memory_report
from latentmas_kernels.engines.cuda_graphs import CallOrder, CaptureError, EagerReplay
from latentmas_kernels.engines.cuda_step import DecodeStep
from latentmas_kernels.inputs import Prompt
from latentmas_kernels.models import module_settings, packed_weights
from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.models.packable import check_packable
from latentmas_kernels.models.packed_weights import unpack_weights
from latentmas_kernels.warn_once import warn_once

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter takes some milliseconds for every program: two layers and three heads are enough to go wrong in.
SMALL = {
    "num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip


def small_model(name="llama", **overrides):
    if "layer_types" in FAMILIES.get(name, {}):
        overrides.setdefault("layer_types", ["sliding_attention", "full_attention"])
    return tiny_model(name, **{**SMALL, **overrides}).to(DEVICE)


def every(batch, steps, **options):
    """So many steps for each row."""
    return LatentParams(torch.full((batch,), steps), **options)


@pytest.fixture
def small():
    return small_model()


def prompt(lengths, **options):
    return tuple(t.to(DEVICE) for t in ragged(lengths, **options))


def chain(model, engine, *, lengths=(9, 4), steps=2, tokens=4, aligner="ridge"):
    """Two latent agents and a judger on one KV cache."""
    past, outputs = None, []
    for seed in (1, 2):
        ids, mask = prompt(list(lengths), seed=seed)
        out = latent_generate(
            model, ids, mask, latent_steps=steps, past_key_values=past, aligner=aligner, engine=engine
        )
        outputs.append(out)
        past = out.past_key_values
    ids, mask = prompt(list(reversed(lengths)), seed=3, side="right")
    outputs.append(
        generate(model, ids, mask, past_key_values=past, max_new_tokens=tokens, eos_token_id=None, engine=engine)
    )
    return outputs


def assert_same_cache(ours, theirs):
    assert ours.lengths.tolist() == theirs.lengths.tolist()
    assert ours.next_position.tolist() == theirs.next_position.tolist()
    assert ours.segments == theirs.segments
    for row, length in enumerate(ours.lengths.tolist()):
        assert torch.equal(ours.positions[row, :length], theirs.positions[row, :length])
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(a[:, row, :, :length], b[:, row, :, :length], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_interpreter_chain_equals_eager(family):
    """Ragged rows, agents that go on from each other's KV cache, windows of 8 that the cache outgrows."""
    model = small_model(family)
    ours, theirs = chain(model, "cuda"), chain(model, "eager")
    assert [o.metrics.engine for o in ours] == ["cuda"] * 3
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a.latents, b.latents, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(a.last_hidden, b.last_hidden, rtol=1e-4, atol=1e-5)
        assert_same_cache(a.past_key_values, b.past_key_values)
    assert torch.equal(ours[2].sequences, theirs[2].sequences)
    assert_same_cache(ours[2].past_key_values, theirs[2].past_key_values)
    a, b = ours[2].metrics, theirs[2].metrics
    assert (a.prefill_tokens, a.decode_tokens, a.kv_bytes) == (b.prefill_tokens, b.decode_tokens, b.kv_bytes)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_interpreter_rope_scaling_equals_eager(rope):
    model = small_model("qwen3", rope_parameters=rope)
    ours, theirs = (chain(model, engine, lengths=(5, 3), steps=1, tokens=2) for engine in ("cuda", "eager"))
    torch.testing.assert_close(ours[1].latents, theirs[1].latents, rtol=1e-4, atol=1e-6)
    assert torch.equal(ours[2].sequences, theirs[2].sequences)


def test_interpreter_biases_equal_eager():
    """Every product may have a bias; a fresh model's are zero, which would hide one left out."""
    model = small_model("llama", attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    ours, theirs = (chain(model, engine, lengths=(5, 3), steps=1, tokens=2) for engine in ("cuda", "eager"))
    torch.testing.assert_close(ours[1].latents, theirs[1].latents, rtol=1e-4, atol=1e-6)
    assert torch.equal(ours[2].sequences, theirs[2].sequences)


def test_interpreter_soft_feedback_equals_eager(small):
    ours, theirs = (chain(small, engine, tokens=1, aligner="soft") for engine in ("cuda", "eager"))
    torch.testing.assert_close(ours[1].latents, theirs[1].latents, rtol=1e-4, atol=1e-6)


def test_interpreter_rows_are_bit_identical_alone_and_in_a_batch(small):
    """float32: one kernel whatever the batch, sums in one order. The prompt runs through torch, which is not so exact:
    so both start from the same KV cache."""
    ids, mask = prompt([6, 3, 8])
    read = latent_generate(small, ids, mask, latent_steps=0, max_cache_len=16)
    aligner = build_aligner(small, "ridge")
    engine = CudaEngine(small, Architecture.of(small))
    cache = read.past_key_values
    together = engine.run_latent(cache.fork(), read.last_hidden, aligner, every(3, 2), None)
    for row in range(3):
        alone = engine.run_latent(cache.select([row]), read.last_hidden[row : row + 1], aligner, every(1, 2), None)
        assert torch.equal(alone.latents[0], together.latents[row])


def test_interpreter_reads_and_writes_no_slot_but_its_own(small):
    """Poison behind every row's end: a read of it shows in the output, a write over it shows in the buffer."""
    ids, mask = prompt([6, 3])
    read = latent_generate(small, ids, mask, latent_steps=0, max_cache_len=12)
    cache = read.past_key_values.fork(12)
    for row, length in enumerate(cache.lengths.tolist()):
        cache.keys[:, row, :, length:] = cache.values[:, row, :, length:] = float("nan")
    engine = CudaEngine(small, Architecture.of(small))
    result = engine.run_latent(cache, read.last_hidden, build_aligner(small, "ridge"), every(2, 2), None)
    assert result.latents.isfinite().all()
    assert result.last_hidden.isfinite().all()
    for row, length in enumerate([8, 5]):
        assert cache.keys[:, row, :, :length].isfinite().all()
        assert cache.keys[:, row, :, length:].isnan().all()
        assert cache.values[:, row, :, length:].isnan().all()


def test_interpreter_one_capture_serves_every_call(small, monkeypatch):
    """Other caches, capacities, lengths and settings: the graph does not change."""
    captured = []
    real_step = cuda.CudaState._step

    def counting(self, weights, bucket, kind, aligner):
        if (bucket, *kind) not in self.graphs:
            captured.append((bucket, kind[0]))
        return real_step(self, weights, bucket, kind, aligner)

    monkeypatch.setattr(cuda.CudaState, "_step", counting)
    for lengths, room in (([4, 2], None), ([3, 7], 40)):
        ids, mask = prompt(lengths)
        out = latent_generate(small, ids, mask, latent_steps=1, engine="cuda", max_cache_len=room, aligner="ridge")
        for temperature in (0.5, 2.0):
            generate(
                small, ids, mask, past_key_values=out.past_key_values, max_new_tokens=2, do_sample=True,
                temperature=temperature, engine="cuda",
            )  # fmt: skip
    engine, cache = CudaEngine(small, Architecture.of(small)), out.past_key_values.fork(20)
    for latent_params in (LatentParams(torch.tensor([1, 2]), record=True), every(2, 2, stop_cosine=0.5)):
        engine.run_latent(cache, out.last_hidden, build_aligner(small, "ridge"), latent_params, None)
    assert captured == [(2, "latent"), (2, "token")]
    report = memory_report(small)
    assert report["tensors of batch 2"] > 0
    assert set(report) == {"tensors of batch 2", "graphs"}


def test_interpreter_ended_rows_store_nothing_and_get_padding(small):
    ids, mask = prompt([5, 7])
    free = generate(small, ids, mask, max_new_tokens=6, eos_token_id=None, engine="cuda")
    new = free.sequences[:, 7:]
    end = int(new[0, 1])
    options = {"max_new_tokens": 6, "eos_token_id": [end, 96], "pad_token_id": 90}
    ours, theirs = (generate(small, ids, mask, **options, engine=engine) for engine in ("cuda", "eager"))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert (ours.new_tokens, ours.finish_reasons) == (theirs.new_tokens, theirs.finish_reasons)
    assert ours.new_tokens[0] <= 2
    assert_same_cache(ours.past_key_values, theirs.past_key_values)
    barred = {**options, "min_new_tokens": 5}
    ours, theirs = (generate(small, ids, mask, **barred, engine=engine) for engine in ("cuda", "eager"))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert end not in ours.sequences[:, 7:11].flatten().tolist()


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "temperature": 3.0, "top_k": None}], ids=["greedy", "sampled"]
)
@torch.no_grad()
def test_interpreter_rows_of_the_lm_head_that_have_no_embedding_are_left_out(small, options):
    padded = small_model()
    head = torch.nn.Linear(padded.config.hidden_size, VOCAB + 40, bias=False, device=DEVICE)
    head.weight[:VOCAB], head.weight[VOCAB:] = padded.lm_head.weight, 20 * padded.lm_head.weight[:40]
    padded.lm_head = head
    ids, mask = prompt([5, 7])
    assert int(padded(input_ids=ids).logits[:, -1].argmax(-1).max()) >= VOCAB, "they would win"
    texts, results = [], []
    for model in (small, padded):
        torch.manual_seed(4)
        texts.append(
            generate(model, ids, mask, max_new_tokens=4, eos_token_id=None, engine="cuda", **options).sequences
        )
        results.append(latent_generate(model, ids, mask, latent_steps=2, aligner="soft", engine="cuda").latents)
    assert torch.equal(*texts)
    torch.testing.assert_close(*results)


def test_interpreter_sampling_repeats_with_the_seed(small):
    ids, mask = prompt([5, 2])

    def drawn(seed, **options):
        torch.manual_seed(seed)
        out = generate(small, ids, mask, max_new_tokens=3, do_sample=True, eos_token_id=None, engine="cuda", **options)
        return out.sequences[:, 5:]

    first = drawn(0, temperature=3.0, top_k=None)
    assert torch.equal(first, drawn(0, temperature=3.0, top_k=None))
    assert not torch.equal(first, drawn(1, temperature=3.0, top_k=None))
    assert not torch.equal(first[0], first[1])
    greedy = generate(small, ids, mask, max_new_tokens=3, eos_token_id=None, engine="cuda").sequences[:, 5:]
    assert torch.equal(drawn(0, top_k=1), greedy)
    assert torch.equal(drawn(0, top_p=0.001), greedy)


class Streamer:
    def __init__(self):
        self.got = []

    def put(self, ids):
        self.got.append(ids.tolist())

    def end(self):
        self.got.append("end")


def test_interpreter_streamer_processors_and_criteria_equal_eager(small):
    ids, mask = prompt([4])
    free = generate(small, ids, mask, max_new_tokens=3, eos_token_id=None, engine="eager").sequences[0, 4:].tolist()
    streamer = Streamer()
    generate(small, ids, mask, max_new_tokens=3, eos_token_id=None, streamer=streamer, engine="cuda")
    assert streamer.got == [ids.tolist(), *([token] for token in free), "end"]
    options = {
        "logits_processor": LogitsProcessorList([SuppressTokensLogitsProcessor(free, device=DEVICE)]),
        "stopping_criteria": StoppingCriteriaList(
            [lambda ids, scores, **_: torch.tensor([ids.shape[1] >= 6], device=DEVICE)]
        ),
        "max_new_tokens": 5,
        "eos_token_id": None,
    }
    ours, theirs = (generate(small, ids, mask, **options, engine=engine) for engine in ("cuda", "eager"))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert_same_cache(ours.past_key_values, theirs.past_key_values)


def test_interpreter_reports_each_step_once(small):
    ids, mask = prompt([3, 4])
    seen = []
    latent_generate(small, ids, mask, latent_steps=2, aligner="ridge", engine="cuda", on_step=seen.append)
    assert seen == [0, 1]


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_between_steps_nothing_is_allocated_copied_or_waited_for(small, monkeypatch):
    """Each of these is a call of torch, and more steps make no more of them; for a step itself see test_cuda_step.py."""
    monkeypatch.setattr(cuda.EagerReplay, "__call__", lambda self, body, *reads, **constants: lambda: None)
    engine = CudaEngine(small, Architecture.of(small))
    aligner, seed = build_aligner(small, "ridge"), torch.ones(2, 24, device=DEVICE)

    def calls(run):
        run()  # makes the step
        with Count() as count:
            run()
        return count.calls

    def run_latent(steps, **options):
        latent_params = every(2, steps, **options)
        return calls(
            lambda: engine.run_latent(
                LatentCache.for_model(engine.architecture, 2, 40), seed, aligner, latent_params, None
            )
        )

    def decode(tokens):
        sampling_params = SamplingParams(tokens, 0, False, 1.0, 0, 1.0, eos_token_ids=[1], pad_token_id=0)
        cache = LatentCache.for_model(engine.architecture, 2, 40)
        return calls(lambda: engine.decode(cache, torch.zeros(2, 97, device=DEVICE), sampling_params, None))

    assert run_latent(30) == run_latent(3)
    assert run_latent(30, record=True) == run_latent(3, record=True)
    assert run_latent(15, stop_cosine=0.5) == run_latent(3, stop_cosine=0.5)
    assert run_latent(35, stop_cosine=0.5) > run_latent(15, stop_cosine=0.5)  # as below
    assert decode(15) == decode(2)
    assert decode(35) > decode(15)  # a look at whether all have ended, every 16 tokens


# ---- rows that end at steps of their own ---------------------------------------------------------------------------


def poison(cache):
    """NaN in the slots that a row does not use: behind its end, and its copy of the shared prefix."""
    for row, (length, prefix_len) in enumerate(zip(cache.lengths.tolist(), cache.prefix_len.tolist(), strict=True)):
        for store in (cache.keys, cache.values):
            store[:, row, :, length:] = store[:, row, :, :prefix_len] = float("nan")
    return cache


def assert_same_result(ours, theirs):
    assert ours.steps.tolist() == theirs.steps.tolist()
    assert ours.steps.dtype == torch.int64
    torch.testing.assert_close(ours.latents, theirs.latents, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.last_hidden, theirs.last_hidden, rtol=1e-4, atol=1e-5)
    assert (ours.states is None) == (theirs.states is None)
    if ours.states is not None:
        torch.testing.assert_close(ours.states, theirs.states, rtol=1e-4, atol=1e-5)
        last = ours.states[torch.arange(len(ours.steps)), ours.steps - 1]
        assert torch.equal(last, ours.last_hidden)


class Both:
    """Both engines on the same KV cache and seed."""

    @torch.no_grad()
    def __init__(self, model, lengths, aligner, *, times=1, room=12):
        architecture = Architecture.of(model)
        self.engines = CudaEngine(model, architecture), EagerEngine(model, architecture)
        self.aligner = build_aligner(model, aligner)
        ids, mask = prompt(lengths)
        read = latent_generate(model, ids, mask, latent_steps=0, engine="eager").past_key_values
        self.start = read.fork_rows(times, max(lengths) + room)
        tokens = torch.arange(5, 5 + len(lengths) * times, device=DEVICE)[:, None]
        one_each = Prompt(torch.ones(len(tokens), dtype=torch.int64), tokens)
        self.seed = self.engines[1].extend(self.start, one_each, logits=self.aligner.needs_logits)

    @torch.no_grad()
    def ours(self, latent_params, on_step=None):
        return self.engines[0].run_latent(poison(self.start.fork()), self.seed, self.aligner, latent_params, on_step)

    @torch.no_grad()
    def run_latent(self, latent_params):
        """Return the results of both engines and their KV caches; slots that ours did not use are as they were."""
        caches = [poison(self.start.fork()) for _ in self.engines]
        results = [
            engine.run_latent(cache, self.seed, self.aligner, latent_params, None)
            for engine, cache in zip(self.engines, caches, strict=True)
        ]
        for row, (length, prefix_len) in enumerate(
            zip(caches[0].lengths.tolist(), caches[0].prefix_len.tolist(), strict=True)
        ):
            for store in (caches[0].keys, caches[0].values):
                assert store[:, row, :, prefix_len:length].isfinite().all()
                assert store[:, row, :, length:].isnan().all()
                assert store[:, row, :, :prefix_len].isnan().all()
        return results, caches

    def assert_same(self, latent_params):
        results, caches = self.run_latent(latent_params)
        assert_same_result(*results)
        for cache in caches:
            cache.make_private()
        assert_same_cache(*caches)
        return results[0].steps.tolist()


def parting(latents):
    """A cosine, far from those that there are, that ends not all rows at the same step."""
    cosines = torch.cosine_similarity(latents[:, 1:], latents[:, :-1], dim=-1)
    levels = cosines.flatten().sort().values
    gaps = (levels[1:] - levels[:-1]).argsort(descending=True).tolist()
    for level in (float(levels[gap] + levels[gap + 1]) / 2 for gap in gaps):
        reached = cosines >= level
        if len({int(row.int().argmax()) for row in reached if row.any()}) > 1:
            return level
    raise AssertionError("all rows settle alike")


@pytest.mark.parametrize(("family", "aligner"), [("llama", "ridge"), ("llama", "soft"), ("qwen3-mixed", "identity")])
def test_interpreter_rows_end_as_on_eager(family, aligner):
    both = Both(small_model(family), [6, 3, 8], aligner)
    assert both.assert_same(LatentParams(torch.tensor([3, 1, 5]), record=True)) == [3, 1, 5]
    assert both.assert_same(LatentParams(torch.tensor([3, 1, 3]), stop_cosine=-1.0)) == [2, 1, 2]
    assert both.assert_same(LatentParams(torch.tensor([2, 1, 3]), stop_cosine=1.0)) == [2, 1, 3]
    with torch.no_grad():
        free = both.engines[1].run_latent(both.start.fork(), both.seed, both.aligner, every(3, 5), None)
    ends = both.assert_same(every(3, 5, stop_cosine=parting(free.latents), record=True))
    assert min(ends) < max(ends)


def test_interpreter_settled_batches_are_looked_at_now_and_then(small, monkeypatch):
    """Steps behind the last row's end change nothing, and a look ends them."""
    monkeypatch.setattr(cuda, "SYNC_EVERY", 3)
    monkeypatch.setattr(cuda._all_ended, "__defaults__", (3,))
    both, seen = Both(small, [6, 3], "ridge"), []
    latent_params = every(2, 12, stop_cosine=-1.0)
    result = both.ours(latent_params, seen.append)
    assert seen == [0, 1, 2]
    assert result.latents.shape[1] == 2
    assert both.assert_same(latent_params) == [2, 2]


def test_interpreter_settling_goes_by_what_was_fed(small):
    """A state that is a fixed point is fed twice: the cosine is 1, to the last bit."""
    both = Both(small, [6, 3], "identity")
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
            if name == "model.norm.weight":
                parameter.fill_(1)
    results, _ = both.run_latent(every(2, 4, stop_cosine=0.999999))
    assert [t.steps.tolist() for t in results] == [[2, 2], [2, 2]]


@pytest.mark.parametrize("aligner", ["ridge", "soft"])
@torch.no_grad()
def test_interpreter_rows_that_end_are_bit_identical_alone_and_in_a_batch(small, aligner):
    both = Both(small, [70, 6], aligner, times=2)
    engine = both.engines[0]
    for latent_params in (
        LatentParams(torch.tensor([3, 2, 1, 1]), record=True),
        every(4, 3, stop_cosine=0.9, record=True),
    ):
        together = both.ours(latent_params)
        for row in (1, 3):
            only = LatentParams(latent_params.steps[[row]], latent_params.stop_cosine, record=True)
            alone = engine.run_latent(both.start.select([row]), both.seed[[row]], both.aligner, only, None)
            steps = int(together.steps[row])
            assert alone.steps.tolist() == [steps]
            assert torch.equal(alone.latents[0], together.latents[row, :steps])
            assert torch.equal(alone.states[0], together.states[row, :steps])
            assert torch.equal(alone.last_hidden[0], together.last_hidden[row])
            assert not together.latents[row, steps:].any()


# ---- prefixes that rows share --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "aligner"), [("llama", "ridge"), ("qwen3-mixed", "ridge"), ("mistral-window", "soft")]
)
def test_interpreter_shared_prefixes_are_read_in_the_row_that_stores_them(family, aligner):
    """Windows that end inside, before and behind the prefix; each row goes on by itself."""
    model = (
        small_model(family, sliding_window=20) if family in ("qwen3-mixed", "mistral-window") else small_model(family)
    )
    both = Both(model, [66, 40, 129], aligner, times=2)
    assert both.start.prefix_len.tolist() == [0, 64, 0, 0, 0, 128]
    both.assert_same(LatentParams(torch.tensor([2, 3, 1, 2, 3, 3]), record=True))


def test_interpreter_prefix_rows_may_be_in_another_part(small):
    state_of(small).buckets = [1, 2]
    both = Both(small, [66, 70], "ridge", times=3)
    assert both.start.prefix_row.tolist() == [0, 0, 0, 3, 3, 3]
    seen = []
    with expecting("a batch of 6 rows runs in parts of 2"):
        both.assert_same(LatentParams(torch.tensor([1, 2, 2, 1, 3, 2]), record=True))
    latent_params = LatentParams(torch.tensor([1, 1, 3, 1, 1, 2]), stop_cosine=-1.0)
    result = both.ours(latent_params, seen.append)
    assert seen == [0, 1, 2]
    assert result.steps.tolist() == [1, 1, 2, 1, 1, 2]


def test_interpreter_text_behind_a_shared_prefix_equals_eager(small):
    both = Both(small, [66, 3], "ridge", times=2)
    ids, mask = prompt([2, 3, 1, 4])
    outs = [
        generate(small, ids, mask, past_key_values=poison(both.start.fork()).donate(), max_new_tokens=4,
                 eos_token_id=None, engine=engine, **options)
        for engine in ("cuda", "eager")
        for options in ({}, {"logits_processor": LogitsProcessorList([SuppressTokensLogitsProcessor([7], device=DEVICE)])})
    ]  # fmt: skip
    for ours, theirs in zip(outs[:2], outs[2:], strict=True):
        assert ours.past_key_values.prefix_len.tolist() == [0, 64, 0, 0]
        assert torch.equal(ours.sequences, theirs.sequences)


# ---- edited models -------------------------------------------------------------------------------------------------


def scale(model):
    for layer in model.model.layers:
        layer.self_attn.scaling *= 3


def eps(model):
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.1


def window(model):
    model.config.sliding_window = 3


def bias(model):
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-9, 9, len(model.lm_head.weight), device=DEVICE))


@pytest.mark.parametrize("edit", [scale, eps, window, bias])
def test_interpreter_a_step_is_captured_again_where_the_model_was_edited(edit):
    model = small_model("mistral-window", sliding_window=6)
    before, state = chain(model, "cuda", lengths=(9,), steps=1, tokens=2), state_of(model)
    assert state_of(model) is state
    edit(model)
    ours, theirs = (chain(model, engine, lengths=(9,), steps=1, tokens=2) for engine in ("cuda", "eager"))
    assert state_of(model) is not state
    torch.testing.assert_close(ours[1].latents, theirs[1].latents, rtol=1e-4, atol=1e-6)
    assert torch.equal(ours[2].sequences, theirs[2].sequences)
    changed = not torch.allclose(ours[1].latents, before[1].latents, atol=1e-4)
    assert changed or not torch.equal(ours[2].sequences, before[2].sequences)


def test_interpreter_layers_write_where_their_layer_idx_says():
    """Of three layers the one in the middle was taken out."""
    model = small_model(num_hidden_layers=3)
    del model.model.layers[1]
    ours, theirs = (chain(model, engine, lengths=(5, 3), steps=1, tokens=2) for engine in ("cuda", "eager"))
    assert ours[1].metrics.engine == "cuda"
    torch.testing.assert_close(ours[1].latents, theirs[1].latents, rtol=1e-4, atol=1e-6)
    for out in (ours[2], theirs[2]):
        out.past_key_values.keys[1] = out.past_key_values.values[1] = 0  # nothing is written there
    assert_same_cache(ours[2].past_key_values, theirs[2].past_key_values)


# ---- batches outside the buckets, and memory that runs out ---------------------------------------------------------


def state_of(model):
    return CudaEngine(model, Architecture.of(model)).state


def expecting(words):
    warn_once.cache_clear()
    return pytest.warns(RuntimeWarning, match=words)


def test_interpreter_larger_batches_run_in_parts(small):
    state_of(small).buckets = [1, 2]
    with expecting("a batch of 3 rows runs in parts of 2"):
        ours = chain(small, "cuda", lengths=(5, 2, 4), steps=1, tokens=2)
    theirs = chain(small, "eager", lengths=(5, 2, 4), steps=1, tokens=2)
    torch.testing.assert_close(ours[1].latents, theirs[1].latents, rtol=1e-4, atol=1e-6)
    assert torch.equal(ours[2].sequences, theirs[2].sequences)
    assert_same_cache(ours[2].past_key_values, theirs[2].past_key_values)


@pytest.mark.parametrize(("most", "words"), [(1, "in parts of 1 rows from now on"), (0, "runs on the eager engine")])
def test_interpreter_out_of_memory_takes_a_smaller_bucket_or_eager(small, monkeypatch, most, words):
    state = state_of(small)
    real_step, released = cuda.CudaState._step, []

    def failing(self, weights, bucket, kind, aligner):
        if bucket > most:
            raise torch.OutOfMemoryError("as a capture says it")
        return real_step(self, weights, bucket, kind, aligner)

    monkeypatch.setattr(cuda.CudaState, "_step", failing)
    monkeypatch.setattr(state.capture, "release", lambda: released.append(True))
    with expecting(words):
        ours = chain(small, "cuda", lengths=(5, 2), steps=1, tokens=2)
    theirs = chain(small, "eager", lengths=(5, 2), steps=1, tokens=2)
    assert released
    torch.testing.assert_close(ours[1].latents, theirs[1].latents, rtol=1e-4, atol=1e-6)
    assert torch.equal(ours[2].sequences, theirs[2].sequences)
    assert_same_cache(ours[2].past_key_values, theirs[2].past_key_values)


def test_interpreter_what_did_not_fit_is_freed_before_its_memory_is_given_back(small, monkeypatch):
    state, made, alive = state_of(small), [], []

    def failing(self, step, weights, kind, aligner):
        made.append(weakref.ref(step))
        raise torch.OutOfMemoryError("as a capture says it")

    monkeypatch.setattr(cuda.CudaState, "_capture", failing)
    monkeypatch.setattr(state.capture, "release", lambda: alive.append(made[-1]() is not None))
    with expecting("runs on the eager engine"):
        chain(small, "cuda", lengths=(5, 2), steps=1, tokens=2)
    assert len(alive) > 1
    assert not any(alive)


# ---- what graphs read, and who owns it -----------------------------------------------------------------------------


def rounded_frequencies(model):
    """As `.to(torch.bfloat16)` leaves them: the kernels read a float32 copy."""
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.bfloat16()
    return model


def test_interpreter_graphs_of_a_later_call_read_what_lives_as_long_as_they(small):
    """A latent graph in the first call, a token graph in the second, whose engine and packed weights are gone in the third."""
    rounded_frequencies(small)
    ids, mask = prompt([5, 3])
    past = latent_generate(small, ids, mask, latent_steps=2, aligner="ridge", engine="cuda").past_key_values
    texts = []
    for engine in ("cuda", "cuda", "eager"):
        out = generate(small, ids, mask, past_key_values=past, max_new_tokens=4, eos_token_id=None, engine=engine)
        texts.append(out.sequences)
        gc.collect()
    assert torch.equal(texts[1], texts[2])
    assert torch.equal(texts[0], texts[2])


@torch.no_grad()
def test_interpreter_a_copy_of_the_frequencies_follows_the_model(small):
    """An edit through .data, of which a device's tensors count no version, under an engine that is open."""
    both = Both(rounded_frequencies(small), [6, 3], "ridge")
    before = both.ours(every(2, 2)).latents
    small.model.rotary_emb.inv_freq.data.mul_(0.25)
    after = both.ours(every(2, 2)).latents
    assert not torch.allclose(before, after, atol=1e-4)
    theirs = both.engines[1].run_latent(both.start.fork(), both.seed, both.aligner, every(2, 2), None).latents
    torch.testing.assert_close(after, theirs, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_interpreter_a_step_is_captured_again_for_another_embedding_of_the_aligner(small):
    """Soft feedback reads the embedding of its target, which may be another model's and be given other weights."""
    target = small_model()
    aligner = build_aligner(small, "soft", target_model=target)
    both = Both(small, [6, 3], "soft")
    both.aligner = aligner
    before = both.ours(every(2, 2)).latents
    target.model.embed_tokens.weight = nn.Parameter(target.model.embed_tokens.weight.flip(0))
    gc.collect()
    results, _ = both.run_latent(every(2, 2))
    assert_same_result(*results)
    assert not torch.allclose(results[0].latents, before, atol=1e-4)
    assert len(both.engines[0].state.graphs) == 2


@torch.no_grad()
def test_interpreter_replays_are_calls_in_order_on_the_models_device(small, monkeypatch):
    """Every replay and every capture, of every method, is inside of a call."""
    inside, devices, real = [], [], EagerReplay.__call__

    def capture(self, *reads, **constants):
        assert inside
        replay = real(self, *reads, **constants)

        def checked():
            assert inside
            replay()

        return checked

    @contextlib.contextmanager
    def call(self, device):
        devices.append(device)
        inside.append(self)
        yield
        assert inside.pop() is self

    monkeypatch.setattr(EagerReplay, "__call__", capture)
    monkeypatch.setattr(CallOrder, "call", call)
    chain(small, "cuda", lengths=(5, 2), steps=1, tokens=2)
    engine = CudaEngine(small, Architecture.of(small))
    engine.capture([1], build_aligner(small, "ridge"))
    cache = LatentCache.for_model(engine.architecture, 2, 8)
    engine.extend(cache, Prompt(torch.tensor([1, 1]), torch.tensor([[5], [6]], device=DEVICE)), logits=True)
    assert set(devices) == {small.device}


def test_interpreter_calls_of_two_threads_do_not_mix(small):
    """They share the static tensors of their bucket."""
    ids, mask = prompt([5, 3])

    def text(row):
        return generate(small, ids[row:], mask[row:], max_new_tokens=4, eos_token_id=None, engine="cuda").sequences

    want = [text(0), text(1)]
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(text, [0, 1, 0, 1, 1, 1]))
    for row, sequences in zip([0, 1, 0, 1, 1, 1], got, strict=True):
        assert torch.equal(sequences, want[row])


def test_interpreter_a_call_from_within_a_call_is_refused(small):
    ids, mask = prompt([4])
    with pytest.raises(ValueError, match="supported is one call at a time"):
        latent_generate(
            small, ids, mask, latent_steps=1, aligner="ridge", engine="cuda", on_step=lambda _: one_latent(small)
        )
    assert one_latent(small).isfinite().all()


def test_interpreter_counters_that_are_wrong_are_put_right_where_a_call_begins(small):
    """A split product counts its programs: one that was broken off would leave every later sum wrong."""
    both = Both(small, [6, 3], "ridge")
    want = both.ours(every(2, 1)).latents
    (step,) = both.engines[0].state.steps.values()
    for counters in (step.workspace.tile_counters, step.splits.split_counters):
        counters.fill_(1)
        assert torch.equal(both.ours(every(2, 1)).latents, want)
        assert not counters.any()


# ---- captures that fail --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["latent", "token", "forward"])
def test_interpreter_a_step_that_cannot_be_captured_runs_on_eager_with_one_warning(small, monkeypatch, kind):
    tried, real = [], EagerReplay.__call__

    def refuse(self, body, *reads, **constants):
        if body is getattr(DecodeStep, kind):
            tried.append(reads[0].batch)
            raise CaptureError("RuntimeError: operation not permitted")
        return real(self, body, *reads, **constants)

    monkeypatch.setattr(EagerReplay, "__call__", refuse)
    options = {} if kind != "forward" else {"logits_processor": [SuppressTokensLogitsProcessor([7], device=DEVICE)]}

    def run(engine):
        ids, mask = prompt([5, 2])
        out = latent_generate(small, ids, mask, latent_steps=2, aligner="ridge", engine=engine)
        past, latents = out.past_key_values, out.latents
        out = generate(
            small, ids, mask, past_key_values=past, max_new_tokens=3, eos_token_id=None, engine=engine, **options
        )
        return latents, out.sequences

    words = rf"runs {kind} steps of 2 rows on the eager engine: a step could not be captured \(RuntimeError: operation"
    with expecting(words) as warned:
        ours = run("cuda")
    assert len(warned) == 1
    again, theirs = run("cuda"), run("eager")
    assert tried == [2], "it is not tried again"
    for got in (ours, again):
        torch.testing.assert_close(got[0], theirs[0], rtol=1e-4, atol=1e-6)
        assert torch.equal(got[1], theirs[1])


# ---- opening ---------------------------------------------------------------------------------------------------------


def test_interpreter_a_model_is_looked_at_once_per_opening(small, monkeypatch):
    """Packed and checked in full only where something that a step reads was edited, and nothing waits for a device."""
    read, packed, real = [], [], (module_settings.reread, cuda.pack_weights)
    monkeypatch.setattr(module_settings, "reread", lambda model: (read.append(model), real[0](model))[1])
    monkeypatch.setattr(cuda, "pack_weights", lambda *of: (packed.append(of), real[1](*of))[1])
    monkeypatch.setattr(packed_weights, "check_packable", lambda *of: (packed.append(of), check_packable(*of))[1])

    def opened():
        read.clear()
        packed.clear()
        open_engine("cuda", small, Architecture.of(small))
        return len(packed), len(read)

    assert opened()[0] > 0
    assert opened() == (0, 1)
    small.model.layers[1].self_attn.scaling = small.model.layers[0].self_attn.scaling * 1.0
    assert opened() == (0, 1)
    small.lm_head.weight = nn.Parameter(small.lm_head.weight.clone())
    assert opened()[0] > 0
    assert opened() == (0, 1)


@torch.no_grad()
def test_interpreter_weights_that_the_model_gave_up_are_freed(small):
    """Nothing that is kept between calls holds them: `.to()` frees a device."""
    one_latent(small)
    refs = [StorageWeakRef(p.untyped_storage()) for p in small.parameters()]
    small.double()
    gc.collect()
    assert all(ref.expired() for ref in refs)


# ---- weights that change under the engine --------------------------------------------------------------------------


def one_latent(model, engine="cuda"):
    ids, mask = prompt([4])
    return latent_generate(model, ids, mask, latent_steps=1, aligner="identity", engine=engine).last_hidden


@torch.no_grad()
def scramble(model, seed):
    draw = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(t.shape, generator=draw) * 0.1).to(t) for name, t in model.state_dict().items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.load_state_dict(scramble(model, 1)),
        lambda model: model.load_state_dict(scramble(model, 1), assign=True),
        lambda model: model.to(torch.float64).to(torch.float32),
        lambda model: model.model.layers[1].self_attn.k_proj.weight.data.mul_(2),
        lambda model: setattr(
            model.model.layers[0].mlp.up_proj, "weight", nn.Parameter(torch.ones(40, 24, device=DEVICE))
        ),
    ],
    ids=["load", "assign", "cast and back", "in place", "another parameter"],
)
def test_interpreter_follows_the_weights(small, change):
    before = one_latent(small)
    change(small)
    after = one_latent(small)
    torch.testing.assert_close(after, one_latent(small, "eager"), rtol=1e-4, atol=1e-5)
    assert torch.equal(before, after) == (change.__code__.co_names[0] == "to")


def test_interpreter_copies_are_models_of_their_own(small):
    before = one_latent(small)
    other = copy.deepcopy(small)
    other.load_state_dict(scramble(other, 2))
    torch.testing.assert_close(one_latent(other), one_latent(other, "eager"), rtol=1e-4, atol=1e-5)
    assert torch.equal(one_latent(small), before)


def test_interpreter_unmerge_and_save(small, tmp_path):
    before = one_latent(small)
    unpack_weights(small)
    assert one_latent(small, "eager").shape == before.shape
    assert torch.equal(one_latent(small), before)
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).to(DEVICE).eval()
    assert torch.equal(one_latent(loaded), before)


# ---- what is not covered -------------------------------------------------------------------------------------------


def test_interpreter_engine_by_name_refuses_what_it_does_not_cover(small):
    small.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"does not cover this LlamaForCausalLM: model.layers.0.mlp has hooks"):
        one_latent(small)


def test_auto_falls_back_with_one_warning():
    with torch.device("meta"):  # any device that is neither a CPU nor CUDA
        model = tiny_model("llama")
    architecture = Architecture.of(model)
    with expecting("LlamaForCausalLM runs on the eager engine, since the model is on meta"):
        assert open_engine("auto", model, architecture).name == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_engine("auto", model, architecture).name == "eager"


@pytest.mark.parametrize("on", ["own loop", "one step at a time", "latent steps", "cache", "embeddings"])
def test_interpreter_drop_in_equals_transformers(small, on):
    """generate() of an accelerated model, on this engine."""
    ids, mask = prompt([5, 2])
    options = {"attention_mask": mask, "max_new_tokens": 4, "eos_token_id": [60, 80], "pad_token_id": 0}
    inputs = {"input_ids": ids}
    if on == "one step at a time":  # what this engine's own loop does not have
        options |= {"repetition_penalty": 1.5, "logits_processor": [SuppressTokensLogitsProcessor([7], device=DEVICE)]}
    elif on == "embeddings":
        inputs = {"inputs_embeds": small.get_input_embeddings()(ids)}
    elif on == "cache":
        options["return_dict_in_generate"] = True
    elif on == "latent steps":
        ours = accelerate(copy.deepcopy(small), engine="cuda", aligner="ridge")
        theirs = accelerate(copy.deepcopy(small), engine="eager", aligner="ridge")
        outs = [m.generate(**inputs, **options, latent_steps=2, return_dict_in_generate=True) for m in (ours, theirs)]
        assert torch.equal(outs[0].sequences, outs[1].sequences)
        assert_same_cache(outs[0].past_key_values, outs[1].past_key_values)
        return
    want = small.generate(**inputs, **options)
    got = accelerate(copy.deepcopy(small), engine="cuda").generate(**inputs, **options)
    if on == "cache":
        assert got.past_key_values.get_seq_length() == want.past_key_values.get_seq_length()
        for a, b in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
            torch.testing.assert_close(a.keys[0], b.keys[0], rtol=1e-4, atol=2e-5)  # the row without padding
        got, want = got.sequences, want.sequences
    assert torch.equal(got, want)
