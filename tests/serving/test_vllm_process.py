"""vLLM's server as a child process; a small program stands in for it."""

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from latentmas.backends.vllm.server import VllmServer
from latentmas.serving.vllm_process import VllmProcess
from served_gateway import SECONDS
from tokenizers_offline import character_tokenizer


def child_of(model: Any, folder: Path, program: str) -> tuple[VllmProcess, list[str]]:
    """One that runs a Python program in place of vLLM's server; its port is the last argument."""
    said: list[str] = []
    vllm = VllmServer(model, character_tokenizer(), folder=folder)
    child = VllmProcess("model", model, vllm, [], said.append)
    child._command = [sys.executable, "-c", program]
    return child, said


def test_a_child_that_does_not_start_says_why(model: Any, tmp_path: Path) -> None:
    child, said = child_of(model, tmp_path, "import sys; print('no such\\rgpu'); sys.exit(3)")
    with pytest.raises(ValueError, match=r"exit code 3(.|\n)*such\ngpu"):
        asyncio.run(asyncio.wait_for(child.start(), SECONDS))
    assert said == ["vLLM: no such", "vLLM: gpu"]


SERVER = """
import http.server, os, pathlib, subprocess, sys
if pathlib.Path("FOLDER/broken").exists(): sys.exit(4)
subprocess.Popen(["sh", "-c", "trap 'sleep 0.5; touch FOLDER/tidy; exit' TERM; while :; do sleep 0.1; done"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""
"""Has a child that tidies up when it is told to end."""


def running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_child_is_started_again_but_not_for_ever(model: Any, tmp_path: Path) -> None:
    child, said = child_of(model, tmp_path, SERVER.replace("FOLDER", str(tmp_path)))

    async def run() -> None:
        await child.start()
        keeping = asyncio.ensure_future(child.supervise())
        try:
            assert child._process is not None
            first = psutil.Process(child._process.pid)
            group = [first, *first.children()]
            assert len(group) == 2
            os.kill(first.pid, signal.SIGKILL)
            while not any("answers again" in line for line in said):
                await asyncio.sleep(0.05)
            assert not any(running(process) for process in group)
            assert (tmp_path / "tidy").exists()
            (tmp_path / "broken").touch()
            os.kill(child._process.pid, signal.SIGKILL)
            with pytest.raises(ValueError, match="did not start 3 times in a row"):
                await keeping
        finally:
            keeping.cancel()
            await child.end()

    asyncio.run(asyncio.wait_for(run(), 2 * SECONDS))


def test_a_child_leaves_nothing_behind(model: Any, tmp_path: Path) -> None:
    child, _ = child_of(model, tmp_path, SERVER.replace("FOLDER", str(tmp_path)))

    async def run() -> None:
        try:
            await child.start()
            assert child._process is not None
            first = psutil.Process(child._process.pid)
            group = [first, *first.children()]
        finally:
            await child.end()
        assert not any(running(process) for process in group)
        assert (tmp_path / "tidy").exists()

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_options_that_the_gateway_sets_are_refused(model: Any, tmp_path: Path) -> None:
    vllm = VllmServer(model, character_tokenizer(), folder=tmp_path)
    for option in (
        "--port=1", "--kv_transfer_config", "--host", "--dtype", "--kv-transfer-config.kv_role=x", "--kv-tr", "--por=1",
        "--no-enable-prompt-tokens-details", "--ssl-keyfile", "--ssl_certfile=x", "--root-path", "--config=x", "--api-k",
    ):  # fmt: skip
        with pytest.raises(ValueError, match="--vllm-url"):
            VllmProcess("model", model, vllm, ["--max-num-seqs", "4", option], print)
    free = [
        "--max-model-len", "-1", "--no-enable-prefix-caching", "--api-server-count=1", "-tp", "1", "--kv-cache-dtype", "auto",
        "--model-impl=auto", "--uvicorn-log-level", "info",
    ]  # fmt: skip
    VllmProcess("model", model, vllm, free, print)
