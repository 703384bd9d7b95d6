"""The report of a run on standard output: answers as they come and a table of times, or one JSON document."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from latentmas.chain.agent import Agent
from latentmas.chain.results import AgentMetrics, Answer, ChainResult
from latentmas.characters import visible
from latentmas.cli.batches import records
from latentmas.cli.questions import Question
from latentmas.console import print_json, print_whole
from latentmas_kernels import Aligner

PHASES = ("prefill", "latent", "decode", "other")


class Report:
    """The sums of the batches of a run.

    Attributes:
        finished: questions answered by this run.
        seconds: wall clock of its batches.
    """

    def __init__(
        self, console: Console, agents: Sequence[Agent], done: Iterable[dict[str, Any]], *, as_json: bool
    ) -> None:
        """Begin with all sums at zero.

        Args:
            console: where to print.
            agents: of the chain.
            done: results of an earlier run; they come into the document only.
            as_json: print nothing but a document at the end.
        """
        self.console, self.as_json = console, as_json
        self.agents = [AgentMetrics(agent.name) for agent in agents]
        self.records = [{name: value for name, value in record.items() if name != "settings"} for record in done]
        self.finished, self.seconds = 0, 0.0

    def add(self, batch: Sequence[Question], result: ChainResult) -> None:
        """Add a batch and print its answers."""
        self.agents = [total + new for total, new in zip(self.agents, result.agents, strict=True)]
        self.records += records(batch, result)
        self.finished, self.seconds = self.finished + len(batch), self.seconds + result.seconds
        if not self.as_json:
            for question, answer in zip(batch, result.answers, strict=True):
                self._print_answer(question, answer)

    def close(self, settings: dict[str, Any], setup: float, aligner: Aligner | None, left_out: Sequence[str]) -> None:
        """Print the table, or the document.

        Args:
            settings: of the run.
            setup: seconds before the first batch.
            aligner: how hidden states were fed back, None where no agent runs latent steps.
            left_out: what was wrong with the questions that were not run.
        """
        if self.as_json:
            document = {
                **settings,
                "answers": sorted(self.records, key=lambda record: record["number"]),
                "agents": [agent.to_dict() for agent in self.agents],
                "seconds": self.seconds,
                "setup_seconds": setup,
                "feedback": None if aligner is None else {"kind": aligner.kind, "reason": aligner.reason},
                "left_out": list(left_out),
            }
            print_json(self.console, document)
        elif self.finished:
            self._print_table(setup)
            if aligner is not None:
                self.console.print(f"feedback: {aligner.kind} ({aligner.reason})", soft_wrap=True)

    def _print_answer(self, question: Question, answer: Answer) -> None:
        show = self.console.print
        show(Text(f"Question {question.number} ", "bold").append(visible(question.text), "not bold"), soft_wrap=True)
        show(f"\n{answer.text}\n" if answer.text.strip() else Text("\n(the answer is empty)\n", "dim"), soft_wrap=True)
        if answer.finish_reason == "length":
            show(Text("(cut off by --max-new-tokens)\n", "dim"))
        if question.answer is not None:
            show(Text(f"expected: {visible(question.answer)}\n", "dim"), soft_wrap=True)

    def _print_table(self, setup: float) -> None:
        """Print a row per agent and one for all, then the phases."""
        table = Table(box=None, pad_edge=False)
        table.add_column("agent", overflow="fold")
        counts = {"prompt tokens": "prompt_tokens", "shared": "shared_tokens", "latent steps": "latent_steps"}
        counts["new tokens"] = "new_tokens"
        if not any(agent.shared_tokens for agent in self.agents):
            del counts["shared"]
        for column in (*counts, "seconds", "ms/step", "KV MB", "share"):
            table.add_column(column, justify="right")
        for agent in self.agents:
            step = "" if agent.ms_per_step is None else f"{agent.ms_per_step:.1f}"
            table.add_row(
                visible(agent.agent), *(str(getattr(agent, name)) for name in counts.values()), f"{agent.seconds:.2f}", step,
                f"{agent.kv_bytes / 2**20:.1f}", f"{agent.seconds / self.seconds:.0%}",
            )  # fmt: skip
        if len(self.agents) > 1:
            sums = (str(self._sum(name)) for name in counts.values())
            table.add_row("all", *sums, f"{self._sum('seconds'):.2f}", style="bold")
        print_whole(self.console, table)
        phases = ", ".join(f"{phase} {self._sum(phase + '_seconds'):.2f} s" for phase in PHASES)
        self.console.print(f"\n{self.seconds:.2f} s: {phases}; {setup:.2f} s to load and set up", soft_wrap=True)

    def _sum(self, name: str) -> Any:
        return sum(getattr(agent, name) for agent in self.agents)
