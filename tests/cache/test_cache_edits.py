"""Cutting, branching, merging and forking the rows of a LatentCache against plain lists of slots; what branches share."""

import copy
import gc
import itertools
import pickle
import sys
import threading
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ragged, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from latentmas_kernels import LatentCache, Segment, generate, latent_generate
from latentmas_kernels.cache.buffer import PREFIX_BLOCK
from latentmas_kernels.cache.free_memory import InsufficientMemoryError

SHAPE = {"layers": 2, "kv_heads": 2, "head_dim": 4, "dtype": torch.float32}
MODEL = tiny_model("llama", num_hidden_layers=2, head_dim=4)
NAN = float("nan")


def rotated(keys, turn):
    """Keys [..., 4], moved on by so many positions, in float64."""
    angle = turn * MODEL.model.rotary_emb.inv_freq.double()
    low, high = keys.double().chunk(2, dim=-1)
    return torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()], dim=-1)


# ---- any sequence of operations ------------------------------------------------------------------------------------


class Slot(NamedTuple):
    """What was written, [2, layers, heads, width]; where it is now; how far it was moved; the segment that it is in."""

    states: torch.Tensor
    position: int
    turn: int
    segment: int


class Plain:
    """What a cache should hold: lists of slots, and the segments there are as (number, agent, kind), rising along a row."""

    def __init__(self, rows, live):
        self.rows, self.live = rows, live

    def copy(self, rows=None):
        return Plain([list(self.rows[r]) for r in (range(len(self.rows)) if rows is None else rows)], list(self.live))

    def next_position(self, row):
        return self.rows[row][-1].position + 1 if self.rows[row] else 0

    def cut(self, kept):
        """Keep slot i of row b where kept(b, i, slot)."""
        left = [[s for i, s in enumerate(row) if kept(b, i, s)] for b, row in enumerate(self.rows)]
        if left != self.rows:
            there = {s.segment for row in left for s in row}
            self.rows, self.live = left, [entry for entry in self.live if entry[0] in there]

    def rebase(self):
        self.rows = [
            [s._replace(position=i, turn=s.turn + i - s.position) for i, s in enumerate(row)] for row in self.rows
        ]

    def segments(self):
        def ends(limit):
            return tuple(sum(s.segment < limit for s in row) for row in self.rows)

        return [Segment(agent, kind, ends(number), ends(number + 1)) for number, agent, kind in self.live]

    def names(self):
        """Those of segments with a slot in some row."""
        there = {s.segment for row in self.rows for s in row}
        return sorted({name for n, agent, kind in self.live if n in there for name in (agent, f"{agent}:{kind}")})

    def numbers(self, names):
        return [n for n, agent, kind in self.live if {agent, f"{agent}:{kind}"} & set(names)]


def place(cache, row, slot):
    """Return the row that holds this slot in the buffer."""
    return int(cache.prefix_row[row]) if slot < int(cache.prefix_len[row]) else row


def check(cache, plain):
    assert cache.lengths.tolist() == [len(row) for row in plain.rows]
    assert cache.next_position.tolist() == [plain.next_position(b) for b in range(len(plain.rows))]
    assert cache.segments == plain.segments()
    for b, row in enumerate(plain.rows):
        assert cache.positions[b, : len(row)].tolist() == [s.position for s in row]
        if row:
            slots = list(range(len(row)))
            keys, values = cache.buffer[:, :, [place(cache, b, i) for i in slots], :, slots].unbind(1)
            want = torch.stack([s.states for s in row])
            turns = torch.tensor([s.turn for s in row])[:, None, None, None]
            assert torch.equal(values, want[:, 1])
            assert torch.allclose(keys.double(), rotated(want[:, 0], turns), atol=2e-5)


def poison(caches):
    """NaN in all slots that no cache uses: behind the rows' ends, and under shared prefixes."""
    for cache in caches:
        used = torch.zeros(cache.batch_size, cache.capacity, dtype=torch.bool)
        for other in caches:
            if other.buffer.data_ptr() == cache.buffer.data_ptr():
                for b, length in enumerate(other.lengths.tolist()):
                    for i in range(length):
                        used[place(other, b, i), i] = True
        cache.buffer.masked_fill_(~used[None, None, :, None, :, None], NAN)


