"""The native engine against the eager one: every family, instruction set and number of threads; odd sizes, ragged rows."""

import copy
import itertools
import multiprocessing
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_engine import assert_same_cache
from tiny_models import FAMILIES, VOCAB, ragged, tiny_model
from torch import nn

from latentmas_kernels import LatentCache, build_aligner, generate, latent_generate
from latentmas_kernels.engines import EagerEngine, LatentParams, NativeEngine, SamplingParams, open_engine
from latentmas_kernels.engines import native as native_module
from latentmas_kernels.engines.native import memory_report, quantize_rows
from latentmas_kernels.extension import extension, extension_state
from latentmas_kernels.inputs import Prompt
from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.ops.sample import sample_reference
from latentmas_kernels.warn_once import warn_once

if extension() is None:
    pytest.skip(extension_state(), allow_module_level=True)

ISAS = extension().available_isas().split()
RUNS = [f"{isa}-{threads}" for isa, threads in itertools.product(ISAS, (1, 2))]
ROPES = [
    {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
]  # fmt: skip


@pytest.fixture(params=RUNS)
def run(request, monkeypatch):
    """Each instruction set that this processor has, on one thread and on two."""
    isa, threads = request.param.split("-")
    monkeypatch.setenv("LATENTMAS_ISA", isa)
    monkeypatch.setenv("LATENTMAS_NUM_THREADS", threads)
    return isa, int(threads)


def chain(model, engine, *, lengths=(19, 4, 11), steps=3, tokens=6, aligner="ridge", vocabulary=VOCAB, **options):
    """Two latent agents and a judger on one KV cache."""
    past, outputs = None, []
    for seed in (1, 2):
        ids, mask = ragged(list(lengths), seed=seed, vocab=vocabulary)
        out = latent_generate(
            model, ids, mask, latent_steps=steps, past_key_values=past, aligner=aligner, engine=engine
        )
        outputs.append(out)
        past = out.past_key_values
    ids, mask = ragged(list(reversed(lengths)), seed=3, side="right", vocab=vocabulary)
    options = {"eos_token_id": None, **options}
    return [
        *outputs,
        generate(model, ids, mask, past_key_values=past, max_new_tokens=tokens, engine=engine, **options),
    ]


def assert_same_chain(ours, theirs):
    assert [o.metrics.engine for o in ours] == ["native"] * len(ours)
    for a, b in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(a.latents, b.latents, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(a.last_hidden, b.last_hidden, rtol=1e-4, atol=2e-5)
        assert_same_cache(a.past_key_values, b.past_key_values)
    assert torch.equal(ours[-1].sequences, theirs[-1].sequences)
    assert_same_cache(ours[-1].past_key_values, theirs[-1].past_key_values)
    a, b = ours[-1].metrics, theirs[-1].metrics
    assert (a.prefill_tokens, a.decode_tokens, a.kv_bytes) == (b.prefill_tokens, b.decode_tokens, b.kv_bytes)


@pytest.mark.parametrize("family", FAMILIES)
def test_chain_equals_eager(family, run):
    """Ragged rows, agents that go on from each other's KV cache, windows of 8 that the cache outgrows."""
    model = tiny_model(family)
    assert_same_chain(chain(model, "native"), chain(model, "eager"))


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_rope_scaling_equals_eager(rope):
    model = tiny_model("qwen3", rope_parameters=rope)
    assert_same_chain(chain(model, "native"), chain(model, "eager"))


def test_biases_equal_eager(run):
    """Every product may have a bias; a fresh model's are zero, which would hide one left out."""
    model = tiny_model("llama", attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    assert_same_chain(chain(model, "native"), chain(model, "eager"))


@pytest.mark.parametrize("vocabulary", [7, 97, 1501])
@pytest.mark.parametrize("aligner", ["identity", "soft"])
def test_feedback_equals_eager(aligner, vocabulary, run):
    """Soft feedback mixes ten tokens: all of seven, and those of a vocabulary in which most blocks hold none."""
    model = tiny_model("llama", vocab_size=vocabulary)
    options = {"aligner": aligner, "vocabulary": vocabulary}
    assert_same_chain(chain(model, "native", **options), chain(model, "eager", **options))


def test_soft_feedback_into_another_model_goes_by_single_steps():
    """The embedding that is looked up is not this model's."""
    model, other = tiny_model("llama"), tiny_model("qwen2")
    aligner = build_aligner(model, "soft", target_model=other)
    ids, mask = ragged([9, 4])
    ours, theirs = (
        latent_generate(model, ids, mask, latent_steps=3, aligner=aligner, engine=engine)
        for engine in ("native", "eager")
    )
    torch.testing.assert_close(ours.latents, theirs.latents, rtol=1e-4, atol=1e-6)


def test_logits_of_nan_give_latents_of_nan():
    """The caller looks for them once per call, so that no step may hide them."""
    model = tiny_model("llama")
    engine = NativeEngine(model, Architecture.of(model))
    cache = LatentCache.for_model(Architecture.of(model), 2, 4)
    logits = torch.randn(2, 97)
    logits[1] = float("nan")
    result = engine.run_latent(cache, logits, build_aligner(model, "soft"), LatentParams(torch.tensor([2, 2])), None)
    assert result.latents[0].isfinite().all()
    assert result.latents[1].isnan().all()
    assert result.last_hidden[1].isnan().all()


# Batch, query heads, key heads, width of a head, hidden size, intermediate size: groups of 1, 2, 4, 8 and 5, and sizes that
# neither a vector nor a tile divides.
SIZES = [
    (1, 4, 4, 64, 129, 70),
    (3, 4, 2, 96, 200, 33),
    (19, 8, 2, 128, 72, 250),
    (3, 8, 1, 64, 40, 17),
    (19, 10, 2, 8, 65, 161),
    (8, 3, 1, 80, 31, 47),
    (1, 2, 1, 256, 96, 96),
]


def of_sizes(query_heads, kv_heads, head_dim, hidden, intermediate, **overrides):
    return tiny_model(
        "qwen2", num_attention_heads=query_heads, num_key_value_heads=kv_heads, head_dim=head_dim, hidden_size=hidden,
        intermediate_size=intermediate, num_hidden_layers=2, vocab_size=101, **overrides,
    )  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_odd_sizes_equal_eager(sizes, run):
    batch, *rest = sizes
    model = of_sizes(*rest)
    lengths = [3 + 5 * row % 23 for row in range(batch)]
    ours, theirs = (chain(model, engine, lengths=lengths, steps=2, tokens=3) for engine in ("native", "eager"))
    assert_same_chain(ours, theirs)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_bfloat16_is_as_good_as_torch(sizes, run):
    """Error against float64 at most twice that of transformers' bfloat16, over the prompt, the steps and the logits."""
    batch, *rest = sizes
    model = of_sizes(*rest).bfloat16()
    lengths = [3 + 5 * row % 23 for row in range(batch)]
    ids, mask = ragged(lengths)

    def states(model, engine):
        read = latent_generate(model, ids, mask, latent_steps=3, aligner="identity", engine=engine, max_cache_len=64)
        prompt = Prompt(torch.ones(batch, dtype=torch.int64), torch.full((batch, 1), 5))
        runner = open_engine(engine, model, Architecture.of(model))
        logits = runner.extend(read.past_key_values, prompt, logits=True)
        return [t.double() for t in (read.latents, read.last_hidden, logits)]

    with torch.no_grad():
        exact = states(copy.deepcopy(model).float(), "eager")
        ours, theirs = states(model, "native"), states(model, "eager")
    for got, plain, want in zip(ours, theirs, exact, strict=True):
        grace = torch.finfo(torch.bfloat16).eps / 2 * want.norm()
        assert (got - want).norm() <= 2 * (plain - want).norm() + grace


def test_forty_bfloat16_steps_stay_close(run):
    """Each step against a float32 run that was given the same embeddings, so that chaos does not hide an error."""
    model = tiny_model("llama").bfloat16()
    ids, mask = ragged([30, 21])
    out = latent_generate(model, ids, mask, latent_steps=40, aligner="identity", engine="native")
    wide = copy.deepcopy(model).float()
    cache = latent_generate(wide, ids, mask, latent_steps=0, engine="eager", max_cache_len=80).past_key_values
    for step in range(40):
        embeds = out.latents[:, step : step + 1].float()
        with torch.no_grad():
            hidden = EagerEngine(wide, Architecture.of(wide)).extend(
                cache, Prompt(torch.ones(2, dtype=torch.int64), inputs_embeds=embeds), logits=False
            )
        following = out.last_hidden if step == 39 else out.latents[:, step + 1]
        assert torch.cosine_similarity(hidden, following.float(), dim=-1).min() > 0.999


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=7),
    steps=st.integers(1, 3),
    data=st.sampled_from([(isa, threads) for isa in ISAS for threads in ("1", "2", "3")]),
    weights=st.sampled_from(["model", "int8"]),
)
def test_hypothesis_float32_rows_are_bit_identical_alone_and_in_a_batch(lengths, steps, data, weights):
    """Prompts, latent steps and text: one order of every sum whatever the batch, the threads and the padding."""
    model = HYPOTHESIS_MODEL
    ids, mask = ragged(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTMAS_ISA", data[0])
        patch.setenv("LATENTMAS_NUM_THREADS", data[1])
        together = latent_generate(model, ids, mask, latent_steps=steps, weights=weights, aligner="ridge")
        batch_text = generate(model, ids, mask, max_new_tokens=3, eos_token_id=None, weights=weights)
        row = len(lengths) - 1
        patch.setenv("LATENTMAS_NUM_THREADS", "1")
        own = ids[row : row + 1, mask[row].bool()]
        alone = latent_generate(model, own, latent_steps=steps, weights=weights, aligner="ridge")
        assert torch.equal(alone.latents[0], together.latents[row])
        assert torch.equal(alone.last_hidden[0], together.last_hidden[row])
        text = generate(model, own, max_new_tokens=3, eos_token_id=None, weights=weights)
        assert torch.equal(text.sequences[0, -3:], batch_text.sequences[row, -3:])


HYPOTHESIS_MODEL = tiny_model("qwen3-mixed")


def test_a_prompt_in_several_parts_equals_eager(run):
    """More positions than run at once: rows that begin, end and go on between two parts, and parts that end no row."""
    model = tiny_model("qwen3-mixed")
    ids, mask = ragged([301, 7, 290])
    ours, theirs = (latent_generate(model, ids, mask, latent_steps=2, engine=engine) for engine in ("native", "eager"))
    torch.testing.assert_close(ours.latents, theirs.latents, rtol=1e-4, atol=1e-6)
    assert_same_cache(ours.past_key_values, theirs.past_key_values)


def test_positions_with_gaps_and_far_out_equal_eager():
    """Windows and rotations follow the positions, not the slots."""
    model = tiny_model("qwen3-mixed", max_position_embeddings=40000)
    ids, mask = ragged([9, 6])
    out = []
    for engine in ("native", "eager"):
        cache = latent_generate(model, ids, mask, latent_steps=0, engine="eager", max_cache_len=16).past_key_values
        cache.next_position = cache.next_position + torch.tensor([5, 31000])
        out.append(
            latent_generate(model, ids[:, -2:], past_key_values=cache, latent_steps=3, engine=engine, aligner="ridge")
        )
    torch.testing.assert_close(out[0].latents, out[1].latents, rtol=1e-3, atol=1e-5)


def test_reads_and_writes_no_slot_but_its_own(run):
    """Poison behind every row's end: a read of it shows in the output, a write over it shows in the buffer."""
    model = tiny_model("qwen2-mixed")
    engine = NativeEngine(model, Architecture.of(model))
    ids, mask = ragged([70, 3])
    read = latent_generate(model, ids, mask, latent_steps=0, max_cache_len=80, engine="eager")
    cache = read.past_key_values.fork(80)
    for row, length in enumerate(cache.lengths.tolist()):
        cache.keys[:, row, :, length:] = cache.values[:, row, :, length:] = float("nan")
    before = cache.fork()
    aligner = build_aligner(model, "ridge")
    result = engine.run_latent(cache, read.last_hidden, aligner, LatentParams(torch.tensor([2, 2])), None)
    with torch.no_grad():
        engine.extend(cache, Prompt(torch.tensor([3, 0]), torch.tensor([[4, 5, 6], [0, 0, 0]])), logits=True)
    assert result.latents.isfinite().all()
    assert result.last_hidden.isfinite().all()
    assert cache.lengths.tolist() == [75, 5]
    for row, (old, new) in enumerate(zip(before.lengths.tolist(), cache.lengths.tolist(), strict=True)):
        for store, was in ((cache.keys, before.keys), (cache.values, before.values)):
            assert torch.equal(store[:, row, :, :old], was[:, row, :, :old])
            assert store[:, row, :, old:new].isfinite().all()
            assert store[:, row, :, new:].isnan().all()


def test_capacity_does_not_change_a_bit():
    model = tiny_model("llama")
    ids, mask = ragged([20, 9])
    small, large = (
        latent_generate(model, ids, mask, latent_steps=3, engine="native", max_cache_len=slots) for slots in (23, 400)
    )
    assert torch.equal(small.latents, large.latents)


# ---- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"eos_token_id": [40, 50, 60, 70, 80]},
        {"eos_token_id": list(range(3, 97, 4)), "min_new_tokens": 3},
        {"eos_token_id": list(range(3, 97))},
    ],
)
def test_rows_that_end_leave_the_batch(options):
    """Rows end at different steps: the others go on as alone, and what the ended ones hold stays."""
    model = tiny_model("llama")
    ids, mask = ragged([9, 4, 6, 12, 3], seed=5)
    ours, theirs = (
        generate(model, ids, mask, max_new_tokens=20, engine=engine, **options) for engine in ("native", "eager")
    )
    assert torch.equal(ours.sequences, theirs.sequences)
    assert ours.new_tokens == theirs.new_tokens
    assert ours.finish_reasons == theirs.finish_reasons
    assert_same_cache(ours.past_key_values, theirs.past_key_values)


