"""The command line: latentmas run, latentmas doctor, latentmas serve."""

import io
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.text import Text

from latentmas.characters import decoded, visible
from latentmas.cli.console import Terminal, print_json, working
from latentmas.faults import shortened
from latentmas_kernels.errors import LatentMASError

if TYPE_CHECKING:
    from latentmas.cli.questions import Question

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
out, err = Terminal(), Terminal(stderr=True)

SHOWN_FAULTS = 5
"""Questions that cannot be run and are named on the terminal; the others are counted."""

ModelOption = Annotated[str | None, typer.Option(help="Local folder or hub name. Default: SmolLM2-135M-Instruct.")]


@app.callback()
def latentmas() -> None:
    """Multi-agent reasoning in hidden states (LatentMAS) on Hugging Face models."""


@app.command()
def run(
    question: Annotated[
        str | None, typer.Argument(help="The question to answer; - reads it from standard input.")
    ] = None,
    questions: Annotated[
        str | None,
        typer.Option(
            help='File (JSON lines, a JSON array, CSV or Parquet) with "question" and, optionally, "answer" and "options"; '
            "- for standard input, or: sample. CSV is known by the name of its file, which must end in .csv, so it cannot come "
            "from standard input."
        ),
    ] = None,
    model: ModelOption = None,
    method: Annotated[
        str | None, typer.Option(help="latent (the default), hierarchical, debate, mix, text or single.")
    ] = None,
    chain: Annotated[
        str | None, typer.Option(help="File that describes the agents (docs/chains.md), instead of a method.")
    ] = None,
    hierarchical: Annotated[
        str | None,
        typer.Option(help="parallel: groups of agents work side by side; serial: each sees those before it."),
    ] = None,
    latent_steps: Annotated[
        int | None, typer.Option(help="Most steps that an agent thinks. Default: 10, or the chain's.")
    ] = None,
    aligner: Annotated[str, typer.Option(help="auto, ridge, identity or soft (thinking agents).")] = "auto",
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Limit of each text. Default: 256, or the chain's.")
    ] = None,
    max_note_tokens: Annotated[
        int, typer.Option("--handover-tokens", help="Tokens of a text that later agents read (text).")
    ] = 512,
    memory: Annotated[
        str | None, typer.Option(help="What agents get of the memory: all, last, latent or a number of slots.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help='Limit of keys and values: "64 MB" or "512 slots".')] = None,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.")] = 1,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: the accelerator, if any.")] = None,
    engine: Annotated[str, typer.Option(help="auto, native, cuda or eager.")] = "auto",
    weights: Annotated[str, typer.Option(help="model, or int8: rounded by row, on the CPU.")] = "model",
    decoder: Annotated[str, typer.Option(help="Who writes the texts: own, or vllm (docs/vllm.md).")] = "own",
    kv_transfer: Annotated[
        str | None,
        typer.Option(
            "--hand-over", help="Memory to vLLM: kv, keys and values as they are (the default), or embeds, read again."
        ),
    ] = None,
    vllm: Annotated[
        str | None, typer.Option(help='Settings of vLLM as JSON: {"tensor_parallel_size": 2}, say.')
    ] = None,
    folder: Annotated[
        str | None, typer.Option(help="Where memories are handed over to vLLM. Default: shared memory.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.", min=0, max=2**62)] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens with this probability together.")
    ] = 1.0,
    think: Annotated[bool, typer.Option("--think", help="Turn the chat template's thinking switch on.")] = False,
    output: Annotated[str | None, typer.Option(help="File to write results to, a line of JSON each.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on behind the results that are in --output.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in --output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
    trace: Annotated[
        str | None, typer.Option(help="Show every latent step (nearest tokens, norms) and write them to this file.")
    ] = None,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Leave out questions that cannot be run.")] = False,
) -> None:
    """Answer questions: one agent alone, agents that hand on text, agents that think in hidden states, or any mixture.

    Without a question, the first one of the sample is asked.
    """
    import torch

    from latentmas.backends.base import EngineError
    from latentmas.chain.chain import Chain, check_request
    from latentmas.chain.decoder_check import check_linear
    from latentmas.chain.stages import stretches_of
    from latentmas.chain_files.reader import serial
    from latentmas.cli.batches import most_kv_bytes, questions_that_fit, run_batches
    from latentmas.cli.free_cores import OtherProcesses
    from latentmas.cli.report import Report
    from latentmas.cli.results_file import ResultsFile
    from latentmas.cli.run_config import Arrangement
    from latentmas.cli.trace_file import TraceFile, check_trace_path
    from latentmas.default_model import NAME, default_model_folder
    from latentmas.loading import check_placement, load_model
    from latentmas_kernels.alignment import KINDS
    from latentmas_kernels.engines import ENGINES, WEIGHTS
    from latentmas_kernels.extension import extension

    _quiet()
    out.needed = output is None and trace is None  # else the file is what the run is for
    # What is known to be wrong is said before a model is loaded.
    _check_choice("--aligner", aligner, KINDS)
    _check_choice("--engine", engine, ENGINES)
    _check_choice("--weights", weights, WEIGHTS)
    vllm_settings = _vllm_settings(decoder, kv_transfer, vllm, folder)
    _check_at_least_one("--batch-size", batch_size)
    _check_at_least_one("--handover-tokens", max_note_tokens)
    check_placement(dtype, device)
    arranged = Arrangement.read(
        method=method, chain=chain, hierarchical=hierarchical, latent_steps=latent_steps, max_new_tokens=max_new_tokens,
        think=think, model=model, memory=memory, budget=budget,
    )  # fmt: skip
    if vllm_settings is not None and kv_transfer == "embeds":
        check_linear(stretches_of(arranged.agents), arranged.budget)
    if trace is not None:
        if resume:
            raise LatentMASError(
                "got --resume and --trace; what is finished is not thought again, so the trace would lack it"
            )
        if not arranged.thinks:
            raise LatentMASError("got --trace, and no agent of this chain thinks in hidden states")
        check_trace_path(trace, [name for name in (output, questions, chain) if name is not None])
    if (resume or overwrite) and output is None:
        raise LatentMASError("--resume and --overwrite say what to do with the file of --output; got no --output")
    asked, left_out = _questions(question, questions)
    _check_left_out(left_out, keep_going)
    check_request([entry.text for entry in asked] or ["-"], temperature, top_p)
    settings = {
        "model": model or NAME, **arranged.settings, "aligner": aligner, "handover_tokens": max_note_tokens,
        "dtype": dtype, "seed": seed, "temperature": temperature, "top_p": top_p, "think": think,
        "decoder": None if vllm_settings is None else decoder, "vllm": vllm_settings,
        "hand_over": None if vllm_settings is None else kv_transfer or "kv",
    }  # fmt: skip

    with ExitStack() as stack:
        results = None
        if output is not None:
            results = stack.enter_context(ResultsFile(output, asked, settings, resume=resume, overwrite=overwrite))
        done = results.done if results else {}
        asked = [entry for entry in asked if entry.number not in done]
        if done:
            err.print(f"{len(done)} results are in {output}, {len(asked)} questions are left", soft_wrap=True)
        if not asked and not done:
            Report(out, serial(arranged.agents), (), as_json=as_json).close(settings, 0.0, None, left_out)
            raise LatentMASError(f"no question is left to run: all {len(left_out):,} were left out")
        if not asked and not as_json:
            raise typer.Exit(2 if left_out else 0)
        began, others = time.perf_counter(), OtherProcesses()
        with working(err, "loading the model (the default one is fetched and converted the first time)"):
            loaded, tokenizer = load_model(model, dtype=dtype, device=device)
            models = {name: load_model(name, dtype=dtype, device=device) for name in arranged.models}
        writer = None
        if vllm_settings is not None:
            from latentmas.backends.vllm.engine import Vllm

            # What is on the stack ends then, too, vLLM's processes among it.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
            last = serial(arranged.agents)[-1].model
            with working(err, "starting vLLM"):
                writer = stack.enter_context(
                    Vllm(
                        str(default_model_folder()) if last is None and model is None else str(last or model),
                        loaded if last is None else models[last][0],
                        kv_transfer=kv_transfer or "kv", settings=vllm_settings,
                        folder=None if folder is None else Path(folder),
                    )
                )  # fmt: skip
        with working(err, "setting up the chain, measuring how hidden states are best fed back"):
            run_by = Chain(
                loaded, tokenizer, arranged.agents, aligner=aligner, engine=engine, weights=weights,
                max_note_tokens=max_note_tokens, budget=arranged.budget, models=models, decoder=writer,
            )  # fmt: skip
        setup = time.perf_counter() - began
        kernels = extension()
        crowded = others.warning(torch.get_num_threads() if kernels is None else kernels.threads())
        if crowded is not None and loaded.device.type == "cpu":
            _warn(crowded)
        asked, too_long = questions_that_fit(run_by, asked)
        _check_left_out(too_long, keep_going)
        left_out += too_long
        if asked:
            need = f"keys and values take up to {most_kv_bytes(run_by, asked, batch_size) / 2**20:,.1f} MB"
            limit = f" (budget: {arranged.budget})" if arranged.budget else ""
            err.print(f"{arranged.title + '; ' if arranged.title else ''}{need}{limit}", soft_wrap=True)
        report = Report(out, run_by.agents, done.values(), as_json=as_json)
        traced = None if trace is None else stack.enter_context(TraceFile(trace, tokenizer, None if as_json else out))
        try:
            for batch, result in run_batches(
                run_by, asked, batch_size=batch_size, seed=seed, temperature=temperature, top_p=top_p, console=err,
                output=results, traced=traced,
            ):  # fmt: skip
                report.add(batch, result)
        except KeyboardInterrupt:
            err.print(f"stopped: {_state(report.finished, len(asked), output)}", soft_wrap=True)
            raise typer.Exit(130) from None
        # Our own consoles deal with pipes that their readers close; another broken pipe is a fault.
        except (ValueError, EngineError, BrokenPipeError) as error:
            raise LatentMASError(f"{error}. {_state(report.finished, len(asked), output)}") from error
        report.close(settings, setup, run_by.aligner, left_out)
    if left_out:
        raise typer.Exit(2)


@app.command()
def doctor(
    model: ModelOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which fast paths are on here, for a model where one is named, and why the others are not."""
    from latentmas.loading import load_skeleton
    from latentmas_kernels import doctor as look

    _quiet()
    report = look(load_skeleton(model) if model is not None else None)
    if as_json:
        print_json(out, report.to_dict())
    else:
        out.print(str(report), soft_wrap=True)


@app.command()
def serve(
    vllm_options: Annotated[
        list[str] | None,
        typer.Argument(help="Behind --, options of the vLLM server that is started.", metavar="[-- VLLM OPTIONS]"),
    ] = None,
    model: ModelOption = None,
    chain: Annotated[
        list[str] | None,
        typer.Option(
            help="Chain to serve: a file, or a name of those that come with the package; may be repeated. Default: those."
        ),
    ] = None,
    latent_steps: Annotated[
        int | None, typer.Option(help="Most steps that an agent thinks. Default: the chain's.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Limit of each text. Default: the chain's.")] = None,
    aligner: Annotated[str, typer.Option(help="auto, ridge, identity or soft (thinking agents).")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[
        str | None, typer.Option(help="Of the agents that think. Default: the accelerator, if any.")
    ] = None,
    engine: Annotated[str, typer.Option(help="auto, native, cuda or eager.")] = "auto",
    weights: Annotated[str, typer.Option(help="model, or int8: rounded by row, on the CPU.")] = "model",
    kv_transfer: Annotated[
        str, typer.Option("--hand-over", help="Memory to vLLM: kv, keys and values as they are, or embeds, read again.")
    ] = "kv",
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=0, max=65535)] = 8000,
    vllm_url: Annotated[
        str | None, typer.Option(help="A vLLM server that runs, in place of one that is started (see --kv-config).")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Where memories are handed over. Default: shared memory.")] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds that vLLM may be silent while it works for a request.")
    ] = 300.0,
    max_waiting: Annotated[int, typer.Option(help="Requests at a time; more are refused (429).")] = 256,
    kv_config: Annotated[
        bool, typer.Option("--kv-config", help="Print vLLM's --kv-transfer-config for this model and folder, and end.")
    ] = False,
) -> None:
    """Serve chains over OpenAI's API: agents think here, vLLM writes. `model` in a request names the chain."""
    from latentmas.loading import check_placement
    from latentmas_kernels.alignment import KINDS
    from latentmas_kernels.engines import ENGINES, WEIGHTS

    _quiet()
    _check_choice("--aligner", aligner, KINDS)
    _check_choice("--engine", engine, ENGINES)
    _check_choice("--weights", weights, WEIGHTS)
    check_placement(dtype, device)
    try:
        from latentmas.serving.config import ServeConfig
        from latentmas.serving.server import print_kv_config, serve
    except ModuleNotFoundError as error:
        raise LatentMASError(
            f"latentmas serve needs {error.name}, which is not installed: pip install 'latentmas-kernels[serve]'"
        ) from error
    serving = ServeConfig(
        model, chain or (), latent_steps, max_new_tokens, aligner, dtype, device, engine, weights, kv_transfer, host, port,
        vllm_url, folder, timeout, max_waiting, vllm_options or (),
    )  # fmt: skip
    if kv_config:
        print_kv_config(serving, out)
    else:
        raise typer.Exit(serve(serving, err))


def main() -> None:
    """Entry point: what the user can mend is one line and exit code 2, Ctrl-C is 130 (by typer)."""
    try:
        app()
    except SystemExit as ended:
        # click ends with 1 on a broken pipe, and says nothing. That is no error where nobody reads the help any more.
        if not ended.code or not isinstance(ended.__context__, BrokenPipeError):
            raise
        if out.needed:
            sys.exit(0)
        _fail(f"the run did not come to its end ({ended.__context__}); go on with --resume where there is an --output")
    except (ValueError, OSError) as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    err.print(Text("error: ", "bold red").append(visible(message), "not bold default"), soft_wrap=True)
    sys.exit(2)


def _quiet() -> None:
    """Only our own words, as far as the terminal has their letters: libraries are silent, warnings are one line each."""
    import huggingface_hub
    import transformers

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    warnings.showwarning = lambda message, *rest, **more: _warn(str(message))


def _warn(message: str) -> None:
    err.print(Text("warning: ", "yellow").append(visible(message), "none"), soft_wrap=True)


def _check_choice(option: str, got: str, choices: Sequence[str]) -> None:
    if got not in choices:
        raise LatentMASError(f"got {option} {got}; supported are {', '.join(choices)}")


def _vllm_settings(
    decoder: str, kv_transfer: str | None, settings: str | None, folder: str | None
) -> dict[str, Any] | None:
    """Of vLLM's engine; None where nobody asked for it."""
    from latentmas.backends.base import KV_TRANSFERS
    from latentmas.backends.vllm.launch import check_installed

    _check_choice("--decoder", decoder, ("own", "vllm"))
    _check_choice("--hand-over", kv_transfer or "kv", KV_TRANSFERS)
    if decoder == "own":
        if (kv_transfer, settings, folder) != (None, None, None):
            raise LatentMASError("--hand-over, --vllm and --folder are for --decoder vllm; got --decoder own")
        return None
    check_installed()
    if folder is not None and not os.access(folder, os.W_OK | os.X_OK):
        raise LatentMASError(f"got --folder {folder}, which is no folder that can be written to; name one that is")
    try:
        read = json.loads(settings or "{}")
    except (ValueError, RecursionError) as error:
        raise LatentMASError(
            f"got --vllm {str(settings)[:60]}, which is no JSON ({error}); it takes an object of vLLM's settings"
        ) from error
    if not isinstance(read, dict):
        raise LatentMASError(f"got --vllm {settings}; it takes an object of vLLM's settings")
    return read


def _check_at_least_one(option: str, got: int) -> None:
    if got < 1:
        raise LatentMASError(f"{option} must be 1 or more; got {got}")


def _check_left_out(faults: list[str], keep_going: bool) -> None:
    """Each as a warning where the others shall run, all in one error otherwise."""
    if faults and not keep_going:
        told = "; ".join(shortened(faults, SHOWN_FAULTS))
        raise LatentMASError(f"{told}. Mend this, or run the other questions with --keep-going")
    for fault in shortened(faults, SHOWN_FAULTS):
        _warn(f"left out: {fault}")


def _state(finished: int, asked: int, output: str | None) -> str:
    state = f"{finished} of {asked} questions are answered"
    if not finished:
        return state
    return f"{state} and kept in {output}; go on with --resume" if output else f"{state}; --output would keep them"


def _questions(question: str | None, source: str | None) -> tuple[list["Question"], list[str]]:
    """The questions to ask, and what is wrong with the lines that hold none."""
    from latentmas.cli.questions import SAMPLE, Question, read_questions, standard_input

    if question is not None and source is not None:
        raise LatentMASError("got a question and --questions; give one of them")
    if source is not None:
        return read_questions(source)
    if question is None:
        return read_questions(SAMPLE)[0][:1], []
    if question == "-":
        question = decoded(standard_input(), "standard input").strip()
    return [Question(1, question)], []
