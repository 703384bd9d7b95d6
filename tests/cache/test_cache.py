"""LatentCache: ragged writes, copies, and both directions to transformers."""

import copy
import gc
import pickle
import weakref
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ragged, tiny_model
from transformers import Cache, DynamicCache, QuantizedCache, StaticCache, cache_utils
from transformers.cache_utils import DynamicIndexedLayer, QuantizedLayer
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from latentmas_kernels import LatentCache, Segment, generate, latent_generate
from latentmas_kernels.cache import from_hf as cache_from_hf

SHAPE = {"layers": 2, "kv_heads": 2, "head_dim": 4, "dtype": torch.float32}


def random_states(batch, columns, draw):
    return torch.randn(batch, 2, columns, 4, generator=draw)


def append(cache, counts, draw, kind="prompt"):
    """Append counts[b] random positions to each row through the engines' door; returns what each row got, per layer."""
    counts = torch.tensor(counts)
    columns = max(1, int(counts.max()))
    start = cache.lengths
    slots = cache.reserve(counts, columns)
    written = []
    for layer in range(2):
        k, v = random_states(len(counts), columns, draw), random_states(len(counts), columns, draw)
        cache.write(layer, k, v, slots)
        written.append([(k[b, :, columns - n :], v[b, :, columns - n :]) for b, n in enumerate(counts.tolist())])
    cache.advance(counts)
    cache.add_segment(kind, start)
    return written


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sequence_of_operations_equals_lists_of_slots(data):
    """Appends, forks, selections and crops in any order hold what plain Python lists per row would hold."""
    draw = torch.Generator().manual_seed(0)
    batch = data.draw(st.integers(1, 4))
    cache = LatentCache(batch=batch, capacity=40, **SHAPE)
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    rows = [[] for _ in range(batch)]  # per row a list of slots, a slot being [(k, v) per layer]
    for _ in range(data.draw(st.integers(1, 6))):
        action = data.draw(st.sampled_from(["append", "fork", "select", "crop"]))
        if action == "append":
            counts = data.draw(st.lists(st.integers(0, 5), min_size=len(rows), max_size=len(rows)))
            written = append(cache, counts, draw)
            for b, n in enumerate(counts):
                rows[b] += [[(written[la][b][0][:, i], written[la][b][1][:, i]) for la in range(2)] for i in range(n)]
        elif action == "fork":
            cache = cache.fork(data.draw(st.integers(40, 50)))
        elif action == "select":
            chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
            cache, rows = cache.select(chosen), [list(rows[r]) for r in chosen]
        else:
            count = data.draw(st.integers(0, min(map(len, rows))))
            cache.crop(-count)
            rows = [r[: len(r) - count] for r in rows]
    assert cache.lengths.tolist() == [len(r) for r in rows]
    assert cache.next_position.tolist() == [len(r) for r in rows]
    for b, slots in enumerate(rows):
        assert cache.positions[b, : len(slots)].tolist() == list(range(len(slots)))
        for layer in range(2):
            for i, slot in enumerate(slots):
                assert torch.equal(cache.keys[layer, b, :, i], slot[layer][0])
                assert torch.equal(cache.values[layer, b, :, i], slot[layer][1])


def test_fork_and_select_do_not_share_memory():
    draw = torch.Generator().manual_seed(0)
    cache = LatentCache(batch=2, capacity=8, **SHAPE)
    append(cache, [3, 1], draw)
    before = cache.keys[:, :, :, :3].clone()
    for other in (cache.fork(), cache.select([0, 1]), cache.fork(16)):
        other.keys.zero_()
        append(other, [2, 2], draw)
        assert cache.lengths.tolist() == [3, 1]
    assert torch.equal(cache.keys[:, 0, :, :3], before[:, 0])


def test_segments_follow_rows_and_names():
    draw = torch.Generator().manual_seed(0)
    cache = LatentCache(batch=2, capacity=20, **SHAPE)
    append(cache, [3, 1], draw)
    append(cache, [2, 2], draw, "latent")
    cache.name_segments("planner")
    append(cache, [1, 4], draw)
    append(cache, [1, 1], draw)
    assert cache.segments == [
        Segment("planner", "prompt", (0, 0), (3, 1)),
        Segment("planner", "latent", (3, 1), (5, 3)),
        Segment(None, "prompt", (5, 3), (7, 8)),
    ]
    assert cache.select([1, 1, 0]).segments[1] == Segment("planner", "latent", (1, 1, 3), (3, 3, 5))
    cache.crop(-3)
    assert cache.segments[-1] == Segment(None, "prompt", (4, 3), (4, 5))


