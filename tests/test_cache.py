"""LatentCache: ragged writes, copies, and both directions to transformers."""

import copy
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ragged, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, QuantizedCache, StaticCache

from latentmas_kernels import LatentCache, Segment, latent_generate

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


def test_donation_fits_or_refuses():
    draw = torch.Generator().manual_seed(0)
    cache = LatentCache(batch=1, capacity=8, **SHAPE)
    append(cache, [3], draw)
    assert cache.donate().take(8) is cache
    assert cache.take(8) is not cache
    with pytest.raises(ValueError, match="capacity of 8 slots per row, this call needs 9"):
        cache.donate().take(9)


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


def test_to_hf_and_back_is_the_same_memory():
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
def test_works_as_a_cache_of_transformers_while_rows_are_uniform(family_model):
    """model() and model.generate() append to it in place, up to its capacity."""
    ids, _ = ragged([9, 9, 9])
    memory = latent_generate(family_model, ids, latent_steps=5, aligner="ridge", max_cache_len=40).past_key_values
    plain = memory.to_hf()
    for columns in (4, 1, 1):
        ours = family_model(ids[:, :columns], past_key_values=memory, use_cache=True).logits
        theirs = family_model(ids[:, :columns], past_key_values=plain, use_cache=True).logits
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert memory.lengths.tolist() == [20] * 3
    assert memory.get_seq_length() == 20
    whole = torch.cat([torch.zeros(3, 20, dtype=torch.int64), ids], 1)  # generate() cuts off what the cache holds
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs = family_model.generate(whole, past_key_values=plain, **options)
    ours = family_model.generate(whole, past_key_values=memory, **options)
    assert torch.equal(ours, theirs)
    assert memory.lengths.tolist() == [34] * 3


@torch.no_grad()
def test_as_transformers_cache_it_refuses_what_it_cannot_be():
    model = tiny_model("llama")
    ids, mask = ragged([3, 5])
    memory = latent_generate(model, ids, mask, latent_steps=1, aligner="ridge").past_key_values
    with pytest.raises(ValueError, match="ragged rows.*to_hf"):
        model(ids, past_key_values=memory, use_cache=True)
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
    memory = latent_generate(model, ids, latent_steps=1, aligner="ridge").past_key_values
    first, second = memory.keys[:, 0].clone(), memory.keys[:, 1].clone()
    memory.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(memory.keys[:, 0], second)
    memory.batch_repeat_interleave(2)
    assert memory.batch_size == 4
    assert torch.equal(memory.keys[:, 2], first)
    memory.batch_select_indices(torch.tensor([3]))
    assert torch.equal(memory.keys[:, 0], first)
    assert memory.layers[0].keys.shape == (1, 2, 5, 16)
    memory.reset()
    assert memory.lengths.tolist() == [0]


def test_deepcopy_is_independent():
    cache = LatentCache(batch=1, capacity=8, **SHAPE)
    append(cache, [3], torch.Generator().manual_seed(0))
    twin = copy.deepcopy(cache)
    twin.layers[0].update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
    assert twin.keys.data_ptr() != cache.keys.data_ptr()
    assert twin.layers[0]._cache is twin
    assert not torch.equal(twin.keys[0, 0, :, 3], cache.keys[0, 0, :, 3])


def test_other_kinds_of_caches_are_refused_by_name():
    quantized = QuantizedCache.__new__(QuantizedCache)
    layer = type("QuantoQuantizedLayer", (), {})()
    quantized.layers = [layer]
    with pytest.raises(ValueError, match="QuantoQuantizedLayer.*supported are DynamicLayer"):
        LatentCache.from_hf(quantized)
    with pytest.raises(ValueError, match="empty DynamicCache"):
        LatentCache.from_hf(DynamicCache())
    keys = torch.zeros(2, 2, 5, 4)
    with pytest.raises(ValueError, match=r"must be \[2, 5\].*got \[2, 4\]"):
        LatentCache.from_hf(DynamicCache(ddp_cache_data=[(keys, keys)]), torch.ones(2, 4))
    with pytest.raises(ValueError, match="sizes of at least 1"):
        LatentCache(batch=0, capacity=8, **SHAPE)


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
