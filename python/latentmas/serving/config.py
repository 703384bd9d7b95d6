"""ServeConfig: the options of `latentmas serve`. Needs neither torch nor the server's packages."""

from dataclasses import dataclass
from typing import Annotated

import typer

from latentmas import options
from latentmas.options import CHAIN, SERVER, SHIPPED, VLLM, option


@dataclass(frozen=True)
class ServeConfig:
    """The options of `latentmas serve`. Those of the command line are made of these fields."""

    model: options.Model = None
    chains: Annotated[
        list[str] | None,
        option(CHAIN, f"A file, or a chain of the package ({SHIPPED}); may be repeated. Default: those.", "--chain"),
    ] = None
    latent_steps: options.LatentSteps = None
    max_new_tokens: options.MaxNewTokens = None
    aligner: options.AlignerKind = "auto"
    dtype: options.DType = "auto"
    device: options.Device = None
    engine: options.EngineName = "auto"
    weights: options.Weights = "model"
    kv_transfer: options.KVTransfer = None
    host: Annotated[str, option(SERVER, "Address to listen at.")] = "127.0.0.1"
    port: Annotated[int, option(SERVER, "Port to listen at.", min=0, max=65535)] = 8000
    vllm_url: Annotated[
        str | None, option(VLLM, "A vLLM server that runs, in place of one that is started (see --kv-config).")
    ] = None
    folder: options.Folder = None
    timeout: Annotated[float, option(VLLM, "Seconds that vLLM may be silent while it works for a request.")] = 300.0
    max_waiting: Annotated[int, option(SERVER, "Requests at a time; more are refused (429).")] = 256
    kv_config: Annotated[
        bool, option(VLLM, "Print vLLM's --kv-transfer-config for this model and folder, and end.", "--kv-config")
    ] = False
    vllm_options: Annotated[
        list[str] | None,
        typer.Argument(help="Behind --, options of the vLLM server that is started.", metavar="[-- VLLM OPTIONS]"),
    ] = None
