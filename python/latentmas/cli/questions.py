"""Read questions from a file, standard input or the sample that comes with the package."""

import csv
import io
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from latentmas.characters import decoded, first_line, without_mark
from latentmas.cli.question_fields import ANSWER, LETTERS, OPTIONS, QUESTION, listed, read_entry
from latentmas_kernels.errors import LatentMASError

SAMPLE = "sample"
SUPPORTED = (
    "supported are JSON lines, a JSON array, CSV (in a file whose name ends in .csv) and Parquet, "
    'with "question" and, optionally, "answer" and "options" (docs/questions.md)'
)


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        number: of its line, or from 1 among the entries of an array or the rows of a table.
        text: with its options, where it has some.
        answer: the expected one, if there is one: the letter of an option, what follows "####", or all of it.
    """

    number: int
    text: str
    answer: str | None = None


_Placed = tuple[int, str, Any]
"""A question's number, where it stands ("line 3"), and what stands there; the error where that could not be read."""


def questions_to_ask(question: str | None, source: str | None) -> tuple[list[Question], list[str]]:
    """Return the questions that the command line asks for, and what is wrong with the entries that hold none.

    Args:
        question: the question itself; "-" reads it from standard input.
        source: as in `read_questions`; not both. Without either, the first question of the sample is asked.

    Raises:
        LatentMASError: as `read_questions`.
        OSError: where the file cannot be opened.
    """
    if source is not None:
        return read_questions(source)
    if question is None:
        return read_questions(SAMPLE)[0][:1], []
    if question == "-":
        question = decoded(standard_input(), "standard input").strip()
    return [Question(1, question)], []


def read_questions(source: str) -> tuple[list[Question], list[str]]:
    """Read questions and, where there are some, their options and expected answers.

    JSON lines (empty ones are passed over), a JSON array of objects, CSV with names of columns in its first row (where the
    name ends in .csv) and Parquet. `latentmas.cli.question_fields` has the names of fields; others are ignored.

    Args:
        source: a file; "-" is standard input, "sample" the eight questions of this package.

    Returns:
        The questions, and what is wrong with each entry that has none ("line 3 is not JSON (...)").

    Raises:
        LatentMASError: where there is not a single entry, or the file as a whole cannot be read.
        OSError: where the file cannot be opened.
    """
    name = "standard input" if source == "-" else source
    if source == SAMPLE:
        data = files("latentmas.cli").joinpath("sample.jsonl").read_bytes()
    else:
        data = standard_input() if source == "-" else without_mark(Path(source).read_bytes(), source)
    questions, faults, passed_over = [], [], dict[str, str]()
    for number, place, entry in _entries(name, data):
        try:
            if isinstance(entry, LatentMASError):
                raise entry
            read = read_entry(entry)
            questions.append(Question(number, read.text, read.answer))
            passed_over = dict.fromkeys(read.passed_over, place) | passed_over
        except LatentMASError as error:
            faults.append(f"{place} {error}")
    if not questions and not faults:
        raise LatentMASError(f"{name} holds no questions; {SUPPORTED}")
    for message, place in passed_over.items():
        warnings.warn(f"{name}: {message} (first in {place})", stacklevel=2)
    return questions, faults


def standard_input() -> bytes:
    """Return all of standard input, without a byte-order mark.

    Raises:
        LatentMASError: where it is closed, or in another encoding than UTF-8.
    """
    if sys.stdin is None:
        raise LatentMASError("standard input is closed; give a question, or a file with --questions")
    return without_mark(sys.stdin.buffer.read(), "standard input")


def _entries(name: str, data: bytes) -> Iterator[_Placed]:
    if data.startswith(b"PAR1"):
        return _parquet(name, data)
    if name.lower().endswith(".csv"):
        return _csv(name, data)
    if data.lstrip().startswith(b"["):
        return _array(name, data)
    return _lines(name, data)


def _lines(name: str, data: bytes) -> Iterator[_Placed]:
    lines = data.split(b"\n")
    if data.strip() and not any(line.lstrip().startswith(b"{") for line in lines):
        raise LatentMASError(f"{name} is neither JSON nor JSON lines: not one line begins with {{; {SUPPORTED}")
    if lines[0].strip() == b"{":  # an object over several lines
        yield 1, f"the object in {name}", _json(decoded(data, name), name)
        return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, f"line {number}", _json(line.decode())
            except UnicodeDecodeError as error:
                yield number, f"line {number}", LatentMASError(f"is not UTF-8 ({error.reason} at byte {error.start})")
            except LatentMASError as error:
                yield number, f"line {number}", error


