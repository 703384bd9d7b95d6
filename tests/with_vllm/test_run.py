"""`latentmas run --decoder vllm`, with an engine in a process of its own, as a user has it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from latentmas import METHODS, Chain
from latentmas.backends.vllm import Vllm
from latentmas.backends.writing import EngineError
from latentmas.default_model import default_model_folder

pytestmark = pytest.mark.usefixtures("keys_are_moved_by_torch")
QUESTION = "How many legs have 3 cats and 2 birds?"


def test_the_answer_is_that_of_our_own_engine(float32: tuple[Any, Any]) -> None:
    expected = Chain(*float32, METHODS["latent"](4, 24)).run([QUESTION])
    command = [
        str(Path(sys.executable).with_name("latentmas")), "run", QUESTION, "--decoder", "vllm", "--json", "--dtype", "float32",
        "--latent-steps", "4", "--max-new-tokens", "24", "--vllm", '{"max_model_len": 1024}',
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)  # nothing of vLLM's log is in it
    assert document["answers"][0]["answer"] == expected.answers[0].text
    assert document["decoder"] == "vllm"
    counted = [(m["agent"], m["prompt_tokens"], m["latent_steps"], m["new_tokens"]) for m in document["agents"]]
    assert counted == [(m.agent, m.prompt_tokens, m.latent_steps, m.new_tokens) for m in expected.agents]


def test_a_killed_engine_is_an_error_and_no_wait(float32: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    before = set(psutil.Process().children(recursive=True))
    with Vllm(str(default_model_folder()), float32[0], settings={"max_model_len": 1024}) as vllm:
        started = set(psutil.Process().children(recursive=True)) - before
        chain = Chain(*float32, METHODS["text"](0, 200), decoder=vllm)

        def kill(progress: Any) -> None:
            if progress.step == 5:
                for process in started:
                    if "EngineCore" in " ".join(process.cmdline()):
                        process.kill()

        with pytest.raises(EngineError, match="vLLM's engine has ended"):
            chain.run([QUESTION], on_progress=kill)
        with pytest.raises(EngineError, match="vLLM's engine has ended"):
            chain.run([QUESTION])
