"""vLLM's server as a child: started on a port of its own, started again when it dies, ended with this process."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import psutil
import torch

from latentmas.backends.vllm.launch import environment, kv_config
from latentmas.backends.vllm.server import Upstream
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.architecture import Architecture

FAILED_STARTS = 3
"""In a row, before it is given up."""
KEPT_LINES = 20
END_SECONDS, LOOK_SECONDS = 15.0, 0.25
OURS = (
    "--model", "--host", "--port", "--uds", "--dtype", "--kv-transfer-config", "--enable-prompt-embeds", "--api-key",
    "--generation-config", "--enable-prompt-tokens-details", "--root-path", "--config", "--ssl-",
)  # fmt: skip
"""Options that the gateway sets, or that would keep it from finding the server."""
# SIGTERM when this process is killed without a word; then vLLM's server as a program.
_FOLLOW = """import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
os.execv(sys.executable, [sys.executable, "-W", "ignore::DeprecationWarning", "-m", *sys.argv[1:]])"""
# `vllm serve` runs the same, but its command line fails where the package is not called vllm, as the one for CPUs is not.
_SERVER = "vllm.entrypoints.openai.api_server"


class Child:
    """vLLM's server for one model."""

    def __init__(self, name: str, model: Any, upstream: Upstream, settings: Sequence[str], say: Callable[[str], None]):
        """Nothing is started yet.

        Args:
            name: folder or hub name of the model.
            model: the same as a causal LM of transformers.
            upstream: is told the address.
            settings: further options of `vllm serve`.
            say: takes lines for the user.

        Raises:
            ValueError: for options that the gateway sets, or where vLLM is not installed.
        """
        taken = [option for option in settings if _is_ours(option)]
        if taken:
            raise LatentMASError(
                f"got {' '.join(taken)} among vLLM's options, which the gateway sets itself or cannot work with; leave it out, "
                "or run vLLM yourself and name it with --vllm-url"
            )
        if find_spec("vllm") is None:
            raise LatentMASError(
                "vLLM is not installed here; docs/vllm.md says how to make an environment with it, and --vllm-url takes a "
                "server that runs elsewhere"
            )
        self.upstream, self.say, self._ending, self._hurry = upstream, say, False, False
        architecture = Architecture.of(model)
        on_cpu = not torch.cuda.is_available()  # vLLM takes a GPU where there is one, whatever the chain's model is on
        if upstream.kv_transfer == "kv":
            way = ["--kv-transfer-config", json.dumps(kv_config(upstream.stamp, upstream.folder))]
        else:
            way = ["--enable-prompt-embeds"]
        self._command = [
            sys.executable, "-c", _FOLLOW, _SERVER, "--model", name, "--host", "127.0.0.1",
            "--dtype", str(architecture.dtype).removeprefix("torch."), "--generation-config", "vllm",
            "--enable-prompt-tokens-details", "--uvicorn-log-level", "warning", *way,
            *(["--enforce-eager"] if on_cpu else []), *settings,
        ]  # fmt: skip
        self._environment = {"VLLM_LOGGING_LEVEL": "WARNING", **environment(), **os.environ}
        self._process: subprocess.Popen[str] | None = None
        self._log: deque[str] = deque(maxlen=KEPT_LINES)
        self._forwards: threading.Thread | None = None

    async def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            ValueError: where it ends instead.
        """
        port = _free_port()
        self._log.clear()
        self._process = subprocess.Popen(
            [*self._command, "--port", str(port)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", env=self._environment, start_new_session=True,
        )  # fmt: skip
        self._forwards = threading.Thread(target=self._forward, args=[self._process], daemon=True)
        self._forwards.start()
        self.upstream.at(f"http://127.0.0.1:{port}")
        while not await self.upstream.answers():
            await asyncio.sleep(LOOK_SECONDS)
            if self._process.poll() is not None:
                await self.end()
                said = "\n".join(self._log) or "nothing"
                raise LatentMASError(
                    f"vLLM ended as it started ({_ended(self._process.returncode)}); the last that it said:\n{said}"
                )

    async def keep(self) -> None:
        """Start it again whenever it has ended.

        Raises:
            ValueError: where it did not start, several times in a row.
        """
        while True:
            assert self._process is not None
            # What vLLM started may hold its output open, so this does not wait for that.
            while self._process.poll() is None:
                await asyncio.sleep(LOOK_SECONDS)
            status = _ended(self._process.returncode)
            await self.end()
            self.say(f"vLLM has ended ({status}) and is started again; requests are refused until then (503)")
            for failed in range(1, FAILED_STARTS + 1):
                try:
                    await self.start()
                    break
                except ValueError as error:
                    if failed == FAILED_STARTS:
                        raise LatentMASError(f"vLLM did not start {failed} times in a row. {error}") from error
                    self.say(str(error))
                    await asyncio.sleep(failed)
            self.say("vLLM answers again")

    async def end(self) -> None:
        """End it and all that it started: ask all of them to, and kill those that are left when the time is over.

        What only ends with the others needs that time, too: it removes what they left in shared memory.
        """
        if self._process is None:
            return
        if self._process.poll() is None:
            self._ending = True
        for number in (signal.SIGTERM, signal.SIGKILL):
            _signal(self._process.pid, number)
            end = time.monotonic() + END_SECONDS
            while self._lives() and time.monotonic() < end and not (self._hurry and number == signal.SIGTERM):
                await asyncio.sleep(LOOK_SECONDS)
        if self._forwards is not None:
            self._forwards.join(LOOK_SECONDS)

    def hurry(self) -> None:
        """Whoever ends it waits no longer for what ends by itself."""
        self._hurry = True

    def _lives(self) -> bool:
        """Whether it, or anything that it started, is still running."""
        assert self._process is not None
        return self._process.poll() is None or _group_lives(self._process.pid)

    def _forward(self, process: "subprocess.Popen[str]") -> None:
        """Its log, line by line, until it is told to end; the last lines are kept."""
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                if line.strip() and not self._ending:
                    self._log.append(line.rstrip())
                    self.say(f"vLLM: {line.rstrip()}")


def _ended(status: int) -> str:
    return f"exit code {status}" if status >= 0 else f"signal {-status}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _is_ours(option: str) -> bool:
    """Whether vLLM would take it for one of OURS: shortened, negated, or with a key of JSON behind a dot."""
    if not option.startswith("--") or option == "--":
        return False
    name = option[2:].partition("=")[0].partition(".")[0].replace("_", "-").removeprefix("no-")
    return name.startswith("ssl-") or any(own.startswith(f"--{name}") for own in OURS)


def _group_lives(group: int) -> bool:
    """Whether some process of a group runs; those that only wait for init to take their exit codes do not."""
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)
