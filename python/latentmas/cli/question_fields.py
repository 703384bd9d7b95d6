"""Questions from entries with the fields that public data sets use."""

import ast
import io
import json
import math
import re
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from latentmas.characters import SURROGATE, check_characters, quoted
from latentmas_kernels.errors import LatentMASError

QUESTION = ("question", "query", "problem", "prompt")
ANSWER = ("answer", "gold", "label", "answerkey")
OPTIONS = ("options", "choices")
"""Names of fields, in lower case; of several, the first counts (see `read_entry`)."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Entry:
    """A question and its expected answer.

    Attributes:
        text: the question, its options below it.
        answer: the expected one: the letter of an option, what follows "####", or all of it; several right ones are joined
            by "or". None where there is none that can be used.
        passed_over: fields that were not read, and why: another one was, or an answer cannot be used. The words are the same
            for all entries of a file with the same fault.
    """

    text: str
    answer: str | None
    passed_over: tuple[str, ...]


@dataclass(frozen=True)
class _Option:
    label: str
    text: str
    number: bool  # whether the file has a number there

    def __str__(self) -> str:
        return f"{self.label}. {self.text}"


_Fields = dict[str, tuple[str, Any]]
"""By name in lower case: the name as it is written, and the value. Only those with one."""


def read_entry(entry: Any) -> Entry:
    """Read a mapping with a question and, optionally, an answer and options; other fields are ignored.

    Of several fields that may hold the question, one that lists each option once is taken, else the first of QUESTION.
    An answer among options may be a label, the text of an option or, as a number, its place from 0. The final answer of
    GSM8K's solutions is what follows "####" in their last line. An answer that cannot be used is None, with a word in
    `passed_over`: the question can be asked without it.

    Raises:
        LatentMASError: says what is wrong with the question or its options, to go on from "line 3 ".
    """
    if not isinstance(entry, dict):
        raise LatentMASError(f'is {_kind(entry)}, not an object with "question"')
    fields = {str(name).strip().lower(): (str(name), value) for name, value in reversed(entry.items()) if _given(value)}
    options = _options(entry, fields)
    lines = [str(option) for option in options]

    names = [name for name in QUESTION if name in fields]
    if not names:
        empty = any(str(name).strip().lower() in QUESTION for name in entry)
        raise LatentMASError(
            "has an empty question" if empty else f"has no {_either(QUESTION)}; it has {listed(entry)}"
        )
    once = [name for name in names if lines and all(_times(line, fields[name][1]) == 1 for line in lines)]
    name = (once or names)[0]
    written, text = fields[name]
    if not isinstance(text, str):
        raise LatentMASError(f'has a "{written}" that is {_kind(text)}, not text')
    check_characters(text, f'has a "{written}" that')
    if not all(_times(line, text) for line in lines):
        text = "\n".join([text.rstrip(), *lines])
    passed_over = _passed_over(entry, QUESTION, written, fields[name][1]) + _options_passed_over(entry, fields)

    answers = [name for name in ANSWER if name in fields]
    if not answers:
        return Entry(text, None, passed_over)
    written, value = fields[answers[0]]
    passed_over += _passed_over(entry, ANSWER, written, value)
    try:
        return Entry(text, _answer(value, options), passed_over)
    except LatentMASError as error:
        return Entry(text, None, (*passed_over, f"{quoted(written)} is left out where it {error}"))


def _given(value: Any) -> bool:
    """Return whether a field holds something: not null, NaN, blank text or an empty list."""
    missing = value is None or value in ([], {}) or (isinstance(value, float) and math.isnan(value))
    return not (missing or (isinstance(value, str) and not value.strip()))


# ---- options ---------------------------------------------------------------------------------------------------------


def _options(entry: dict[Any, Any], fields: _Fields) -> list[_Option]:
    """Return the options; none where the entry has no list of them, and no fields A, B ..."""
    name = next((name for name in OPTIONS if name in fields), None)
    if name is not None:
        written, texts = fields[name]
    else:
        letters = "".join(letter for letter in LETTERS if _given(entry.get(letter)))
        if not letters.startswith("AB"):  # one letter alone is somebody's own field
            return []
        written, texts = ", ".join(letters), [entry[letter] for letter in letters]
        if not LETTERS.startswith(letters):
            raise LatentMASError(f"has the options {written}, with a gap between them")
    in_a_cell = isinstance(texts, str)
    if in_a_cell:
        texts = _cell(texts)
    if isinstance(texts, Mapping) and {"text", "label"} <= set(texts):  # ARC, CommonsenseQA
        labels, texts = texts["label"], texts["text"]
    elif isinstance(texts, Mapping):
        given = {label: text for label, text in texts.items() if isinstance(text, str) or _given(text)}
        labels, texts = list(given), list(given.values())
    elif isinstance(texts, Sequence):
        labels, texts = list(LETTERS[: len(texts)]), _without_letters(texts)
    else:
        labels = None
    lists = isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels) > 0
    if in_a_cell and not (lists and len(texts) > 1):
        raise LatentMASError(
            f'has a cell "{written}" that holds no options; supported are lists of at least two in JSON or as Python writes '
            """them, with commas: ["three", "four"], not ['three' 'four'] as numpy prints an array (save .tolist())"""
        )
    if not lists or not all(_is_text(part) for part in [*texts, *labels]):
        raise LatentMASError(
            f'has "{written}" that are no options; supported are lists of up to {len(LETTERS)} texts or numbers, and texts '
            "by letter"
        )
    options = [
        _Option(str(label).strip(), str(text).strip(), not isinstance(text, str))
        for label, text in zip(labels, texts, strict=True)
    ]
    for option in options:
        check_characters(str(option), f'has "{written}" of which one')
    return options


def _cell(text: str) -> list[Any] | dict[Any, Any] | None:
    """Return a list or mapping in a cell of a table, as JSON or as Python writes it; None where it is neither."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
        if _joins_texts(text):
            return None
    value = list(value) if isinstance(value, tuple) else value
    return value if isinstance(value, list | dict) else None