def test_donation_fits_or_grows():
    draw = torch.Generator().manual_seed(0)
    cache = LatentCache(batch=1, capacity=8, **SHAPE)
    append(cache, [3], draw)
    assert cache.donate().acquire(8) is cache
    assert cache.acquire(8) is not cache
    before = cache.to_hf().layers[1].keys
    assert cache.donate().acquire(9) is cache, "it grows"
    assert cache.capacity == 9
    assert cache.lengths.tolist() == [3]
    assert torch.equal(cache.to_hf().layers[1].keys, before)
    assert cache.acquire(9) is not cache


@pytest.mark.parametrize("rows", [[2], [-1], []])
def test_select_refuses_rows_that_are_not_there(rows):
    cache = LatentCache(batch=2, capacity=8, **SHAPE)
    with pytest.raises(ValueError, match="this cache has rows 0 to 1"):
        cache.select(rows)


def test_copies_refuse_to_truncate():
    cache = LatentCache(batch=2, capacity=8, **SHAPE)
    append(cache, [5, 2], torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="5 slots per row does not fit a capacity of 4"):
        cache.fork(4)
    with pytest.raises(ValueError, match="5 tokens in a row; a capacity of 4"):
        LatentCache.from_hf(cache.to_hf(), cache.attention_mask(), capacity=4)


def test_to_hf_and_back_is_the_same_cache():
    cache = LatentCache(batch=3, capacity=16, **SHAPE)
    cache.keys.fill_(float("nan"))
    append(cache, [4, 1, 9], torch.Generator().manual_seed(0))
    theirs, mask = cache.to_hf(), cache.attention_mask()
    assert isinstance(theirs, DynamicCache)
    assert mask.tolist() == [[0] * 5 + [1] * 4, [0] * 8 + [1], [1] * 9]
    assert all(layer.keys.isfinite().all() and layer.keys.shape == (3, 2, 9, 4) for layer in theirs.layers)
    back = LatentCache.from_hf(theirs, mask)
    assert back.lengths.tolist() == [4, 1, 9]
    for b, n in enumerate([4, 1, 9]):
        assert torch.equal(back.keys[:, b, :, :n], cache.keys[:, b, :, :n])
        assert torch.equal(back.values[:, b, :, :n], cache.values[:, b, :, :n])


def test_mask_with_holes_drops_them():
    keys = torch.arange(6.0)[None, None, :, None].expand(1, 2, 6, 4)
    cache = LatentCache.from_hf(DynamicCache(ddp_cache_data=[(keys, keys)]), torch.tensor([[0, 1, 1, 0, 1, 0]]))
    assert cache.lengths.tolist() == [3]
    assert cache.keys[0, 0, 0, :3, 0].tolist() == [1, 2, 4]
    assert cache.positions[0, :3].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "make", [lambda m: DynamicCache(config=m.config), lambda m: StaticCache(config=m.config, max_cache_len=64)]
)
@pytest.mark.parametrize("name", ["llama", "qwen3-mixed", "mistral-window"])
@torch.no_grad()
def test_caches_that_dropped_what_lies_outside_the_window(name, make):
    """transformers keeps only the window in sliding layers; the rest is never asked for again."""
    model = tiny_model(name)
    ids, _ = ragged([20, 20])
    past = make(model)
    model(ids[:, :14], past_key_values=past, use_cache=True)
    model(ids[:, 14:], past_key_values=past, use_cache=True)
    out = latent_generate(model, ids, past_key_values=past, latent_steps=3, aligner="ridge")
    whole = latent_generate(model, torch.cat([ids, ids], 1), latent_steps=3, aligner="ridge")
    assert (out.latents - whole.latents).abs().max() < 5e-5


@torch.no_grad()
def windowed(model, lengths=(30, 5, 30)):
    """What `from_hf` makes of a cache whose windows of 8 have dropped slots of all rows but the short one, and its mask."""
    ids, mask = ragged(list(lengths))
    past = DynamicCache(config=model.config)
    model(ids, attention_mask=mask, past_key_values=past, use_cache=True)
    return LatentCache.from_hf(past, mask, capacity=60)


