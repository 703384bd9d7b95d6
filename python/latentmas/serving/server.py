"""`latentmas serve`: load the model, start vLLM or connect to one that runs, and serve until a signal ends it."""

import asyncio
import json
import signal
import socket
import time
from contextlib import nullcontext
from typing import Any

import uvicorn
from anyio import CancelScope, create_task_group
from rich.console import Console
from rich.text import Text

from latentmas.backends.base import KV_TRANSFERS, EngineError
from latentmas.backends.vllm.http_errors import authorization_header, server_address
from latentmas.backends.vllm.launch import check_installed, kv_config
from latentmas.backends.vllm.server import VllmServer
from latentmas.chain.chain import Chain
from latentmas.console import working
from latentmas.loading import load_model, model_path
from latentmas.serving.app import build_app
from latentmas.serving.config import ServeConfig
from latentmas.serving.gateway import Gateway
from latentmas.serving.load_chains import build_chains, check_chains, read_chain_files
from latentmas.serving.model_lease import ModelLease
from latentmas.serving.vllm_process import VllmProcess
from latentmas_kernels.errors import LatentMASError

GRACE_SECONDS, DRAIN_SECONDS = 10, 5
"""For requests that are being answered when the server begins to end; and for their error responses after that."""


def serve(config: ServeConfig, console: Console) -> int:
    """Serve until a signal; return the exit code.

    Raises:
        LatentMASError: for options that do not go together, a chain or a model that cannot be served, an address that is
            taken, or a vLLM that does not start.
        OSError: where a file cannot be read.
    """
    _check(config)
    files = read_chain_files(config)
    with listen(config.host, config.port) as address:
        if config.vllm_url is None:
            try:
                check_installed()
            except LatentMASError as error:
                raise LatentMASError(f"{error}, and --vllm-url takes a server that runs elsewhere") from error
        with working(console, "loading the model, measuring how hidden states are best fed back"):
            model, tokenizer = load_model(config.model, dtype=config.dtype, device=config.device)
            vllm, process = _vllm_server(config, model, tokenizer), None
            if config.vllm_url is None:
                process = VllmProcess(
                    model_path(config.model), model, vllm, config.vllm_options or (), lambda line: _log(console, line)
                )
            chains = build_chains(config, files, model, tokenizer, vllm, lambda line: _warn(console, line))
        try:
            return asyncio.run(Server(config, console, vllm, process, chains, address).run())
        except EngineError as error:  # as it starts
            raise LatentMASError(str(error)) from error


def print_kv_config(config: ServeConfig, out: Console) -> None:
    """Print the JSON for vLLM's --kv-transfer-config."""
    model, tokenizer = load_model(config.model, dtype=config.dtype, device=config.device)
    vllm = _vllm_server(config, model, tokenizer)
    out.print(json.dumps(kv_config(vllm.stamp, vllm.folder)), soft_wrap=True)


