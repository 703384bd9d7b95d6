"""Rows of a LatentCache that share a prefix: the same as rows that hold a copy of it."""

import pytest
import torch
from buffers import count_buffers
from test_cache_edits import MODEL, assert_holds, go_on, held, poison
from tiny_models import ragged, tiny_model

from latentmas_kernels import LatentCache, generate, latent_generate
from latentmas_kernels.cache.buffer import PREFIX_BLOCK
from latentmas_kernels.models.rope import RopeShift


def forked(model, lengths, times, *, room=30):
    """A cache of the model, forked and poisoned, and the same rows without a shared prefix."""
    ids, mask = ragged(lengths)
    cache = latent_generate(model, ids, mask, latent_steps=2, aligner="ridge", engine="eager").past_key_values
    cache.name_segments("planner")
    wide = cache.fork_rows(times, cache.capacity + room)
    poison([wide])
    plain = cache.select([r for r in range(len(lengths)) for _ in range(times)]).fork(cache.capacity + room)
    return wide, plain


def test_whole_blocks_are_shared_and_counted_once():
    wide, plain = forked(MODEL, [2 * PREFIX_BLOCK + 1, PREFIX_BLOCK - 2, PREFIX_BLOCK - 3, 4], 3)
    shared = [2 * PREFIX_BLOCK, PREFIX_BLOCK, 0, 0]
    assert wide.prefix_len.tolist() == [n for count in shared for n in (0, count, count)]
    assert wide.prefix_row.tolist() == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9]
    assert plain.kv_bytes - wide.kv_bytes == 2 * sum(shared) * wide.slot_bytes
    assert wide.segments == plain.segments
    for other in (wide, wide.fork(), wide.fork(400), LatentCache.from_hf(wide)):
        assert_holds(other, held(plain))
        assert other.kv_bytes == wide.kv_bytes
    again = wide.fork_rows(2, 200)
    assert_holds(again, held(plain.select(torch.arange(12).repeat_interleave(2))))
    assert again.prefix_len.tolist() == [n for count in shared for n in [0, count] * 3]
    chosen = wide.select([2, 1, 11])
    assert not chosen.prefix_len.any()
    assert_holds(chosen, held(plain.select([2, 1, 11])))


def test_a_file_holds_shared_prefixes_in_every_row(tmp_path):
    wide, plain = forked(MODEL, [PREFIX_BLOCK + 1, 4], 2)
    wide.save(tmp_path / "memory.safetensors", MODEL)
    loaded = LatentCache.load(tmp_path / "memory.safetensors", MODEL)
    assert_holds(loaded, held(plain))
    assert loaded.segments == plain.segments
    assert wide.prefix_len.any()