def _array(name: str, data: bytes) -> Iterator[_Placed]:
    try:
        entries = _json(decoded(data, name), name)
    except LatentMASError as error:
        raise LatentMASError(f"{error}; {SUPPORTED}") from error
    for number, entry in enumerate(entries, start=1):
        yield number, f"entry {number}", entry


def _json(text: str, name: str = "") -> Any:
    """Parse JSON; raise LatentMASError where it is none. With a name, the text is a file of several lines."""
    begin = f"{name} " if name else ""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if name else ""
        raise LatentMASError(f"{begin}is not JSON ({error.msg} at {line}column {error.colno})") from error
    except RecursionError as error:
        raise LatentMASError(f"{begin}is not JSON that can be read (nested too deeply)") from error
    except ValueError as error:  # a number of thousands of digits
        raise LatentMASError(f"{begin}is not JSON that can be read ({error})") from error


def _csv(name: str, data: bytes) -> Iterator[_Placed]:
    # A byte that is not UTF-8 becomes half a surrogate pair, which is a fault of its row alone.
    text = data.decode(errors="surrogateescape")
    limit = csv.field_size_limit(max(len(text), 1))
    try:
        rows = _csv_rows(text)
        _, names = next(rows, (0, None))
        if isinstance(names, csv.Error):
            raise LatentMASError(f"{name} is not CSV ({names} in its first row)") from names
        if names is not None:
            _check_columns(name, names)
            for number, (line, row) in enumerate(rows, start=1):
                yield number, f"row {number} (line {line})", _csv_entry(names, row)
    finally:
        csv.field_size_limit(limit)


def _csv_rows(text: str) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Yield the rows that hold something, or the error of a row that cannot be read; each with its last line's number."""
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield rows.line_num, error
        else:
            if any(cell.strip() for cell in row):
                yield rows.line_num, row


def _csv_entry(names: list[str], row: list[str] | csv.Error) -> dict[str, str] | LatentMASError:
    if isinstance(row, csv.Error):
        return LatentMASError(f"is not CSV ({row})")
    if len(row) > len(names):
        return LatentMASError(
            f"has {len(row)} cells where the first row has {len(names)}; put text with commas into quotes"
        )
    return dict(zip(names, row, strict=False))


def _parquet(name: str, data: bytes) -> Iterator[_Placed]:
    try:  # optional
        from pyarrow import ArrowException, BufferReader, parquet
    except ModuleNotFoundError as error:
        raise LatentMASError(
            f"{name} is a Parquet file, and pyarrow, which reads those, is not installed: pip install "
            "'latentmas-kernels[data]', or save it as JSON lines"
        ) from error
    try:
        file = parquet.ParquetFile(BufferReader(data))
        columns = file.schema_arrow.names
        _check_columns(name, columns)
        known = {*QUESTION, *ANSWER, *OPTIONS, *LETTERS.lower()}
        rows = file.read(columns=[column for column in columns if column.strip().lower() in known]).to_pylist()
    except LatentMASError:
        raise
    except (ArrowException, OSError, ValueError, OverflowError) as error:  # the latter for a date beyond Python's
        raise LatentMASError(f"{name} is not a Parquet file that can be read ({first_line(error)})") from error
    for number, row in enumerate(rows, start=1):
        yield number, f"row {number}", row


def _check_columns(name: str, columns: list[str]) -> None:
    """Raise LatentMASError where no row can hold a question, or it would not be known which column it is in."""
    names = [column.strip().lower() for column in columns]
    if not set(names) & set(QUESTION):
        raise LatentMASError(
            f"{name} has the columns {listed(columns)}; one of them must be {', '.join(QUESTION[:-1])} or {QUESTION[-1]}"
        )
    twice = [column for column in names if names.count(column) > 1 and column]
    if twice:
        raise LatentMASError(f"{name} has more than one column {listed(twice[:1])}; give each a name of its own")