def append(cache, counts, draw):
    """Through the engines' door; returns what each row got, [2, layers, heads, n, width]."""
    counts = torch.tensor(counts)
    columns = max(1, int(counts.max()))
    start, slots = cache.lengths, cache.reserve(counts, columns)
    states = torch.randn(2, 2, len(counts), 2, columns, 4, generator=draw)
    with cache.transaction():
        for layer in range(2):
            cache.write(layer, states[0, layer], states[1, layer], slots)
        cache.advance(counts)
    return start, [states[:, :, b, :, columns - n :] for b, n in enumerate(counts.tolist())]


class World:
    """Caches that live side by side, each with its plain twin."""

    def __init__(self, data, batch):
        self.data, self.draw, self.numbers = data, torch.Generator().manual_seed(0), itertools.count()
        self.pairs = [(LatentCache(batch=batch, capacity=12, **SHAPE), Plain([[] for _ in range(batch)], []))]

    def choose(self, *options):
        return self.data.draw(st.sampled_from(options))

    def append(self, cache, plain):
        size = len(plain.rows)
        counts = self.data.draw(st.lists(st.integers(0, 5), min_size=size, max_size=size))
        need = max(1, *(len(row) + n for row, n in zip(plain.rows, counts, strict=True)))
        if self.choose(True, False) and need <= cache.capacity:
            assert cache.donate().acquire(need) is cache
        else:
            cache, plain = cache.acquire(need), plain.copy()
            self.pairs.append((cache, plain))
            poison([c for c, _ in self.pairs])
        start, written = append(cache, counts, self.draw)
        kind, agent, number = self.choose("prompt", "latent", "text"), self.choose("a", "b", "c"), next(self.numbers)
        cache.add_segment(kind, start)
        cache.name_segments(agent)
        plain.live.append((number, agent, kind))
        for b, states in enumerate(written):
            first = plain.next_position(b)
            plain.rows[b] += [Slot(states[..., i, :], first + i, 0, number) for i in range(states.shape[3])]

    def cut_by_name(self, cache, plain):
        if not plain.names():
            return
        how = self.choose("keep", "drop", "rewind")
        if how == "rewind":
            name = self.choose(*plain.names())
            last = plain.numbers([name])[-1]
            cache.rewind(name)
            plain.cut(lambda b, i, s: s.segment <= last)
            return
        names = self.data.draw(st.lists(st.sampled_from(plain.names()), min_size=1, max_size=3))
        chosen = plain.numbers(names)
        getattr(cache, how)(names[0] if len(names) == 1 else names)
        plain.cut(lambda b, i, s: (s.segment in chosen) == (how == "keep"))

    def cut_by_mask(self, cache, plain):
        width = int(cache.lengths.max())
        mask = torch.rand(len(plain.rows), width, generator=self.draw) < self.choose(0.3, 0.8)
        cache.keep(mask)
        plain.cut(lambda b, i, s: bool(mask[b, i]))

    def crop(self, cache, plain):
        count = self.data.draw(st.integers(0, min(map(len, plain.rows))))
        cache.crop(-count)
        left = [len(row) - count for row in plain.rows]
        plain.cut(lambda b, i, s: i < left[b])

    def rebase(self, cache, plain):
        cache.rebase(MODEL)
        plain.rebase()

    def fork(self, cache, plain):
        longest = max(map(len, plain.rows))
        capacity = self.data.draw(st.integers(max(1, longest), longest + 20))
        self.pairs.append((cache.fork(capacity), plain.copy()))

    def select(self, cache, plain):
        rows = self.data.draw(st.lists(st.integers(0, len(plain.rows) - 1), min_size=1, max_size=4))
        self.pairs.append((cache.select(rows), plain.copy(rows)))

    def fork_rows(self, cache, plain):
        times, used = self.choose(1, 2, 3), max(map(len, plain.rows))
        if len(plain.rows) * times <= 6:
            wide = cache.fork_rows(times, used + 10)
            self.pairs.append((wide, plain.copy([r for r in range(len(plain.rows)) for _ in range(times)])))

    def branch(self, cache, plain):
        twin, name = plain.copy(), self.choose(None, *plain.names())
        if name is not None:
            last = twin.numbers([name])[-1]
            twin.cut(lambda b, i, s: s.segment <= last)
        self.pairs.append((cache.branch(name), twin))

    def concat(self, cache, plain):
        parts, count = [], self.choose(1, 2, 3)
        merged = Plain([[] for _ in range(count)], [])
        for _ in range(self.choose(1, 2, 3)):
            source, twin = self.choose(*self.pairs)
            rows = self.data.draw(st.lists(st.integers(0, len(twin.rows) - 1), min_size=count, max_size=count))
            start = [self.data.draw(st.integers(0, len(twin.rows[r]))) for r in rows]
            parts.append(source.part(rows, torch.tensor(start)))
            taken = [twin.rows[r][first:] for r, first in zip(rows, start, strict=True)]
            there = {s.segment for row in taken for s in row}
            new = {number: next(self.numbers) for number, _, _ in twin.live if number in there}
            merged.live += [(new[n], agent, kind) for n, agent, kind in twin.live if n in there]
            for row, slots in zip(merged.rows, taken, strict=True):
                row += [s._replace(segment=new[s.segment]) for s in slots]
        merged.rebase()
        longest = max(map(len, merged.rows))
        if longest:
            self.pairs.append((LatentCache.concat(parts, MODEL, capacity=longest + 7), merged))

    def forget(self, cache, plain):
        if len(self.pairs) > 1:
            self.pairs = [pair for pair in self.pairs if pair[0] is not cache]


