"""What the command line prints: nothing that steers a terminal, tables that are whole, and pipes that close."""

import io
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentmas.characters import check_characters, decoded, shortened, visible, without_mark
from latentmas.console import Terminal, print_json, print_whole, without_bars, working
from rich.live import Live
from rich.table import Table
from rich.text import Text

HOSTILE = "a\x1b[2Jb\x1b]0;title\x07c\x9b31md\rX\x08\x7f\u202ee"
SHOWN = "a\\x1b[2Jb\\x1b]0;title\\x07c\\x9b31md\\rX\\x08\\x7f\\u202ee"


def paper(**options):
    """A terminal that is a string; its colours off, so that every escape sequence in it came from elsewhere."""
    terminal = Terminal()
    terminal.file = io.StringIO()
    for name, value in options.items():
        setattr(terminal, name, value)
    return terminal


def written(terminal):
    return terminal.file.getvalue()


# ---- characters ----------------------------------------------------------------------------------------------------


def test_what_steers_a_terminal_is_shown():
    assert visible(HOSTILE) == SHOWN
    assert visible("tab\tand\nlines\r\nof two systems, Wie spät? 你好 \u2028 שלום") == (
        "tab\tand\nlines\nof two systems, Wie spät? 你好 \u2028 שלום"
    )


@given(st.text())
def test_no_control_character_is_left(text):
    kept = visible(text)
    assert not any((ord(letter) < 32 and letter not in "\t\n") or 0x7F <= ord(letter) < 0xA0 for letter in kept)
    assert visible(kept) == kept


@pytest.mark.parametrize("text", ["\ud83d", "ab\udcffc", "\udc00\ud800"])
def test_halves_of_characters_are_refused(text):
    with pytest.raises(
        ValueError, match=r"^it holds '\\ud[8cd]\w\w' at character [13], half a surrogate pair or a byte"
    ):
        check_characters(text, "it")
    check_characters("\U0001f600 ä", "it")


def test_bytes_are_utf8_with_or_without_a_mark():
    assert without_mark(b"\xef\xbb\xbf\xc3\xa4", "it") == without_mark(b"\xc3\xa4", "it") == b"\xc3\xa4"
    assert decoded(b"\xc3\xa4", "it") == "ä"
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        with pytest.raises(ValueError, match="^it is UTF-16 or UTF-32; save it as UTF-8$"):
            without_mark("{}".encode(encoding), "it")
    with pytest.raises(ValueError, match=r"^it is not UTF-8 \(byte 0xe4 in line 2\); save it as UTF-8$"):
        decoded(b"first\nsp\xe4t\n", "it")


def test_lists_are_cut_with_a_count():
    faults = [f"line {number}" for number in range(4502)]
    assert shortened(faults, 3) == ["line 0", "line 1", "line 2", "and 4,499 more"]
    assert shortened(faults[:3], 3) == faults[:3]
    assert shortened([], 3) == []


# ---- the console ---------------------------------------------------------------------------------------------------


def test_texts_are_printed_as_they_are_and_steer_nothing():
    terminal = paper()
    terminal.print(HOSTILE, soft_wrap=True)
    terminal.print(Text(visible(HOSTILE)).append(" \x1b[2J", "bold"), soft_wrap=True)
    terminal.print("[red]no markup[/red] :smile:", soft_wrap=True)
    assert written(terminal).splitlines() == [SHOWN, SHOWN + " \\x1b[2J", "[red]no markup[/red] :smile:"]


def test_tables_and_live_views_steer_nothing():
    terminal = paper(_force_terminal=True, _color_system=None)
    table = Table("name", box=None)
    table.add_row("a\x1b[2J\x9b")
    print_whole(terminal, table)
    with Live(Text("b\x1b[3J"), console=terminal, auto_refresh=False, redirect_stdout=False, redirect_stderr=False):
        pass
    text = written(terminal)
    assert "\x9b" not in text
    assert "b\\x1b[3J" in text
    assert "\x1b[2J" not in text
    assert "\x1b[3J" not in text
    assert "\x1b[?25l" in text, "rich's own codes still go out"


def test_a_table_that_is_piped_is_whole():
    """Names longer than the 80 columns that are taken for a pipe."""
    terminal = paper()
    table = Table("agent", box=None, pad_edge=False)
    table.add_column("steps", justify="right")
    table.add_row("name" * 50, "10")
    table.add_row("short", "7")
    print_whole(terminal, table)
    lines = written(terminal).splitlines()
    assert [line.split() for line in lines] == [["agent", "steps"], ["name" * 50, "10"], ["short", "7"]]
    assert {len(line) for line in lines} == {207}


def test_json_stays_json():
    terminal = paper()
    document = {"text": HOSTILE + " [red]\\x1b " + "long " * 50}
    print_json(terminal, document)
    assert json.loads(written(terminal)) == document


# ---- pipes ---------------------------------------------------------------------------------------------------------

CODE = f"""
import sys
sys.path[:0] = {sys.path!r}
from latentmas.console import Terminal
out, err = Terminal(), Terminal(stderr=True)
if "needed" in sys.argv:
    out.needed = False
for number in range(200_000):
    (err if "err" in sys.argv else out).print(f"line {{number}}")
open(sys.argv[1], "w").write("to the end")
"""


@pytest.mark.parametrize(
    ("stream", "arguments", "ends"),
    [("stdout", [], False), ("stdout", ["needed"], True), ("stderr", ["err"], True)],
    ids=["the answers", "answers that are in a file too", "progress"],
)
def test_a_pipe_that_closes_is_no_error(tmp_path, stream, arguments, ends):
    """The run ends with 0 and no word where what it prints is all there is, and goes on otherwise."""
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, str(tmp_path / "end"), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    closed, other = (process.stdout, process.stderr) if stream == "stdout" else (process.stderr, process.stdout)
    assert closed.readline() == b"line 0\n"
    closed.close()
    assert other.read() == b""
    other.close()
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "end").exists() == ends


# ---- bars of libraries ---------------------------------------------------------------------------------------------


def test_bars_of_libraries_are_silent_while_ours_shows(capsys):
    """Whichever class of tqdm they take, and again as before behind the block."""
    from huggingface_hub.utils import tqdm as of_the_hub
    from tqdm import tqdm
    from tqdm.auto import tqdm as automatic

    bars = (tqdm, automatic, of_the_hub)
    with working(paper(), "loading"), without_bars():
        for bar in bars:
            assert list(bar(range(3), desc="Loading weights")) == [0, 1, 2]
            assert list(bar(range(3), desc="Loading weights", disable=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    for bar in bars:
        list(bar(range(3), desc="Loading weights"))
    assert capsys.readouterr().err.count("Loading weights") >= len(bars)


def test_the_bars_come_back_whatever_ends_the_block(capsys):
    from tqdm import tqdm

    with pytest.raises(KeyboardInterrupt), without_bars():
        raise KeyboardInterrupt
    list(tqdm(range(3), desc="mine"))
    assert "mine" in capsys.readouterr().err