def test_streams_each_steps_tokens():
    class Streamer:
        def __init__(self):
            self.got = []

        def put(self, ids):
            self.got.append(ids.tolist())

        def end(self):
            self.got.append("end")

    model, seen = tiny_model("llama"), []
    ids, mask = ragged([5, 3])
    for engine in ("native", "eager"):
        streamer = Streamer()
        generate(model, ids, mask, max_new_tokens=5, streamer=streamer, eos_token_id=[41], engine=engine)
        seen.append(streamer.got)
    assert seen[0] == seen[1]


def test_samples_what_the_op_would():
    """The same seed for all rows of a call: one draw from torch's generator, then a number per step and row."""
    model = tiny_model("llama")
    engine = NativeEngine(model, Architecture.of(model))
    ids, mask = ragged([5, 3])
    read = latent_generate(model, ids, mask, latent_steps=0, max_cache_len=16, engine="native")
    logits = torch.randn(2, 97, generator=torch.Generator().manual_seed(3)) * 3
    sampling_params = SamplingParams(4, 0, True, 0.8, 20, 0.9, eos_token_ids=[], pad_token_id=0)
    torch.manual_seed(11)
    tokens = engine.decode(read.past_key_values.fork(16), logits, sampling_params, None)
    torch.manual_seed(11)
    seed = int(torch.randint(2**62, ()).item())
    cache = read.past_key_values.fork(16)
    for step in range(4):
        want = sample_reference(logits, True, 0.8, 20, 0.9, seed, step)
        assert tokens[:, step].tolist() == want.tolist()
        logits = engine.extend(cache, Prompt(torch.ones(2, dtype=torch.int64), want[:, None]), logits=True)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_an_error_and_no_token(do_sample, fault):
    model = tiny_model("llama")
    engine = NativeEngine(model, Architecture.of(model))
    cache = LatentCache.for_model(Architecture.of(model), 2, 4)
    logits = torch.randn(2, 97)
    logits[1] = fault
    with pytest.raises(ValueError, match="the logits hold NaN or Inf"):
        engine.decode(
            cache, logits, SamplingParams(2, 0, do_sample, 1.0, 5, 0.9, eos_token_ids=[], pad_token_id=0), None
        )


