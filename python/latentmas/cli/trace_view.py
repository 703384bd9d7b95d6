"""What the agents of a run think: a table per question and agent to read, a document to work on, and the file of --trace."""

import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from latentmas.chain.results import AgentTrace
from latentmas.characters import visible
from latentmas.cli.questions import Question
from latentmas.cli.token_text import Spelling, printable, readable
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.storage import atomic_write
from latentmas_kernels.trace import LatentTrace

TOP_K = 5
"""Tokens that are kept of each step in a file of `TraceFile`."""


def trace_table(
    console: Console | None, traces: Sequence[AgentTrace], questions: Sequence[Question | str], tokenizer: Any
) -> None:
    """Print what the agents of a batch think: for each question one table per agent, with a row for every step.

    A row says which tokens the state behind the step would have become, with their probabilities; the norm of that state;
    the cosine of the embedding that was fed to that of the step before; and the token whose embedding is nearest to it,
    with the distance, 1 - cosine. Spaces in tokens show as ␣, and what cannot be seen is escaped as in Python.

    Args:
        console: where to print; None is standard output.
        traces: one per agent that thought, in the order of the chain.
        questions: of the batch, in its order; strings are numbered from 1.
        tokenizer: the model's.

    Raises:
        LatentMASError: where the traces are of another number of questions.
    """
    console = Console() if console is None else console
    spellings = _spellings(traces, tokenizer)
    for row, question in _rows(traces, questions):
        title = Text(f"Question {question.number} ", "bold").append(visible(question.text), "not bold")
        console.print(title, soft_wrap=True)
        for agent, spelling in zip(traces, spellings, strict=True):
            steps = agent.trace.steps[row]
            count = "1 step" if steps == 1 else f"{steps} steps"
            console.print(Text(f"\n{visible(agent.agent)} ", "bold").append(count, "not bold dim"), soft_wrap=True)
            if steps:
                console.print(_table(agent.trace, row, spelling))
        console.print()


def trace_document(
    traces: Sequence[AgentTrace], questions: Sequence[Question | str], tokenizer: Any
) -> dict[str, list[dict[str, Any]]]:
    """Return what the agents of a batch think, for `json.dumps`. No number is NaN or Inf: what is not known is None.

    Args:
        traces, questions, tokenizer: as in `trace_table`.

    Returns:
        {"questions": [{number, question, agents: [{agent, steps: [{step, says: [{token_id, text, probability}], norm,
        cosine, nearest: {token_id, text, distance}, finite}]}]}]}. Steps are counted from 1. says is empty and norm None
        where the state holds NaN or Inf, nearest None where the embedding does; cosine is None for the first step too. In a
        text, bytes that are no UTF-8 by themselves read \\xNN. Documents of several batches join by their lists.

    Raises:
        LatentMASError: as `trace_table`.
    """
    spellings = _spellings(traces, tokenizer)
    return {
        "questions": [
            {
                "number": question.number,
                "question": question.text,
                "agents": [
                    {"agent": agent.agent, "steps": [_entry(step, spelling) for step in _steps(agent.trace, row)]}
                    for agent, spelling in zip(traces, spellings, strict=True)
                ],
            }
            for row, question in _rows(traces, questions)
        ]
    }


