"""Question files as people have them: what is read, and what is said of entries that hold no question."""

import csv
import io
import json
import sys
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentmas.cli.questions import SAMPLE, SUPPORTED, Question, read_questions

from latentmas_kernels.errors import LatentMASError


def read(tmp_path, data, name="questions.jsonl"):
    """What read_questions makes of a file with these bytes."""
    file = tmp_path / name
    file.write_bytes(data)
    return read_questions(str(file))


def read_one(tmp_path, entry):
    """The only question of an array of one entry, where that has no faults."""
    questions, faults = read(tmp_path, json.dumps([entry]).encode(), "questions.json")
    assert faults == []
    return questions[0]


def fault_of(tmp_path, entry):
    """What is said of an entry between two good ones, which are read."""
    questions, faults = read(tmp_path, json.dumps([{"question": "a"}, entry, {"question": "b"}]).encode(), "q.json")
    assert [question.number for question in questions] == [1, 3]
    assert len(faults) == 1
    assert "\n" not in faults[0]
    return faults[0]


def test_a_question_has_the_number_of_its_line(tmp_path):
    data = b'{"question": "One?"}\n\n   \n{"question": "Four?", "answer": "4", "id": 7}\n'
    assert read(tmp_path, data) == ([Question(1, "One?"), Question(4, "Four?", "4")], [])


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("9", "9"), (9, "9"), (2.5, "2.5"), (None, None), ("", None), (float("nan"), None), ([], None),
        (True, "true"), (False, "false"), (["Paris"], "Paris"), (["Paris", "Lutetia", "Paris"], "Paris or Lutetia"),
        (["a", 1, True], "a or 1 or true"),
    ],
)  # fmt: skip
def test_answers_are_text_numbers_truth_values_or_lists_of_these(tmp_path, answer, text):
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
        (b'"a question"', 'is str, not an object with "question"'),
        (b"[1, 2]", 'is list, not an object with "question"'),
        (b'{"text": "a"}', 'has no "question" (nor query, problem, prompt); it has "text"'),
        (b"{}", 'has no "question" (nor query, problem, prompt); it has nothing'),
        (b'{"question": null}', "has an empty question"),
        (b'{"question": "\\ud83d"}', "has a \"question\" that holds '\\ud83d' at character 1, half a surrogate pair"),
        (b'{"question": ' + b"[" * 100_000 + b"}", "is not JSON that can be read (nested too deeply)"),
        (b'{"question": "a", "answer": ' + b"9" * 5000 + b"}", "is not JSON that can be read (Exceeds the limit"),
        (b'{"question": 3}', 'has a "question" that is int, not text'),
        (b'{"question": " \\n"}', "has an empty question"),
        (b'{"question": NaN}', "has an empty question"),
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
        ValueError,
        match=r'questions\.jsonl holds no questions; supported are JSON lines, .* CSV .* Parquet, with "question"',
    ):
        read(tmp_path, data)


@pytest.mark.parametrize(
    "text",
    [
        "question,answer\nOne?,1\nTwo?,2\n",
        "question\tanswer\nOne?\t1\n",
        "What is 2 + 2?\n\nAnd 3 + 3?\n",
        '"a question"\n"another"\n',
        "1\n2\n",
        "[1] What is 2 + 2?\n",
        "question: One?\nanswer: 1\n",
    ],
    ids=["csv", "tsv", "text", "strings", "numbers", "text in brackets", "yaml"],
)
def test_a_file_of_another_format_is_one_error_that_names_the_formats(tmp_path, monkeypatch, text):
    with pytest.raises(ValueError, match=r"q\.tsv is (neither JSON nor JSON lines|not JSON)") as caught:
        read(tmp_path, text.encode(), "q.tsv")
    assert str(caught.value).endswith(SUPPORTED)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    with pytest.raises(ValueError, match="^standard input is (neither JSON nor JSON lines|not JSON)") as caught:
        read_questions("-")
    assert str(caught.value).endswith(SUPPORTED)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["q.jsonl", "q.csv"])
