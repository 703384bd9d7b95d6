"""`latentmas run --decoder vllm`, with an engine in a process of its own, as a user has it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from latentmas import METHODS, Chain
from latentmas.backends.base import EngineError
from latentmas.backends.vllm import Vllm
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.usefixtures("keys_are_moved_by_torch")
Loaded = tuple[Any, Any]
QUESTION = "How many legs have 3 cats and 2 birds?"


def test_the_answer_is_that_of_our_own_engine(float32: Loaded, default_folder: Path) -> None:
    expected = Chain(*float32, METHODS["latent"](4, 24)).run([QUESTION])
    command = [
        str(Path(sys.executable).with_name("latentmas")), "run", QUESTION, "--decoder", "vllm", "--json", "--dtype", "float32",
        "--model", str(default_folder), "--latent-steps", "4", "--max-new-tokens", "24", "--vllm", '{"max_model_len": 1024}',
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)  # nothing of vLLM's log is in it
    assert document["answers"][0]["answer"] == expected.answers[0].text
    assert document["decoder"] == "vllm"
    counted = [(m["agent"], m["prompt_tokens"], m["latent_steps"], m["new_tokens"]) for m in document["agents"]]
    assert counted == [(m.agent, m.prompt_tokens, m.latent_steps, m.new_tokens) for m in expected.agents]


def test_a_killed_engine_is_an_error_and_no_wait(
    float32: Loaded, default_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    before = set(psutil.Process().children(recursive=True))
    with Vllm(str(default_folder), float32[0], settings={"max_model_len": 1024}) as vllm:
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


# ---- ends --------------------------------------------------------------------------------------------------------------

TINY = """
import os, sys
from latentmas.backends.vllm import Vllm
from latentmas.backends.base import GenerationRequest
from transformers import LlamaForCausalLM

if __name__ == "__main__":
    model = LlamaForCausalLM.from_pretrained(sys.argv[1])
    with Vllm(sys.argv[1], model, settings={"max_model_len": 512, "skip_tokenizer_init": True}) as vllm:
        print("ready", flush=True)
        while True:
            vllm.write(None, [GenerationRequest([5, 6], 400, ())])
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of its own group that starts vLLM and lets it write for ever."""
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, head_dim=32,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    (tmp_path / "script.py").write_text(TINY)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", tmp_path / "model"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, start_new_session=True, env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    )  # fmt: skip
    yield process
    for child in engine_of(process):
        child.kill()
    process.kill()
    process.wait()


def engine_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    if not psutil.pid_exists(process.pid):
        return []
    return [child for child in psutil.Process(process.pid).children() if "EngineCore" in " ".join(child.cmdline())]


def test_ctrl_c_while_vllm_starts(owner: subprocess.Popen[str]) -> None:
    """vLLM swallows the exception and would wait for its process, which has ended by then."""
    deadline = time.monotonic() + 60
    while not engine_of(owner):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(owner.pid, signal.SIGINT)
    assert owner.wait(60) in (130, -signal.SIGINT)


def test_vllm_ends_with_a_process_that_was_killed(owner: subprocess.Popen[str]) -> None:
    assert owner.stdout is not None
    assert owner.stdout.readline() == "ready\n"
    (engine,) = engine_of(owner)
    everyone = [engine, *engine.children(recursive=True)]
    owner.kill()
    _, alive = psutil.wait_procs(everyone, timeout=60)
    assert alive == []


def test_what_the_connector_refuses_is_said_by_name(
    float32: Loaded, default_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although it would be found in another process."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(
        ValueError, match="LatentConnector got kv_cache_dtype fp8 for a model in float32; supported are"
    ):
        Vllm(str(default_folder), float32[0], settings={"max_model_len": 512, "kv_cache_dtype": "fp8"})


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"dtype": "bfloat16"}, "got dtype among the settings of vLLM, which are set by the chain"),
        ({"data_parallel_size": 2}, "got data_parallel_size 2 .* one of the replicas only"),
        ({"load_format": "dummy"}, "its weights would be random"),
        ({"no_such": 1}, "vLLM does not take these settings: .*no_such"),
    ],
)
def test_settings_that_cannot_be_right(
    float32: Loaded, default_folder: Path, settings: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        Vllm(str(default_folder), float32[0], settings=settings)