def test_what_a_window_dropped_does_not_come_back(tmp_path):
    """A cut, a move or a merge would let later positions see zeros; what was added behind may be edited."""
    model = tiny_model("mistral-window")
    cache = windowed(model)
    assert cache.complete_from.tolist() == [30, 0, 30]
    cache.name_segments("reader")
    more = latent_generate(model, *ragged([2, 2, 2]), latent_steps=3, past_key_values=cache).past_key_values
    more.name_segments("thinker")
    more.save(tmp_path / "memory.safetensors", model)
    loaded = LatentCache.load(tmp_path / "memory.safetensors", model)
    copies = [
        more, loaded, more.fork(90), more.branch(), more.select([0, 1, 2]), more.fork_rows(1, 70), copy.deepcopy(more),
        copy.copy(more),
    ]  # fmt: skip
    front = torch.arange(35).expand(3, -1) > 2
    for one in copies:
        assert one.complete_from.tolist() == [30, 0, 30]
        for refused in (
            lambda c: c.truncate(torch.tensor([30, 5, 29])),
            lambda c: c.crop(-6),
            lambda c: c.keep("thinker"),
            lambda c: c.keep(front),
            lambda c: LatentCache.concat([c, c], model),
            lambda c: LatentCache.concat([c.part([1, 0])], model),
        ):
            with pytest.raises(ValueError, match=r"row [02] was read .* dropped .* 30 tokens.*Let the model read"):
                refused(one)
        assert one.lengths.tolist() == [35, 10, 35]
        merged = LatentCache.concat([one.part([1]), one.part([1])], model)
        assert merged.lengths.tolist() == [20], "of that row all is there"
        one.drop("thinker:prompt")
        one.rebase(model)
        assert one.lengths.tolist() == [33, 8, 33]
        one.rewind("reader")
        assert one.lengths.tolist() == [30, 5, 30]
    assert more.select([1, 0]).complete_from.tolist() == [0, 30]
    assert more.fork_rows(2, 60).complete_from.tolist() == [30, 30, 0, 0, 30, 30]
    more.reset()
    assert more.complete_from.tolist() == [0, 0, 0]
    assert windowed(tiny_model("llama")).complete_from.tolist() == [0, 0, 0]
    assert windowed(model, (6, 5, 3)).complete_from.tolist() == [0, 0, 0]


@pytest.mark.parametrize("value", [[31, 0, 0], [-1, 0, 0], [1, 0], [1.0, 0, 0], [True, 0, 0], "30", None])
def test_a_file_does_not_say_more_than_can_be(tmp_path, value):
    model = tiny_model("mistral-window")
    cache = windowed(model)
    cache.complete_from = SimpleNamespace(any=lambda: True, tolist=lambda: value)
    cache.save(tmp_path / "memory.safetensors", model)
    with pytest.raises(ValueError, match=r"found whole_from .*0 to the length, for each of 3 rows"):
        LatentCache.load(tmp_path / "memory.safetensors", model)


@torch.no_grad()
def test_works_as_a_cache_of_transformers_while_rows_are_uniform(family_model):
    """model() and model.generate() append to it in place, up to its capacity."""
    ids, _ = ragged([9, 9, 9])
    cache = latent_generate(family_model, ids, latent_steps=5, aligner="ridge", max_cache_len=40).past_key_values
    plain = cache.to_hf()
    for columns in (4, 1, 1):
        ours = family_model(ids[:, :columns], past_key_values=cache, use_cache=True).logits
        theirs = family_model(ids[:, :columns], past_key_values=plain, use_cache=True).logits
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert cache.lengths.tolist() == [20] * 3
    assert cache.get_seq_length() == 20
    whole = torch.cat([torch.full((3, 20), 5), ids], 1)  # generate() cuts off what the cache holds
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs = family_model.generate(whole, past_key_values=plain, **options)
    ours = family_model.generate(whole, past_key_values=cache, **options)
    assert torch.equal(ours, theirs)
    assert cache.lengths.tolist() == [34] * 3


