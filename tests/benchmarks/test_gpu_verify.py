"""The script for a machine with a GPU: what comes first there, in which limits, and that nothing is lost or done twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = "scripts/gpu_verify.sh"
FIRST_SLOT = ["build", "checks", "replays"]


def run(*stages, **environment):
    env = {
        **os.environ,
        "DEVICE": "cpu",
        "PYTHON": sys.executable,
        "PYTHONPATH": f"{ROOT}:{ROOT}/python",
        **environment,
    }
    return subprocess.run([SCRIPT, *stages], cwd=ROOT, env=env, capture_output=True, text=True)


def test_a_first_slot_has_checks_and_step_times_before_anything_else():
    done = run("nonsense")
    assert done.returncode == 2
    stages = done.stdout.partition("there are ")[2].split()
    assert stages[:7] == [*FIRST_SLOT, "chain", "engine", "tests", "tune"]
    assert len(stages) == len(set(stages))


def test_the_first_stages_end_in_six_minutes():
    function = f"source <(sed -n '/^limit_of()/,/^}}/p' {SCRIPT})"
    limits = f"DEVICE=cuda; {function}; for stage in {' '.join(FIRST_SLOT)}; do limit_of $stage; done"
    done = subprocess.run(["bash", "-euc", limits], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 3
    assert sum(map(int, done.stdout.split())) <= 360


def test_a_dry_run_writes_marks_and_numbers_and_is_not_done_twice(tmp_path):
    """The stage that goes through bench_replay.py, predict.py and table.py; test_check_device.py runs the checks."""
    done = run("replays", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no prediction for" in done.stdout
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert found["stages"]["replays"]["state"] == "passed"
    assert found["replay"]["tiny float32 batch 1 kv 24 no pdl"]["latent"]["us"] > 0
    assert "## One step, replayed" in (tmp_path / "cpu.md").read_text()
    assert "tiny float32" in (tmp_path / "all.log").read_text()
    again = run("replays", OUT=str(tmp_path))
    assert again.returncode == 0
    assert "replays: passed before" in again.stdout


def test_a_stage_that_fails_is_marked_and_ends_nonzero(tmp_path):
    results = tmp_path / "cpu.json"
    results.write_text('{"replay": "not a table"}')
    done = run("replays", OUT=str(tmp_path))
    assert done.returncode == 1
    assert "FAILED: replays" in done.stdout
    assert json.loads(results.read_text())["stages"]["replays"]["state"] == "failed"
