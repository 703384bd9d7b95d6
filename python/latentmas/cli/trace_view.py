"""The latent steps of a run: a table per question and agent to read, a document to work on, and the file of --trace."""

import json
import math
import os
import tempfile
import warnings
from collections.abc import Sequence
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
    """Print the latent steps of a batch: for each question one table per agent, with a row for every step.

    A row says which tokens the state behind the step would have become, with their probabilities; the norm of that state;
    the cosine of the embedding that was fed to that of the step before; and the token whose embedding is nearest to it,
    with the distance, 1 - cosine. Spaces in tokens show as ␣, and what cannot be seen is escaped as in Python.

    Args:
        console: where to print; None is standard output.
        traces: one per agent that ran latent steps, in the order of the chain.
        questions: of the batch, in its order; strings are numbered from 1.
        tokenizer: the model's.

    Raises:
        LatentMASError: where the traces are of another number of questions.
    """
    console = Console() if console is None else console
    spellings = _spellings(traces, tokenizer)
    for question in trace_document(traces, questions, tokenizer)["questions"]:
        title = Text(f"Question {question['number']} ", "bold").append(visible(question["question"]), "not bold")
        console.print(title, soft_wrap=True)
        for agent, spelling in zip(question["agents"], spellings, strict=True):
            steps = agent["steps"]
            count = "1 step" if len(steps) == 1 else f"{len(steps)} steps"
            console.print(Text(f"\n{visible(agent['agent'])} ", "bold").append(count, "not bold dim"), soft_wrap=True)
            if steps:
                console.print(_table(steps, spelling))
        console.print()


def trace_document(
    traces: Sequence[AgentTrace], questions: Sequence[Question | str], tokenizer: Any
) -> dict[str, list[dict[str, Any]]]:
    """Return the latent steps of a batch, for `json.dumps`. No number is NaN or Inf: what is not known is None.

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
    for agent in traces:
        if len(agent.trace.steps) != len(questions):
            raise LatentMASError(
                f"the trace of {agent.agent!r} has {len(agent.trace.steps)} rows for {len(questions)} questions; pass the "
                "questions of its batch"
            )
    agents = list(zip(traces, _spellings(traces, tokenizer), strict=True))
    document = []
    for row, question in enumerate(questions):
        if isinstance(question, str):
            question = Question(row + 1, question)
        steps = [{"agent": agent.agent, "steps": _steps(agent.trace, row, spelling)} for agent, spelling in agents]
        document.append({"number": question.number, "question": question.text, "agents": steps})
    return {"questions": document}


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


# ---- steps ---------------------------------------------------------------------------------------------------------


def _steps(trace: LatentTrace, row: int, spelling: Spelling) -> list[dict[str, Any]]:
    """Return the steps that a row took, and no more, as a document has them."""

    def token(token_id: int, **score: float) -> dict[str, Any]:
        return {"token_id": token_id, "text": readable(spelling(token_id)), **score}

    names = ("tokens", "probabilities", "norms", "cosines", "nearest", "distances", "finite")
    columns = [getattr(trace, name)[row, : trace.steps[row]].tolist() for name in names]
    steps = []
    for number, values in enumerate(zip(*columns, strict=True), start=1):
        tokens, probabilities, norm, cosine, nearest, distance, finite = values
        likely = zip(tokens, probabilities, strict=True) if tokens[0] >= 0 else ()
        steps.append(
            {
                "step": number,
                "says": [token(token_id, probability=probability) for token_id, probability in likely],
                "norm": norm if math.isfinite(norm) else None,
                "cosine": cosine if math.isfinite(cosine) else None,
                "nearest": token(nearest, distance=distance) if nearest >= 0 else None,
                "finite": finite,
            }
        )
    return steps


def _table(steps: Sequence[dict[str, Any]], spelling: Spelling) -> Table:
    """Return a table of steps of a document. Cells are folded where the console is narrow: nothing is left out."""
    table = Table(box=None, pad_edge=False)
    for name in ("step", "says", "norm", "cosine", "nearest"):
        table.add_column(name, justify="left" if name in ("says", "nearest") else "right", overflow="fold")

    def scored(token: dict[str, Any], score: str) -> Text:
        # Text, never markup: a token may be "[/]". Spaces in tokens are spelled out, so those between tokens tell them apart.
        return Text(printable(spelling(token["token_id"]))).append(f" {token[score]:.2f}", "dim")

    for step in steps:
        says = [scored(token, "probability") for token in step["says"]]
        if not (step["finite"] and says):
            says.insert(0, Text("NaN or Inf in the logits" if step["finite"] else "NaN or Inf", "bold red"))
        norm, cosine, nearest = step["norm"], step["cosine"], step["nearest"]
        table.add_row(
            str(step["step"]),
            Text("  ").join(says),
            "" if norm is None else f"{norm:.1f}" if 1 <= norm < 1e5 else f"{norm:.3g}",
            "" if cosine is None else f"{cosine:.3f}",
            "" if nearest is None else scored(nearest, "distance"),
        )
    return table


def _spellings(traces: Sequence[AgentTrace], tokenizer: Any) -> list[Spelling]:
    """Return the spelling of each agent's tokens; one object for each tokenizer."""
    tokenizers = [tokenizer if agent.tokenizer is None else agent.tokenizer for agent in traces]
    known = {id(one): Spelling(one) for one in tokenizers}
    return [known[id(one)] for one in tokenizers]


# ---- the file of --trace --------------------------------------------------------------------------------------------


class TraceFile:
    """The file of --trace: the traces of batches, written at the end of its block, whatever ends that. A context manager."""

    def __init__(self, path: str | Path, tokenizer: Any, console: Console | None) -> None:
        """Begin with no traces; nothing is written before the block ends.

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
