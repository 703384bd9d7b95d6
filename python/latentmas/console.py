"""Consoles of the command line: text as it is, control characters made visible, pipes that may close."""

import functools
import io
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from latentmas.characters import visible


class Terminal(Console):
    """A console whose texts are no markup, and whose control characters are shown and not sent.

    Attributes:
        needed: whether what is printed here is the only result of the run. When its reader closes the pipe (`| head -1`),
            the process then ends with exit code 0; otherwise the run goes on and prints nothing more.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, stderr=stderr)
        self.needed = not stderr

    def print(self, *objects: Any, **options: Any) -> None:
        # Before rich makes Text of it, which drops some control characters.
        super().print(*(visible(entry) if isinstance(entry, str) else entry for entry in objects), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)

    def on_broken_pipe(self) -> None:
        """Discard what is printed from now on; end the process with exit code 0 if the output is `needed`.

        Called by rich, from 13.8 on.
        """
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)
        if self.needed:
            raise SystemExit(0)


out, err = Terminal(), Terminal(stderr=True)


def warn(message: str) -> None:
    """Print a warning on standard error."""
    err.print(Text("warning: ", "yellow").append(visible(message), "none"), soft_wrap=True)


def fail(message: str) -> NoReturn:
    """Print one line and end with exit code 2."""
    err.print(Text("error: ", "bold red").append(visible(message), "not bold default"), soft_wrap=True)
    sys.exit(2)


def quiet_libraries() -> None:
    """Silence the libraries, print each warning on one line, and escape letters that the terminal does not have."""
    # transformers takes long to import; --help answers before that.
    import huggingface_hub
    import transformers

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    warnings.showwarning = lambda message, *rest, **more: warn(str(message))


def print_whole(console: Console, table: Table) -> None:
    """Print a table; where it does not go to a terminal, as wide as it is, with nothing cut or folded."""
    if not console.is_terminal:
        table.width = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    console.print(table, crop=False)


def print_json(console: Console, document: Any) -> None:
    """Print a document as JSON."""
    console.print(json.dumps(document, indent=2), soft_wrap=True)  # ASCII: there is nothing to be made visible in it


@contextmanager
def working(console: Console, text: str) -> Iterator[None]:
    """Show a text while the block runs, and silence the progress bars of libraries, which would be drawn over it."""
    with console.status(visible(text)), without_bars():
        yield


@contextmanager
def without_bars() -> Iterator[None]:
    """Silence tqdm inside the block, whoever calls it: not all libraries have an option for it."""
    from tqdm.std import tqdm  # the help does without it

    before = tqdm.__init__

    @functools.wraps(before)
    def silent(bar: tqdm, *arguments: Any, **options: Any) -> None:
        before(bar, *arguments, **{**options, "disable": True})  # also where the caller says disable=False

    tqdm.__init__ = silent
    try:
        yield
    finally:
        tqdm.__init__ = before