def test_a_file_in_utf16_says_so(tmp_path, monkeypatch, encoding, name):
    """As some tools of Windows save it."""
    data = '{"question": "One?"}\n'.encode(encoding)
    with pytest.raises(ValueError, match=f"{name} is UTF-16 or UTF-32; save it as UTF-8$"):
        read(tmp_path, data, name)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    with pytest.raises(ValueError, match="^standard input is UTF-16 or UTF-32; save it as UTF-8$"):
        read_questions("-")


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"question": "q"}')))
    assert read_questions("-") == ([Question(1, "q")], [])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(ValueError, match="standard input holds no questions"):
        read_questions("-")


def test_standard_input_that_is_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="standard input is closed; give a question, or a file"):
        read_questions("-")


# ---- fields --------------------------------------------------------------------------------------------------------

OPTIONS = ["three", "four", "five"]
LISTED = "2 + 2?\nA. three\nB. four\nC. five"


@pytest.mark.parametrize("question", ["question", "query", "problem", "prompt", "Question", " PROBLEM "])
@pytest.mark.parametrize("answer", ["answer", "gold", "label", "answerKey", "Answer"])
def test_usual_names_of_fields(tmp_path, question, answer):
    entry = {"id": 9, "text": "other", question: "2 + 2?", answer: "4"}
    assert read_one(tmp_path, entry) == Question(1, "2 + 2?", "4")


@pytest.mark.parametrize(
    ("entry", "text", "answer", "said"),
    [
        ({"query": "SELECT 1", "question": "How many?"}, "How many?", None, ['"question" is read, not "query"']),
        ({"label": 3, "answer": "4", "prompt": "2 + 2?"}, "2 + 2?", "4", ['"answer" is read, not "label"']),
        ({"question": "", "problem": "2 + 2?"}, "2 + 2?", None, []),
        ({"question": "2 + 2?", "prompt": "2 + 2?"}, "2 + 2?", None, []),
        ({"question": "2 + 2?", "Question": "3 + 3?"}, "2 + 2?", None, ['"question" is read, not "Question"']),
        ({"Question": "2 + 2?", "question": "2 + 2?"}, "2 + 2?", None, []),
        (
            {"question": "2 + 2?", "answer": "4", "Answer": 5, "ANSWER": float("nan")},
            "2 + 2?",
            "4",
            ['"answer" is read, not "Answer"'],
        ),
        (
            {"question": "2 + 2?", "options": ["three", "four", "five"], "choices": ["x", "y"]},
            "2 + 2?\nA. three\nB. four\nC. five",
            None,
            ['"options" is read, not "choices"'],
        ),
        (
            {"question": "2 + 2?", "options": ["three", "four", "five"], "label": -1},
            "2 + 2?\nA. three\nB. four\nC. five",
            None,
            ['"label" is left out where it is none of the options'],
        ),
        (
            {"question": LISTED + LISTED[6:], "options": OPTIONS, "query": LISTED + "\nChoose."},
            LISTED + "\nChoose.",
            None,
            ['"query" is read, not "question"'],
        ),
    ],
    ids=[
        "two questions",
        "two answers",
        "an empty one",
        "the same",
        "two spellings",
        "two spellings of the same",
        "two spellings of the answer",
        "two lists of options",
        "no label",
        "the one that lists the options once",
    ],
)
def test_of_several_fields_one_is_read_with_a_word(tmp_path, entry, text, answer, said):
    """Once for the file, with the first place where it is so."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        questions, faults = read(tmp_path, json.dumps([entry, entry]).encode(), "q.json")
    assert questions == [Question(1, text, answer), Question(2, text, answer)]
    assert faults == []
    assert [str(one.message) for one in caught] == [
        f"{tmp_path / 'q.json'}: {line} (first in entry 1)" for line in said
    ]


def test_a_final_answer_is_what_follows_the_mark(tmp_path):
    """GSM8K's form; four hashes inside a text, or a heading that more lines follow, are text."""
    answers = ["2 + 2 = <<2+2=4>>4\n#### 4", "x\n#### 1,450\n", "#### -3", "a #### b", "#### 1\nnot yet", "###  4"]
    got = [read_one(tmp_path, {"question": "?", "answer": answer}).answer for answer in answers]
    assert got == ["4", "1,450", "-3", "a #### b", "#### 1\nnot yet", "###  4"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"answer": {"value": "Paris"}}, "is neither text, a number, true or false, nor a list of these"),
        ({"answer": [["Paris"]]}, "is neither text, a number, true or false, nor a list of these"),
        ({"answer": "\udc00"}, "holds half a surrogate pair or a byte that is not UTF-8"),
        ({"options": ["yes", "no"], "answer": "six"}, "is none of the options"),
        ({"options": ["yes", "no"], "answer": 3}, "is none of the options"),
        ({"options": ["yes", "no"], "answer": True}, "is none of the options"),
        ({"options": ["yes", "no"], "answer": ["yes", "no"]}, "is more than one of the options"),
        ({"options": ["same", "same"], "answer": "same"}, "may be more than one of the options (give the letter)"),
    ],
)
def test_an_answer_that_cannot_be_used_does_not_cost_the_question(tmp_path, more, said):
    """One warning for the file, whatever the values are."""
    entries = [{"question": "a"}, {"question": "b", **more}, {"question": "c", **more}]
    with pytest.warns(UserWarning, match="is left out where it") as caught:
        questions, faults = read(tmp_path, json.dumps(entries).encode(), "q.json")
    assert [str(one.message) for one in caught] == [
        f'{tmp_path / "q.json"}: "answer" is left out where it {said} (first in entry 2)'
    ]
    assert [(question.number, question.answer) for question in questions] == [(1, None), (2, None), (3, None)]
    assert faults == []


