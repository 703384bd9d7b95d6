"""What a run leaves on standard output: answers, a table of where the time went, or one JSON document."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from latentmas.questions import Question
from latentmas.results import AgentMetrics, Answer


def print_answer(console: Console, question: Question, answer: Answer) -> None:
    """One question and its answer, and what was expected where that is known."""
    console.print(Text(f"Question {question.number} ", "bold").append(question.text, "not bold"), soft_wrap=True)
    console.print(f"\n{answer.text}\n", soft_wrap=True)
    if answer.finish_reason == "length":
        console.print(Text("(cut off by --max-new-tokens)\n", "dim"))
    if question.answer is not None:
        console.print(Text(f"expected: {question.answer}\n", "dim"), soft_wrap=True)


def print_table(console: Console, agents: Sequence[AgentMetrics], wall: float, setup: float) -> None:
    """A row per agent and one for all, then the phases.

    Args:
        console: where to print.
        agents: metrics, added up over the batches.
        wall: seconds of the batches.
        setup: seconds before the first of them.
    """
    table = Table("agent", box=None, pad_edge=False)
    for column in ("prompt tokens", "latent steps", "new tokens", "seconds", "ms/step", "KV MB", "share"):
        table.add_column(column, justify="right")
    for agent in agents:
        step = "" if agent.ms_per_step is None else f"{agent.ms_per_step:.1f}"
        counts = (agent.prompt_tokens, agent.latent_steps, agent.new_tokens)
        table.add_row(
            agent.agent, *map(str, counts), f"{agent.seconds:.2f}", step, f"{agent.kv_bytes / 2**20:.1f}",
            f"{agent.seconds / wall:.0%}",
        )  # fmt: skip
    if len(agents) > 1:
        sums = [
            sum(getattr(agent, name) for agent in agents) for name in ("prompt_tokens", "latent_steps", "new_tokens")
        ]
        table.add_row("all", *map(str, sums), f"{sum(agent.seconds for agent in agents):.2f}", "", "", "", style="bold")
    console.print(table)
    phases = [
        f"{name} {sum(getattr(agent, name + '_seconds') for agent in agents):.2f} s"
        for name in ("prefill", "latent", "decode", "other")
    ]
    console.print(f"\n{wall:.2f} s: {', '.join(phases)}; {setup:.2f} s to load and set up", soft_wrap=True)