@settings(max_examples=40, deadline=None)
@given(
    vocabulary=st.integers(2, 900),
    top_k=st.integers(0, 950),
    top_p=st.sampled_from([0.1, 0.7, 0.99, 1.0]),
    distinct=st.sampled_from([3, 50, 10**6]),
    seed=st.integers(0, 2**40),
)
def test_hypothesis_draws_as_the_reference(vocabulary, top_k, top_p, distinct, seed):
    """With many equal logits and few, fewer blocks than top-k and more."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, distinct, (3, vocabulary), generator=draw).float() * (8 / distinct)
    native_sampling = extension().Sampling(do_sample=True, temperature=0.8, top_k=top_k, top_p=top_p, seed=seed)
    got = extension().sample(logits, native_sampling, 7)
    assert got == sample_reference(logits, True, 0.8, top_k, top_p, seed, 7).tolist()


# ---- int8 ----------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 5))
def test_hypothesis_rounding_to_int8_is_within_half_a_step(rows, cols, seed):
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    packed, scales = quantize_rows(weight)
    assert packed.dtype == torch.int8
    assert ((packed * scales[:, None] - weight).abs() <= scales[:, None] * 0.5001).all()
    assert quantize_rows(torch.zeros(2, 3))[0].tolist() == [[0, 0, 0]] * 2


def dequantized(model):
    """The model on the weights that int8 stands for; its embedding stays what it was."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for module in other.modules():
            if isinstance(module, nn.Linear):
                packed, scales = quantize_rows(module.weight)
                module.weight.copy_(packed * scales[:, None])
    return other


