"""A chain is added by a YAML file alone: every command and METHODS know it by its name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHAINS = Path(__file__).parents[2] / "python" / "latentmas" / "chain_files"
PROGRAM = """
import importlib.resources, pathlib, sys
importlib.resources.files = lambda package: pathlib.Path(sys.argv.pop(1))
from latentmas import METHODS, read_chain
from latentmas.cli.app import main
assert [agent.name for agent in METHODS["pair"](2, 3)] == ["planner", "judger"]
assert read_chain("pair", latent_steps=2, max_new_tokens=3).agents == METHODS["pair"](2, 3)
main()
"""


@pytest.mark.parametrize("command", ["run", "serve"])
def test_a_chain_is_a_file_in_the_folder(tmp_path, command):
    for file in CHAINS.glob("*.yaml"):
        shutil.copy(file, tmp_path)
    thinker, writer = "{name: planner, output: latent, prompt: '{question}'}", "{name: judger, output: text, prompt: x}"
    (tmp_path / "pair.yaml").write_text(f"agents:\n  - {thinker}\n  - {writer}\n")
    arguments = [sys.executable, "-c", PROGRAM, str(tmp_path), command, "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert "debate, hierarchical, mix, pair, sequential, single, text" in done.stdout, done.stderr
