"""Run questions in batches: progress is shown, and results are written as soon as a batch is answered."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from latentmas.chain.chain import Chain
from latentmas.chain.results import Answer, ChainResult
from latentmas.characters import first_line
from latentmas.cli.live_view import Display
from latentmas.cli.questions import Question
from latentmas.cli.results_file import ResultsFile
from latentmas.cli.run_config import RunConfig
from latentmas.cli.trace_view import TOP_K, TraceFile
from latentmas.console import err
from latentmas_kernels.errors import LatentMASError


def questions_that_fit(chain: Chain, questions: Sequence[Question]) -> tuple[list[Question], list[str]]:
    """Return the questions that the chain can run, and what is wrong with each of the others."""
    fit, faults = [], []
    for question in questions:
        try:
            chain.check(question.text)
            fit.append(question)
        except LatentMASError as error:
            faults.append(f"question {question.number}: {error}")
    return fit, faults


def most_kv_bytes(chain: Chain, questions: Sequence[Question], batch_size: int) -> int:
    """Return the bytes of keys and values of the batch that needs the most; raise LatentMASError where one does not fit."""
    starts = range(0, len(questions), batch_size)
    return max(chain.kv_bytes([q.text for q in questions[start : start + batch_size]]) for start in starts)


def run_batches(
    chain: Chain,
    questions: Sequence[Question],
    config: RunConfig,
    output: ResultsFile | None,
    traced: TraceFile | None = None,
) -> Iterator[tuple[Sequence[Question], ChainResult]]:
    """Run the questions in their order; yield each batch with its result, once that is written to the output (and the
    agents' latent steps to the trace).

    Raises:
        LatentMASError: where a batch does not fit free memory, or as Chain.run().
        OSError: where the output cannot be written.
    """
    tokenizers = {name: (context.tokenizer, context.end_ids) for name, context in chain.setup.model_contexts.items()}
    for start in range(0, len(questions), config.batch_size):
        batch = questions[start : start + config.batch_size]
        # By the question, so that a run that goes on draws what it would have drawn.
        torch.manual_seed(config.seed + batch[0].number)
        with Display(err, tokenizers, _title(batch, start, len(questions))) as display:
            try:
                result = chain.run(
                    [question.text for question in batch], temperature=config.temperature, top_p=config.top_p,
                    on_progress=display, trace=None if traced is None else TOP_K,
                )  # fmt: skip
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                raise LatentMASError(
                    f"out of memory with {len(batch)} questions at a time ({first_line(error)}); take a smaller "
                    "--batch-size, or a lower --max-new-tokens"
                ) from error
        if output is not None:
            output.write(records(batch, result))
        if traced is not None:
            traced.add(batch, result.traces)
        yield batch, result


def records(batch: Sequence[Question], result: ChainResult) -> list[dict[str, Any]]:
    """Return a result per question as `json.dumps` takes it; the seconds are those of its whole batch."""
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
