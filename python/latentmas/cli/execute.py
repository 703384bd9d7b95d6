"""A run from its options to its end: check, load the models, set up the chain, run the batches, report."""

import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import typer

from latentmas.backends import open_backend
from latentmas.backends.base import EngineError
from latentmas.chain.chain import Chain, check_request
from latentmas.chain.decoder_check import check_recomputable
from latentmas.chain.stages import split_contexts
from latentmas.chain_files.reader import serial
from latentmas.characters import shortened
from latentmas.cli.batches import most_kv_bytes, questions_that_fit, run_batches
from latentmas.cli.free_cores import OtherProcesses
from latentmas.cli.questions import questions_to_ask
from latentmas.cli.report import Report
from latentmas.cli.results_file import ResultsFile
from latentmas.cli.run_config import ChainConfig, RunConfig
from latentmas.cli.trace_view import TraceFile, check_trace_path
from latentmas.console import err, out, warn, working
from latentmas.default_model import NAME
from latentmas.loading import check_placement, load_model, model_path
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.extension import extension

SHOWN_FAULTS = 5
"""Questions that cannot be run and are named on the terminal; the others are counted."""


def execute(config: RunConfig) -> int:
    """Run; return the exit code: 0, or 2 where questions were left out.

    Raises:
        typer.Exit: with 130, where the run is interrupted.
        LatentMASError: for what the user can mend.
        OSError: where a file cannot be read or written.
    """
    out.needed = config.output is None and config.trace is None  # else the file is what the run is for
    # What is known to be wrong is an error before a model is loaded.
    check_placement(config.dtype, config.device)
    chain_config, vllm = config.read_chain(), config.read_vllm_settings()
    if vllm is not None and config.kv_transfer == "embeds":
        check_recomputable(split_contexts(chain_config.agents), chain_config.budget)
    if config.trace is not None:
        others = (config.output, config.questions, config.chain)
        check_trace_path(config.trace, [name for name in others if name is not None])
    asked, left_out = questions_to_ask(config.question, config.questions)
    _check_left_out(left_out, config.keep_going)
    check_request([question.text for question in asked] or ["-"], config.temperature, config.top_p)
    settings = config.settings(config.model or NAME, chain_config, vllm)

    with ExitStack() as stack:
        results = None
        if config.output is not None:
            results = stack.enter_context(
                ResultsFile(config.output, asked, settings, resume=config.resume, overwrite=config.overwrite)
            )
        done = results.done if results else {}
        asked = [question for question in asked if question.number not in done]
        if done:
            err.print(f"{len(done)} results are in {config.output}, {len(asked)} questions are left", soft_wrap=True)
        if not asked and not done:
            # A reader of the document gets one here, too, with what was left out.
            Report(out, serial(chain_config.agents), (), as_json=config.as_json).close(settings, 0.0, None, left_out)
            raise LatentMASError(f"no question is left to run: all {len(left_out):,} were left out")
        if not asked and not config.as_json:
            return 2 if left_out else 0
        began = time.perf_counter()
        chain = _build_chain(config, chain_config, vllm, stack)
        setup_seconds = time.perf_counter() - began
        asked, too_long = questions_that_fit(chain, asked)
        _check_left_out(too_long, config.keep_going)
        left_out += too_long
        if asked:
            need = f"keys and values take up to {most_kv_bytes(chain, asked, config.batch_size) / 2**20:,.1f} MB"
            limit = f" (budget: {chain_config.budget})" if chain_config.budget else ""
            title = f"{chain_config.title}; " if chain_config.title else ""
            err.print(f"{title}{need}{limit}", soft_wrap=True)
        report = Report(out, chain.agents, done.values(), as_json=config.as_json)
        trace = None
        if config.trace is not None:
            trace = stack.enter_context(TraceFile(config.trace, chain.tokenizer, None if config.as_json else out))
        try:
            for batch, result in run_batches(chain, asked, config, results, trace):
                report.add(batch, result)
        except KeyboardInterrupt:
            err.print(f"stopped: {_state(report.finished, len(asked), config.output)}", soft_wrap=True)
            raise typer.Exit(130) from None  # so that a trace knows that it ends early
        # Our own consoles deal with pipes that their readers close; another broken pipe is a fault.
        except (LatentMASError, EngineError, BrokenPipeError) as error:
            raise LatentMASError(f"{error}. {_state(report.finished, len(asked), config.output)}") from error
        report.close(settings, setup_seconds, chain.aligner, left_out)
    return 2 if left_out else 0


def _build_chain(config: RunConfig, chain_config: ChainConfig, vllm: dict[str, Any] | None, stack: ExitStack) -> Chain:
    """Load the models, start vLLM where it writes the texts (the stack ends it), and set up the chain."""
    others = OtherProcesses()
    with working(err, "loading the model (the default one is fetched and converted the first time)"):
        model, tokenizer = load_model(config.model, dtype=config.dtype, device=config.device)
        models = {name: load_model(name, dtype=config.dtype, device=config.device) for name in chain_config.models}
    decoder = None
    if vllm is not None:
        # The stack is unwound then, too, and vLLM's processes end.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        last = serial(chain_config.agents)[-1].model
        name, writer = (last, models[last][0]) if last else (model_path(config.model), model)
        with working(err, "starting vLLM"):
            transfer = config.kv_transfer or "kv"
            backend = open_backend(
                config.decoder, name, writer, kv_transfer=transfer, settings=vllm, folder=config.folder
            )
            decoder = stack.enter_context(backend)
    with working(err, "setting up the chain, measuring how hidden states are best fed back"):
        chain = Chain(
            model, tokenizer, chain_config.agents, aligner=config.aligner, engine=config.engine, weights=config.weights,
            max_note_tokens=config.max_note_tokens, budget=chain_config.budget, models=models, decoder=decoder,
        )  # fmt: skip
    kernels = extension()
    crowded = others.warning(torch.get_num_threads() if kernels is None else kernels.threads())
    if crowded is not None and model.device.type == "cpu":
        warn(crowded)
    return chain


def _check_left_out(faults: Sequence[str], keep_going: bool) -> None:
    """Warn of each fault where the other questions shall run; raise one error for all of them otherwise."""
    shown = shortened(faults, SHOWN_FAULTS)
    if faults and not keep_going:
        raise LatentMASError(f"{'; '.join(shown)}. Mend this, or run the other questions with --keep-going")
    for fault in shown:
        warn(f"left out: {fault}")


def _state(finished: int, asked: int, output: str | None) -> str:
    state = f"{finished} of {asked} questions are answered"
    if not finished:
        return state
    return f"{state} and kept in {output}; go on with --resume" if output else f"{state}; --output would keep them"
