"""The file of --trace: what every agent of a run thought, step by step."""

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from latentmas.cli.questions import Question
from latentmas.cli.trace_view import AgentTrace, trace_document, trace_table, write_trace
from latentmas_kernels.errors import LatentMASError

TOP_K = 5
"""Tokens that are kept of each step."""


class TraceFile:
    """Collects the traces of batches and writes them at the end of its block, whatever ends that. A context manager."""

    def __init__(self, path: str | Path, tokenizer: Any, console: Console | None) -> None:
        """
        Args:
            path: takes the place of a file that is there.
            tokenizer: spells the tokens.
            console: where to print each batch as a table; None is nowhere.

        """
        self.path, self.tokenizer, self.console = Path(path), tokenizer, console
        self.questions: list[Any] = []

    def __enter__(self) -> "TraceFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if not self.questions:
            return
        try:
            write_trace(self.path, {"questions": self.questions})
        except OSError as fault:
            if kind is None:
                raise
            warnings.warn(str(fault), stacklevel=2)  # what ended the block says more

    def add(self, batch: Sequence[Question], traces: Sequence[AgentTrace]) -> None:
        """Take in a batch and show it."""
        self.questions += trace_document(traces, batch, self.tokenizer)["questions"]
        if self.console is not None:
            trace_table(self.console, traces, batch, self.tokenizer)


def check_trace_path(path: str | Path, others: Sequence[str | Path]) -> None:
    """Raise ValueError where no file can be written, or one of the others would be lost; before a model is loaded."""
    place = Path(path)
    if place.resolve() in [Path(other).resolve() for other in others]:
        raise LatentMASError(
            f"cannot write the trace to {path}: this run reads or writes it as something else; name another file"
        )
    if not place.parent.is_dir() or (place.exists() and not place.is_file()):
        raise LatentMASError(
            f"cannot write the trace to {path}: its folder must exist, and what is there must be a plain file or nothing"
        )
    try:
        with tempfile.TemporaryFile(dir=place.parent):
            pass
    except OSError as error:
        raise LatentMASError(
            f"cannot write the trace to {path}: {error.strerror}; name a file in another folder"
        ) from error