# ---- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        OPTIONS,
        ["A. three", "B. four", "C. five"],
        ["(A) three", "(B) four", "(C) five"],
        {"A": "three", "B": "four", "C": "five", "D": None},
        {"text": OPTIONS, "label": ["A", "B", "C"]},
        json.dumps(OPTIONS),
        repr(OPTIONS),
    ],
    ids=["texts", "with letters", "in brackets", "by letter", "ARC", "a cell with JSON", "a cell of Python"],
)
@pytest.mark.parametrize("answer", ["B", "b", "B.", "(B)", "four", " Four ", "B. four", 1, "1"])
def test_options_are_listed_below_the_question_and_answers_are_letters(tmp_path, options, answer):
    for name in ("options", "choices"):
        entry = {"question": "2 + 2?\n", name: options, "answer": answer}
        assert read_one(tmp_path, entry) == Question(1, LISTED, "B")


def test_options_left_open_and_a_field_of_another_case(tmp_path):
    assert (
        read_one(tmp_path, {"question": "2 + 2?", "options": {"A": "three", "B": "four", "C": float("nan")}}).text
        == (LISTED[: LISTED.index("\nC.")])
    )
    assert read_one(tmp_path, {"question": "2 + 2?", "a": 7, "A": "three", "B": "four", "C": "five"}).text == LISTED


def test_options_in_columns_of_their_own(tmp_path):
    entry = {"Question": "2 + 2?", "A": "three", "B": "four", "C": "five", "Answer": "C"}
    assert read_one(tmp_path, entry) == Question(1, LISTED, "C")
    said = fault_of(tmp_path, entry | {"A": [1]})
    assert said.startswith('entry 2 has "A, B, C" that are no options')
    assert fault_of(tmp_path, entry | {"E": "x"}) == "entry 2 has the options A, B, C, E, with a gap between them"
    for others in ({"A": "a field of somebody's"}, {"B": 1, "C": 2}, {"a": 1, "b": 2}):
        assert read_one(tmp_path, {"question": "2 + 2?", **others}) == Question(1, "2 + 2?")


def test_numbers_as_labels_and_as_options(tmp_path):
    arc = {"question": "2 + 2?", "choices": {"text": OPTIONS, "label": ["1", "2", "3"]}, "answerKey": "3"}
    assert read_one(tmp_path, arc) == Question(1, "2 + 2?\n1. three\n2. four\n3. five", "3")
    # A number is a place, as in MMLU, where the options are texts of numbers.
    mmlu = {"question": "Order of 3?", "choices": ["8", "2", "24", "120"], "answer": 2}
    assert read_one(tmp_path, mmlu).answer == "C"
    for unclear in ({"answer": "2"}, {"choices": [8, 2, 24, 120]}):
        with pytest.warns(
            UserWarning, match=r'"answer" is left out where it may be more than one of the options \(give the'
        ):
            assert read_one(tmp_path, mmlu | unclear).answer is None
    assert read_one(tmp_path, mmlu | {"choices": [8, 2, 24, 120], "answer": 24}).answer == "C"


