"""What is shown while a batch runs, on a terminal and in a log. Drawn to a string; the clock is set by the test."""

import io

import pytest
import torch
from latentmas.chain.agent import Agent
from latentmas.chain.progress import Progress
from latentmas.cli import live_view as display
from latentmas.cli.live_view import Display
from rich.console import Console
from tokenizers_offline import character_tokenizer

THINKER = Agent("planner", "{question}", latent_steps=4)
WRITER = Agent("judger", "{question}", max_new_tokens=50)
A, B, END = 4, 5, 2  # ids of "a", "b" and <eos>


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(display, "time", clock)
    return clock


@pytest.fixture
def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=60, height=24, color_system=None)


@pytest.fixture
def log():
    return Console(file=io.StringIO(), force_terminal=False, width=60)


def showing(console, title="How many?"):
    return Display(console, {None: (character_tokenizer(), [END])}, title)


def written(console):
    return console.file.getvalue()


def play(view, agent, number, steps, clock, seconds=0.5):
    """Let an agent begin and take its steps: a list of tokens per step, or None for latent steps."""
    view(Progress(agent, number, 2, 0))
    clock.now += 10  # the prompt
    for step, tokens in enumerate(steps, start=1):
        view(Progress(agent, number, 2, step, None if tokens is None else torch.tensor(tokens)))
        clock.now += seconds


def text(view, console):
    """What the view would show now on a console of this width, without control codes of a terminal."""
    paper = Console(file=io.StringIO(), width=console.width)
    paper.print(view._view())
    return [line.rstrip() for line in written(paper).splitlines()]


def test_a_log_gets_a_line_per_agent(log, clock):
    with showing(log, "1-2 of 8: How many?") as view:
        play(view, THINKER, 1, [None] * 4, clock)
        play(view, WRITER, 2, [[A]], clock)
    assert written(log).splitlines() == [
        "1-2 of 8: How many?",
        "  planner thinks 4 steps (1 of 2)",
        "  judger writes up to 50 tokens (2 of 2)",
    ]


def test_a_terminal_shows_agents_steps_and_the_text_as_it_comes(terminal, clock):
    with showing(terminal) as view:
        play(view, THINKER, 1, [None] * 4, clock)
        play(view, WRITER, 2, [[A], [B], [B]], clock)
        # Four thoughts took two seconds; two tokens came in the 1.5 s since the first one.
        assert text(view, terminal) == [
            "How many?",
            "  planner thinks 4/4  2.0 steps/s",
            "  judger writes 3/50  1.3 tokens/s",
            "abb",
        ]


def test_all_rows_count_as_tokens_per_second_until_they_end(terminal, clock):
    with showing(terminal) as view:
        play(view, WRITER, 1, [[A, A], [B, END], [A, 0], [A, 0]], clock)
        # After the first step: 2 tokens, then 1 and 1 of the first row alone, in 2 seconds.
        assert text(view, terminal)[1:] == ["  judger writes 4/50  2.0 tokens/s", "abaa"]


def test_what_comes_behind_the_end_of_a_row_is_not_shown(terminal, clock):
    with showing(terminal) as view:
        play(view, WRITER, 1, [[A, A], [END, A], [B, B]], clock)
        assert text(view, terminal)[-1] == "a"


def test_a_long_text_shows_its_last_lines(terminal, clock):
    with showing(terminal, "Q" * 200) as view:
        play(view, WRITER, 1, [[A]] * 1000 + [[B]], clock)
        lines = text(view, terminal)
    assert len(lines) == 2 + display.TEXT_LINES
    assert lines[-1].endswith("ab")
    assert max(map(len, lines)) <= 60
    assert lines[0].endswith("…")


def test_the_prompt_is_being_read(terminal, clock):
    with showing(terminal) as view:
        view(Progress(WRITER, 1, 2, 0))
        assert text(view, terminal)[-1] == "  judger writes (reading its prompt)"


def test_the_cursor_comes_back_whatever_ends_the_run(terminal, clock):
    def stopped():
        with showing(terminal) as view:
            play(view, WRITER, 1, [[A]], clock)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    hidden, shown = written(terminal).rfind("\x1b[?25l"), written(terminal).rfind("\x1b[?25h")
    assert 0 <= hidden < shown


def test_drawing_is_now_and_then(terminal, clock):
    """A thousand steps in a second are drawn eight times, not a thousand."""
    with showing(terminal) as view:
        draws = []
        view.live.update = lambda *content, refresh: draws.append(clock.now)
        play(view, WRITER, 1, [[A]] * 1000, clock, seconds=0.001)
    assert 8 <= len(draws) <= 10


@pytest.mark.parametrize("width", [1, 2, 20])
def test_narrow_terminals(clock, width):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=24, color_system=None)
    with showing(console) as view:
        play(view, WRITER, 1, [[A], [B]], clock)
        assert "".join(text(view, console)).endswith("ab")


def test_an_end_that_is_no_special_token_is_not_shown(terminal, clock):
    with Display(terminal, {None: (character_tokenizer(), [B])}, "How many?") as view:
        play(view, WRITER, 1, [[A], [A], [B], [A]], clock)
        assert text(view, terminal)[-1] == "aa"


def test_nothing_of_a_question_or_a_text_steers_the_terminal(terminal, log, clock):
    hostile, shown = "Why\x1b[2J\x07?", "Why\\x1b[2J\\x07?"
    agent = Agent("jud\x1b[3Jger", "{question}", max_new_tokens=5)
    with showing(log, hostile) as view:
        play(view, agent, 1, [[A]], clock)
    assert written(log).splitlines() == [shown, "  jud\\x1b[3Jger writes up to 5 tokens (1 of 2)"]
    with showing(terminal, hostile) as view:
        view.tokenizers[None][0].decode = lambda ids, **_: "ab\x1b]0;title\x07"
        play(view, agent, 1, [[A], [B]], clock)
        assert text(view, terminal) == [shown, "  jud\\x1b[3Jger writes 2/5  1.0 tokens/s", "ab\\x1b]0;title\\x07"]
    assert "\x1b[2J" not in written(terminal)