class Server:
    """The gateway and vLLM, from start to end.

    Attributes:
        signal: the last signal that arrived, or 0.
        failed: whether vLLM could not be restarted.
    """

    def __init__(
        self,
        config: ServeConfig,
        console: Console,
        vllm: VllmServer,
        process: VllmProcess | None,
        chains: dict[str, Chain],
        address: socket.socket,
    ) -> None:
        self.config, self.console, self.vllm, self.process = config, console, vllm, process
        self.chains, self.address, self.signal = chains, address, 0
        self.failed = False
        self._http: uvicorn.Server | None = None
        self._gateway: Gateway | None = None

    async def run(self) -> int:
        """Start vLLM, serve, end vLLM; return the exit code."""
        self._starting = CancelScope()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            with self._starting:
                await self._start()
            if not self.signal:
                await self._serve()
        finally:
            if self.process is not None:
                await self.process.end()
            await self.vllm.close()
        if self.failed:
            return 1
        return 130 if self.signal == signal.SIGINT else 0

    async def _start(self) -> None:
        if self.process is not None:
            with self.console.status(_Elapsed("starting vLLM")):
                await self.process.start()
        else:
            assert self.config.vllm_url is not None
            self.vllm.set_url(self.config.vllm_url)
        await self.vllm.connect()
        self.chains = check_chains(self.config, self.chains, lambda line: _warn(self.console, line))

    async def _serve(self) -> None:
        self._gateway = Gateway(self.chains, self.vllm, max_waiting=self.config.max_waiting)
        self._http = _Uvicorn(
            uvicorn.Config(
                build_app(self._gateway), log_level="warning", access_log=False, lifespan="off",
                timeout_graceful_shutdown=GRACE_SECONDS + DRAIN_SECONDS,
            )
        )  # fmt: skip
        host, port = self.address.getsockname()[:2]
        name = f"[{host}]" if ":" in host else host
        _log(self.console, f"http://{name}:{port}/v1 serves {', '.join(self.chains)}; texts by {self.vllm.name}")
        async with create_task_group() as group:
            if self.process is not None:
                group.start_soon(self._supervise, self.process)
            try:
                await self._http.serve(sockets=[self.address])
            finally:
                if self._http.server_state.tasks:  # uvicorn does not wait for them after a second signal
                    await asyncio.wait(self._http.server_state.tasks, timeout=DRAIN_SECONDS)
            group.cancel_scope.cancel()

    async def _supervise(self, process: VllmProcess) -> None:
        """Restart vLLM whenever it has ended; shut down where that fails."""
        try:
            await process.supervise()
        except Exception as error:
            _log(self.console, f"the server ends: {error}")
            self.failed = True
            self._shut_down()

    def _shut_down(self) -> None:
        """Accept no more connections, and end requests that are not answered after GRACE_SECONDS."""
        assert self._http is not None
        assert self._gateway is not None
        self._http.should_exit = True
        asyncio.get_running_loop().call_later(GRACE_SECONDS, self._gateway.stop)

    def _on_signal(self, number: int) -> None:
        """Shut down; at a second signal end requests and vLLM at once."""
        if self._http is None or self._gateway is None:
            self._starting.cancel()
        else:
            self._shut_down()
            if self.signal:
                self._gateway.stop()
                self._http.force_exit = True
        if self.signal and self.process is not None:
            self.process.kill_now()
        self.signal = number


class _Elapsed:
    """A line of text with the seconds since it was made."""

    def __init__(self, text: str) -> None:
        self.text, self.began = text, time.perf_counter()

    def __rich__(self) -> Text:
        return Text(f"{self.text} ({time.perf_counter() - self.began:.0f} s)")


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers, since vLLM must end too."""

    def capture_signals(self) -> Any:
        return nullcontext()


def listen(host: str, port: int) -> socket.socket:
    """Listen before anything is loaded, so that a taken address is an error at once; clients wait until then."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(2048)  # an address that is only bound is not taken yet
        return bound
    except (OSError, OverflowError, UnicodeError) as error:
        raise LatentMASError(
            f"cannot listen at {host} port {port}: {error}; name others with --host and --port"
        ) from error


def _check(config: ServeConfig) -> None:
    """Raise LatentMASError for options of a server that are not supported, or not together."""
    if config.vllm_url is not None and config.vllm_options:
        raise LatentMASError(
            f"got --vllm-url and options for vLLM ({' '.join(config.vllm_options)}); give those to the server that runs"
        )
    if config.vllm_url is not None:
        server_address(config.vllm_url)
    authorization_header()
    if config.vllm_options and not config.vllm_options[0].startswith("-"):
        raise LatentMASError(
            f"got {config.vllm_options[0]!r}; supported are options, and behind -- options of `vllm serve`, like -- "
            "--max-model-len 4096"
        )
    if config.max_waiting < 1:
        raise LatentMASError(f"--max-waiting must be 1 or more; got {config.max_waiting}")
    if config.kv_transfer not in (None, *KV_TRANSFERS):
        raise LatentMASError(f"got --hand-over {config.kv_transfer}; supported are {', '.join(KV_TRANSFERS)}")
    if not config.timeout > 0:
        raise LatentMASError(f"got --timeout {config.timeout}; supported are seconds, more than 0")


def _vllm_server(config: ServeConfig, model: Any, tokenizer: Any) -> VllmServer:
    return VllmServer(
        model, tokenizer, kv_transfer=config.kv_transfer or "kv", folder=config.folder, timeout=config.timeout,
        wait=ModelLease.wait,
    )  # fmt: skip


def _log(console: Console, line: str, mark: str = "") -> None:
    console.print(Text(mark, "yellow").append(line, "not bold default"), soft_wrap=True)


def _warn(console: Console, line: str) -> None:
    _log(console, line, "warning: ")
