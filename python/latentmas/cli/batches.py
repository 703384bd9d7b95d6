"""Questions in batches through a chain: shown while they run, kept as soon as they are answered."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console

from latentmas.chain.chain import Chain
from latentmas.chain.results import Answer, ChainResult
from latentmas.cli.live_view import Display
from latentmas.cli.questions import Question
from latentmas.cli.results_file import ResultsFile
from latentmas.cli.trace_file import TOP_K, TraceFile
from latentmas_kernels.errors import LatentMASError


def questions_that_fit(chain: Chain, questions: Sequence[Question]) -> tuple[list[Question], list[str]]:
    """The questions that the chain can run, and what is wrong with each of the others."""
    fit, faults = [], []
    for question in questions:
        try:
            chain.check(question.text)
            fit.append(question)
        except ValueError as error:
            faults.append(f"question {question.number}: {error}")
    return fit, faults


def most_kv_bytes(chain: Chain, questions: Sequence[Question], batch_size: int) -> int:
    """Bytes that keys and values may come to take, of the batch that needs the most; ValueError where one has no room."""
    starts = range(0, len(questions), batch_size)
    return max(chain.kv_bytes([q.text for q in questions[start : start + batch_size]]) for start in starts)


def run_batches(
    chain: Chain,
    questions: Sequence[Question],
    *,
    batch_size: int,
    seed: int,
    temperature: float,
    top_p: float,
    console: Console,
    output: ResultsFile | None,
    traced: TraceFile | None = None,
) -> Iterator[tuple[Sequence[Question], ChainResult]]:
    """Run the questions in their order; gives each batch with its result, once that is written to the output (and what it
    thought to the trace).

    Raises:
        ValueError: where a batch does not fit the memory, or as Chain.run().
        OSError: where the output cannot be written.
    """
    speakers = {name: (context.tokenizer, context.end_ids) for name, context in chain.setup.model_contexts.items()}
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        # By the question, so that a run that goes on draws what it would have drawn.
        torch.manual_seed(seed + batch[0].number)
        with Display(console, *speakers[None], _title(batch, start, len(questions)), speakers) as display:
            try:
                result = chain.run(
                    [question.text for question in batch], temperature=temperature, top_p=top_p, on_progress=display,
                    trace=None if traced is None else TOP_K,
                )  # fmt: skip
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                raise LatentMASError(
                    f"out of memory with {len(batch)} questions at a time ({str(error).splitlines()[0]}); take a smaller "
                    "--batch-size, or a lower --max-new-tokens"
                ) from error
        if output is not None:
            output.write(records(batch, result))
        if traced is not None:
            traced.add(batch, result.traces)
        yield batch, result


def records(batch: Sequence[Question], result: ChainResult) -> list[dict[str, Any]]:
    """One JSON-able result per question; the seconds are those of its whole batch."""
    return [
        {
            "number": question.number,
            **_record(answer),
            **({} if question.answer is None else {"expected": question.answer}),
            "batch_size": len(batch),
            "batch_seconds": result.seconds,
        }
        for question, answer in zip(batch, result.answers, strict=True)
    ]


def _record(answer: Answer) -> dict[str, Any]:
    record = answer.to_dict()
    record["answer"] = record.pop("text")
    return record


def _title(batch: Sequence[Question], start: int, total: int) -> str:
    first = " ".join(batch[0].text.split())
    if total == 1:
        return first
    return f"{start + 1}{f'-{start + len(batch)}' if len(batch) > 1 else ''} of {total}: {first}"


def _is_out_of_memory(error: BaseException) -> bool:
    # torch raises a plain RuntimeError where the CPU's allocator fails.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