@torch.no_grad()
def test_as_transformers_cache_it_refuses_what_it_cannot_be():
    model = tiny_model("llama")
    ids, mask = ragged([3, 5])
    cache = latent_generate(model, ids, mask, latent_steps=1, aligner="ridge").past_key_values
    with pytest.raises(ValueError, match="ragged rows.*to_hf"):
        model(ids, past_key_values=cache, use_cache=True)
    even = latent_generate(model, ids, latent_steps=1, aligner="ridge").past_key_values
    with pytest.raises(ValueError, match="capacity of 6 slots per row, 11 are needed"):
        model(ids, past_key_values=even, use_cache=True)
    assert even.lengths.tolist() == [6, 6]
    gap = even.fork()
    gap.next_position = gap.next_position + 3
    with pytest.raises(ValueError, match="do not have the positions"):
        gap.to_hf()


@torch.no_grad()
def test_reordering_repeating_and_resetting(model):
    ids, _ = ragged([4, 4], side="left")
    cache = latent_generate(model, ids, latent_steps=1, aligner="ridge").past_key_values
    first, second = cache.keys[:, 0].clone(), cache.keys[:, 1].clone()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.keys[:, 0], second)
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    assert torch.equal(cache.keys[:, 2], first)
    cache.batch_select_indices(torch.tensor([3]))
    assert torch.equal(cache.keys[:, 0], first)
    assert cache.layers[0].keys.shape == (1, 2, 5, 16)
    cache.reset()
    assert cache.lengths.tolist() == [0]


def test_deepcopy_is_independent():
    cache = LatentCache(batch=1, capacity=8, **SHAPE)
    append(cache, [3], torch.Generator().manual_seed(0))
    twin = copy.deepcopy(cache)
    twin.layers[0].update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
    assert twin.keys.data_ptr() != cache.keys.data_ptr()
    assert twin.layers[0]._cache is twin
    assert not torch.equal(twin.keys[0, 0, :, 3], cache.keys[0, 0, :, 3])


def test_other_kinds_of_caches_are_refused_by_name():
    with pytest.raises(ValueError, match="DynamicIndexedLayer; supported are DynamicLayer.* and quantized layers"):
        LatentCache.from_hf(Cache(layers=[Int8Layer(), DynamicIndexedLayer()]))
    with pytest.raises(ValueError, match="empty DynamicCache"):
        LatentCache.from_hf(DynamicCache())
    with pytest.raises(ValueError, match="empty Cache"):
        LatentCache.from_hf(Cache(layers=[Int8Layer()]))
    keys = torch.ones(2, 2, 5, 4)
    with pytest.raises(ValueError, match=r"must be \[2, 5\].*got \[2, 4\]"):
        LatentCache.from_hf(DynamicCache(ddp_cache_data=[(keys, keys)]), torch.ones(2, 4))
    wide = torch.ones(2, 2, 5, 8)
    for pairs, layer in (([(keys, keys), (wide, wide)], 1), ([(keys, wide)], 0)):
        with pytest.raises(ValueError, match=rf"layer {layer} of this DynamicCache.*supported is one shape for all"):
            LatentCache.from_hf(DynamicCache(ddp_cache_data=pairs))
    with pytest.raises(ValueError, match="sizes of at least 1"):
        LatentCache(batch=0, capacity=8, **SHAPE)


# ---- quantized caches ----------------------------------------------------------------------------------------------


class Int8Layer(QuantizedLayer):
    """A quantized layer that needs no other package: 8 bits and one scale per tensor."""

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax() / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, quantized):
        return quantized[0].to(self.keys.dtype) * quantized[1]


def int8_cache(model, **options):
    return Cache(layers=[Int8Layer(**options) for _ in range(model.config.num_hidden_layers)])


def backend(name, available, **options):
    reason = f"transformers has no {name} cache here"
    return pytest.param(
        lambda model: QuantizedCache(name, model.config, **options),
        id=name,
        marks=pytest.mark.skipif(not available, reason=reason),
    )


QUANTIZED = [
    pytest.param(int8_cache, id="int8"),
    backend("fp8", hasattr(cache_utils, "Fp8QuantizedLayer")),
    backend("quanto", is_optimum_quanto_available(), q_group_size=16),
    backend("hqq", is_hqq_available(), q_group_size=16, axis_key=1, axis_value=1),
]


def states_of(cache):
    """What the model attends to at its next token, per layer. The cache has it then."""
    states = []
    for layer in cache.layers:
        token = torch.zeros(2, 2, 1, 16, dtype=layer.keys.dtype)
        states.append([full[:, :, :-1] for full in layer.update(token, token)])
    return states


