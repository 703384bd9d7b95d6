"""latentmas serve."""

from typing import Annotated

import typer

from latentmas.cli import options
from latentmas.cli.options import CHAIN, SERVER, SHIPPED, VLLM, option
from latentmas.console import err, out, quiet_libraries
from latentmas_kernels.errors import LatentMASError


def serve(
    vllm_options: Annotated[
        list[str] | None,
        typer.Argument(help="Behind --, options of the vLLM server that is started.", metavar="[-- VLLM OPTIONS]"),
    ] = None,
    model: options.Model = None,
    chain: Annotated[
        list[str] | None,
        option(CHAIN, f"A file, or a chain of the package ({SHIPPED}); may be repeated. Default: those."),
    ] = None,
    latent_steps: options.LatentSteps = None,
    max_new_tokens: options.MaxNewTokens = None,
    aligner: options.AlignerKind = "auto",
    dtype: options.DType = "auto",
    device: options.Device = None,
    engine: options.EngineName = "auto",
    weights: options.Weights = "model",
    kv_transfer: options.KVTransfer = None,
    host: Annotated[str, option(SERVER, "Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, option(SERVER, "Port to listen at.", min=0, max=65535)] = 8000,
    vllm_url: Annotated[
        str | None, option(VLLM, "A vLLM server that runs, in place of one that is started (see --kv-config).")
    ] = None,
    folder: options.Folder = None,
    timeout: Annotated[float, option(VLLM, "Seconds that vLLM may be silent while it works for a request.")] = 300.0,
    max_waiting: Annotated[int, option(SERVER, "Requests at a time; more are refused (429).")] = 256,
    kv_config: Annotated[
        bool, option(VLLM, "Print vLLM's --kv-transfer-config for this model and folder, and end.", "--kv-config")
    ] = False,
) -> None:
    """Serve chains over OpenAI's API: agents think here, vLLM writes. `model` in a request names the chain."""
    # torch takes seconds to import; --help answers before that.
    from latentmas.loading import check_placement

    quiet_libraries()
    check_placement(dtype, device)
    try:  # the server's packages are optional
        from latentmas.serving import config, server
    except ModuleNotFoundError as error:
        raise LatentMASError(
            f"latentmas serve needs {error.name}, which is not installed: pip install 'latentmas-kernels[serve]'"
        ) from error
    serving = config.ServeConfig(
        model=model,
        chains=chain or (),
        latent_steps=latent_steps,
        max_new_tokens=max_new_tokens,
        aligner=aligner,
        dtype=dtype,
        device=device,
        engine=engine,
        weights=weights,
        kv_transfer=kv_transfer or "kv",
        host=host,
        port=port,
        vllm_url=vllm_url,
        folder=folder,
        timeout=timeout,
        max_waiting=max_waiting,
        vllm_options=vllm_options or (),
    )
    if kv_config:
        server.print_kv_config(serving, out)
    else:
        raise typer.Exit(server.serve(serving, err))