def test_options_that_the_question_lists_are_not_listed_again(tmp_path):
    """However an option is wrapped: one of the published MedQA ends in a line of its own."""
    options = ["A. one", 'B. one two\n"']
    text = 'Which?"\nA. one\nB. one two\n"\nChoose the correct option.'
    assert read_one(tmp_path, {"query": text, "options": options, "answer": 'one two\n"'}) == Question(1, text, "B")
    wrapped = 'Which?\nA.  one\nB. one\n   two\n"'
    assert read_one(tmp_path, {"query": wrapped, "options": options}).text == wrapped
    part = "Which?\nA. one\nB. one two and more"  # no option of these
    assert read_one(tmp_path, {"query": part, "options": options}).text == f'{part}\nA. one\nB. one two\n"'


CELLS_WITHOUT_OPTIONS = [
    "yes or no",
    "['three' 'four']",
    "['three'\n 'four', 'five']",
    "['three', 'four' \"five\"]",
    "{'A': 'three' 'four', 'B': 'five'}",
    "[1 2 3]",
    "array(['three', 'four'], dtype=object)",
    '"yes"',
    "'yes'",
    '["yes"]',
    '{"A": "yes"}',
    '{"text": ["yes"], "label": ["A"]}',
    "3",
    "null",
]


def test_a_list_as_numpy_prints_it_is_named(tmp_path):
    said = fault_of(tmp_path, {"question": "2 + 2?", "options": "['three' 'four']"})
    assert said.endswith(
        """with commas: ["three", "four"], not ['three' 'four'] as numpy prints an array (save .tolist())"""
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        *(
            ({"options": cell}, 'a cell "options" that holds no options; supported are lists of at least two in JSON')
            for cell in CELLS_WITHOUT_OPTIONS
        ),
        ({"choices": ["a", ["b"]]}, '"choices" that are no options; supported are lists of up to 26 texts or numbers'),
        ({"choices": '["a", ["b"]]'}, '"choices" that are no options'),
        ({"choices": ["a", float("nan")]}, '"choices" that are no options'),
        ({"choices": ["a", None]}, '"choices" that are no options'),
        ({"choices": ["x"] * 27}, '"choices" that are no options'),
        ({"choices": 3}, '"choices" that are no options'),
        ({"choices": {"text": OPTIONS, "label": ["A"]}}, '"choices" that are no options'),
        ({"options": ["a", "\ud83d"]}, "\"options\" of which one holds '\\ud83d'"),
    ],
)  # fmt: skip
def test_faults_of_options_are_named(tmp_path, more, said):
    assert fault_of(tmp_path, {"question": "2 + 2?", **more}).startswith(f"entry 2 has {said}")


def test_many_fields_and_long_names_make_no_long_message(tmp_path):
    said = fault_of(tmp_path, {f"{'field' * 100}{number}": 1 for number in range(5000)})
    assert said.endswith("and 4,992 more")
    assert len(said) < 600


# ---- formats -------------------------------------------------------------------------------------------------------

TABLE = [{"question": "One?", "answer": "1"}, {"question": 'He said "2,\n3"', "answer": "x\n#### 23"}]
WANT = [Question(1, "One?", "1"), Question(2, 'He said "2,\n3"', "23")]


def as_csv(rows):
    paper = io.StringIO()
    writer = csv.DictWriter(paper, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return paper.getvalue().encode()


def as_parquet(tmp_path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    return (tmp_path / "rows.parquet").read_bytes()


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "byte-order mark"])
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("q.jsonl", "\n".join(map(json.dumps, TABLE)).encode()),
        ("q.json", json.dumps(TABLE).encode()),
        ("q", b"\n " + json.dumps(TABLE, indent=2).encode() + b"\n"),
        ("q.csv", as_csv(TABLE)),
        ("Q.CSV", as_csv(TABLE).replace(b"\r\n", b"\n") + b"\n ,\n"),
    ],
    ids=["lines", "array", "array over lines", "csv", "csv of another system"],
)
def test_formats(tmp_path, name, data, mark):
    assert read(tmp_path, mark + data, name) == (WANT, [])


