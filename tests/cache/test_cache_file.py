"""LatentCache.save and load: what comes back, which model it is for, and files that are not what they should be."""

import copy
import gc
import itertools
import json
import os
import pickle
import random
import stat
import tempfile
from pathlib import Path

import psutil
import pytest
import torch
from cache_examples import MODELS, append, example, poisoned
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import ragged, tiny_model
from transformers import AutoModelForCausalLM

from latentmas_kernels import LatentCache, Segment, generate, latent_generate
from latentmas_kernels.cache import file as cache_file
from latentmas_kernels.cache.file import HEADER_LIMIT, read_file
from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.models.fingerprint import ModelFingerprint, model_fingerprint

MODEL = MODELS[torch.float32]


def assert_same(ours, theirs):
    assert torch.equal(ours.lengths, theirs.lengths)
    assert torch.equal(ours.next_position, theirs.next_position)
    assert ours.segments == theirs.segments
    assert (ours.buffer.dtype, ours.batch_size) == (theirs.buffer.dtype, theirs.batch_size)
    for row, length in enumerate(theirs.lengths.tolist()):
        assert torch.equal(ours.positions[row, :length], theirs.positions[row, :length])
        assert torch.equal(ours.keys[:, row, :, :length], theirs.keys[:, row, :, :length])
        assert torch.equal(ours.values[:, row, :, :length], theirs.values[:, row, :, :length])


