"""Pending loads of the connector, under a scheduler like vLLM's: prefix cache, preemption, several requests in a step."""

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from latentmas.backends.kv_file import FILE, ROW, SLOTS, SUFFIX, KVFileRow
from latentmas.backends.vllm.pending_loads import PendingLoad, PendingLoads

BLOCKS = 300


@dataclass
class Request:
    """As the scheduler knows it; `tokens` are those of the prompt, which begins with a placeholder for every slot."""

    name: str
    source: KVFileRow | None
    tokens: int
    written: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def asked(self) -> tuple[dict[str, Any] | None, str | None, int]:
        return (None, None, self.tokens) if self.source is None else (self.source.params, self.source.salt, self.tokens)


def content(source, start=0, stop=None):
    """What a memory has in its slots: numbers that no other row has."""
    stop = source.slots if stop is None else stop
    return int(source.file.removesuffix(SUFFIX)) * 10**6 + source.row * 10**4 + torch.arange(start, stop)


class Scheduler(RuleBasedStateMachine):
    """Gives requests blocks, takes them away again, and runs steps; what is loaded goes to a paged memory of numbers."""

    @initialize(size=st.sampled_from([4, 16, 128]))
    def begin(self, size):
        self.size, self.pending = size, PendingLoads()
        self.paged = torch.full((BLOCKS * size,), -1)
        self.free = list(range(BLOCKS))
        self.used = [0] * BLOCKS  # by how many requests
        self.cached = {}  # (salt, number of the block) -> block
        self.waiting, self.running, self.count = [], [], 0
        self.fresh = {}  # of each request that was given room in this step, its new blocks

    # ---- requests ----

    @rule(file=st.integers(0, 2), row=st.integers(0, 1), prompt=st.integers(1, 9))
    @precondition(lambda self: len(self.waiting) + len(self.running) < 6)
    def arrives(self, file, row, prompt):
        """Several may go on from the same row; a row always has the same number of slots."""
        source = KVFileRow(f"{file}{SUFFIX}", row, 1 + (file * 97 + row * 61) % 170)
        self._arrive(source, source.slots + prompt)

    @rule(prompt=st.integers(1, 60))
    @precondition(lambda self: len(self.waiting) + len(self.running) < 6)
    def arrives_without_a_memory(self, prompt):
        self._arrive(None, prompt)

    def _arrive(self, source, tokens):
        self.count += 1
        self.waiting.append(Request(f"r{self.count}", source, tokens))

    @rule(data=st.data())
    @precondition(lambda self: self.waiting)
    def is_given_room(self, data):
        """The beginning of its prompt that is in the prefix cache, as far as vLLM still finds it, and new blocks."""
        request = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        whole = request.tokens + request.written
        found = []
        while request.source is not None and len(found) < (whole - 1) // self.size:
            block = self.cached.get((request.source.salt, len(found)))
            if block is None:
                break
            found.append(block)
        found = found[: data.draw(st.integers(0, len(found)), label="blocks found")]
        computed = len(found) * self.size
        external = self.pending.num_new_matched_tokens(request.name, *request.asked, computed)
        slots = 0 if request.source is None else request.source.slots
        assert external == max(0, slots - computed)
        assert computed + external < whole, "nothing is left to be read"
        new = [self._new_block() for _ in range(-(-whole // self.size) - len(found))]
        request.blocks = found + new
        for block in request.blocks:
            self.used[block] += 1
        self.pending.add(request.name, request.asked[0], request.blocks, external)
        self.fresh[request.name] = set(new)
        for number in range(len(found), slots // self.size):
            self.cached[request.source.salt, number] = request.blocks[number]
        self.running.append(request)

    def _new_block(self):
        block = self.free.pop()
        self.paged[block * self.size : (block + 1) * self.size] = -2  # of whoever had it before
        return block

    @rule(data=st.data())
    @precondition(lambda self: self.running and not self.fresh)
    def is_preempted(self, data):
        """After it has written some tokens; then the same request comes again, and the scheduler has its text to read, too."""
        request = self._take_away(data)
        request.written += data.draw(st.integers(0, 9), label="tokens written")
        self.waiting.insert(0, request)

    @rule(data=st.data())
    @precondition(lambda self: self.running and not self.fresh)
    def ends(self, data):
        self._take_away(data)

    def _take_away(self, data):
        request = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        for block in request.blocks:
            self.used[block] -= 1
        self._free()
        return request

    @rule(data=st.data())
    @precondition(lambda self: self.cached)
    def forgets_a_block(self, data):
        """That nobody uses now: something else is written there."""
        key = data.draw(st.sampled_from(sorted(self.cached)))
        if not self.used[self.cached[key]]:
            del self.cached[key]
            self._free()

    def _free(self):
        kept = set(self.cached.values()) | set(self.free)
        self.free += [block for block in range(BLOCKS) if not self.used[block] and block not in kept]

    # ---- steps ----

    @rule()
    def step(self):
        before, written = self.paged.clone(), set()
        for load in self.pending.pop_all():
            places = load.slot_mapping(self.size)
            assert places.dtype == torch.int64
            assert len(set(places.tolist())) == len(places) == load.stop - load.start > 0
            assert load.block_ids(self.size) == set((places // self.size).tolist())
            assert load.block_ids(self.size) <= self.fresh[load.request], "a block of others is written to"
            assert not load.fault
            self.paged[places] = content(load.source, load.start, load.stop)
            written |= set(places.tolist())
        others = torch.tensor([at not in written for at in range(len(before))])
        assert torch.equal(self.paged[others], before[others])
        assert self.pending.pop_all() == []
        self.fresh = {}

    @invariant()
    def every_memory_is_where_its_request_reads_it(self):
        if getattr(self, "fresh", True):
            return
        for request in self.running:
            if request.source is not None:
                slots = torch.arange(request.source.slots)
                places = torch.tensor(request.blocks)[slots // self.size] * self.size + slots % self.size
                assert torch.equal(self.paged[places], content(request.source))


TestScheduler = Scheduler.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

# ---- requests with a fault -----------------------------------------------------------------------------------------

SOURCE = KVFileRow(f"a{SUFFIX}", 0, 20)
FAULTS = {
    "salt of another row": (SOURCE.params, "b:0", 30, r"got cache_salt 'b:0'; it must be 'a\.latentmas-kv:0'"),
    "no salt": (SOURCE.params, None, 30, "got cache_salt None; it must be"),
    "a slot for each token": (SOURCE.params, SOURCE.salt, 20, "got a prompt of 20 tokens for 20 slots"),
    "more slots than tokens": (SOURCE.params, SOURCE.salt, 7, "got a prompt of 7 tokens for 20 slots"),
    "one token": (SOURCE.params, SOURCE.salt, 1, "got a prompt of 1 tokens for 20 slots"),
    "another folder": ({**SOURCE.params, FILE: f"../a{SUFFIX}"}, SOURCE.salt, 30, "supported are the name of a file"),
    "no row": ({FILE: SOURCE.file, SLOTS: 20}, SOURCE.salt, 30, f"{ROW}=None"),
    "slots in words": ({**SOURCE.params, SLOTS: "20"}, SOURCE.salt, 30, f"{SLOTS}='20'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_request_with_a_fault_has_one_token_that_cannot_be_loaded(fault, caplog):
    """So that vLLM ends it with an error; where its prompt is one token, vLLM has nothing but that to read."""
    params, salt, tokens, why = FAULTS[fault]
    pending = PendingLoads()
    for computed, block in ((0, 7), (4, 3)):  # what comes before is another's, too
        external = pending.num_new_matched_tokens("r", params, salt, tokens, computed)
        assert external == min(1, max(0, tokens - 1 - computed))
        pending.add("r", params, [7, 3], external)
        loads = pending.pop_all()
        assert len(loads) == external
        for load in loads:
            assert (load.request, load.source, load.blocks) == ("r", None, (7, 3))
            assert (load.start, load.stop) == (computed, computed + 1)
            assert load.block_ids(4) == {block}
            assert re.search(why, load.fault)
        if not external:
            assert re.search(why, caplog.text), "it is answered without its memory"


@given(
    params=st.sampled_from(
        [SOURCE.params, {**SOURCE.params, ROW: True}, {FILE: 1}, {SLOTS: 5}, {"other": 1}, {}, None]
    ),
    salt=st.sampled_from([SOURCE.salt, "other", "", None]),
    tokens=st.integers(1, 40),
    computed=st.integers(0, 39),
)
def test_no_request_is_promised_more_than_it_has(params, salt, tokens, computed):
    """vLLM must be left at least one token to read."""
    computed = min(computed, tokens - 1)
    external = PendingLoads().num_new_matched_tokens("r", params, salt, tokens, computed)
    assert 0 <= external <= tokens - 1 - computed


@pytest.mark.parametrize("params", [None, {}, {"do_remote_prefill": True, "remote_block_ids": [1]}])
@pytest.mark.parametrize("salt", [None, SOURCE.salt])
def test_requests_without_a_memory_are_left_alone(params, salt):
    pending = PendingLoads()
    assert pending.num_new_matched_tokens("r", params, salt, 30, 0) == 0
    pending.add("r", params, [1, 2], 0)
    assert pending.pop_all() == []


def test_taken_is_forgotten():
    pending = PendingLoads()
    for name in ("one", "two"):
        pending.add(name, SOURCE.params, [4, 5], 20)
    assert [load.request for load in pending.pop_all()] == ["one", "two"]
    assert pending.pop_all() == []
    pending.add("three", SOURCE.params, [4, 5], 4)
    assert pending.pop_all() == [PendingLoad("three", SOURCE, 16, 20, (4, 5))]


def test_places_and_blocks_of_a_load_written_out():
    load = PendingLoad("r", SOURCE, 4, 11, (9, 2, 5, 7))
    assert load.slot_mapping(4).tolist() == [8, 9, 10, 11, 20, 21, 22]
    assert load.block_ids(4) == {2, 5}
    assert PendingLoad("r", SOURCE, 4, 8, (9, 2, 5, 7)).block_ids(4) == {2}
    assert PendingLoad("r", SOURCE, 5, 9, (9, 2, 5, 7)).slot_mapping(4).tolist() == [9, 10, 11, 20]


def test_a_request_that_was_aborted_is_forgotten():
    pending = PendingLoads()
    assert pending.num_new_matched_tokens("r", SOURCE.params, "other", 30, 0) == 1
    pending.discard("r")
    pending.discard("unknown")
    assert pending.num_new_matched_tokens("r", {}, None, 30, 0) == 0
    pending.add("r", {}, [1, 2], 0)
    assert pending.pop_all() == []
