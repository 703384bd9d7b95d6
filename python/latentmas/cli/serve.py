"""latentmas serve: the command, whose options are the fields of ServeConfig."""

import inspect
from typing import Any

import typer

from latentmas.console import err, out, quiet_libraries
from latentmas.serving.config import ServeConfig
from latentmas_kernels.errors import LatentMASError


def serve(**options: Any) -> None:
    """Serve chains over OpenAI's API: agents think here, vLLM writes. `model` in a request names the chain."""
    # torch takes seconds to import; --help answers before that.
    from latentmas.loading import check_placement

    config = ServeConfig(**options)
    quiet_libraries()
    check_placement(config.dtype, config.device)
    try:  # the server's packages are optional
        from latentmas.serving import server
    except ModuleNotFoundError as error:
        raise LatentMASError(
            f"latentmas serve needs {error.name}, which is not installed: pip install 'latentmas-kernels[serve]'"
        ) from error
    if config.kv_config:
        server.print_kv_config(config, out)
    else:
        raise typer.Exit(server.serve(config, err))


# typer makes the options of a command from the signature: here they are the fields of ServeConfig.
serve.__signature__ = inspect.signature(ServeConfig)  # type: ignore[attr-defined]
serve.__annotations__ = inspect.get_annotations(ServeConfig)
