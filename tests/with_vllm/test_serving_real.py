"""`latentmas serve` as a process, with vLLM and OpenAI's client."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from latentmas import Chain
from latentmas.chain_files.reader import read_chain

from latentmas_kernels import build_aligner

SECONDS = 60.0
CHAIN = """
name: ponder
latent_steps: 3
max_new_tokens: 24
agents:
  - {name: planner, output: latent, prompt: "Question: {question}\\n\\nYou are the planner. Write a short plan."}
  - {name: critic, output: latent, prompt: "You are the critic. Look for mistakes."}
  - {name: judger, output: text, prompt: "{question}\\n\\nAnswer in your own words."}
"""
LONG = """
name: long
agents:
  - {name: planner, output: latent, latent_steps: 2, prompt: "{question}"}
  - {name: judger, output: text, max_new_tokens: 1500, prompt: "Write a very long story about a boy who walks to the sea."}
"""
THINGS = """apple bridge candle desert engine forest guitar hammer island jungle kitchen ladder mirror needle ocean pencil
queen river shadow temple umbrella violin window yacht zebra anchor basket castle dragon elephant feather garden harbour iceberg
jacket kettle lantern mountain notebook orchard planet quilt rocket saddle tractor uniform valley whale volcano compass"""
QUESTIONS = [f"What is a {thing}?" for thing in THINGS.split()]


class Server:
    """The process, what it says, and a client for it."""

    def __init__(self, folder: Path) -> None:
        self.kv_files, self.said = folder / "kv-files", list[str]()
        self.kv_files.mkdir()
        (folder / "ponder.yaml").write_text(CHAIN)
        (folder / "long.yaml").write_text(LONG)
        self.chains = [str(folder / "ponder.yaml"), "mix", str(folder / "long.yaml")]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="-", timeout=SECONDS, max_retries=0)

    def start(self) -> None:
        environment = {
            **os.environ, "OMP_NUM_THREADS": "2", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "1000",
        }  # fmt: skip
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        self.process = subprocess.Popen(
            [
                Path(sys.executable).with_name("latentmas"), "serve", *(part for c in self.chains for part in ("--chain", c)),
                "--max-new-tokens", "24", "--dtype", "float32", "--aligner", "identity", "--port", self.url.rpartition(":")[2],
                "--folder", self.kv_files, "--", "--max-model-len", "2048", "--max-num-seqs", "16",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        threading.Thread(target=self._listen, daemon=True).start()
        self.until(self.well, 3 * SECONDS)

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line.rstrip())

    def until(self, true: Callable[[], Any], seconds: float = SECONDS) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, self.said[-20:]
            time.sleep(0.05)

    def well(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def vllm(self) -> psutil.Process:
        """vLLM's server."""
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def running(self) -> float:
        """Requests that vLLM works on, by its own count."""
        (port,) = {c.laddr.port for c in self.vllm().net_connections("inet") if c.status == psutil.CONN_LISTEN}
        told = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=SECONDS, trust_env=False).text.splitlines()
        return sum(
            float(line.rpartition(" ")[2])
            for line in told
            if line.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{"))
        )

    def ask(self, model: str, question: str, **options: Any) -> Any:
        return self.client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], **options
        )


def running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def shared_memory(process: psutil.Process) -> list[Path]:
    """Python's segments of it."""
    return [Path(piece.path) for piece in process.memory_maps() if piece.path.startswith("/dev/shm/psm_")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("serve"))
    server.start()
    try:
        yield server
    finally:
        family = [psutil.Process(server.process.pid)]
        family += family[0].children(recursive=True)
        shared = {path for process in family for path in shared_memory(process)}
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(SECONDS)
        # Those that were orphaned may wait for init to take their exit codes.
        alive = [process for process in family if running(process)]
        for process in alive:
            process.kill()
        assert code == 0
        assert len(family) > 3
        assert not alive
        assert not [path for path in shared if path.exists()]
        assert not list(server.kv_files.iterdir())


@pytest.fixture(scope="module")
def own(float32: tuple[Any, Any], server: Server) -> Callable[[str, list[str]], list[Any]]:
    """Answers of our own engine, one question at a time."""
    model, tokenizer = float32
    aligner = build_aligner(model, "identity")

    def answers(chain: str, questions: list[str], max_new_tokens: int = 24) -> list[Any]:
        agents = read_chain(chain, max_new_tokens=24).agents
        agents[-1] = replace(agents[-1], max_new_tokens=max_new_tokens)  # type: ignore[type-var]
        run_by = Chain(model, tokenizer, agents, aligner=aligner)
        batches = [questions[start : start + 10] for start in range(0, len(questions), 10)]
        return [answer for batch in batches for answer in run_by.run(batch).answers]

    return answers


