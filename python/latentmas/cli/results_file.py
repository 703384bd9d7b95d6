"""A file of results, a line of JSON each: finished ones stay whole whatever ends the run, and a run can go on."""

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentmas.cli.questions import Question
from latentmas_kernels.errors import LatentMASError


class ResultsFile:
    """A file that results are appended to. A context manager: a file that it made and wrote nothing to is removed.

    Attributes:
        done: the results that were there, by number of the question.
        written: how many results this run has added.
    """

    def __init__(
        self,
        path: str | Path,
        questions: Sequence[Question],
        settings: dict[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        """Open the file, or raise before any work is done.

        Args:
            path: the file; its folder must exist.
            questions: of this run; results of others are refused.
            settings: of this run, kept in each result; results with others are refused.
            resume: go on behind the results that are there. A last line that was cut off is dropped, with a warning.
            overwrite: replace what is there, when the first result comes.

        Raises:
            LatentMASError: where the file has results and neither is asked for, or ones that this run cannot go on from.
            OSError: where it cannot be written.
        """
        if resume and overwrite:
            raise LatentMASError(
                "got both --resume and --overwrite; go on from the results that are there, or replace them"
            )
        self.path, self.settings = Path(path), settings
        self.done: dict[int, dict[str, Any]] = {}
        self.written = 0
        self._made = not self.path.exists()
        if not self._made and not self.path.is_file():
            raise LatentMASError(f"{self.path} is not a file; name a file to write results to")
        if not self._made and self.path.stat().st_size and not (resume or overwrite):
            raise LatentMASError(
                f"{self.path} exists; go on from it with --resume, replace it with --overwrite, or name another"
            )
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._whole = 0 if overwrite else self._read(questions)
        except BaseException:
            os.close(self._handle)
            raise

    def __enter__(self) -> "ResultsFile":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._handle)
        if self._made and not self.written:
            self.path.unlink(missing_ok=True)

    def write(self, results: Sequence[dict[str, Any]]) -> None:
        """Append results, all of them or none.

        Raises:
            OSError: where they cannot be written; says how many are kept.
        """
        lines = "".join(json.dumps({**result, "settings": self.settings}) + "\n" for result in results).encode()
        size, left = self._whole, memoryview(lines)
        try:
            os.ftruncate(self._handle, size)  # an overwritten file, or a line that was cut off
            while left:
                left = left[os.write(self._handle, left) :]
        except BaseException as error:
            os.ftruncate(self._handle, size)
            if not isinstance(error, OSError):
                raise
            kept = len(self.done) + self.written
            raise OSError(
                f"cannot write to {self.path}: {error.strerror}; {kept} finished results are kept in it: make room and go "
                "on with --resume"
            ) from error
        self._whole += len(lines)
        self.written += len(results)

    def _read(self, questions: Sequence[Question]) -> int:
        """Read the results that are there into `done`; return the size of the complete lines in bytes."""
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            warnings.warn(f"the last line of {self.path} was cut off and is written again", stacklevel=4)
        texts = {question.number: question.text for question in questions}
        for line, entry in enumerate(data[:whole].splitlines(), start=1):
            try:
                result = json.loads(entry)
                number, question, settings = result["number"], result["question"], dict(result["settings"])
                asked = texts.get(number)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise LatentMASError(
                    f"{self.path} line {line} is no result of latentmas run; name another file, or replace it with --overwrite"
                ) from error
            other = [name for name in self.settings if settings.get(name) != self.settings[name]]
            if other:
                was = ", ".join(f"{name}={settings.get(name)}" for name in other)
                now = ", ".join(f"{name}={self.settings[name]}" for name in other)
                raise LatentMASError(
                    f"{self.path} line {line} was made with {was}; this run has {now}: go on with the same, or name "
                    "another file"
                )
            if asked != question:
                raise LatentMASError(
                    f"{self.path} line {line} answers another question {number} than this run asks; go on with the same "
                    "questions, or name another file"
                )
            self.done[number] = result
        return whole