def test_parquet(tmp_path):
    """By what is in it, whatever its name; options as lists, too."""
    rows = [{**row, "choices": OPTIONS, "answer": 1, "image": b"\x00"} for row in TABLE]
    questions, faults = read(tmp_path, as_parquet(tmp_path, rows), "q.data")
    assert faults == []
    assert [question.text for question in questions] == [row["question"] + LISTED[6:] for row in TABLE]
    assert [question.answer for question in questions] == ["B", "B"]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pyarrow.* is not installed: pip install 'latentmas-kernels\[data\]'"):
        read(tmp_path, b"PAR1 and more")


def test_a_date_beyond_those_of_python_is_one_line(tmp_path):
    """pyarrow raises a plain ValueError."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    dates = pyarrow.array([10**15], pyarrow.timestamp("s"))
    parquet.write_table(pyarrow.table({"question": ["When?"], "answer": dates}), tmp_path / "q.parquet")
    with pytest.raises(LatentMASError, match="is not a Parquet file that can be read"):
        read_questions(str(tmp_path / "q.parquet"))


def test_a_damaged_parquet_file_is_one_line(tmp_path):
    data = as_parquet(tmp_path, TABLE)
    with pytest.raises(ValueError, match=r"questions\.jsonl is not a Parquet file that can be read \(") as caught:
        read(tmp_path, data[: len(data) // 2])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_without_questions_names_its_columns(tmp_path, kind):
    rows = [{"text": "One?", "gold": "1"}]
    data = as_csv(rows) if kind == "csv" else as_parquet(tmp_path, rows)
    with pytest.raises(ValueError, match='has the columns "text", "gold"; one of them must be question, .* or prompt$'):
        read(tmp_path, data, f"q.{kind}")


def test_two_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r'q\.csv has more than one column "question"'):
        read(tmp_path, b"question,Question\na,b\n", "q.csv")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (b"Well, is it?,yes", "has 3 cells where the first row has 2; put text with commas into quotes"),
        (b',"no question"', "has an empty question"),
        (b"\xff,1", "has a \"question\" that holds '\\udcff' at character 1, half a surrogate pair or a byte"),
        (b'"a"b,1', "is not CSV ("),
    ],
)
def test_a_broken_row_is_named_and_the_others_are_read(tmp_path, row, said):
    data = b'question,answer\n"over\ntwo lines",1\n' + row + b"\nlast,3\n"
    questions, faults = read(tmp_path, data, "q.csv")
    assert questions == [Question(1, "over\ntwo lines", "1"), Question(3, "last", "3")]
    assert len(faults) == 1
    assert faults[0].startswith(f"row 2 (line 4) {said}")


def test_a_quote_that_is_not_closed_is_no_long_question(tmp_path):
    questions, faults = read(tmp_path, b'question,answer\nfirst,1\n"second,2\nthird,3\n', "q.csv")
    assert questions == [Question(1, "first", "1")]
    assert len(faults) == 1
    assert "is not CSV (unexpected end of data)" in faults[0]


def test_a_cell_may_be_long(tmp_path):
    limit = csv.field_size_limit()
    text = "word " * 50_000
    assert read(tmp_path, b"question\n" + text.encode(), "q.csv") == ([Question(1, text)], [])
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'[{"question": "a"},\n{"question" "b"}]', r"is not JSON \(Expecting ':' delimiter at line 2, column 13\)"),
        (b"[\n\xff]", r"is not UTF-8 \(byte 0xff in line 2\)"),
        (b"[" * 100_000, r"is not JSON that can be read \(nested too deeply\)"),
        (b"[]", "holds no questions"),
    ],
)
def test_an_array_that_cannot_be_read_is_one_line(tmp_path, data, said):
    with pytest.raises(ValueError, match=rf"q\.json {said}"):
        read(tmp_path, data, "q.json")


def test_an_object_over_several_lines_is_one_entry(tmp_path):
    """As pretty printers write it: not a line of JSON each, and not a fault for each of them."""
    text = json.dumps({"question": "One?", "answer": 1}, indent=2).encode()
    assert read(tmp_path, text, "q.json") == ([Question(1, "One?", "1")], [])
    questions, faults = read(tmp_path, json.dumps({"data": [{"question": "One?"}]}, indent=2).encode(), "q.json")
    assert questions == []
    assert len(faults) == 1
    assert faults[0].endswith('q.json has no "question" (nor query, problem, prompt); it has "data"')


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
