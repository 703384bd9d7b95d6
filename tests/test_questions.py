"""Questions from JSON lines: what is read, and what is said of the lines that hold none."""

import io
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentmas.questions import SAMPLE, Question, read_questions


def read(tmp_path, data):
    """What read_questions makes of a file with these bytes."""
    file = tmp_path / "questions.jsonl"
    file.write_bytes(data)
    return read_questions(str(file))


def test_a_question_has_the_number_of_its_line(tmp_path):
    data = b'{"question": "One?"}\n\n   \n{"question": "Four?", "answer": "4", "id": 7}\n'
    assert read(tmp_path, data) == ([Question(1, "One?"), Question(4, "Four?", "4")], [])


@pytest.mark.parametrize(("answer", "text"), [("9", "9"), (9, "9"), (2.5, "2.5"), (None, None), ("", "")])
def test_answers_are_text_or_numbers(tmp_path, answer, text):
    line = json.dumps({"question": "?", "answer": answer}).encode()
    assert read(tmp_path, line)[0] == [Question(1, "?", text)]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_files_of_other_systems(tmp_path, end):
    """A byte order mark and carriage returns are no part of a question; a line separator inside one is."""
    lines = [b'\xef\xbb\xbf{"question": "a"}', '{"question": "b\u2028c"}'.encode()]
    assert read(tmp_path, end.join(lines)) == ([Question(1, "a"), Question(2, "b\u2028c")], [])


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"{", "is not JSON (Expecting property name"),
        (b'{"question": "a"} x', "is not JSON (Extra data at column 19)"),
        (b"\xff\xfe", "is not UTF-8 (invalid start byte at byte 0)"),
        (b'"a question"', 'has no "question"'),
        (b'{"text": "a"}', 'has no "question"'),
        (b'{"question": 3}', 'has a "question" that is int, not text'),
        (b'{"question": " \\n"}', "has an empty question"),
        (b'{"question": "a", "answer": [1]}', 'has an "answer" that is list, neither text nor a number'),
        (b'{"question": "a", "answer": true}', 'has an "answer" that is bool, neither text nor a number'),
    ],
)
def test_a_broken_line_is_named_and_the_others_are_read(tmp_path, line, fault):
    good = b'{"question": "good"}'
    questions, faults = read(tmp_path, good + b"\n" + line + b"\n" + good)
    assert [question.number for question in questions] == [1, 3]
    assert len(faults) == 1
    assert faults[0].startswith(f"line 2 {fault}")
    assert "\n" not in faults[0]


@pytest.mark.parametrize("data", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_a_line_is_refused(tmp_path, data):
    with pytest.raises(
        ValueError, match=r'questions\.jsonl holds no questions; supported are JSON lines with "question"'
    ):
        read(tmp_path, data)


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"question": "q"}')))
    assert read_questions("-") == ([Question(1, "q")], [])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(ValueError, match="standard input holds no questions"):
        read_questions("-")


def test_the_sample_comes_with_the_package():
    questions, faults = read_questions(SAMPLE)
    assert faults == []
    assert [question.number for question in questions] == list(range(1, 9))
    assert all(question.answer for question in questions)


@given(st.lists(st.binary(max_size=30).filter(lambda line: b"\n" not in line), min_size=1))
def test_any_bytes_are_questions_or_faults(tmp_path_factory, lines):
    """Each line that is not blank is one or the other, whatever is in it."""
    lines = [b'{"question": "first"}', *lines]
    questions, faults = read(tmp_path_factory.mktemp("any"), b"\n".join(lines))
    assert len(questions) + len(faults) == sum(bool(line.strip()) for line in lines)
