"""Keys and values in a file on their way to another engine: what it holds, who may read it, and how long it is there."""

import itertools
import os
import socket
import stat
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from cache_examples import MODELS, append, example, poisoned
from hypothesis import given, settings
from hypothesis import strategies as st
from latentmas.backends.kv_file import (
    FILE,
    ROW,
    SLOTS,
    SUFFIX,
    KVFile,
    KVFileRow,
    check_finite,
    check_transferable,
    kv_heads_of_rank,
    read_kv_rows,
    remove_stale,
    shared_folder,
)
from tiny_models import FAMILIES, tiny_model

import latentmas_kernels.models.rope  # noqa: F401  what keys_are_moved_by_torch replaces
from latentmas_kernels import LatentCache
from latentmas_kernels.cache.free_memory import InsufficientMemoryError
from latentmas_kernels.models.architecture import UnsupportedModelError
from latentmas_kernels.models.fingerprint import ModelFingerprint

STAMPS = {dtype: ModelFingerprint.of(model) for dtype, model in MODELS.items()}
STAMP = STAMPS[torch.float32]
DTYPES = list(MODELS)


def ragged_memory(dtype=torch.float32, lengths=(9, 4, 1)):
    """What lies behind the lengths is NaN."""
    memory = poisoned(len(lengths), 90, dtype)
    append(memory, list(lengths), "prompt", torch.Generator().manual_seed(3))
    return memory


def spread_memory(dtype):
    """Rows that borrow their first 64 slots from the first one, and go on by themselves."""
    memory = ragged_memory(dtype, [70]).fork_rows(3, 90)
    append(memory, [5, 0, 9], "prompt", torch.Generator().manual_seed(4))
    assert int(memory.prefix_len.sum()) == 128
    return memory


def forked_memory(dtype):
    """A fork of rows that borrow goes on lending."""
    return spread_memory(dtype).fork(100)


def cut_memory(dtype):
    """Slots are cut out and the rest moved to the first positions."""
    memory = ragged_memory(dtype)
    kept = torch.arange(9) < memory.lengths[:, None]
    kept[:, 1:4] = False
    memory.keep(kept)
    memory.rebase(MODELS[dtype])
    assert memory.lengths.tolist() == [6, 1, 1]
    return memory


MEMORIES = {"ragged": ragged_memory, "prefix": spread_memory, "forked": forked_memory, "cut": cut_memory}


def row_of(memory, row):
    """[2, layers, heads, slots, width], whoever holds it."""
    alone = memory.select([row])
    return alone.buffer[:, :, 0, :, : int(alone.lengths[0])]


@pytest.fixture
def kv_file(tmp_path):
    with closing(KVFile(ragged_memory(), STAMP, tmp_path)) as kv_file:
        yield kv_file


# ---- what it holds -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("keys_are_moved_by_torch")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MEMORIES)
def test_a_kv_file_holds_what_the_memory_held(tmp_path, name, dtype):
    """Bit for bit, and the memory is as it was."""
    memory = MEMORIES[name](dtype)
    before = memory.buffer.clone(), memory.lengths.clone(), memory.prefix_len.clone(), list(memory.segments)
    with closing(KVFile(memory, STAMPS[dtype], tmp_path)) as kv_file:
        assert [(source.row, source.slots) for source in kv_file.rows] == list(enumerate(memory.lengths.tolist()))
        for row, source in enumerate(kv_file.rows):
            got = read_kv_rows(tmp_path, source, STAMPS[dtype].fingerprint)
            assert got.dtype == dtype
            assert torch.equal(got, row_of(memory, row))
    assert torch.equal(memory.buffer.view(torch.uint8), before[0].view(torch.uint8))
    assert torch.equal(memory.lengths, before[1])
    assert torch.equal(memory.prefix_len, before[2])
    assert memory.segments == before[3]