def _joins_texts(literal: str) -> bool:
    """Return whether texts follow each other without a comma, which Python reads as one: numpy prints arrays so."""
    tokens = tokenize.generate_tokens(io.StringIO(literal.strip()).readline)
    kinds = [token.type for token in tokens if token.type != tokenize.NL]
    return any(first == second == tokenize.STRING for first, second in pairwise(kinds))


def _is_text(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool) and _given(value)


def _without_letters(texts: Sequence[Any]) -> list[Any]:
    """Return "yes", "no" of "A. yes", "B. no", where all of them begin so."""
    begins = [re.match(r"\s*\(?([A-Z])[.):]\s+", text) if isinstance(text, str) else None for text in texts]
    if [found and found[1] for found in begins] != list(LETTERS[: len(texts)]):
        return list(texts)
    return [text[found.end() :] for text, found in zip(texts, begins, strict=True) if found]


def _times(line: str, text: Any) -> int:
    """Count how often an option stands in a text, however it is wrapped there."""
    words = r"\s+".join(map(re.escape, line.split()))
    return len(re.findall(rf"(?<!\S){words}(?!\S)", text)) if isinstance(text, str) else 0


# ---- answers ---------------------------------------------------------------------------------------------------------


def _answer(value: Any, options: list[_Option]) -> str:
    """Return the expected answer; a LatentMASError says why there is none, in the same words for all values."""
    right = []
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, bool):
            part = str(part).lower()
        if not isinstance(part, str | int | float) or not _given(part):
            raise LatentMASError("is neither text, a number, true or false, nor a list of these")
        if SURROGATE.search(str(part)):
            raise LatentMASError("holds half a surrogate pair or a byte that is not UTF-8")
        right.append(_label(part, options) if options else _final(str(part)))
    right = list(dict.fromkeys(right))
    if options and len(right) > 1:
        raise LatentMASError("is more than one of the options")
    return " or ".join(right)


def _label(answer: str | int | float, options: list[_Option]) -> str:
    """Return the label of the option that is meant."""
    given = " ".join(str(answer).split()).casefold()
    for option in options:
        label = option.label.casefold()
        if given in (label, f"{label}.", f"{label})", f"({label})", " ".join(str(option).split()).casefold()):
            return option.label
    meant = {
        option.label
        for option in options
        if " ".join(option.text.split()).casefold() == given and (option.number or isinstance(answer, str))
    }
    if re.fullmatch("[0-9]{1,2}", given) and int(given) < len(options):
        meant.add(options[int(given)].label)
    if len(meant) == 1:
        return meant.pop()
    raise LatentMASError("may be more than one of the options (give the letter)" if meant else "is none of the options")


def _final(answer: str) -> str:
    found = re.search(r"(?:\A|\n)[ \t]*####[ \t]*(\S[^\n]*?)\s*\Z", answer)
    return found[1] if found else answer


# ---- words -----------------------------------------------------------------------------------------------------------


def listed(names: Any, most: int = 8) -> str:
    """Return names in quotes, of many the first ones and their count."""
    names = [str(name) for name in names]
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(quoted, names[:most])) + more or "nothing"


def _passed_over(entry: dict[Any, Any], names: Sequence[str], written: str, value: Any) -> tuple[str, ...]:
    """Say which fields of those names, in any case, hold something else than the one that was read."""
    others = [
        name for name, other in entry.items()
        if str(name).strip().lower() in names and _given(other) and other != value
    ]  # fmt: skip
    return (f"{quoted(written)} is read, not {listed(others)}",) if others else ()


def _options_passed_over(entry: dict[Any, Any], fields: _Fields) -> tuple[str, ...]:
    name = next((name for name in OPTIONS if name in fields), None)
    return () if name is None else _passed_over(entry, OPTIONS, *fields[name])


def _either(names: Sequence[str]) -> str:
    first, *others = names
    return f'"{first}" (nor {", ".join(others)})'


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
