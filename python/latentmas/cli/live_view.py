"""The progress of a chain while it runs: a live view on a terminal, plain lines elsewhere. All of it on standard error."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from latentmas.chain.progress import Progress
from latentmas.characters import visible

REDRAWS_PER_SECOND = 8
TEXT_LINES = 8


class Display:
    """The progress of one batch. A context manager; leaves nothing behind on a terminal.

    Everything happens in the thread that runs the chain: tokenizers are not made for several, and a view that is drawn
    now and then takes less than one step in twenty.
    """

    def __init__(
        self, console: Console, tokenizers: Mapping[str | None, tuple[Any, Sequence[int]]], title: str
    ) -> None:
        """Prepare the view; nothing is written before the block begins.

        Args:
            console: where to write.
            tokenizers: tokenizer, for the text of the batch's first row, and tokens that end a row, by the names of agents'
                models; None is the chain's own.
            title: what the batch is.
        """
        self.console, self.tokenizers, self.title = console, tokenizers, visible(title)
        self.live: Live | None = None
        self.finished: list[Text] = []
        self.progress: Progress | None = None
        self.began = self.drawn = 0.0
        self.ended: list[bool] = []
        self.ids: list[int] = []
        self.tokens = 0

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            # Streams stay as they are: a redirected one could not be restored from inside an interrupt.
            self.live = Live(
                console=self.console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self.live.start()
        else:
            self.console.print(self.title, soft_wrap=True)
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, progress: Progress) -> None:
        if progress.step == 0:
            self._begin(progress)
        else:
            self._step(progress)
        now = time.perf_counter()
        if self.live is not None and (progress.step == 0 or now - self.drawn > 1 / REDRAWS_PER_SECOND):
            self.drawn = now
            self.live.update(self._view(), refresh=True)

    def _begin(self, progress: Progress) -> None:
        if self.progress is not None:
            self.finished.append(self._line(self.progress, finished=True))
        if self.live is None:
            limit = f"{progress.steps} steps" if progress.agent.thinks else f"up to {progress.steps} tokens"
            number = ", ".join(map(str, (progress.number, *progress.others)))
            line = f"  {visible(progress.names)} {_verb(progress)} {limit} ({number} of {progress.agents})"
            self.console.print(line, soft_wrap=True)
        self.progress, self.began, self.ids, self.ended, self.tokens = progress, 0.0, [], [], 0

    def _step(self, progress: Progress) -> None:
        self.progress = progress
        if not self.began:  # the first step begins behind the prompt
            self.began = time.perf_counter()
        if progress.tokens is None:
            return
        tokens = progress.tokens.tolist()
        self.ended = self.ended or [False] * len(tokens)
        ends = self.tokenizers[progress.agent.model][1]
        if not self.ended[0] and tokens[0] not in ends:
            self.ids.append(tokens[0])
        self.tokens += self.ended.count(False)
        self.ended = [ended or token in ends for ended, token in zip(self.ended, tokens, strict=True)]

    def _line(self, progress: Progress, *, finished: bool = False) -> Text:
        seconds, thinks = time.perf_counter() - self.began if self.began else 0.0, progress.agent.thinks
        line = Text(f"  {visible(progress.names)}", "bold").append(f" {_verb(progress)} ", "not bold")
        if not progress.step:
            return line.append("(reading its prompt)" if progress.steps else "", "not bold dim")
        line.append(f"{progress.step}/{progress.steps}", "not bold")
        # The clock begins with the first step: a latent agent reports as a step begins, a writer once its tokens are there.
        done = progress.step - (not finished) if thinks else self.tokens - len(self.ended)
        if seconds > 0 and done > 0:
            line.append(f"  {done / seconds:.1f} {'steps' if thinks else 'tokens'}/s", "not bold dim")
        return line

    def _view(self) -> Group:
        assert self.progress is not None
        lines = [Text(self.title, "dim", overflow="ellipsis", no_wrap=True), *self.finished, self._line(self.progress)]
        if self.ids:
            tokenizer, _ = self.tokenizers[self.progress.agent.model]
            text = Text(visible(tokenizer.decode(self.ids, skip_special_tokens=True).strip()))
            lines += text.wrap(self.console, max(self.console.width - 1, 1))[-TEXT_LINES:]
        return Group(*lines)


def _verb(progress: Progress) -> str:
    return ("think" if progress.agent.thinks else "write") + "s" * (not progress.beside)
