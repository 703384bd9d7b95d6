"""Looking inside the thoughts of a run: a table per question and agent to read, or a document to work on."""

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from latentmas.chain.results import AgentTrace
from latentmas.characters import visible
from latentmas.cli.questions import Question
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.storage import atomic_write
from latentmas_kernels.trace import LatentTrace

SPACE = "␣"
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


def trace_table(
    console: Console | None, traces: Sequence[AgentTrace], questions: Sequence[Question | str], tokenizer: Any
) -> None:
    """Print the thoughts of a batch, for each question one table per agent with a row for every step that it took.

    A row says which tokens the state behind the step would have become, with their probabilities; the norm of that state;
    the cosine of the embedding that was fed to that of the step before; and the token whose embedding is nearest to it,
    with the distance, 1 - cosine. Spaces in tokens show as ␣, and what cannot be seen is escaped as in Python.

    Args:
        console: where to print; None is standard output.
        traces: one per agent that thought, in the order of the chain.
        questions: of the batch, in its order; strings are numbered from 1.
        tokenizer: the model's.

    Raises:
        ValueError: where the traces are of another number of questions.
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
    """The thoughts of a batch for `json.dumps`. No number in it is NaN or Inf: what cannot be told is None.

    Args:
        traces, questions, tokenizer: as in `trace_table`.

    Returns:
        {"questions": [{number, question, agents: [{agent, steps: [{step, says: [{token_id, text, probability}], norm,
        cosine, nearest: {token_id, text, distance}, finite}]}]}]}. Steps are counted from 1. says is empty and norm None
        where the state holds NaN or Inf, nearest None where the embedding does; cosine is None for the first step too. In a
        text, bytes that are no UTF-8 by themselves read \\xNN. Documents of several batches join by their lists.

    Raises:
        ValueError: as `trace_table`.
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
    """Write a document of `trace_document` as JSON, whole or not at all; a file that is there is replaced.

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
    """One step as plain numbers; None where there is nothing to tell."""

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
    """The steps that a row took, and no more."""
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


def _entry(step: _Step, spelling: "_Spelling") -> dict[str, Any]:
    def token(token_id: int) -> dict[str, Any]:
        return {"token_id": token_id, "text": _readable(spelling(token_id))}

    return {
        "step": step.number,
        "says": [{**token(token_id), "probability": probability} for token_id, probability in step.says],
        "norm": step.norm,
        "cosine": step.cosine,
        "nearest": None if step.nearest is None else {**token(step.nearest[0]), "distance": step.nearest[1]},
        "finite": step.finite,
    }


def _table(trace: LatentTrace, row: int, spelling: "_Spelling") -> Table:
    """Cells are folded where the console is narrow: nothing is left out."""
    table = Table(box=None, pad_edge=False)
    for name in ("step", "says", "norm", "cosine", "nearest"):
        table.add_column(name, justify="left" if name in ("says", "nearest") else "right", overflow="fold")

    def scored(tokens: Sequence[tuple[int, float]]) -> Text:
        # Text, never markup: a token may be "[/]". Spaces in tokens are spelled out, so those here tell tokens apart.
        pieces = [Text(_visible(spelling(token_id))).append(f" {score:.2f}", "dim") for token_id, score in tokens]
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


# ---- how a token is spelled ----------------------------------------------------------------------------------------


def _spellings(traces: Sequence[AgentTrace], tokenizer: Any) -> list["_Spelling"]:
    """Of each agent; one for each tokenizer."""
    theirs = [tokenizer if agent.tokenizer is None else agent.tokenizer for agent in traces]
    known = {id(one): _Spelling(one) for one in theirs}
    return [known[id(one)] for one in theirs]


class _Spelling:
    """The text of single tokens, spaces in front included; bytes that are no UTF-8 by themselves are lone surrogates.

    Read from the vocabulary's own entries. `decode([id])` loses what matters here: SentencePiece decoders strip the space
    in front of a first token, and half of a character becomes U+FFFD, whichever half it is.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[int, str] = {}

    def __call__(self, token_id: int) -> str:
        if token_id not in self.known:
            self.known[token_id] = self._spell(token_id)
        return self.known[token_id]

    def _spell(self, token_id: int) -> str:
        if token_id in self.added:
            return self.added[token_id]
        try:
            entry = self.tokenizer.convert_ids_to_tokens(token_id)
        except (IndexError, KeyError, ValueError, OverflowError):
            entry = None
        if entry is None:  # models pad their vocabulary
            return f"<no token {token_id}>"
        if isinstance(entry, bytes):
            return entry.decode(errors="surrogateescape")
        if self.byte_level:
            if all(letter in self.bytes for letter in entry):
                return bytes(self.bytes[letter] for letter in entry).decode(errors="surrogateescape")
            return str(entry)
        byte = BYTE_TOKEN.fullmatch(entry)
        if byte is not None:
            return bytes([int(byte[1], 16)]).decode(errors="surrogateescape")
        return str(entry.replace("▁", " "))

    @cached_property
    def added(self) -> dict[int, str]:
        """Tokens beside the vocabulary, which are spelled as they are, and the special ones."""
        try:
            return {n: str(token) for n, token in self.tokenizer.added_tokens_decoder.items()}
        except (AttributeError, NotImplementedError):
            return {}

    @cached_property
    def byte_level(self) -> bool:
        """Whether the vocabulary spells bytes as letters (GPT-2, Llama 3, Qwen), and not spaces as ▁ (SentencePiece)."""
        try:
            return bool(self.tokenizer.convert_tokens_to_string(["Ġ"]) == " ")
        except (AttributeError, NotImplementedError):
            return False

    @cached_property
    def bytes(self) -> dict[str, int]:
        """The byte of each letter of a byte-level vocabulary: printable Latin-1 is itself, the rest follows from U+0100."""
        itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        rest = sorted(set(range(256)) - set(itself))
        return {chr(byte): byte for byte in itself} | {chr(0x100 + n): byte for n, byte in enumerate(rest)}


def _readable(text: str) -> str:
    """Proper Unicode, with \\xNN for bytes that are no UTF-8 by themselves."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _visible(text: str) -> str:
    """One word of printable characters: as in Python's repr, but for spaces."""

    def show(letter: str) -> str:
        if letter == " ":
            return SPACE
        if 0xDC80 <= ord(letter) <= 0xDCFF:
            return f"\\x{ord(letter) - 0xDC00:02x}"
        plain = letter.isprintable() and letter not in ("\\", SPACE)
        return letter if plain else letter.encode("unicode_escape").decode()

    return "".join(map(show, text)) or "''"