def test_a_kv_file_is_read_where_it_lies(tmp_path, kv_file):
    """What the reader gets are the pages of the file, not a copy."""
    kv = read_kv_rows(tmp_path, kv_file.rows[0], STAMP.fingerprint)
    maps = [m.addr.split("-") for m in psutil.Process().memory_maps(grouped=False) if m.path == str(kv_file.path)]
    assert any(int(low, 16) <= kv.data_ptr() < int(high, 16) for low, high in maps)


def test_a_kv_file_is_a_file_that_load_reads(tmp_path, kv_file):
    assert torch.equal(row_of(LatentCache.load(kv_file.path, MODELS[torch.float32]), 1), row_of(ragged_memory(), 1))


# ---- what is not sent ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["ragged", "prefix"])
def test_what_is_not_finite_is_refused_with_its_row(tmp_path, name, dtype, value):
    memory = MEMORIES[name](dtype)
    memory.keys[1, 2, 0, int(memory.lengths[2]) - 1, 5] = value
    with pytest.raises(ValueError, match="row 2 of the memory holds NaN or Inf"):
        KVFile(memory, STAMPS[dtype], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_a_lender_holds_is_looked_at_for_every_row(tmp_path, value):
    memory = spread_memory(torch.float32)
    memory.values[0, 0, 1, 63, 0] = value
    with pytest.raises(ValueError, match="row 0 of the memory holds NaN or Inf"):
        KVFile(memory, STAMP, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_large_values_are_finite(dtype):
    """Also where their sum is not."""
    large = torch.full((2, 3, 4), torch.finfo(dtype).max, dtype=dtype)
    assert not large.sum(dtype=torch.float32).isfinite()
    check_finite(large, "it")
    large[1, 2, 3] = -float("inf")
    with pytest.raises(ValueError, match="it holds NaN or Inf"):
        check_finite(large, "it")


def test_rows_that_vllm_could_not_go_on_from_are_refused(tmp_path):
    empty = ragged_memory(lengths=[3, 0, 2])
    with pytest.raises(ValueError, match="row 1 of the memory holds nothing; send its prompt as tokens"):
        KVFile(empty, STAMP, tmp_path)
    gaps = example()
    with pytest.raises(ValueError, match=r"positions 0, 1, 2, .*next positions \[9, 10, 5\].*rebase\(model\)"):
        KVFile(gaps, STAMP, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_layers_with_windows_cannot_be_handed_over():
    for name in FAMILIES:
        model = tiny_model(name)
        windowed = {"qwen2-mixed": 2, "qwen3-mixed": 2, "mistral-window": 3}.get(name)
        if windowed is None:
            check_transferable(model)
            continue
        with pytest.raises(UnsupportedModelError, match=f"a sliding window in {windowed} of its 3 layers.*embeds"):
            check_transferable(model)


def test_keys_whose_angles_change_with_the_length_cannot_be_handed_over():
    for kind in ("longrope", "dynamic"):
        model = tiny_model("llama")
        model.config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4}
        with pytest.raises(
            UnsupportedModelError, match=f"RoPE of type {kind}, whose angles change with the length.*embeds"
        ):
            check_transferable(model)


def test_a_memory_of_another_model_is_refused(tmp_path):
    other = replace(STAMP, model=STAMP.model.replace("3 layers", "4 layers"))
    with pytest.raises(ValueError, match="got a cache of 3 layers.* writes a cache of 4 layers"):
        KVFile(ragged_memory(), other, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(
        InsufficientMemoryError, match="a memory of 0 MB does not fit .*, where 0 MB are free: .*--shm-size.*--folder"
    ):
        KVFile(ragged_memory(), STAMP, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- what is not read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "slots"), [(3, 9), (0, 8), (0, 10), (1, 9), (10**30, 9)])
def test_rows_are_what_the_request_said(tmp_path, kv_file, row, slots):
    source = KVFileRow(kv_file.path.name, row, slots)
    with pytest.raises(ValueError, match=rf"holds rows of \[9, 4, 1\] slots; got row {row} of {slots}"):
        read_kv_rows(tmp_path, source, STAMP.fingerprint)


def test_the_memory_of_another_model_is_refused(tmp_path, kv_file):
    other = STAMPS[torch.bfloat16].fingerprint
    with pytest.raises(ValueError, match=f"another model: .*{STAMP.fingerprint[:12]}.*started for {other[:12]}"):
        read_kv_rows(tmp_path, kv_file.rows[0], other)


@pytest.mark.parametrize("path", [FILE, "cut", "damaged", "empty", "folder"])
def test_files_that_cannot_be_read_are_errors_that_a_worker_survives(tmp_path, kv_file, path):
    source = kv_file.rows[0]
    whole = kv_file.path.read_bytes()
    kv_file.path.unlink()
    if path == "folder":
        kv_file.path.mkdir()
    elif path != FILE:
        parts = {"cut": whole[:-7], "damaged": whole[:8] + b"x" + whole[9:], "empty": b""}
        kv_file.path.write_bytes(parts[path])
    with pytest.raises((OSError, ValueError), match=kv_file.path.name):
        read_kv_rows(tmp_path, source, STAMP.fingerprint)
    if path == "folder":
        kv_file.path.rmdir()


def test_gaps_in_positions_are_refused_by_the_reader(tmp_path):
    """The file is one that save() writes and load() reads."""
    memory = example()
    file = tmp_path / f"x{SUFFIX}"
    memory.save(file, MODELS[torch.float32])
    read_kv_rows(tmp_path, KVFileRow(file.name, 2, 5), STAMP.fingerprint)
    with pytest.raises(ValueError, match="gaps in its positions; rebase"):
        read_kv_rows(tmp_path, KVFileRow(file.name, 1, 5), STAMP.fingerprint)


# ---- how requests name it ------------------------------------------------------------------------------------------

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda s: st.lists(s),
    max_leaves=3,
)
NAMES = st.one_of(
    st.text(),
    st.text(alphabet="ab./\\\0~-").map(lambda name: name + SUFFIX),
    st.sampled_from(["..", ".", "/", "a/..", "/dev/shm/a", "../a", "a/", "~/a", "a\0", "C:\\a", ""]).map(
        lambda n: n + SUFFIX
    ),
)


@settings(max_examples=400, deadline=None)
@given(file=NAMES | ANYTHING, row=ANYTHING, slots=ANYTHING, keys=st.sets(st.sampled_from([FILE, ROW, SLOTS, "other"])))
def test_only_a_plain_name_is_read_from_what_anyone_may_send(file, row, slots, keys):
    """Nothing outside the folder can be named, and nothing is taken for an integer that is none."""
    everything = {FILE: file, ROW: row, SLOTS: slots, "other": 1}
    params = {key: everything[key] for key in keys}
    if not keys - {"other"}:
        assert KVFileRow.read(params) is None
        return
    good = (
        isinstance(file, str)
        and file.endswith(SUFFIX)
        and not set("/\0") & set(file)
        and type(row) is int
        and type(slots) is int
        and row >= 0
        and slots >= 1
    )
    if good and keys >= {FILE, ROW, SLOTS}:
        source = KVFileRow.read(params)
        assert source == KVFileRow(file, row, slots)
        folder = Path("/some/folder")
        assert (folder / source.file).parent == folder
        assert os.path.normpath(folder / source.file) == str(folder / source.file)
    else:
        with pytest.raises(ValueError, match=f"{FILE}=.*supported are the name of a file"):
            KVFileRow.read(params)


@pytest.mark.parametrize("file", ["../a", "/etc/a", "a/b", "a\0b", "a/../b", "./a"])
def test_names_that_lead_out_of_the_folder(file):
    with pytest.raises(ValueError, match="supported are the name of a file in the folder"):
        KVFileRow.read({FILE: file + SUFFIX, ROW: 0, SLOTS: 1})


@pytest.mark.parametrize(
    ("row", "slots"), [(True, 1), (0, True), (-1, 1), (0, 0), (1.0, 1), (0, "1"), (None, 1), (0, None)]
)
def test_numbers_that_are_none(row, slots):
    with pytest.raises(ValueError, match="its number of slots"):
        KVFileRow.read({FILE: "a" + SUFFIX, ROW: row, SLOTS: slots})


@given(st.text(alphabet="abc-09").map(lambda n: n + SUFFIX), st.integers(0), st.integers(1))
def test_what_is_said_of_a_row_is_read_again(file, row, slots):
    source = KVFileRow(file, row, slots)
    assert KVFileRow.read(source.params) == source
    assert KVFileRow.read({**source.params, "of someone else": 1}) == source
    assert KVFileRow.read(None) is None
    assert KVFileRow.read({}) is None


def test_no_two_rows_have_the_same_salt(tmp_path):
    """Of one kv_file, nor of two of the same memory."""
    memory = ragged_memory()
    rows = [source for _ in range(3) for source in KVFile(memory, STAMP, tmp_path).rows]
    assert len({source.salt for source in rows}) == 9


# ---- how long it is there ------------------------------------------------------------------------------------------


def test_the_file_is_there_within_the_block_only_and_for_its_owner_only(tmp_path):
    with closing(KVFile(ragged_memory(), STAMP, tmp_path)) as kv_file:
        assert list(tmp_path.iterdir()) == [kv_file.path]
        assert stat.S_IMODE(kv_file.path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == []
    kv_file.close()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_file_is_gone_behind_an_error(tmp_path, error):
    with pytest.raises(error), closing(KVFile(ragged_memory(), STAMP, tmp_path)):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_where_the_file_could_not_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "latentmas_kernels.cache.file.save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(OSError, match="full"):
        KVFile(ragged_memory(), STAMP, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_remove_stale_removes_what_dead_processes_of_this_host_left(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    here, dead, alive = socket.gethostname(), child.pid, os.getpid()
    own = KVFile(ragged_memory(), STAMP, tmp_path).path.name
    gone = [f"{here}-{dead}-0a{SUFFIX}", f".{here}-{dead}-0b{SUFFIX}.tmp1"]
    stay = [
        own,
        f"{here}-{alive}-0c{SUFFIX}",
        f".{here}-{alive}-0c{SUFFIX}.tmp2",
        f"{here}x-{dead}-0d{SUFFIX}",
        f"{here}-{dead}-{alive}-0e{SUFFIX}",  # of a host that is called like this one with a number behind
        f"{here}-{dead}-0f.txt",
        f"{here}-none-0f{SUFFIX}",
        f"x{SUFFIX}",
    ]
    for name in gone + stay[1:]:
        (tmp_path / name).touch()
    remove_stale(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(stay)
    remove_stale(tmp_path / "nowhere")


def test_kv_files_of_one_host_lie_in_memory():
    assert shared_folder() == Path("/dev/shm")


# ---- tensor parallel -----------------------------------------------------------------------------------------------


def test_heads_of_ranks():
    """As in vLLM's attention layers: each rank has heads/ranks of them, or one head serves ranks/heads ranks in a row."""
    for ranks, heads in itertools.product(range(1, 17), repeat=2):
        if ranks % heads and heads % ranks:
            with pytest.raises(ValueError, match=f"got {heads} KV heads and tensor_parallel_size {ranks}"):
                kv_heads_of_rank(0, ranks, heads)
            continue
        served = [[] for _ in range(heads)]
        for rank in range(ranks):
            for head in range(heads)[kv_heads_of_rank(rank, ranks, heads)]:
                served[head].append(rank)
        if ranks <= heads:
            want = [[head // (heads // ranks)] for head in range(heads)]
        else:
            times = ranks // heads
            want = [list(range(head * times, (head + 1) * times)) for head in range(heads)]
        assert served == want