# ---- what comes back -----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_cache_comes_back_as_it_was(data):
    dtype = data.draw(st.sampled_from(list(MODELS)))
    batch = data.draw(st.integers(1, 4))
    cache, draw = poisoned(batch, 40, dtype), torch.Generator().manual_seed(0)
    rows = st.lists(st.integers(0, 6), min_size=batch, max_size=batch)
    for _ in range(data.draw(st.integers(0, 4))):
        append(cache, data.draw(rows), data.draw(st.sampled_from(["prompt", "latent", "text"])), draw)
        cache.next_position = cache.next_position + torch.tensor(data.draw(rows))
        if data.draw(st.booleans()):
            cache.name_segments(data.draw(st.text(max_size=5)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory"
        cache.save(path, MODELS[dtype])
        loaded = LatentCache.load(path, MODELS[dtype])
        assert_same(loaded, cache)
        assert loaded.capacity == max(1, int(cache.lengths.max()))
        assert loaded.lengths.dtype == loaded.positions.dtype == torch.int64
        loaded.save(path, MODELS[dtype])  # over the file that it is mapped from
        assert_same(loaded, cache)
        assert_same(LatentCache.load(path, MODELS[dtype]), cache)


def test_a_file_written_by_hand_has_the_names_of_the_format(tmp_path):
    """All names in a file are part of the format: files that were saved by earlier versions stay readable."""
    shape = Architecture.of(MODEL).kv_shape
    kv = torch.randn(2, shape.layers, 2, shape.kv_heads, 3, shape.head_dim)
    metadata = {
        "format": "latentmas-cache-1", "fingerprint": model_fingerprint(MODEL), "model": "a model",
        "segments": [{"agent": "planner", "kind": "prompt", "start": [0, 0], "stop": [3, 2]}], "whole_from": [3, 0],
    }  # fmt: skip
    kv[:, :, 1, :, 2] = 0
    tensors = {
        "kv": kv, "lengths": torch.tensor([3, 2]), "next_position": torch.tensor([3, 2]),
        "positions": torch.tensor([[0, 1, 2], [0, 1, 0]]),
    }  # fmt: skip
    path, again = tmp_path / "by_hand", tmp_path / "again"
    save_file(tensors, path, metadata={"latentmas": json.dumps(metadata)})
    loaded = LatentCache.load(path, MODEL)
    assert torch.equal(loaded.buffer, kv)
    assert loaded.segments == [Segment("planner", "prompt", (0, 0), (3, 2))]
    assert loaded.complete_from.tolist() == [3, 0]
    loaded.save(again, MODEL)
    with safe_open(again, framework="pt") as file:
        written = json.loads(file.metadata()["latentmas"])
    assert {**written, "model": "a model"} == metadata
    assert {name: tensor.tolist() for name, tensor in load_file(again).items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("engine", ["auto", "eager"])
@pytest.mark.parametrize("dtype", list(MODELS))
def test_calls_go_on_from_a_loaded_cache_as_from_the_one_that_was_saved(tmp_path, dtype, engine):
    """Bit for bit: the same numbers lead to the same numbers. It is not changed itself."""
    model = MODELS[dtype]
    ids, mask = ragged([9, 4, 6])
    kept = latent_generate(model, ids, mask, latent_steps=3, aligner="ridge", engine=engine).past_key_values
    kept.save(tmp_path / "memory", model)
    loaded = LatentCache.load(str(tmp_path / "memory"), model)
    more, more_mask = ragged([3, 5, 2], seed=2)
    options = {"max_new_tokens": 8, "eos_token_id": None, "engine": engine}
    decoded = [generate(model, more, more_mask, past_key_values=past, **options) for past in (kept, loaded)]
    assert torch.equal(decoded[0].sequences, decoded[1].sequences)
    options = {"latent_steps": 4, "aligner": "ridge", "engine": engine}
    latent = [latent_generate(model, more, more_mask, past_key_values=past, **options) for past in (kept, loaded)]
    assert torch.equal(latent[0].latents, latent[1].latents)
    assert_same(latent[0].past_key_values, latent[1].past_key_values)
    assert_same(loaded, kept)


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_a_donated_one_is_extended_in_its_mapping(tmp_path, engine):
    """Engines write to the mapped memory itself, at whatever address the header left it."""
    ids, _ = ragged([30, 30])
    kept = latent_generate(MODEL, ids, latent_steps=0, aligner="ridge", engine=engine).past_key_values
    kept.save(tmp_path / "memory", MODEL)
    content = (tmp_path / "memory").read_bytes()
    loaded = LatentCache.load(tmp_path / "memory", MODEL)
    for cache in (kept, loaded):
        cache.crop(-12)
    before = loaded.buffer.data_ptr()
    options = {"max_new_tokens": 6, "eos_token_id": None, "engine": engine}
    want = generate(MODEL, ids[:, :4], past_key_values=kept, **options)
    got = generate(MODEL, ids[:, :4], past_key_values=loaded.donate(), **options)
    assert got.past_key_values is loaded
    assert loaded.buffer.data_ptr() == before
    assert torch.equal(got.sequences, want.sequences)
    assert_same(loaded, want.past_key_values)
    assert (tmp_path / "memory").read_bytes() == content


def test_copies_and_transformers_take_a_loaded_cache(tmp_path):
    cache = poisoned(2, 9)
    append(cache, [5, 3], "prompt", torch.Generator().manual_seed(0))
    cache.save(tmp_path / "memory", MODEL)
    loaded = LatentCache.load(tmp_path / "memory", MODEL)
    assert_same(loaded.fork(20), cache)
    assert_same(copy.deepcopy(loaded), cache)
    assert_same(loaded.select([1, 0, 1]), cache.select([1, 0, 1]))
    for ours, theirs in zip(loaded.to_hf().layers, cache.to_hf().layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


def test_lengths_and_next_positions_may_be_one_tensor(tmp_path):
    cache = example()
    cache.segments, cache.lengths = [], cache.lengths.clamp(max=3)
    cache.next_position, cache.positions[:] = cache.lengths, torch.arange(16)
    cache.save(tmp_path / "memory", MODEL)
    assert_same(LatentCache.load(tmp_path / "memory", MODEL), cache)


def test_nothing_but_the_slots_in_use_gets_into_the_file(tmp_path):
    example().save(tmp_path / "memory", MODEL)
    stored = load_file(tmp_path / "memory")
    assert stored["kv"].shape == (2, 3, 3, 2, 9, 16)
    assert stored["kv"].isfinite().all()
    for row, length in enumerate([9, 5, 5]):
        assert stored["kv"][:, :, row, :, length:].count_nonzero() == 0
        assert stored["positions"][row, length:].count_nonzero() == 0


# ---- mapped --------------------------------------------------------------------------------------------------------


def test_writing_into_a_loaded_cache_does_not_change_the_file(tmp_path):
    example().save(tmp_path / "memory", MODEL)
    content = (tmp_path / "memory").read_bytes()
    loaded = LatentCache.load(tmp_path / "memory", MODEL)
    loaded.buffer.fill_(7)
    loaded.positions.fill_(7)
    loaded.lengths.fill_(1)
    assert (tmp_path / "memory").read_bytes() == content
    assert_same(LatentCache.load(tmp_path / "memory", MODEL), example())


def test_a_new_file_in_its_place_leaves_a_loaded_cache_alone(tmp_path):
    cache = example()
    cache.save(tmp_path / "memory", MODEL)
    loaded = LatentCache.load(tmp_path / "memory", MODEL)
    cache.select([2]).save(tmp_path / "memory", MODEL)
    assert_same(loaded, cache)
    (tmp_path / "memory").unlink()
    assert_same(loaded, cache)


def test_what_was_checked_stays_checked_while_the_file_is_written_to(tmp_path):
    """Another program writes over it in place; keys and values are numbers of any kind before and after."""
    example().save(tmp_path / "memory", MODEL)
    loaded = LatentCache.load(tmp_path / "memory", MODEL)
    with (tmp_path / "memory").open("r+b") as file:
        file.write(b"\xff" * (tmp_path / "memory").stat().st_size)
    assert loaded.lengths.tolist() == [9, 5, 5]
    assert loaded.next_position.tolist() == example().next_position.tolist()
    assert loaded.positions[0].tolist() == list(range(9))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_loading_reads_nothing_of_the_keys_and_values(tmp_path):
    """150 MB of them stay in the file until they are looked at."""
    cache = LatentCache.for_model(Architecture.of(MODEL), batch=1, capacity=200_000)
    cache.buffer.fill_(1)
    cache.lengths, cache.next_position = torch.tensor([200_000]), torch.tensor([200_000])
    cache.positions = torch.arange(200_000)[None]
    path = tmp_path / "large-memory"
    cache.save(path, MODEL)
    size = cache.kv_bytes
    del cache
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    loaded = LatentCache.load(path, MODEL)
    assert process.memory_info().rss - before < size / 10
    assert str(path) in Path("/proc/self/maps").read_text()
    assert loaded.buffer.sum() == loaded.buffer.numel()
    assert process.memory_info().rss - before > size / 2, "and then they are read"


# ---- which model it is for -----------------------------------------------------------------------------------------


def test_a_checkpoint_that_was_loaded_again_takes_the_cache(tmp_path):
    MODEL.save_pretrained(tmp_path / "model")
    example().save(tmp_path / "memory", MODEL)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert_same(LatentCache.load(tmp_path / "memory", again), example())


def test_another_model_of_the_same_shape_is_refused(tmp_path):
    example().save(tmp_path / "memory", MODEL)
    other = tiny_model("mistral-window")
    with pytest.raises(ValueError, match="is the cache of another model") as caught:
        LatentCache.load(tmp_path / "memory", other)
    for words in (
        str(tmp_path / "memory"),
        "LlamaForCausalLM of 3 layers, 2 KV heads of 16, torch.float32 wrote it",
        model_fingerprint(MODEL)[:12],
        "got MistralForCausalLM of 3 layers, 2 KV heads of 16, torch.float32",
        model_fingerprint(other)[:12],
        "Load it with the model that wrote it",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize("sizes", [{"num_hidden_layers": 2}, {"num_key_value_heads": 4}, {"head_dim": 8}])
def test_another_shape_is_refused_on_both_ways(tmp_path, sizes):
    other = tiny_model("llama", **sizes)
    with pytest.raises(
        ValueError, match=r"got a cache of 3 layers, 2 KV heads of 16, torch.float32, .* writes a cache of"
    ):
        example().save(tmp_path / "memory", other)
    assert not (tmp_path / "memory").exists()
    example().save(tmp_path / "memory", MODEL)
    with pytest.raises(ValueError, match="another model: LlamaForCausalLM of 3 layers, .*the shapes differ"):
        LatentCache.load(tmp_path / "memory", other)


def test_the_same_model_in_another_dtype_is_told_apart_from_another_model(tmp_path):
    example().save(tmp_path / "memory", MODEL)
    message = "keys and values in torch.float32, LlamaForCausalLM computes in torch.bfloat16.*dtype=torch.float32"
    with pytest.raises(ValueError, match=message):
        LatentCache.load(tmp_path / "memory", MODELS[torch.bfloat16])


def test_a_model_in_training_mode_is_refused(tmp_path):
    example().save(tmp_path / "memory", MODEL)
    model = tiny_model("llama").train()
    with pytest.raises(ValueError, match="training mode"):
        LatentCache.load(tmp_path / "memory", model)
    with pytest.raises(ValueError, match="training mode"):
        example().save(tmp_path / "memory", model)


# ---- writing -------------------------------------------------------------------------------------------------------


def test_a_save_that_fails_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    cache = example()
    cache.save(tmp_path / "memory", MODEL)

    def fails(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(cache_file, "save_file", fails)
    with pytest.raises(OSError, match="no space left"):
        cache.select([0]).save(tmp_path / "memory", MODEL)
    assert [p.name for p in tmp_path.iterdir()] == ["memory"]
    assert_same(LatentCache.load(tmp_path / "memory", MODEL), cache)


def test_folders_are_made_and_strangers_do_not_read_the_file(tmp_path):
    path = tmp_path / "new" / "folder" / "memory"
    example().save(path, MODEL)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert_same(LatentCache.load(path, MODEL), example())


def test_more_segments_than_a_header_holds_are_refused_before_anything_is_written(tmp_path):
    cache = example()
    cache.segments = [Segment("x" * 2**20, "text", (0, 0, 0), (1, 1, 1))] * 9
    with pytest.raises(
        ValueError, match=r"9 segments of 3 rows; their list may take up to 8 MB .* takes 9: save fewer"
    ):
        cache.save(tmp_path / "memory", MODEL)
    assert not (tmp_path / "memory").exists()
    cache.segments = cache.segments[:7]
    cache.save(tmp_path / "memory", MODEL)
    assert LatentCache.load(tmp_path / "memory", MODEL).segments == cache.segments


def test_a_cache_that_cannot_be_copied_is_not_saved(tmp_path, monkeypatch):
    cache = example()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    with pytest.raises(ValueError, match="3 rows of 9 slots needs"):
        cache.save(tmp_path / "memory", MODEL)
    assert not (tmp_path / "memory").exists()


# ---- files that are not what they should be ------------------------------------------------------------------------


def rewritten(path, edit):
    """The file with `edit(tensors, facts)` applied to its tensors and to the JSON of its metadata."""
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["latentmas"])
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors, facts)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata={"latentmas": json.dumps(facts)})


def fact(name, value):
    return lambda tensors, facts: facts.update({name: value})


def tensor(name, change):
    return lambda tensors, facts: tensors.update({name: change(tensors[name])})


def item(name, place, value):
    return lambda tensors, facts: tensors[name].__setitem__(place, value)


def segment(**changes):
    return lambda tensors, facts: facts["segments"][1].update(changes)


# What is done to the file of `example()`, whose lengths are 9, 5, 5, and what the refusal says.
DAMAGES = {
    "no format": (lambda t, f: f.pop("format"), "without the metadata of a LatentCache"),
    "another format": (
        fact("format", "latentmas-cache-2"),
        "found the format 'latentmas-cache-2'; supported is latentmas",
    ),
    "format of a strange type": (fact("format", ["x"]), r"the format \['x'\]"),
    "a field too few": (
        lambda t, f: f.pop("segments"),
        "the fields .*supported is fingerprint, format, model, segments",
    ),
    "a field too many": (fact("code", "print()"), "the fields"),
    "fingerprint of a strange type": (fact("fingerprint", 5), "the fingerprint 5; supported is a sha256"),
    "fingerprint cut short": (fact("fingerprint", "ab12"), "the fingerprint 'ab12'"),
    "fingerprint not in hexadecimal": (fact("fingerprint", "z" * 64), "the fingerprint 'zzz"),
    "fingerprint of another model": (fact("fingerprint", "0" * 64), "another model: Llama.*000000000000"),
    "model of a strange type": (fact("model", {"class": "x"}), "the model {'class': 'x'}"),
    "model with terminal codes": (fact("model", "\x1b[2J"), r"the model '\\x1b\[2J'"),
    "model without end": (fact("model", "x" * 201), "a description of up to 200"),
    "a tensor too few": (lambda t, f: t.pop("lengths"), r"tensors named \['kv', 'next_position', 'positions'\]"),
    "a tensor too many": (lambda t, f: t.update(more=torch.zeros(1)), "supported is just kv, lengths"),
    "kv of other axes": (tensor("kv", lambda x: x[0]), r"keys and values \[3, 3, 2, 9, 16\]"),
    "kv of three": (tensor("kv", lambda x: x[[0, 1, 1]]), r"keys and values \[3, 3, 3, 2, 9, 16\]"),
    "kv without rows": (tensor("kv", lambda x: x[:, :, :0]), r"keys and values \[2, 3, 0, 2, 9, 16\]"),
    "kv without slots": (tensor("kv", lambda x: x[..., :0, :]), "none of them 0"),
    "kv of integers": (tensor("kv", lambda x: x.int()), "keys and values .* in torch.int32"),
    "kv of half the bits": (tensor("kv", lambda x: x.half()), "load the model with dtype=torch.float16"),
    "kv of fewer layers": (tensor("kv", lambda x: x[:, :2]), "another model.*the shapes differ"),
    "kv of more heads": (tensor("kv", lambda x: x.repeat(1, 1, 1, 2, 1, 1)), "another model.*the shapes differ"),
    "kv of narrow heads": (tensor("kv", lambda x: x[..., :8]), "another model.*the shapes differ"),
    "kv of fewer rows": (tensor("kv", lambda x: x[:, :, :2]), r"lengths \[3\] in torch.int64; supported is \[2\]"),
    "kv of fewer slots": (tensor("kv", lambda x: x[..., :8, :]), r"positions \[3, 9\].*supported is \[3, 8\]"),
    "lengths of floats": (tensor("lengths", lambda x: x.float()), r"lengths \[3\] in torch.float32"),
    "lengths of other axes": (tensor("lengths", lambda x: x[None]), r"lengths \[1, 3\]"),
    "a length below 0": (item("lengths", 1, -1), "the length -1 in row 1; supported is 0 to the 9 slots"),
    "a length beyond the slots": (item("lengths", 0, 10), "the length 10 in row 0"),
    "a length of 2**62": (item("lengths", 2, 2**62), "the length 4611686018427387904 in row 2"),
    "next positions in 32 bits": (tensor("next_position", lambda x: x.int()), r"next_position \[3\] in torch.int32"),
    "next positions of fewer rows": (tensor("next_position", lambda x: x[:2]), r"next_position \[2\]"),
    "a next position below 0": (
        item("next_position", 0, -5),
        "the next position -5 in row 0; supported is 0 to 2147483647",
    ),
    "a next position beyond all": (item("next_position", 0, 2**31), "the next position 2147483648 in row 0"),
    "a next position that is taken": (item("next_position", 1, 9), "in row 1; supported is positions below the row's"),
    "positions of floats": (tensor("positions", lambda x: x.double()), r"positions \[3, 9\] in torch.float64"),
    "positions of other axes": (tensor("positions", lambda x: x.T), r"positions \[9, 3\]"),
    "a position below 0": (item("positions", (2, 0), -1), "in row 2; supported is positions of at least 0 that rise"),
    "a position twice": (item("positions", (0, 4), 3), "in row 0; supported is positions of at least 0 that rise"),
    "positions that fall": (item("positions", (1, 3), -(2**63)), "in row 1; supported is positions of at least 0"),
    "a last position of 2**63 - 1": (item("positions", (0, 8), 2**63 - 1), "in row 0; supported is positions below"),
    "segments in an object": (fact("segments", {}), "segments {}; supported is a list"),
    "no segments": (fact("segments", None), "segments None"),
    "a segment that is none": (fact("segments", [3]), "the segment 3; supported is an object of agent"),
    "a segment with a field too many": (segment(code="x"), "the segment {"),
    "a segment with a field too few": (lambda t, f: f["segments"][0].pop("agent"), "the segment {"),
    "an agent of a strange type": (
        segment(agent=7),
        "a segment of kind 'latent' by 7; supported is prompt, latent, text",
    ),
    "a kind that is none": (segment(kind="shell"), "a segment of kind 'shell'"),
    "a kind of a strange type": (segment(kind=["prompt"]), r"a segment of kind \['prompt'\]"),
    "ends that are no list": (segment(start=4), "the ends 4 of a segment; supported is 3 integers"),
    "ends of fewer rows": (segment(stop=[7, 5]), r"the ends \[7, 5\] of a segment"),
    "an end that is no integer": (segment(stop=[7, 5, 4.0]), r"the ends \[7, 5, 4.0\]"),
    "an end that is a truth": (segment(start=[True, 2, 1]), r"the ends \[True, 2, 1\]"),
    "a start below 0": (segment(start=[-1, 2, 1]), r"a segment from \[-1, 2, 1\]"),
    "a stop before the start": (segment(stop=[3, 5, 4]), r"a segment from \[4, 2, 1\] to \[3, 5, 4\]"),
    "a stop beyond the length": (segment(stop=[7, 6, 4]), r"within the lengths \[9, 5, 5\]"),
}


@pytest.fixture
def path(tmp_path):
    example().save(tmp_path / "memory", MODEL)
    return tmp_path / "memory"


def refused(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        LatentCache.load(path, MODEL)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_rewritten_file_is_taken_where_nothing_is_wrong(path):
    """Otherwise the cases below would say nothing."""
    rewritten(path, lambda tensors, facts: None)
    assert_same(LatentCache.load(path, MODEL), example())


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_field_is_looked_at(path, damage):
    edit, message = DAMAGES[damage]
    rewritten(path, edit)
    text = refused(path, message)
    assert len(text) < 800
    assert any(advice in text for advice in ("Save the cache again", "Load it with the model", "load the model with"))


def test_what_lies_behind_a_row_is_nobody_s_business(path):
    """Such slots are undefined, whatever another program has put there."""
    rewritten(path, item("positions", (1, slice(5, None)), -9))
    rewritten(path, item("kv", (0, 0, 1, 0, 8), float("nan")))
    loaded = LatentCache.load(path, MODEL)
    assert_same(loaded, example())
    assert_same(loaded.fork(20), example())


@pytest.mark.parametrize("metadata", [None, {}, {"other": "x"}, {"latentmas": "[]"}, {"latentmas": "null"}])
def test_a_safetensors_file_of_something_else(path, metadata):
    save_file(load_file(path), path, metadata=metadata)
    refused(path, "without the metadata of a LatentCache; supported is the format latentmas-cache-1")


@pytest.mark.parametrize("text", ["{", "[" * 500_000, "9" * 10_000, "\udcff", ""])
def test_metadata_that_is_no_json(path, text):
    tensors = load_file(path)
    metadata = {"latentmas": text.encode("utf-8", "replace").decode()}
    save_file(tensors, path, metadata=metadata)
    refused(path, "metadata that is no JSON")


def test_files_of_other_kinds(tmp_path, path):
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    for size in (0, 1, 7, 8, 9, 8 + header - 1, 8 + header, len(content) - 1):
        path.write_bytes(content[:size])
        refused(path, "no safetensors file|no whole safetensors file")
    path.write_bytes(content + b"\0")
    refused(path, "no whole safetensors file")
    path.write_bytes(random.Random(0).randbytes(5000))
    refused(path, "5000 bytes that are no safetensors file")
    path.write_bytes(pickle.dumps({"kv": [1] * 100}))
    refused(path, "no safetensors file")
    torch.save({"kv": torch.zeros(3)}, path)
    refused(path, "no safetensors file")
    folder = tmp_path / "folder"
    folder.mkdir()
    refused(folder, "a folder or a device")
    with pytest.raises(FileNotFoundError):
        LatentCache.load(tmp_path / "missing", MODEL)


def test_a_pickle_is_not_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    (tmp_path / "memory").write_bytes(pickle.dumps(Payload()))
    refused(tmp_path / "memory", "no safetensors file")
    assert not (tmp_path / "executed").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="cannot be read as a LatentCache"):
        LatentCache.load(tmp_path / "pipe", MODEL)


def test_a_header_that_would_fill_the_memory_is_not_read(tmp_path):
    path = tmp_path / "memory"
    with path.open("wb") as file:
        file.write((HEADER_LIMIT + 8).to_bytes(8, "little"))
        file.truncate(2 * HEADER_LIMIT)
    refused(path, "a header of 16,777,224 bytes; supported is up to 16,777,216")
    path.write_bytes((2**64 - 1).to_bytes(8, "little") + b"{}")
    refused(path, "10 bytes that are no safetensors file")


def test_a_shape_larger_than_the_file_is_not_allocated(path):
    content = path.read_bytes()
    for old, new in (
        (b"[2,3,3,2,9,16]", b"[2,3,3,2,9,1099511627776]"),
        (b"[2,3,3,2,9,16]", b"[9223372036854775807,9]"),
    ):
        size = int.from_bytes(content[:8], "little")
        header = content[8 : 8 + size].replace(old, new)
        assert header != content[8 : 8 + size]
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
        refused(path, "no whole safetensors file")


def test_tensors_at_odd_addresses(path):
    """Legal in the format, and nothing that an engine could read."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    path.write_bytes((size + 1).to_bytes(8, "little") + content[8 : 8 + size] + b" " + content[8 + size :])
    refused(path, "tensors at odd addresses; supported is a header padded")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_file_with_any_bytes_changed_is_refused_or_sound(data):
    """Never another exception, and never a cache that a call could not go on from."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory"
        example().save(path, MODEL)
        content = bytearray(path.read_bytes())
        header = 8 + int.from_bytes(content[:8], "little") + 8 * 3 * (1 + 1 + 9)  # with all tensors but kv
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])
        try:
            loaded = LatentCache.load(path, MODEL)
        except ValueError as error:
            loaded = error
    if isinstance(loaded, ValueError):
        assert str(path) in str(loaded)
        return
    assert loaded.buffer.shape == (2, 3, 3, 2, 9, 16)
    for row, length in enumerate(loaded.lengths.tolist()):
        assert 0 <= length <= 9
        used = [-1, *loaded.positions[row, :length].tolist(), int(loaded.next_position[row])]
        assert length == 0 or all(a < b for a, b in itertools.pairwise(used))
        assert all(s.stop[row] <= length for s in loaded.segments)


@pytest.mark.parametrize("dtype", list(MODELS))
def test_rows_are_read_without_a_model(tmp_path, dtype):
    """For a reader that has no model of transformers: what was saved, and whose it is."""
    cache, path = example(dtype), tmp_path / "memory"
    cache.save(path, MODELS[dtype])
    saved = read_file(path)
    assert (
        saved.writer
        == ModelFingerprint.of(MODELS[dtype])
        == ModelFingerprint(model_fingerprint(MODELS[dtype]), saved.writer.model)
    )
    assert saved.writer.model == f"LlamaForCausalLM of 3 layers, 2 KV heads of 16, {dtype}"
    assert saved.kv.dtype == dtype
    assert torch.equal(saved.lengths, cache.lengths)
    assert torch.equal(saved.next_position, cache.next_position)
    for row, length in enumerate(cache.lengths.tolist()):
        assert torch.equal(saved.kv[:, :, row, :, :length], cache.buffer[:, :, row, :, :length])
        assert torch.equal(saved.positions[row, :length], cache.positions[row, :length])


def test_what_was_checked_stays_as_it_was_read(path):
    """Whoever writes into the file afterwards: lengths and positions are copies; only keys and values are mapped."""
    saved = read_file(path)
    before = saved.lengths.clone(), saved.next_position.clone(), saved.positions.clone()
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        file.seek(8 + size)
        file.write(b"\xff" * (path.stat().st_size - 8 - size))
    assert torch.equal(saved.lengths, before[0])
    assert torch.equal(saved.next_position, before[1])
    assert torch.equal(saved.positions, before[2])
    assert saved.kv.isnan().all(), "these are read where they lie"


@pytest.mark.parametrize(
    "kv",
    [
        torch.zeros(2, 3, 3, 2, 9),
        torch.zeros(3, 3, 3, 2, 9, 16),
        torch.zeros(2, 3, 3, 0, 9, 16),
        torch.zeros(2, 3, 3, 2, 9, 16, dtype=torch.int16),
    ],
    ids=["dims", "no pair", "no heads", "integers"],
)
def test_rows_of_another_kind_are_refused_without_a_model(path, kv):
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({**tensors, "kv": kv}, path, metadata=metadata)
    with pytest.raises(
        ValueError, match=r"found keys and values \[.*supported is \[2, layers, B, kv_heads, slots, head_dim\]"
    ):
        read_file(path)