def test_answers_are_those_of_our_own_engine(server: Server, own: Any) -> None:
    for chain, name in ((server.chains[0], "ponder"), ("mix", "mix")):
        (want,) = own(chain, ["Name three colours."])
        said = server.ask(name, "Name three colours.")
        assert said.choices[0].message.content.strip() == want.text
        assert said.choices[0].finish_reason == want.finish_reason
        usage = said.usage.model_dump()
        assert usage["latent_steps"] == sum(turn.latent_steps for turn in want.turns) > 0
        assert usage["prompt_tokens"] == sum(turn.prompt_tokens for turn in want.turns)
        assert usage["completion_tokens"] == sum(turn.new_tokens for turn in want.turns)
        assert usage["completion_tokens_details"]["reasoning_tokens"] == sum(t.new_tokens for t in want.turns[:-1])
        names = ("agent", "prompt_tokens", "latent_steps", "new_tokens")
        assert usage["latentmas"] == [{name: getattr(turn, name) for name in names} for turn in want.turns]
        chunks = list(server.ask(name, "Name three colours.", stream=True, stream_options={"include_usage": True}))
        pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
        assert "".join(pieces) == said.choices[0].message.content
        assert len(pieces) > 10
        assert chunks[-1].usage.model_dump() == usage
        assert chunks[-2].choices[0].finish_reason == want.finish_reason


def test_fifty_at_once(server: Server, own: Any) -> None:
    want = [answer.text for answer in own(server.chains[0], QUESTIONS, 8)]
    with ThreadPoolExecutor(50) as pool:
        said = list(pool.map(lambda question: server.ask("ponder", question, max_tokens=8), QUESTIONS))
    assert len(QUESTIONS) == 50
    assert [s.choices[0].message.content.strip() for s in said] == want
    assert len(set(want)) > 25
    assert not list(server.kv_files.iterdir())


def test_sampling_by_seed_and_stops(server: Server) -> None:
    drawn = [server.ask("ponder", "Tell me a story.", temperature=1.0, seed=seed) for seed in (3, 3, 4)]
    one, again, other = (d.choices[0].message.content for d in drawn)
    assert one == again != other
    whole = server.ask("ponder", "Name three colours.").choices[0].message.content
    word = whole.split()[3]
    cut = server.ask("ponder", "Name three colours.", stop=[word])
    assert cut.choices[0].message.content == whole[: whole.index(word)]
    assert cut.choices[0].finish_reason == "stop"
    assert server.ask("ponder", "Name three colours.", max_tokens=2).usage.completion_tokens == 2


def test_what_does_not_fit_is_refused(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == ["ponder", "mix", "long"]
    with pytest.raises(openai.NotFoundError, match="ponder, mix, long"):
        server.ask("gpt-4o", "?")
    with pytest.raises(openai.BadRequestError, match="tools"):
        server.ask("ponder", "?", tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.BadRequestError, match="positions|max_model_len"):
        server.ask("ponder", "very long " * 3000)


def test_a_client_that_leaves_ends_the_text(server: Server) -> None:
    with server.ask("long", "Count.", stream=True) as stream:
        for number, _ in enumerate(stream):
            if number == 3:
                break
        assert server.running() == 1
        assert len(list(server.kv_files.iterdir())) == 1
    server.until(lambda: server.running() == 0)
    assert not list(server.kv_files.iterdir())


def test_vllm_dies_and_is_started_again(server: Server) -> None:
    """Requests that it worked on have an error, those that come are told to wait, and then there are answers again."""
    before = server.ask("ponder", QUESTIONS[0]).choices[0].message.content
    with server.ask("long", "Count.", stream=True) as stream, ThreadPoolExecutor() as pool:
        next(iter(stream))
        whole = pool.submit(server.ask, "long", "Count.")
        server.until(lambda: server.running() == 2)
        server.vllm().kill()
        with pytest.raises(openai.APIError, match="vLLM's answer broke off"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="vLLM's answer broke off"):
            whole.result(SECONDS)
    with pytest.raises(openai.InternalServerError, match="try again") as refused:
        server.ask("ponder", QUESTIONS[0])
    assert refused.value.status_code == 503
    assert "retry-after" in refused.value.response.headers
    server.until(server.well, 2 * SECONDS)
    assert server.ask("ponder", QUESTIONS[0]).choices[0].message.content == before
    assert any("is started again" in line for line in server.said)
    assert not list(server.kv_files.iterdir())