ACTIONS = ["cut_by_name", "cut_by_mask", "crop", "rebase", "fork", "select", "fork_rows", "branch", "concat", "forget"]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_sequence_of_edits_equals_lists_of_slots(data):
    """Whatever is done to one cache, all that live beside it hold what their own lists hold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latentmas_kernels.cache.edits.PREFIX_BLOCK", 4)
        world = World(data, data.draw(st.integers(1, 3)))
        for _ in range(data.draw(st.integers(2, 12))):
            getattr(world, world.choose("append", "append", "append", *ACTIONS))(*world.choose(*world.pairs))
            world.pairs = world.pairs[-4:]
            poison([cache for cache, _ in world.pairs])
            for pair in world.pairs:
                check(*pair)


# ---- names ---------------------------------------------------------------------------------------------------------


def filled(counts, *, capacity=None, agents=("planner", "critic")):
    """Per agent a prompt and latent steps of counts[row] slots each."""
    draw, size = torch.Generator().manual_seed(0), len(counts)
    cache = LatentCache(batch=size, capacity=capacity or 4 * max(counts) + 9, **SHAPE)
    cache.buffer.fill_(NAN)
    for agent in agents:
        for kind in ("prompt", "latent"):
            start, _ = append(cache, counts, draw)
            cache.add_segment(kind, start)
        cache.name_segments(agent)
    return cache


def test_segments_and_positions_after_each_edit():
    cache = filled([2, 1])
    cache.drop("planner:latent")
    assert [s.name for s in cache.segments] == ["planner:prompt", "critic:prompt", "critic:latent"]
    assert cache.segments[1:] == [
        Segment("critic", "prompt", (2, 1), (4, 2)),
        Segment("critic", "latent", (4, 2), (6, 3)),
    ]
    assert cache.positions[0, :6].tolist() == [0, 1, 4, 5, 6, 7]
    assert cache.positions[1, :3].tolist() == [0, 2, 3]
    assert cache.next_position.tolist() == [8, 4]
    cache.rewind("critic:prompt")
    assert cache.lengths.tolist() == [4, 2]
    assert cache.next_position.tolist() == [6, 3]
    cache.keep(["critic", "critic:prompt"])
    assert cache.segments == [Segment("critic", "prompt", (0, 0), (2, 1))]
    assert cache.positions[0, :2].tolist() == [4, 5]
    cache.rebase(MODEL)
    assert cache.positions[0, :2].tolist() == [0, 1]
    assert cache.next_position.tolist() == cache.lengths.tolist() == [2, 1]
    cache.drop("critic")
    assert cache.segments == []
    assert cache.lengths.tolist() == cache.next_position.tolist() == [0, 0]


def test_a_name_that_is_not_there_is_told_what_is():
    cache = filled([2, 1])
    start, _ = append(cache, [1, 1], torch.Generator())
    cache.add_segment("text", start)
    there = "there is no segment {!r}; there are 'planner:prompt', 'planner:latent', 'critic:prompt', 'critic:latent', ':text'"
    for call in (cache.keep, cache.drop, cache.rewind, cache.branch):
        for name in ("judge", "planner:text", "plan", "prompt", ""):
            with pytest.raises(ValueError) as caught:  # noqa: PT011 (compared below)
                call(name)
            assert there.format(name) in str(caught.value)
    with pytest.raises(ValueError, match="no segment 'judge'"):
        cache.keep(["planner", "judge"])
    assert cache.lengths.tolist() == [9, 5]
    cache.rewind("planner")
    cache.drop("planner")
    with pytest.raises(ValueError, match="there is no segment 'planner'; there are none"):
        cache.keep("planner")
    for mask in (torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(1, 0)):
        with pytest.raises(ValueError, match=r"keep takes names of segments, or bool \[2, 0\]"):
            cache.keep(mask)


def test_what_does_not_fit_is_refused():
    cache = filled([2, 1])
    other = LatentCache(batch=2, capacity=4, **{**SHAPE, "layers": 3})
    with pytest.raises(ValueError, match=r"as many rows each, one or more; got rows \[2, 1\]"):
        LatentCache.concat([cache, cache.part([0])], MODEL)
    with pytest.raises(ValueError, match="one or more"):
        LatentCache.concat([], MODEL)
    with pytest.raises(ValueError, match="16 slots in the longest row; a capacity of 15 is too small"):
        LatentCache.concat([cache, cache], MODEL, capacity=15)
    with pytest.raises(ValueError, match="layers 3 instead of 2"):
        LatentCache.concat([cache, other], MODEL)
    for rows in ([2], [-1]):
        with pytest.raises(ValueError, match=r"part: got rows \[-?\d\]; this cache has rows 0 to 1"):
            cache.part(rows)
    for start in ([9, 0], [-1, 0], [0, 5], [1]):
        with pytest.raises(ValueError, match=r"one for each row, from 0 to its length \(\[8, 4\]\)"):
            cache.part([0, 1], torch.tensor(start))
    early = cache.part([0, 1], torch.tensor([7, 0]))
    for call in (cache.keep, cache.drop, cache.rewind):
        with pytest.raises(ValueError, match="no name of a segment"):
            call([])
    for times, capacity in ((0, 20), (2, 7)):
        with pytest.raises(ValueError, match=f"of 8 slots here or more; got times={times}, capacity={capacity}"):
            cache.fork_rows(times, capacity)
    cache.crop(-3)
    with pytest.raises(ValueError, match=r"first slots \[7, 0\] of rows \[0, 1\].*length \(\[5, 1\]\)"):
        LatentCache.concat([early], MODEL)


def test_names_are_looked_up_in_the_order_that_they_are_given_in():
    cache = filled([2, 1])
    names = [s.name for s in cache.find_segments(["critic", "planner:latent"])]
    assert names == ["critic:prompt", "critic:latent", "planner:latent"]


def test_a_cut_to_more_than_there_is_changes_nothing():
    cache = filled([2, 1])
    cache.truncate(torch.tensor([99, 3]))
    assert cache.lengths.tolist() == [8, 3]
    assert cache.next_position.tolist() == [8, 3]
    assert cache.segments[-1] == Segment("critic", "latent", (6, 3), (8, 3))


# ---- branches ------------------------------------------------------------------------------------------------------


def go_on(cache, count=3, *, inside=None):
    """Append to each row, in place where that is right; returns the states of all its slots."""
    if inside is None:
        assert cache.donate().acquire(int(cache.lengths.max()) + count) is cache
        append(cache, [count] * cache.batch_size, torch.Generator().manual_seed(int(cache.lengths[0])))
    else:
        inside(torch.full((cache.batch_size, count), 5), past_key_values=cache, use_cache=True)
    return held(cache)


def held(cache):
    return [copy.deepcopy(cache.select([b]).buffer[..., :n, :]) for b, n in enumerate(cache.lengths.tolist())]


def assert_holds(cache, want):
    assert all(torch.equal(a, b) for a, b in zip(held(cache), want, strict=True))


@pytest.mark.parametrize("inside", [None, MODEL], ids=["engines", "transformers"])
@torch.no_grad()
def test_the_first_to_go_on_writes_in_place_and_the_next_copies(inside):
    for order in ((0, 1, 2), (2, 0, 1)):
        cache = filled([3, 3])
        caches = [cache, cache.branch(), cache.branch()]
        home, before = cache.buffer.data_ptr(), held(cache)
        assert all(c.buffer.data_ptr() == home for c in caches)
        grown = {}
        for turn, index in enumerate(order):
            grown[index] = go_on(caches[index], inside=inside)
            assert (caches[index].buffer.data_ptr() == home) == (turn == 0)
            for other in range(3):
                assert_holds(caches[other], grown.get(other, before))
        assert len({c.buffer.data_ptr() for c in caches}) == 3


def test_a_branch_from_a_name_and_from_a_fork_changes_nothing_else():
    cache = filled([3, 1])
    before, segments = held(cache), list(cache.segments)
    early = cache.branch("planner")
    assert early.buffer.data_ptr() == cache.buffer.data_ptr()
    assert early.lengths.tolist() == [6, 2]
    assert early.segments == segments[:2]
    go_on(early)
    assert early.buffer.data_ptr() != cache.buffer.data_ptr()
    assert cache.segments == segments
    assert_holds(cache, before)
    for way in (lambda c: c.keep("critic"), lambda c: c.rebase(MODEL), lambda c: c.crop(-2), lambda c: c.reset()):
        twin = cache.branch()
        twin.drop("planner:latent")
        kept = held(twin)
        other = twin.branch()
        way(other)
        go_on(other)
        assert_holds(twin, kept)
        assert_holds(cache, before)


@pytest.mark.parametrize("back", [lambda c: c.rewind("planner"), lambda c: c.crop(-1)], ids=["name", "one slot"])
def test_rewinding_and_writing_over_never_changes_the_other(back):
    cache = filled([3, 3])
    branch = cache.branch()
    before = held(branch)
    back(cache)
    assert cache.buffer.data_ptr() == branch.buffer.data_ptr(), "forgetting needs no copy"
    mine = go_on(cache)
    assert_holds(branch, before)
    theirs = go_on(branch)
    assert_holds(cache, mine)
    assert_holds(branch, theirs)


def test_a_branch_that_is_gone_frees_the_memory():
    cache = filled([3, 3])
    home, branch = cache.buffer.data_ptr(), cache.branch()
    cache.rewind("planner")
    gc.disable()
    try:
        del branch
        go_on(cache)
    finally:
        gc.enable()
    assert cache.buffer.data_ptr() == home


@pytest.mark.parametrize("engine", ["eager", "native"])
@pytest.mark.parametrize("inside", [True, False], ids=["made in the middle", "made before"])
def test_a_branch_that_goes_on_out_of_a_callback_leaves_the_one_that_is_thinking_alone(model, engine, inside):
    ids, mask = ragged([6, 4])
    options = {"latent_steps": 4, "engine": engine, "aligner": "ridge"}
    past = latent_generate(model, ids, mask, **{**options, "latent_steps": 0}, max_cache_len=60).past_key_values
    want = latent_generate(model, ids, mask, past_key_values=past, **options).latents
    branch, inner = past.branch(), []

    def call(step):
        if step == 2:
            other = past.branch() if inside else branch
            inner.append(latent_generate(model, ids + 1, mask, past_key_values=other.donate(), **options))

    got = latent_generate(model, ids, mask, past_key_values=past.donate(), on_step=call, **options).latents
    assert torch.equal(got, want)
    assert inner[0].past_key_values.buffer.data_ptr() != past.buffer.data_ptr()


@torch.no_grad()
def test_branches_that_are_read_by_transformers_in_turns():
    """One forward in the middle of the other: neither loses what its first layers have written."""
    cache = filled([3, 3])
    branch, ids = cache.branch(), torch.full((2, 4), 5)
    caches, want = [cache, branch], []
    for tokens, one in ((ids, cache), (ids + 1, branch)):
        alone = one.fork()
        MODEL(tokens, past_key_values=alone, use_cache=True)
        want.append(held(alone))

    def read_the_other(*_):
        hook.remove()
        MODEL(ids + 1, past_key_values=branch, use_cache=True)

    hook = MODEL.model.layers[0].register_forward_hook(read_the_other)
    MODEL(ids, past_key_values=cache, use_cache=True)
    for one, states in zip(caches, want, strict=True):
        assert_holds(one, states)


@torch.no_grad()
def test_a_forward_that_dies_costs_the_others_a_copy_and_nothing_else():
    cache = filled([3, 3])
    branch, before = cache.branch(), held(cache)
    hook = MODEL.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        MODEL(torch.full((2, 4), 5), past_key_values=branch, use_cache=True)
    hook.remove()
    assert_holds(branch, before)
    assert_holds(cache, before)
    grown = go_on(cache, inside=MODEL)
    assert_holds(branch, before)
    go_on(branch, inside=MODEL)
    assert_holds(cache, grown)


@torch.no_grad()
def test_a_streamer_that_fails_costs_the_others_nothing():
    cache = latent_generate(MODEL, *ragged([6]), latent_steps=0, max_cache_len=40, engine="eager").past_key_values
    branch, home = cache.branch(), cache.buffer.data_ptr()

    class Closed:
        def put(self, value):
            raise BrokenPipeError

    ids = torch.tensor([[5, 6]])
    with pytest.raises(BrokenPipeError):
        generate(MODEL, ids, past_key_values=branch.donate(), max_new_tokens=2, streamer=Closed(), engine="eager")
    generate(MODEL, ids, past_key_values=cache.donate(), max_new_tokens=2, engine="eager")
    assert cache.buffer.data_ptr() == home


def test_a_donation_without_room_for_a_copy_is_not_used_up(monkeypatch):
    cache = filled([3, 3])
    branch = cache.branch().donate()
    go_on(cache)
    home = cache.buffer.data_ptr()
    with monkeypatch.context() as patch:
        patch.setattr(
            "latentmas_kernels.cache.buffer.check_free_memory",
            lambda *_: (_ for _ in ()).throw(InsufficientMemoryError("none")),
        )
        with pytest.raises(InsufficientMemoryError):
            branch.acquire(14)
    assert cache.rewind("critic") is None
    go_on(cache)
    assert cache.buffer.data_ptr() == home, "the branch is not writing"
    assert branch.acquire(14) is branch


def test_branches_are_made_while_others_look_at_each_other():
    cache, errors, done = filled([3, 3]), [], threading.Event()

    def make():
        while not done.is_set():
            errors.extend(_raised(lambda: [cache.branch() for _ in range(20)]))

    interval, workers = sys.getswitchinterval(), [threading.Thread(target=make) for _ in range(2)]
    sys.setswitchinterval(1e-5)
    try:
        for worker in workers:
            worker.start()
        for _ in range(3000):
            errors.extend(_raised(lambda: cache.make_private(since=cache.lengths)))
    finally:
        done.set()
        for worker in workers:
            worker.join()
        sys.setswitchinterval(interval)
    assert not errors


def _raised(call):
    try:
        call()
    except RuntimeError as error:
        return [error]
    return []


@torch.no_grad()
def test_branches_that_two_threads_go_on_with():
    for _ in range(10):
        cache = latent_generate(MODEL, *ragged([9]), latent_steps=0, max_cache_len=60, engine="eager").past_key_values
        branches, start = [cache.branch(), cache.branch()], threading.Barrier(2)
        prompts = [torch.full((1, 20), 5 + n) for n in range(2)]
        want = []
        for ids in prompts:
            alone = cache.fork()
            MODEL(ids, past_key_values=alone, use_cache=True)
            want.append(held(alone))

        def go(n, branches=branches, prompts=prompts, start=start):
            start.wait()
            with torch.no_grad():
                MODEL(prompts[n], past_key_values=branches[n], use_cache=True)

        workers = [threading.Thread(target=go, args=(n,)) for n in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for branch, states in zip(branches, want, strict=True):
            assert_holds(branch, states)


def test_a_transaction_looks_at_the_branches_once_more():
    """One that began to write behind `take`, as in another thread."""
    cache = filled([3, 3], capacity=30)
    branch, before = cache.branch(), held(cache)
    assert branch.donate().acquire(20) is branch
    grown = go_on(cache)
    append(branch, [0, 0], torch.Generator())  # a transaction of its own
    with branch.transaction():
        assert branch.buffer.data_ptr() != cache.buffer.data_ptr()
    assert_holds(cache, grown)
    assert_holds(branch, before)


def forked_cache():
    wide = filled([PREFIX_BLOCK // 4 + 1, 2]).fork_rows(3, 120)
    poison([wide])
    return wide


def test_a_shallow_copy_is_a_fork():
    cache = filled([3, 3])
    before, twin = held(cache), copy.copy(cache)
    assert twin.capacity == cache.capacity
    mine = go_on(cache)
    assert_holds(twin, before)
    go_on(twin, 2)
    assert_holds(cache, mine)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("make", [lambda: filled([3, 3]), forked_cache], ids=["plain", "fork_rows"])
def test_copies_and_pickles_of_branches_are_independent(make, way):
    """Also those of two branches in one object, whose buffer the copy takes for one and the same."""
    cache = make()
    branch = cache.branch("planner")
    before, early = held(cache), held(branch)
    alone = way(branch)
    one, two = way((cache, branch))
    for copied, want in ((alone, early), (one, before), (two, early)):
        assert copied.lengths.tolist() == [w.shape[4] for w in want]
        assert_holds(copied, want)
    for copied in (alone, one, two):
        go_on(copied)
    assert_holds(cache, before)
    assert_holds(branch, early)
    one, two = way((cache, branch))
    go_on(two)
    assert_holds(one, before)


# ---- memory --------------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Bytes of the largest tensor that an operator makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.usefixtures("keys_are_moved_by_torch")
def test_cutting_takes_no_more_memory_than_the_keys_of_one_layer():
    cache = LatentCache(layers=4, batch=2, kv_heads=8, capacity=300, head_dim=32, dtype=torch.float32)
    cache.buffer.zero_()
    cache.advance(torch.tensor([300, 280]))
    cache.positions.copy_(torch.arange(300))
    kept = torch.ones(2, 300, dtype=torch.bool)
    kept[:, 5:9] = False
    one = cache.keys[0].nbytes
    with Allocations() as made:
        cache.keep(kept)
    assert 0.9 * one < made.largest <= one
    model = tiny_model("llama", num_hidden_layers=4, num_key_value_heads=8, num_attention_heads=8, head_dim=32)
    cache.rebase(model.bfloat16().float())  # proves it once, and moves everything
    for first in (150, 5):
        cache.positions[:, first:] += 9
        with Allocations() as made:
            cache.rebase(model)
        assert made.largest <= one * (296 - first) / 300
    with Allocations() as made:
        cache.truncate(torch.tensor([100, 100]))
    assert made.largest < one / 10


class NamedCache(LatentCache):
    """A subclass of a user, with an __init__ of its own."""

    def __init__(self, name, model):
        super().__init__(layers=3, batch=2, kv_heads=2, capacity=20, head_dim=16, dtype=torch.float32)
        self.name, self.model = name, model


def test_copies_are_made_without_the_init_of_a_subclass(tmp_path):
    model = tiny_model("llama")
    cache = NamedCache("mine", model)
    past = latent_generate(model, *ragged([5, 3]), latent_steps=2, past_key_values=cache.donate()).past_key_values
    assert past is cache
    cache.save(tmp_path / "saved", model)
    copies = [
        cache.fork(), cache.fork(30), cache.select([0, 1]), cache.branch(), cache.fork_rows(1, 30), copy.copy(cache),
        copy.deepcopy(cache), NamedCache.concat([cache], model), NamedCache.load(tmp_path / "saved", model),
        NamedCache.from_hf(cache.to_hf(), cache.attention_mask()), cache.new_empty(2, 20),
    ]  # fmt: skip
    assert {type(one) for one in copies} == {NamedCache}
    for one in copies[:-1]:
        assert one.lengths.tolist() == [7, 5]
        assert torch.equal(one.keys[:, 1, :, :5], cache.keys[:, 1, :, :5])
        assert len(one.layers) == 3