@pytest.mark.parametrize("sizes", SIZES[:5], ids=str)
def test_int8_equals_eager_on_the_rounded_weights(sizes, run):
    batch, *rest = sizes
    model = of_sizes(*rest)
    ids, mask = ragged([3 + 5 * row % 23 for row in range(batch)])
    ours = latent_generate(model, ids, mask, latent_steps=2, aligner="identity", weights="int8")
    theirs = latent_generate(dequantized(model), ids, mask, latent_steps=2, aligner="identity", engine="eager")
    assert ours.metrics.engine == "native (int8)"
    torch.testing.assert_close(ours.latents, theirs.latents, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sizes", SIZES[:5], ids=str)
def test_int8_of_a_bfloat16_model_is_as_good_as_torch_on_the_rounded_weights(sizes, run):
    batch, *rest = sizes
    model = of_sizes(*rest).bfloat16()
    wide = dequantized(copy.deepcopy(model).float())
    ids, mask = ragged([3 + 5 * row % 23 for row in range(batch)])
    options = {"latent_steps": 2, "aligner": "identity"}
    exact = latent_generate(wide, ids, mask, engine="eager", **options).latents.double()
    plain = latent_generate(copy.deepcopy(wide).bfloat16(), ids, mask, engine="eager", **options).latents.double()
    ours = latent_generate(model, ids, mask, weights="int8", **options).latents.double()
    assert (ours - exact).norm() <= 2 * (plain - exact).norm()


def test_int8_follows_a_change_of_the_weights():
    model = tiny_model("llama")
    ids, _ = ragged([6])
    before = generate(model, ids, max_new_tokens=4, eos_token_id=None, weights="int8")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-20)
    after = generate(model, ids, max_new_tokens=4, eos_token_id=None, weights="int8")
    want = generate(dequantized(model), ids, max_new_tokens=4, eos_token_id=None, engine="eager")
    assert torch.equal(after.sequences, want.sequences)
    assert not torch.equal(after.sequences, before.sequences)


