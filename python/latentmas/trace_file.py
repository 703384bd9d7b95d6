"""The file of --trace: what every agent of a run thought, step by step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from latentmas.questions import Question
from latentmas.tracing import AgentTrace, trace_document, trace_table, write_trace

TOP_K = 5
"""Tokens that are kept of each step."""


class TraceFile:
    """Collects the traces of batches and writes them at the end, whatever ends the run. A context manager."""

    def __init__(self, path: str | Path, tokenizer: Any, console: Console | None) -> None:
        """
        Args:
            path: takes the place of a file that is there.
            tokenizer: spells the tokens.
            console: where to print each batch as a table; None is nowhere.

        Raises:
            ValueError: where there can be no such file.
        """
        self.path, self.tokenizer, self.console = Path(path), tokenizer, console
        check_trace_path(path)
        self.questions: list[Any] = []

    def __enter__(self) -> "TraceFile":
        return self

    def __exit__(self, *error: object) -> None:
        if self.questions:
            write_trace(self.path, {"questions": self.questions})

    def add(self, batch: Sequence[Question], traces: Sequence[AgentTrace]) -> None:
        """Take in a batch and show it."""
        self.questions += trace_document(traces, batch, self.tokenizer)["questions"]
        if self.console is not None:
            trace_table(self.console, traces, batch, self.tokenizer)


def check_trace_path(path: str | Path) -> None:
    """Raise ValueError where no file can be written; before a model is loaded."""
    if Path(path).is_dir() or not Path(path).parent.is_dir():
        raise ValueError(f"cannot write the trace to {path}: its folder must exist, and it must be no folder itself")
