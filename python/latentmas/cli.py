"""The command line: latentmas run."""

import sys
import time
import warnings
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

SAMPLE_QUESTION = "A baker makes 4 trays of 6 rolls and sells 15 of them. How many rolls are left?"

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
# Questions, answers and messages are shown as they are: brackets are no markup, colons no emoji.
out = Console(highlight=False, markup=False, emoji=False)
err = Console(highlight=False, markup=False, emoji=False, stderr=True)


@app.callback()
def latentmas() -> None:
    """Multi-agent reasoning in hidden states (LatentMAS) on Hugging Face models."""


@app.command()
def run(
    question: Annotated[str, typer.Argument(help="The question to answer.")] = SAMPLE_QUESTION,
    model: Annotated[str | None, typer.Option(help="Local folder or hub name. Default: SmolLM2-135M-Instruct.")] = None,
    latent_steps: Annotated[int, typer.Option(help="Steps that each agent but the judger thinks.")] = 10,
    aligner: Annotated[str, typer.Option(help="auto, ridge, identity or soft.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(help="Limit of the answer.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
) -> None:
    """Planner, critic and refiner think in hidden states; the judger answers in text."""
    import huggingface_hub
    import torch
    import transformers

    from latentmas.agents import sequential
    from latentmas.chain import Chain, check_request
    from latentmas.loading import load_model
    from latentmas_kernels.alignment import KINDS

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    warnings.showwarning = lambda message, *rest, **more: err.print(
        Text("warning: ", "yellow").append(str(message), "none"), soft_wrap=True
    )
    agents = sequential(latent_steps, max_new_tokens)
    # What is known to be wrong is said before a model is loaded.
    check_request([question], temperature)
    if aligner not in KINDS:
        raise ValueError(f"got --aligner {aligner}; supported are {', '.join(KINDS)}")
    with err.status("loading the model (the default one is fetched and converted the first time)"):
        began = time.perf_counter()
        loaded, tokenizer = load_model(model)
    with err.status("measuring how hidden states are best fed back"):
        chain = Chain(loaded, tokenizer, agents, aligner=aligner)
    loading = time.perf_counter() - began
    with err.status("") as status:
        began = time.perf_counter()
        torch.manual_seed(seed)
        result = chain.run(
            [question],
            temperature=temperature,
            on_turn=lambda agent: status.update(f"{agent.name} {'answers' if agent.max_new_tokens else 'thinks'}"),
        )
        seconds = time.perf_counter() - began

    out.print(Text("Question ", "bold").append(question, "not bold"), soft_wrap=True)
    out.print(f"\n{result.answers[0]}\n", soft_wrap=True)
    table = Table("agent", box=None, pad_edge=False)
    for column in ("prompt tokens", "latent steps", "new tokens", "seconds"):
        table.add_column(column, justify="right")
    for turn in result.turns:
        table.add_row(
            turn.agent, *map(str, (turn.prompt_tokens, turn.latent_steps, turn.new_tokens)), f"{turn.seconds:.2f}"
        )
    out.print(table)
    out.print(f"\n{seconds:.2f} s for the chain, {loading:.2f} s to load and set up")
    out.print(f"feedback: {result.aligner.kind} ({result.aligner.reason})", soft_wrap=True)


def main() -> None:
    """Entry point: what the user can mend is one line and exit code 2, Ctrl-C is 130 (by typer)."""
    try:
        app()
    except (ValueError, OSError) as error:
        err.print(Text("error: ", "bold red").append(str(error), "not bold default"), soft_wrap=True)
        sys.exit(2)