def test_int8_elsewhere_is_refused():
    model = tiny_model("llama")
    ids, _ = ragged([4])
    with pytest.raises(ValueError, match="engine='eager' was asked for"):
        latent_generate(model, ids, engine="eager", weights="int8")
    with pytest.raises(ValueError, match="Gemma2ForCausalLM is none of"):
        generate(tiny_model("gemma2"), ids, weights="int8")
    with pytest.raises(ValueError, match="supported are 'model', 'int8'"):
        generate(model, ids, weights="int4")


# ---- what happens around a call ------------------------------------------------------------------------------------


def test_weights_changed_in_place_and_replaced_are_seen():
    model = tiny_model("llama")
    ids, _ = ragged([7])

    def both():
        return [
            generate(model, ids, max_new_tokens=4, eos_token_id=None, engine=e).sequences for e in ("native", "eager")
        ]

    assert torch.equal(*both())
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(3)
    assert torch.equal(*both())
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.randn(80, 48) * 0.3)
    model.lm_head.weight = nn.Parameter(torch.randn(97, 48))
    assert torch.equal(*both())
    model = model.double().float()
    assert torch.equal(*both())


def test_weights_that_lost_rows_where_they_lie_are_seen():
    """Their addresses stay: what was kept for the larger ones would write behind the new logits."""
    model, (ids, _) = tiny_model("llama"), ragged([7])
    ids = ids.clamp(max=15)

    def both():
        return [
            generate(model, ids, max_new_tokens=4, eos_token_id=None, engine=e).sequences for e in ("native", "eager")
        ]

    both()
    model.lm_head.weight.data = model.lm_head.weight.data[:48]
    ours, theirs = both()
    assert torch.equal(ours, theirs)
    assert int(ours.max()) < 48
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data[:16]
    ours, theirs = both()
    assert torch.equal(ours, theirs)
    assert int(ours.max()) < 16
    assert NativeEngine(model, Architecture.of(model)).state.vocabulary == 16


