"""vLLM's server as a child process: started on a free port, restarted when it dies, ended with this process."""

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
from typing import Any

import psutil
import torch

from latentmas.backends.vllm.launch import environment, kv_config
from latentmas.backends.vllm.server import VllmServer
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.architecture import Architecture

FAILED_STARTS = 3
"""Limit of failed starts in a row."""
KEPT_LINES = 20
END_SECONDS, POLL_SECONDS = 15.0, 0.25
RESERVED = (
    "--model", "--host", "--port", "--uds", "--dtype", "--kv-transfer-config", "--enable-prompt-embeds", "--api-key",
    "--generation-config", "--enable-prompt-tokens-details", "--root-path", "--config", "--ssl-",
)  # fmt: skip
"""Options that the gateway sets, or that would keep it from finding the server."""
# Asks for SIGTERM when this process is killed, then becomes vLLM's server.
_FOLLOW = """import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
os.execv(sys.executable, [sys.executable, "-W", "ignore::DeprecationWarning", "-m", *sys.argv[1:]])"""
# The module that `vllm serve` runs. That command fails where the package is not called vllm, as the one for CPUs.
_SERVER = "vllm.entrypoints.openai.api_server"


class VllmProcess:
    """vLLM's server for one model."""

    def __init__(
        self, name: str, model: Any, server: VllmServer, options: Sequence[str], log: Callable[[str], None]
    ) -> None:
        """Prepare the command; `start` runs it.

        Args:
            name: folder or hub name of the model.
            model: the same model as a causal LM of transformers.
            server: gets the address.
            options: further options of `vllm serve`.
            log: prints a line for the user.

        Raises:
            LatentMASError: for options that the gateway sets.
        """
        reserved = [option for option in options if _is_reserved(option)]
        if reserved:
            raise LatentMASError(
                f"got {' '.join(reserved)} among vLLM's options, which the gateway sets itself or cannot work with; leave it "
                "out, or run vLLM yourself and name it with --vllm-url"
            )
        self.server, self.log, self._ending, self._killing = server, log, False, False
        on_cpu = not torch.cuda.is_available()  # vLLM takes a GPU where there is one, whatever the chain's model is on
        transfer = ["--enable-prompt-embeds"]
        if server.kv_transfer == "kv":
            transfer = ["--kv-transfer-config", json.dumps(kv_config(server.stamp, server.folder))]
        self._command = [
            sys.executable, "-c", _FOLLOW, _SERVER, "--model", name, "--host", "127.0.0.1",
            "--dtype", str(Architecture.of(model).dtype).removeprefix("torch."), "--generation-config", "vllm",
            "--enable-prompt-tokens-details", "--uvicorn-log-level", "warning", *transfer,
            *(["--enforce-eager"] if on_cpu else []), *options,
        ]  # fmt: skip
        self._environment = {"VLLM_LOGGING_LEVEL": "WARNING", **environment(), **os.environ}
        self._process: subprocess.Popen[str] | None = None
        self._last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._forwarding: threading.Thread | None = None

    async def start(self) -> None:
        """Start the process and wait until the server is healthy.

        Raises:
            LatentMASError: where the process ends instead.
        """
        port = _free_port()
        self._last_lines.clear()
        self._process = subprocess.Popen(
            [*self._command, "--port", str(port)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", env=self._environment, start_new_session=True,
        )  # fmt: skip
        self._forwarding = threading.Thread(target=self._forward_log, args=[self._process], daemon=True)
        self._forwarding.start()
        self.server.set_url(f"http://127.0.0.1:{port}")
        while not await self.server.is_healthy():
            await asyncio.sleep(POLL_SECONDS)
            if self._process.poll() is not None:
                await self.end()
                output = "\n".join(self._last_lines) or "nothing"
                raise LatentMASError(
                    f"vLLM ended as it started ({_exit_status(self._process)}); the last that it said:\n{output}"
                )

    async def supervise(self) -> None:
        """Restart the process whenever it has ended.

        Raises:
            LatentMASError: where it did not start several times in a row.
        """
        while True:
            assert self._process is not None
            # Not by the end of its output, which its children may keep open.
            while self._process.poll() is None:
                await asyncio.sleep(POLL_SECONDS)
            status = _exit_status(self._process)
            await self.end()
            self.log(f"vLLM has ended ({status}) and is started again; requests are refused until then (503)")
            for failed in range(1, FAILED_STARTS + 1):
                try:
                    await self.start()
                    break
                except LatentMASError as error:
                    if failed == FAILED_STARTS:
                        raise LatentMASError(f"vLLM did not start {failed} times in a row. {error}") from error
                    self.log(str(error))
                    await asyncio.sleep(failed)
            self.log("vLLM answers again")

    async def end(self) -> None:
        """Terminate the process and all its descendants; kill those that are left after END_SECONDS.

        Helper processes that end by themselves need that time too: they remove shared memory of the others.
        """
        if self._process is None:
            return
        if self._process.poll() is None:
            self._ending = True
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            deadline = time.monotonic() + END_SECONDS
            while self._is_running() and time.monotonic() < deadline:
                if self._killing and number == signal.SIGTERM:
                    break
                await asyncio.sleep(POLL_SECONDS)
        if self._forwarding is not None:
            self._forwarding.join(POLL_SECONDS)

    def kill_now(self) -> None:
        """Let `end` kill at once."""
        self._killing = True

    def _is_running(self) -> bool:
        """Return whether a process of the group runs; zombies that only wait for init to collect their exit codes do not.

        Descendants whose parent was killed are no children of anyone here, but still in the group.
        """
        assert self._process is not None
        self._process.poll()
        for process in psutil.process_iter():
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                in_group = os.getpgid(process.pid) == self._process.pid
                if in_group and process.status() != psutil.STATUS_ZOMBIE:
                    return True
        return False

    def _forward_log(self, process: "subprocess.Popen[str]") -> None:
        """Forward the process's output line by line until `end` is called, and keep the last lines."""
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                if line.strip() and not self._ending:
                    self._last_lines.append(line.rstrip())
                    self.log(f"vLLM: {line.rstrip()}")


def _exit_status(process: "subprocess.Popen[str]") -> str:
    status = process.returncode
    return f"exit code {status}" if status >= 0 else f"signal {-status}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _is_reserved(option: str) -> bool:
    """Return whether vLLM would take an option for one of RESERVED: shortened, negated, or with a JSON key after a dot."""
    if not option.startswith("--") or option == "--":
        return False
    name = option[2:].partition("=")[0].partition(".")[0].replace("_", "-").removeprefix("no-")
    return name.startswith("ssl-") or any(reserved.startswith(f"--{name}") for reserved in RESERVED)