def write_trace(path: str | Path, document: dict[str, Any]) -> None:
    """Write a document of `trace_document` as JSON, complete or not at all; an existing file is replaced.

    Raises:
        OSError: where it cannot be written; what was there stays as it was.
        ValueError: where the document holds NaN or Inf.
    """
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    try:
        with atomic_write(Path(path)) as temporary:
            temporary.write_text(text, encoding="ascii")
            temporary.chmod(0o666 & ~_umask())  # a temporary file is for its owner alone
    except OSError as error:
        raise OSError(
            f"cannot write the trace to {path}: {error.strerror or error}; make room, or name another file"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---- rows and steps ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """One latent step as plain numbers; None where there is none."""

    number: int
    says: list[tuple[int, float]]
    norm: float | None
    cosine: float | None
    nearest: tuple[int, float] | None
    finite: bool


def _rows(traces: Sequence[AgentTrace], questions: Sequence[Question | str]) -> Iterator[tuple[int, Question]]:
    for agent in traces:
        if len(agent.trace.steps) != len(questions):
            raise LatentMASError(
                f"the trace of {agent.agent!r} has {len(agent.trace.steps)} rows for {len(questions)} questions; pass the "
                "questions of its batch"
            )
    for row, question in enumerate(questions):
        yield row, Question(row + 1, question) if isinstance(question, str) else question


def _steps(trace: LatentTrace, row: int) -> Iterator[_Step]:
    """Yield the steps that a row took, and no more."""
    names = ("tokens", "probabilities", "norms", "cosines", "nearest", "distances", "finite")
    columns = [getattr(trace, name)[row, : trace.steps[row]].tolist() for name in names]
    for step, values in enumerate(zip(*columns, strict=True), start=1):
        tokens, probabilities, norm, cosine, nearest, distance, finite = values
        says = list(zip(tokens, probabilities, strict=True)) if tokens[0] >= 0 else []
        yield _Step(step, says, _number(norm), _number(cosine), (nearest, distance) if nearest >= 0 else None, finite)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _short(norm: float) -> str:
    return f"{norm:.1f}" if 1 <= norm < 1e5 else f"{norm:.3g}"


def _entry(step: _Step, spelling: Spelling) -> dict[str, Any]:
    def token(token_id: int) -> dict[str, Any]:
        return {"token_id": token_id, "text": readable(spelling(token_id))}

    return {
        "step": step.number,
        "says": [{**token(token_id), "probability": probability} for token_id, probability in step.says],
        "norm": step.norm,
        "cosine": step.cosine,
        "nearest": None if step.nearest is None else {**token(step.nearest[0]), "distance": step.nearest[1]},
        "finite": step.finite,
    }


def _table(trace: LatentTrace, row: int, spelling: Spelling) -> Table:
    """Return a table of a row's steps. Cells are folded where the console is narrow: nothing is left out."""
    table = Table(box=None, pad_edge=False)
    for name in ("step", "says", "norm", "cosine", "nearest"):
        table.add_column(name, justify="left" if name in ("says", "nearest") else "right", overflow="fold")

    def scored(tokens: Sequence[tuple[int, float]]) -> Text:
        # Text, never markup: a token may be "[/]". Spaces in tokens are spelled out, so those here tell tokens apart.
        pieces = [Text(printable(spelling(token_id))).append(f" {score:.2f}", "dim") for token_id, score in tokens]
        return Text("  ").join(pieces)

    for step in _steps(trace, row):
        says = scored(step.says)
        if not (step.finite and step.says):
            mark = "NaN or Inf in the logits" if step.finite else "NaN or Inf"
            says = Text("  ").join([Text(mark, "bold red"), *([says] if says else [])])
        table.add_row(
            str(step.number),
            says,
            "" if step.norm is None else _short(step.norm),
            "" if step.cosine is None else f"{step.cosine:.3f}",
            scored([] if step.nearest is None else [step.nearest]),
        )
    return table


def _spellings(traces: Sequence[AgentTrace], tokenizer: Any) -> list[Spelling]:
    """Return the spelling of each agent's tokens; one object for each tokenizer."""
    theirs = [tokenizer if agent.tokenizer is None else agent.tokenizer for agent in traces]
    known = {id(one): Spelling(one) for one in theirs}
    return [known[id(one)] for one in theirs]


# ---- the file of --trace --------------------------------------------------------------------------------------------


class TraceFile:
    """The file of --trace: the traces of batches, written at the end of its block, whatever ends that. A context manager."""

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
        """Add the traces of a batch and print them."""
        self.questions += trace_document(traces, batch, self.tokenizer)["questions"]
        if self.console is not None:
            trace_table(self.console, traces, batch, self.tokenizer)


def check_trace_path(path: str | Path, others: Sequence[str | Path]) -> None:
    """Raise LatentMASError where no file can be written, or one of the others would be lost; before a model is loaded."""
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
