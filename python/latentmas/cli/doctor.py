"""latentmas doctor."""

from typing import Annotated

import typer

from latentmas.console import out, print_json, quiet_libraries
from latentmas.options import Model


def doctor(model: Model = None, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say which fast paths are on here, for a model where one is named, and why the others are not."""
    # torch takes seconds to import; --help answers before that.
    from latentmas.loading import load_skeleton
    from latentmas_kernels import doctor as examine

    quiet_libraries()
    report = examine(load_skeleton(model) if model is not None else None)
    if as_json:
        print_json(out, report.to_dict())
    else:
        out.print(str(report), soft_wrap=True)