def test_an_exception_between_steps_leaves_the_cache_as_it_was():
    model = tiny_model("llama")
    ids, mask = ragged([6, 3])
    cache = latent_generate(model, ids, mask, latent_steps=0, max_cache_len=40, engine="native").past_key_values
    lengths, held = cache.lengths.clone(), cache.fork()

    def stop(step):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latent_generate(model, ids, mask, past_key_values=cache.donate(), latent_steps=5, on_step=stop, engine="native")
    assert cache.lengths.tolist() == lengths.tolist()
    again = [
        latent_generate(model, ids, mask, past_key_values=c, latent_steps=3, engine="native").latents
        for c in (cache, held)
    ]
    assert torch.equal(*again)


def test_steps_are_reported_as_they_are_issued():
    model, seen = tiny_model("llama"), []
    ids, mask = ragged([6, 3])
    latent_generate(model, ids, mask, latent_steps=4, on_step=seen.append, engine="native")
    assert seen == [0, 1, 2, 3]


def _run_latent_in_child(queue, ids):
    out = latent_generate(HYPOTHESIS_MODEL, ids, latent_steps=3, engine="native", aligner="identity")
    queue.put(out.latents.tolist())


def test_a_forked_child_has_threads_of_its_own(monkeypatch):
    """The team of the parent has run before, and none of its threads are in the child."""
    monkeypatch.setenv("LATENTMAS_NUM_THREADS", "2")
    ids, _ = ragged([9])
    here = latent_generate(HYPOTHESIS_MODEL, ids, latent_steps=3, engine="native", aligner="identity").latents
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_run_latent_in_child, args=(queue, ids))
    child.start()
    assert torch.equal(torch.tensor(queue.get(timeout=60)), here)
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.parametrize("threads", ["0", "-1", "two", "99999", "2x"])
def test_a_wrong_number_of_threads_is_refused(threads, monkeypatch):
    monkeypatch.setenv("LATENTMAS_NUM_THREADS", threads)
    ids, _ = ragged([4])
    with pytest.raises(RuntimeError, match=f"LATENTMAS_NUM_THREADS={threads} is no number of threads"):
        latent_generate(tiny_model("llama"), ids, latent_steps=1, engine="native", aligner="identity")


