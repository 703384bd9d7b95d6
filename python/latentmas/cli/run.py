"""latentmas run."""

import inspect
from typing import Any

import typer

from latentmas.cli.run_config import RunConfig
from latentmas.console import quiet_libraries


def run(**options: Any) -> None:
    """Answer questions: one agent alone, agents that hand on text, agents that think in hidden states, or any mixture.

    Without a question, the first one of the sample is asked.
    """
    quiet_libraries()
    # torch takes seconds to import; --help answers before that.
    from latentmas.cli.execute import execute

    raise typer.Exit(execute(RunConfig(**options)))


# typer makes the options of a command from the signature: here they are the fields of RunConfig.
run.__signature__ = inspect.signature(RunConfig)  # type: ignore[attr-defined]
run.__annotations__ = inspect.get_annotations(RunConfig)
