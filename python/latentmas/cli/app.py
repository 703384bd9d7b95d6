"""The command line: latentmas run, latentmas doctor, latentmas serve."""

import sys

import typer

from latentmas.cli.doctor import doctor
from latentmas.cli.run import run
from latentmas.cli.serve import serve
from latentmas.console import fail, out
from latentmas_kernels.errors import LatentMASError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def latentmas() -> None:
    """Multi-agent reasoning in hidden states (LatentMAS) on Hugging Face models."""


app.command()(run)
app.command()(doctor)
app.command()(serve)


def main() -> None:
    """Run a command.

    An error that the user can mend is one line and exit code 2; an option that typer refuses is typer's box of several lines,
    also with 2. Ctrl-C is 130 (by typer). A bug is a traceback.
    """
    try:
        app()
    except SystemExit as ended:
        # click ends with 1 on a broken pipe, and says nothing. That is no error where nobody reads the help any more.
        if not ended.code or not isinstance(ended.__context__, BrokenPipeError):
            raise
        if out.needed:
            sys.exit(0)
        fail(f"the run did not come to its end ({ended.__context__}); go on with --resume where there is an --output")
    except (LatentMASError, OSError) as error:
        fail(str(error))