def test_calls_from_several_threads_do_not_mix(monkeypatch):
    """Each its own prompt, weights and number of steps, on one model at the same time."""
    monkeypatch.setenv("LATENTMAS_NUM_THREADS", "2")
    model = tiny_model("llama")

    def call(number):
        ids, mask = ragged([9 + number, 5], seed=number)
        weights = ("model", "int8")[number % 2]
        out = latent_generate(model, ids, mask, latent_steps=2 + number % 3, weights=weights, aligner="identity")
        tokens = generate(model, ids[:, -3:], past_key_values=out.past_key_values, max_new_tokens=5, weights=weights)
        return out.latents, tokens.sequences

    alone = [call(number) for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(call, [*range(8)] * 3))
    for (latents, tokens), (latents_alone, tokens_alone) in zip(together, alone * 3, strict=True):
        assert torch.equal(latents, latents_alone)
        assert torch.equal(tokens, tokens_alone)


def test_a_call_out_of_a_callback_does_not_disturb_the_one_around_it():
    model = tiny_model("llama")
    ids, mask = ragged([9, 5])
    other, _ = ragged([20], seed=4)
    options = {"latent_steps": 4, "engine": "native", "aligner": "identity"}
    want, want_inner = latent_generate(model, ids, mask, **options), latent_generate(model, other, **options)
    inner = []
    out = latent_generate(
        model, ids, mask, on_step=lambda step: inner.append(latent_generate(model, other, **options)), **options
    )
    assert torch.equal(out.latents, want.latents)
    assert all(torch.equal(each.latents, want_inner.latents) for each in inner)
    assert len(inner) == 4


def test_int8_weights_live_as_long_as_a_call_that_reads_them():
    """A change of the model in the middle of a call makes a new copy for the next one; the old copy is still being read."""
    model = tiny_model("llama")
    ids, _ = ragged([9])
    options = {"latent_steps": 6, "weights": "int8", "aligner": "identity"}
    want = latent_generate(model, ids, **options)

    def change(step):
        if step < 3:
            with torch.no_grad():
                model.model.layers[0].mlp.down_proj.weight.mul_(-2)
            latent_generate(model, ids, **options)

    assert torch.equal(latent_generate(model, ids, on_step=change, **options).latents, want.latents)
    assert not torch.equal(latent_generate(model, ids, **options).latents, want.latents)


def test_a_child_forked_in_the_middle_of_a_call_can_call(monkeypatch):
    monkeypatch.setenv("LATENTMAS_NUM_THREADS", "2")
    ids, _ = ragged([9])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_run_latent_in_child, args=(queue, ids))
    out = latent_generate(
        HYPOTHESIS_MODEL, ids, latent_steps=3, engine="native", aligner="identity",
        on_step=lambda step: child.start() if step == 1 else None,
    )  # fmt: skip
    assert torch.equal(torch.tensor(queue.get(timeout=60)), out.latents)
    child.join(60)
    assert child.exitcode == 0


def test_auto_is_native_on_the_cpu_and_says_where_it_is_not():
    model = tiny_model("llama")
    assert isinstance(open_engine("auto", model, Architecture.of(model)), NativeEngine)
    other = tiny_model("gemma2")
    warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="runs on the eager engine, since Gemma2ForCausalLM is none of"):
        assert isinstance(open_engine("auto", other, Architecture.of(other)), EagerEngine)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_engine("auto", other, Architecture.of(other))
    with pytest.raises(ValueError, match="engine='native' does not cover this Gemma2ForCausalLM"):
        open_engine("native", other, Architecture.of(other))


def test_scratch_is_small_and_reported():
    model = tiny_model("llama")
    assert memory_report(model) == {}
    ids, _ = ragged([4])
    latent_generate(model, ids, latent_steps=1, engine="native", aligner="identity")
    assert set(memory_report(model)) == {"scratch"}
    generate(model, ids, max_new_tokens=2, weights="int8")
    assert memory_report(model)["int8 weights and scratch"] > memory_report(model)["scratch"]


def test_the_report_is_made_while_another_thread_opens_an_engine():
    model = tiny_model("llama")
    states = native_module._states.setdefault(model, {})

    class Opening:
        @property
        def nbytes(self):
            states[True] = states[False]
            return 7

    states[False] = Opening()
    assert memory_report(model) == {"scratch": 7}
