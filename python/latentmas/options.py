"""Options that commands share, each declared once. Needs no torch: --help answers at once."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from latentmas.chain.agent import LATENT_STEPS, MAX_NEW_TOKENS
from latentmas.chain_files.reader import builtin_chains

QUESTIONS, CHAIN, MODEL, SAMPLING = "Questions", "Chain", "Model", "Sampling"
VLLM, RESULTS, SERVER = "Texts by vLLM", "Results", "Server"
"""Panels of the help."""

SHIPPED = ", ".join(builtin_chains())


def option(panel: str, help: str, *names: str, **more: Any) -> Any:
    """Return an option of a panel of the help; typer takes its name from the parameter where none is given."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


LatentSteps = Annotated[
    int | None, option(CHAIN, f"Most steps that an agent thinks. Default: the chain's, or {LATENT_STEPS}.")
]
MaxNewTokens = Annotated[int | None, option(CHAIN, f"Limit of each text. Default: the chain's, or {MAX_NEW_TOKENS}.")]
AlignerKind = Annotated[
    Literal["auto", "ridge", "identity", "soft"], option(CHAIN, "How hidden states are fed back (thinking agents).")
]
Model = Annotated[str | None, option(MODEL, "Local folder or hub name. Default: SmolLM2-135M-Instruct.")]
DType = Annotated[Literal["auto", "float32", "bfloat16", "float16"], option(MODEL, "auto is the checkpoint's.")]
Device = Annotated[str | None, option(MODEL, "cpu, cuda, cuda:1 ... Default: the accelerator, if any.")]
EngineName = Annotated[
    Literal["auto", "native", "cuda", "eager"], option(MODEL, "What runs latent steps and writes texts.")
]
Weights = Annotated[Literal["model", "int8"], option(MODEL, "The model's, or int8: rounded by row, on the CPU.")]
Decoder = Annotated[Literal["own", "vllm"], option(VLLM, "Who writes the texts (docs/vllm.md).")]
KVTransfer = Annotated[
    Literal["kv", "embeds"] | None,
    option(VLLM, "Cache to vLLM: kv, keys and values as they are (the default), or embeds, read again.", "--hand-over"),
]
Folder = Annotated[Path | None, option(VLLM, "Where caches are written for vLLM. Default: shared memory.")]
