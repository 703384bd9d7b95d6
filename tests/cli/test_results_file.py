"""The file of results: what is in it after a run that was stopped, failed or went on."""

import errno
import json
import os
import subprocess
import sys

import pytest
from latentmas.cli.questions import Question
from latentmas.cli.results_file import ResultsFile

QUESTIONS = [Question(n, f"question {n}") for n in (1, 2, 3)]
SETTINGS = {"model": "m", "seed": 0}


def result(number, **more):
    return {"number": number, "question": f"question {number}", "answer": "ä" * 20, **more}


def opened(path, **options):
    return ResultsFile(path, options.pop("questions", QUESTIONS), options.pop("settings", SETTINGS), **options)


def lines(path):
    data = path.read_bytes()
    assert data == b"" or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.jsonl"


@pytest.fixture
def two(path):
    """A file with the results of questions 1 and 2."""
    with opened(path) as results:
        results.write([result(1), result(2)])
    return path


def test_each_result_is_a_line_with_the_settings(two):
    assert lines(two) == [{**result(n), "settings": SETTINGS} for n in (1, 2)]


def test_results_are_on_disk_as_soon_as_they_are_written(path):
    with opened(path) as results:
        results.write([result(1)])
        assert [line["number"] for line in lines(path)] == [1]
        results.write([result(2), result(3)])
        assert [line["number"] for line in lines(path)] == [1, 2, 3]


def test_a_file_that_exists_is_left_alone(two):
    before = two.read_bytes()
    with pytest.raises(ValueError, match=r"results\.jsonl exists; go on from it with --resume, replace it with --over"):
        opened(two)
    assert two.read_bytes() == before


def test_an_empty_file_is_no_result(path):
    path.touch()
    with opened(path) as results:
        results.write([result(1)])
    assert len(lines(path)) == 1


def test_resume_goes_on_behind_what_is_there(two):
    with opened(two, resume=True) as results:
        assert sorted(results.done) == [1, 2]
        assert results.done[2]["answer"] == "ä" * 20
        results.write([result(3)])
    assert [line["number"] for line in lines(two)] == [1, 2, 3]


def test_resume_without_a_file_begins_one(path):
    with opened(path, resume=True) as results:
        assert results.done == {}
        results.write([result(1)])
    assert len(lines(path)) == 1


def test_overwrite_replaces_when_the_first_result_comes(two):
    """A run that dies before its first result has cost nothing."""
    before = two.read_bytes()
    with opened(two, overwrite=True) as results:
        assert two.read_bytes() == before
        results.write([result(3)])
    assert [line["number"] for line in lines(two)] == [3]


def test_overwrite_takes_any_file(path):
    path.write_bytes(b"my thesis\nno newline at the end")
    with opened(path, overwrite=True) as results:
        results.write([result(1)])
    assert lines(path) == [{**result(1), "settings": SETTINGS}]


def test_both_are_refused(path):
    with pytest.raises(ValueError, match="got both --resume and --overwrite"):
        opened(path, resume=True, overwrite=True)
    assert not path.exists()


@pytest.mark.parametrize("cut", [1, 30])
def test_a_line_that_was_cut_off_is_dropped_with_a_word(two, cut):
    os.truncate(two, two.stat().st_size - cut)
    with pytest.warns(UserWarning, match=r"the last line of .*results\.jsonl was cut off"):
        results = opened(two, resume=True)
    with results:
        assert sorted(results.done) == [1]
        results.write([result(2)])
    assert [line["number"] for line in lines(two)] == [1, 2]


def test_other_settings_are_refused(two):
    with pytest.raises(ValueError, match="line 1 was made with seed=0; this run has seed=1: go on with the same"):
        opened(two, settings={**SETTINGS, "seed": 1}, resume=True)


@pytest.mark.parametrize("questions", [[Question(1, "another one"), *QUESTIONS[1:]], QUESTIONS[1:]])
def test_other_questions_are_refused(two, questions):
    with pytest.raises(ValueError, match="line 1 answers another question 1 than this run asks"):
        opened(two, questions=questions, resume=True)


@pytest.mark.parametrize(
    "line",
    [
        b"thesis",
        b"[1]",
        b"{}",
        b'{"number": 1, "question": "question 1"}',
        b"\xff",
        b"[" * 100_000,
        b'{"number": 1, "question": "question 1", "settings": 3}',
        b'{"number": [1], "question": "x", "settings": {}}',
    ],
)
def test_resume_takes_no_other_file(two, line):
    with two.open("ab") as file:
        file.write(line + b"\n")
    before = two.read_bytes()
    with pytest.raises(ValueError, match="line 3 is no result of latentmas run"):
        opened(two, resume=True)
    assert two.read_bytes() == before


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a file; name a file"):
        opened(tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        opened(tmp_path / "nowhere" / "results.jsonl")


def test_a_file_that_was_made_for_nothing_is_removed(path):
    def stopped():
        with opened(path):
            assert path.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert not path.exists()


def test_a_file_that_was_there_stays(path):
    path.touch()
    with opened(path):
        pass
    assert path.exists()


# ---- a disk that is full -------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_whole_lines(two, monkeypatch):
    """The write takes a part and then fails: nothing of the result stays, and the message counts what is kept."""
    before = two.read_bytes()
    write, calls = os.write, []

    def full(handle, data):
        calls.append(len(data))
        if len(calls) == 1:
            return write(handle, bytes(data[:10]))
        raise OSError(errno.ENOSPC, "No space left on device")

    with opened(two, resume=True) as results:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left on device; 2 finished results are kept in it: make room"):
            results.write([result(3)])
        monkeypatch.undo()
        assert len(calls) == 2, "the rest was tried"
        assert two.read_bytes() == before
        results.write([result(3)])  # and with room it goes on
    assert [line["number"] for line in lines(two)] == [1, 2, 3]


def test_ctrl_c_in_the_middle_of_a_line(two, monkeypatch):
    before = two.read_bytes()
    write = os.write

    def interrupted(handle, data):
        write(handle, bytes(data[:10]))
        raise KeyboardInterrupt

    with opened(two, resume=True) as results:
        monkeypatch.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            results.write([result(3)])
    assert two.read_bytes() == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of file sizes")
def test_a_real_limit_of_the_system(path):
    """The same from the kernel's side: a process that may write 600 bytes to a file."""
    code = f"""
import resource, signal, sys
sys.path[:0] = {sys.path!r}
from test_results_file import QUESTIONS, opened, result
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
with opened({str(path)!r}) as results:
    for number in (1, 2, 3):
        results.write([result(number)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    kept = lines(path)
    assert 0 < len(kept) < 3
    assert f"File too large; {len(kept)} finished results are kept in it" in done.stderr
