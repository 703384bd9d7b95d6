"""Questions from a file, standard input or the sample that comes with the package."""

import json
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

SAMPLE = "sample"


@dataclass(frozen=True)
class Question:
    """One question; `number` is that of its line, `answer` the expected one, if there is one."""

    number: int
    text: str
    answer: str | None = None


def read_questions(source: str) -> tuple[list[Question], list[str]]:
    """Read JSON lines with "question" and, optionally, "answer". Empty lines are passed over, other keys ignored.

    Args:
        source: a file; "-" is standard input, "sample" the eight questions of this package.

    Returns:
        The questions, and what is wrong with each line that has none ("line 3 is not JSON (...)").

    Raises:
        ValueError: where there is not a single line.
        OSError: where the file cannot be read.
    """
    if source == SAMPLE:
        data = files("latentmas").joinpath("sample.jsonl").read_bytes()
    else:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    questions, faults = [], []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            questions.append(_question(number, line))
        except ValueError as error:
            faults.append(f"line {number} {error}")
    if not questions and not faults:
        name = "standard input" if source == "-" else source
        raise ValueError(
            f'{name} holds no questions; supported are JSON lines with "question" and, optionally, "answer"'
        )
    return questions, faults


def _question(number: int, line: bytes) -> Question:
    try:
        entry = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(entry, dict) or "question" not in entry:
        raise ValueError('has no "question"')
    text, answer = entry["question"], entry.get("answer")
    if not isinstance(text, str):
        raise ValueError(f'has a "question" that is {type(text).__name__}, not text')
    if not text.strip():
        raise ValueError("has an empty question")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float | None):
        raise ValueError(f'has an "answer" that is {type(answer).__name__}, neither text nor a number')
    return Question(number, text, None if answer is None else str(answer))
