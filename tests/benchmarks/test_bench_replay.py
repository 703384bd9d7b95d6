"""Step times: a cell is checked, measured once and kept, whatever happens to those behind it."""

import json
import sys

import bench_replay
import pytest
from bandwidth import OUT_OF_TIME
from table import replays

CELLS = ["tiny float32 batch 1 kv 24 no pdl", "tiny float32 batch 2 kv 24 no pdl"]


def run(monkeypatch, out, *words):
    """main() on the CPU; its exit status."""
    words = ["--device", "cpu", "--shape", "tiny", "--dtype", "float32", "--kv", "24", "--out", str(out), *words]
    monkeypatch.setattr(sys, "argv", ["bench_replay.py", *words])
    try:
        bench_replay.main()
    except SystemExit as end:
        return end.code
    return 0


def kept(out):
    return json.loads(out.read_text())["replay"]


@pytest.fixture
def no_reference(monkeypatch):
    """Cells of which only the order matters."""
    monkeypatch.setattr(bench_replay, "reference", lambda start: None)
    monkeypatch.setattr(bench_replay, "Eager", lambda start: None)
    monkeypatch.setattr(bench_replay, "errors", lambda side, exact: {"latent": 1e-7, "token": 1e-7})


def test_a_cell_has_checked_times_and_is_not_measured_again(monkeypatch, tmp_path, capsys):
    out = tmp_path / "results.json"
    assert run(monkeypatch, out) == 0
    cell = kept(out)[CELLS[0]]
    assert cell["pdl"] is False
    for phase in ("latent", "token"):
        assert cell[phase]["us"] > 0
        assert cell[phase]["gb_s"] == pytest.approx(cell[phase]["mb"] / cell[phase]["us"] * 1e3)
        assert cell["error"][phase] < 1e-5
    assert CELLS[0] in capsys.readouterr().out
    assert any(line.startswith("| tiny") for line in replays(out))
    monkeypatch.setattr(bench_replay, "measure", lambda *args: pytest.fail("it was measured already"))
    assert run(monkeypatch, out) == 0


def test_a_run_that_is_cut_off_keeps_its_cells_and_goes_on_behind_them(monkeypatch, tmp_path, no_reference):
    out = tmp_path / "results.json"
    measured = []

    def measure(start, exact, plain, cell, device):
        measured.append(cell)
        if len(measured) == 2:
            raise KeyboardInterrupt
        row = {"us": 1.0, "gb_s": 1.0, "percent_of_datasheet": None}
        return {"latent": row, "token": row}

    monkeypatch.setattr(bench_replay, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, out, "--batch", "1", "2")
    assert list(kept(out)) == CELLS[:1]
    assert run(monkeypatch, out, "--batch", "1", "2") == 0
    assert list(kept(out)) == CELLS
    assert measured == [("tiny", 1, False), ("tiny", 2, False), ("tiny", 2, False)]


def test_no_cell_is_begun_when_the_seconds_are_spent(monkeypatch, tmp_path, no_reference):
    out = tmp_path / "results.json"
    assert run(monkeypatch, out, "--seconds", "-1") == OUT_OF_TIME
    assert not out.exists()


def test_a_wrong_result_gets_no_time_and_ends_nonzero(monkeypatch, tmp_path, no_reference, capsys):
    out = tmp_path / "results.json"
    sides = iter([{"latent": 1e-7, "token": 1e-7}, {"latent": 1e-7, "token": 1.0}])
    monkeypatch.setattr(bench_replay, "errors", lambda side, exact: next(sides))
    assert run(monkeypatch, out) == f"wrong results, so no times: {CELLS[0]}"
    assert "token: wrong result: error 1.00e+00" in capsys.readouterr().out
    assert "latent" not in kept(out)[CELLS[0]]