def test_to_hf_of_rows_with_a_shared_prefix():
    wide, plain = forked(MODEL, [PREFIX_BLOCK + 1, 4], 2)
    for ours, theirs in zip(wide.to_hf().layers, plain.to_hf().layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


@torch.no_grad()
def test_rows_with_a_shared_prefix_inside_a_transformers_model():
    wide, plain = forked(MODEL, [PREFIX_BLOCK + 1, PREFIX_BLOCK + 1], 2)
    ids = ragged([3, 3, 3, 3])[0]
    ours, theirs = (MODEL(ids, past_key_values=c, use_cache=True).logits for c in (wide, plain))
    assert torch.equal(ours, theirs)
    assert_holds(wide, held(plain))
    wide, plain = forked(MODEL, [PREFIX_BLOCK + 1, PREFIX_BLOCK + 1], 2)
    wide.reorder_cache(torch.tensor([3, 1, 0, 0]))
    plain.reorder_cache(torch.tensor([3, 1, 0, 0]))
    assert_holds(wide, held(plain))


@pytest.mark.parametrize(
    ("edit", "shares"),
    [
        (lambda c: c.crop(-2), True),
        (lambda c: c.crop(-7), False),
        (lambda c: c.truncate(c.lengths - torch.tensor([6, 0, 0, 0, 0, 0])), False),
        (lambda c: c.drop("planner:latent"), True),
        (lambda c: c.keep("planner:latent"), False),
        (lambda c: c.reset(), False),
    ],
    ids=["behind the prefix", "in the prefix", "first row in its prefix", "end", "beginning", "reset"],
)
def test_cuts_of_rows_with_a_shared_prefix(edit, shares):
    wide, plain = forked(MODEL, [PREFIX_BLOCK + 3, 9], 3)
    edit(wide)
    edit(plain)
    assert bool(wide.prefix_len.any()) == shares
    assert_holds(wide, held(plain))
    assert wide.segments == plain.segments
    assert [torch.equal(a, b) for a, b in zip(go_on(wide), go_on(plain), strict=True)] == [True] * 6


def test_reading_sizes_leaves_prefixes_shared():
    wide, plain = forked(MODEL, [PREFIX_BLOCK + 1, PREFIX_BLOCK + 1], 2)
    layer, shared = wide.layers[0], wide.prefix_len.tolist()
    length = plain.uniform_length()
    assert (layer.batch_size, layer.get_seq_length(), layer.get_max_length()) == (4, length, wide.capacity)
    assert layer.get_mask_sizes(1) == (length + 1, 0)
    assert wide.get_seq_length() == length
    assert wide.prefix_len.tolist() == shared
    assert torch.equal(layer.keys, plain.layers[0].keys)
    assert torch.equal(layer.values, plain.layers[0].values)
    assert not wide.prefix_len.any()


@pytest.mark.usefixtures("keys_are_moved_by_torch")
@pytest.mark.parametrize(
    ("kept", "still"),
    [
        (lambda n: n % 3 > 0, False),
        (lambda n: (n < 2) | (n > PREFIX_BLOCK // 2), False),
        (lambda n: (n < PREFIX_BLOCK) | (n > PREFIX_BLOCK + 1), False),
        (lambda n: n > PREFIX_BLOCK, False),
        (None, True),
        (lambda n: n < PREFIX_BLOCK - 3, False),
    ],
    ids=["all over", "in the prefix", "behind the prefix", "no slot of the prefix", "nothing", "end"],
)
def test_cutting_and_moving_rows_with_a_shared_prefix_takes_no_second_buffer(kept, still, monkeypatch):
    """A shared prefix is read in the row that holds it; the unused slots of the other rows are NaN."""
    wide, plain = forked(MODEL, [PREFIX_BLOCK + 5, 2 * PREFIX_BLOCK + 9, 12], 3)
    RopeShift.probe(MODEL)
    made = count_buffers(monkeypatch)
    home = wide.buffer.data_ptr()
    for cache in (plain, wide):
        if cache is wide:
            made[0] = 0
        if kept is not None:
            width = int(cache.lengths.max())
            mask = kept(torch.arange(width)).expand(9, -1).clone()
            mask[4] = True  # rows of one prefix are cut differently
            mask[6:, :9] = True
            cache.keep(mask)
        else:  # gaps behind the prefix: it stays shared
            far = cache.positions >= 2 * PREFIX_BLOCK + 3
            cache.positions[far] += 7
            cache.next_position += 7
        cache.rebase(MODEL)
    assert made[0] == 0
    assert wide.buffer.data_ptr() == home
    assert bool(wide.prefix_len.any()) == still
    assert wide.segments == plain.segments
    assert torch.equal(wide.lengths, plain.lengths)
    assert_holds(wide, held(plain))
    assert [torch.equal(a, b) for a, b in zip(go_on(wide), go_on(plain), strict=True)] == [True] * 9


@pytest.mark.usefixtures("keys_are_moved_by_torch")
def test_shared_slots_that_move_are_copied_to_each_row_in_place(monkeypatch):
    wide, plain = forked(MODEL, [PREFIX_BLOCK + 5, PREFIX_BLOCK], 3)
    made = count_buffers(monkeypatch)
    for cache in (plain, wide):
        made[0] = 0
        cache.positions[:, 4:] += 3
        cache.next_position += 3
        cache.rebase(MODEL)
    assert made[0] == 0
    assert not wide.prefix_len.any()
    assert_holds(wide, held(plain))


@pytest.mark.usefixtures("keys_are_moved_by_torch")
def test_cuts_and_moves_leave_a_branch_with_a_shared_prefix_alone():
    wide, _ = forked(MODEL, [PREFIX_BLOCK + 5, PREFIX_BLOCK], 3)
    branch = wide.branch()
    before = held(branch)
    wide.keep(torch.arange(int(wide.lengths.max())).expand(6, -1) % 3 > 0)
    wide.rebase(MODEL)
    assert branch.prefix_len.any()
    assert_holds(branch, before)


# ---- calls that continue them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("engine", ["eager", "native"])
@pytest.mark.parametrize("lengths", [[150, 70, 3], [190]], ids=str)
def test_forked_rows_continue_as_copies_do_bit_for_bit(lengths, engine, threads, dtype, monkeypatch):
    """Unused slots under a shared prefix are NaN; the calls extend the cache in place and on a fork alike."""
    monkeypatch.setenv("LATENTMAS_NUM_THREADS", threads)
    model, times = tiny_model("qwen3-mixed").to(dtype), 3
    count = len(lengths) * times
    options = {"aligner": "ridge", "engine": engine}
    ids, mask = ragged(lengths)
    cache = latent_generate(model, ids, mask, latent_steps=2, **options).past_key_values
    wide = cache.fork_rows(times, cache.capacity + 40)
    poison([wide])
    plain = cache.select([r for r in range(len(lengths)) for _ in range(times)]).fork(cache.capacity + 40)
    assert wide.prefix_len.any()
    ids, mask = ragged([1 + 3 * n % 5 for n in range(count)], seed=3)
    steps = [1 + n % 4 for n in range(count)]
    latent_outputs, texts = [], []
    for index, cache in enumerate((wide, plain, wide, plain)):
        if index > 1:
            cache.donate()
        out = latent_generate(
            model, ids, mask, latent_steps=steps, past_key_values=cache, output_states=True, **options
        )
        latent_outputs.append(out)
        past = out.past_key_values
        texts.append(
            generate(model, ids, mask, past_key_values=past, max_new_tokens=5, eos_token_id=[9], engine=engine)
        )
    assert latent_outputs[2].past_key_values is wide
    assert wide.prefix_len.any()
    for out, text in zip(latent_outputs[1:], texts[1:], strict=True):
        assert torch.equal(out.latents, latent_outputs[0].latents)
        assert torch.equal(out.last_hidden, latent_outputs[0].last_hidden)
        assert torch.equal(out.states, latent_outputs[0].states)
        assert torch.equal(text.sequences, texts[0].sequences)
    for ours, theirs in ((latent_outputs[2], latent_outputs[3]), (texts[0], texts[1])):
        assert_holds(ours.past_key_values, held(theirs.past_key_values))