def tensors_in(thing):
    if type(thing) is torch.Tensor:  # quanto's own kind of tensor cannot be copied
        return [thing]
    if isinstance(thing, tuple | list):
        return [t for part in thing for t in tensors_in(part)]
    return [t for part in thing.values() for t in tensors_in(part)] if isinstance(thing, dict) else []


@pytest.mark.parametrize("parts", [[12], [12, 1], [12, 3, 1, 1], [12, 1, 1, 1, 1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("make", QUANTIZED)
@torch.no_grad()
def test_quantized_caches_are_read_as_the_model_reads_them(model, make, parts):
    """Whether all of it is quantized, or some is yet to be; the cache that was given stays as it was."""
    past = make(model)
    for index, columns in enumerate(parts):
        model(ragged([columns, columns], seed=index)[0], past_key_values=past, use_cache=True)
    fields = [dict(vars(layer)) for layer in past.layers]
    content = [[t.clone() for t in tensors_in(f)] for f in fields]
    cache = LatentCache.from_hf(past)
    for layer, before, tensors in zip(past.layers, fields, content, strict=True):
        assert vars(layer).keys() == before.keys()
        assert all(vars(layer)[name] is before[name] for name in before)
        assert all(torch.equal(a, b) for a, b in zip(tensors_in(before), tensors, strict=True))
    assert cache.lengths.tolist() == [sum(parts)] * 2
    for index, (keys, values) in enumerate(states_of(past)):
        assert torch.equal(cache.keys[index], keys)
        assert torch.equal(cache.values[index], values)


@pytest.mark.parametrize("residual_length", [0, 1, 3, 4, 5])
@torch.no_grad()
def test_reading_a_quantized_cache_does_not_quantize_it_again(model, residual_length):
    """One token before the residual is full, and where there is none: an update by nothing quantizes there."""
    past = int8_cache(model, residual_length=residual_length)
    for columns in (12, 1, 1, 1):
        model(ragged([columns, columns])[0], past_key_values=past, use_cache=True)
    before = [layer._quantized_keys for layer in past.layers]
    cache = LatentCache.from_hf(past)
    assert all(layer._quantized_keys is kept for layer, kept in zip(past.layers, before, strict=True))
    assert all(torch.equal(cache.keys[index], keys) for index, (keys, _) in enumerate(states_of(past)))


@torch.no_grad()
def test_calls_go_on_from_quantized_caches(model):
    """As they do from the dequantized states, padding and all."""
    past, (ids, mask) = int8_cache(model), ragged([12, 7])
    model(ids, attention_mask=mask, past_key_values=past, use_cache=True)
    more, more_mask = ragged([3, 5], seed=2)
    both = torch.cat([mask, more_mask], 1)

    def calls(past):
        latent_output = latent_generate(model, more, both, past_key_values=past, latent_steps=3, aligner="ridge")
        decoded = generate(model, more, both, past_key_values=past, max_new_tokens=6, eos_token_id=None)
        return latent_output.latents, decoded.sequences, latent_output.past_key_values.lengths.tolist()

    ours = calls(past)
    theirs = calls(DynamicCache(ddp_cache_data=[tuple(pair) for pair in states_of(past)]))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert ours[2] == [18, 15]


@pytest.mark.skipif(not hasattr(Int8Layer, "_apply_pending_reorder"), reason="transformers reorders at once here")
@torch.no_grad()
def test_rows_that_wait_to_be_reordered_are(model):
    past = int8_cache(model)
    for columns in (12, 2):
        model(ragged([columns, columns])[0], past_key_values=past, use_cache=True)
    straight = LatentCache.from_hf(past)
    past.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(LatentCache.from_hf(past).buffer, straight.select([1, 0]).buffer)


@torch.no_grad()
def test_a_quantized_cache_that_lost_count_is_refused(model):
    """transformers cuts its residual and keeps the count."""
    past = int8_cache(model)
    for columns in (12, 3):
        model(ragged([columns, columns])[0], past_key_values=past, use_cache=True)
    for layer in past.layers:
        layer.crop(-2)
    with pytest.raises(ValueError, match="Int8Layer counts 15 tokens and holds 13, as after a crop"):
        LatentCache.from_hf(past)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads from CUDA devices only")
@torch.no_grad()
def test_an_offloaded_cache_goes_back_to_its_device(model):
    model.to("cuda")
    plain, offloaded = DynamicCache(config=model.config), DynamicCache(config=model.config, offloading=True)
    ids = ragged([12, 12])[0].to("cuda")
    for past in (plain, offloaded):
        model(ids, past_key_values=past, use_cache=True)
    ours = LatentCache.from_hf(offloaded)
    assert ours.buffer.device.type == "cuda"
    assert torch.equal(ours.buffer, LatentCache.from_hf(plain).buffer)


def test_nothing_of_an_offloaded_cache_is_read_before_its_bytes_are_there(model, monkeypatch):
    past, order = DynamicCache(), []
    model(ragged([12, 12])[0], past_key_values=past, use_cache=True)
    past.offloading = True
    for layer in past.layers:
        layer.device = torch.device("cuda")

    def read(_):
        order.append("read")
        raise InterruptedError

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    monkeypatch.setattr(cache_from_hf, "real_columns", read)
    for call in (LatentCache.from_hf, lambda cache: cache_from_hf.check_call_mask(cache, torch.ones(2, 12))):
        with pytest.raises(InterruptedError):
            call(past)
    assert order == ["wait", "read"] * 2


# ---- memory of the machine -----------------------------------------------------------------------------------------

MEGABYTES = {**SHAPE, "batch": 3, "capacity": 8192}  # 128 bytes a slot in float32: 3 MB


def free(monkeypatch, size):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=size))


def test_a_cache_takes_all_that_is_free_and_not_a_byte_more(monkeypatch):
    """Otherwise the pages would be handed out, and the process killed as the last of them are written."""
    free(monkeypatch, 3 * 2**20)
    assert LatentCache(**MEGABYTES).capacity == 8192
    free(monkeypatch, 3 * 2**20 - 1)
    with pytest.raises(ValueError, match="needs 3 MB"):
        LatentCache(**MEGABYTES)
    assert LatentCache(**{**MEGABYTES, "dtype": torch.bfloat16}).capacity == 8192, "half of it"


def test_a_cache_that_does_not_fit_says_both_numbers_and_what_to_do(monkeypatch):
    free(monkeypatch, 20 * 2**20)
    with pytest.raises(ValueError, match="cache") as caught:
        LatentCache(**{**MEGABYTES, "capacity": 81920})
    for words in (
        "3 rows of 81920 slots needs 30 MB (2 layers, 2 heads of 4 in torch.float32)",
        "free on cpu are 20 MB",
        "take fewer rows at a time (a smaller batch), or shorter ones",
    ):
        assert words in str(caught.value)


def test_no_machine_holds_a_cache_of_petabytes():
    with pytest.raises(ValueError, match=r"needs 122,070,312 MB .* free on cpu are [\d,]+ MB"):
        LatentCache(batch=1, capacity=10**12, **SHAPE)


def test_a_copy_that_does_not_fit_leaves_the_cache_as_it_was(monkeypatch):
    cache = LatentCache(batch=1, capacity=8, **SHAPE)
    append(cache, [3], torch.Generator().manual_seed(0))
    free(monkeypatch, 10 * 128 - 1)
    with pytest.raises(ValueError, match="1 rows of 10 slots needs"):
        cache.fork(10)
    assert cache.fork().lengths.tolist() == cache.lengths.tolist() == [3]


def test_copies_and_pickles_have_layers_of_their_own():
    cache = LatentCache(layers=2, batch=2, kv_heads=1, capacity=6, head_dim=8, dtype=torch.float32)
    cache.buffer.normal_()
    cache.advance(torch.tensor([3, 3]))
    new = torch.ones(2, cache.keys.shape[2], 1, cache.keys.shape[4])
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        for layer in range(len(cache)):
            copied.update(new, new, layer)
        assert copied.lengths.tolist() == [4, 4]
        assert cache.lengths.tolist() == [3, 3]
        assert torch.equal(copied.keys[..., :3, :], cache.keys[..., :3, :])


def test_memory_is_free_when_a_cache_is_dropped():
    """Without the garbage collector: a buffer may be gigabytes."""
    gc.disable()
    try:
        cache = LatentCache(layers=2, batch=1, kv_heads=1, capacity=4, head_dim=8, dtype=torch.float32)
        seen = weakref.ref(cache)
        del cache
        assert seen() is None
    finally:
        gc.enable()
