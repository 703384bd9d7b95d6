"""`latentmas serve`: loads the model, starts vLLM beside it or finds one that runs, and answers until it is told to end."""

import asyncio
import json
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvicorn
from rich.console import Console
from rich.text import Text

from latentmas.backends.base import EngineError
from latentmas.backends.vllm.launch import kv_config
from latentmas.backends.vllm.server import Upstream
from latentmas.backends.vllm.sse import address_of
from latentmas.chain.agent import Agent
from latentmas.chain.chain import Chain
from latentmas.chain_files.reader import ChainFile, builtin_chains, read_builtin, read_chain, serial
from latentmas.cli.console import working
from latentmas.default_model import default_model_folder
from latentmas.loading import load_model
from latentmas.serving.gateway import Gateway
from latentmas.serving.vllm_process import Child
from latentmas_kernels import Aligner, build_aligner
from latentmas_kernels.errors import LatentMASError

GRACE_SECONDS, LEAVE_SECONDS = 10, 5
"""For requests that are being answered when the server is told to end; and to tell their clients when that is over."""


@dataclass(frozen=True)
class Serving:
    """What the command line asks for.

    Attributes:
        model: folder or hub name; None is the default model.
        chains: files or names; empty for all that come with the package.
        latent_steps, max_new_tokens: as in `read_chain`.
        aligner, engine, weights: as in `Chain`; dtype, device: as in `load_model`.
        kv_transfer, folder, timeout: as in `Upstream`.
        host, port: to listen at.
        vllm_url: a running server; None starts one.
        max_waiting: as in `Gateway`.
        vllm_options: of the server that is started.
    """

    model: str | None = None
    chains: Sequence[str] = ()
    latent_steps: int | None = None
    max_new_tokens: int | None = None
    aligner: str = "auto"
    dtype: str = "auto"
    device: str | None = None
    engine: str = "auto"
    weights: str = "model"
    kv_transfer: str = "kv"
    host: str = "127.0.0.1"
    port: int = 8000
    vllm_url: str | None = None
    folder: Path | None = None
    timeout: float = 300.0
    max_waiting: int = 256
    vllm_options: Sequence[str] = ()

    @property
    def source(self) -> str:
        return str(default_model_folder()) if self.model is None else self.model


def serve(serving: Serving, console: Console) -> int:
    """Run until told to end; gives the exit code.

    Raises:
        ValueError: for what does not go together, a chain or a model that cannot be served, or a vLLM that does not start.
        OSError: where a file cannot be read, or the address is taken.
    """
    if serving.vllm_url is not None and serving.vllm_options:
        raise LatentMASError(
            f"got --vllm-url and options for vLLM ({' '.join(serving.vllm_options)}); give those to the server that runs"
        )
    if serving.vllm_url is not None:
        address_of(serving.vllm_url)
    if serving.vllm_options and not serving.vllm_options[0].startswith("-"):
        raise LatentMASError(
            f"got {serving.vllm_options[0]!r}; supported are options, and behind -- options of `vllm serve`, like -- "
            "--max-model-len 4096"
        )
    if serving.max_waiting < 1:
        raise LatentMASError(f"--max-waiting must be 1 or more; got {serving.max_waiting}")
    files = _files(serving)
    with _listening(serving.host, serving.port) as address:
        with working(console, "loading the model, measuring how hidden states are best fed back"):
            model, tokenizer = load_model(serving.model, dtype=serving.dtype, device=serving.device)
            upstream = _upstream(serving, model, tokenizer)
            child = None
            if serving.vllm_url is None:
                child = Child(serving.source, model, upstream, serving.vllm_options, lambda line: _say(console, line))
            chains = _chains(serving, files, model, tokenizer, upstream, console)
        try:
            return asyncio.run(_Server(serving, console, upstream, child, chains, address).run())
        except EngineError as error:  # as it starts
            raise LatentMASError(str(error)) from error


def print_kv_config(serving: Serving, out: Console) -> None:
    """JSON for vLLM's --kv-transfer-config."""
    model, tokenizer = load_model(serving.model, dtype=serving.dtype, device=serving.device)
    upstream = _upstream(serving, model, tokenizer)
    out.print(json.dumps(kv_config(upstream.stamp, upstream.folder)), soft_wrap=True)


class _Server:
    """The gateway and vLLM, from start to end."""

    def __init__(
        self,
        serving: Serving,
        console: Console,
        upstream: Upstream,
        child: Child | None,
        chains: dict[str, Chain],
        address: socket.socket,
    ) -> None:
        self.serving, self.console, self.upstream, self.child = serving, console, upstream, child
        self.chains, self.address, self.signal = chains, address, 0
        self._http: uvicorn.Server | None = None
        self._gateway: Gateway | None = None
        self._main: asyncio.Task[int] | None = None

    async def run(self) -> int:
        """Start everything, answer, end everything; gives the exit code."""
        self._main = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop, number)
        try:
            await self._start()
            return await self._answer()
        except asyncio.CancelledError:
            if not self.signal:
                raise
            return self._code
        finally:
            if self.child is not None:
                await self.child.end()
            await self.upstream.close()

    @property
    def _code(self) -> int:
        return 130 if self.signal == signal.SIGINT else 0

    async def _start(self) -> None:
        began = time.perf_counter()
        if self.child is not None:
            with self.console.status("") as status:
                starting = asyncio.ensure_future(self.child.start())
                try:
                    while not (await asyncio.wait({starting}, timeout=1))[0]:
                        status.update(f"starting vLLM ({time.perf_counter() - began:.0f} s)")
                finally:
                    starting.cancel()
                await starting
        else:
            assert self.serving.vllm_url is not None
            self.upstream.at(self.serving.vllm_url)
        await self.upstream.connect()
        for name, chain in list(self.chains.items()):
            try:
                chain.check("?")
            except ValueError as error:
                _refuse(self.serving, self.chains, name, error, self.console)
        _check_any(self.chains)

    async def _answer(self) -> int:
        self._gateway = Gateway(self.chains, self.upstream, max_waiting=self.serving.max_waiting)
        config = uvicorn.Config(
            self._gateway.app, log_level="warning", access_log=False, lifespan="off",
            timeout_graceful_shutdown=GRACE_SECONDS,
        )  # fmt: skip
        self._http = _Uvicorn(config)
        host, port = self.address.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        _say(self.console, f"http://{shown}:{port}/v1 serves {', '.join(self.chains)}; texts by {self.upstream.name}")
        answering = asyncio.ensure_future(self._http.serve(sockets=[self.address]))
        keeping = None if self.child is None else asyncio.ensure_future(self.child.keep())
        try:
            await asyncio.wait({task for task in (answering, keeping) if task}, return_when=asyncio.FIRST_COMPLETED)
            if keeping is not None and keeping.done():
                _say(self.console, f"the server ends: {keeping.exception()}")
                self._gateway.ending = self._http.should_exit = True
                await answering
                return 1
            await answering
            return self._code
        finally:
            await self._let_go()
            if keeping is not None:
                keeping.cancel()
                await asyncio.wait({keeping})

    async def _let_go(self) -> None:
        """Let requests that were ended tell their clients."""
        assert self._http is not None
        requests = set(self._http.server_state.tasks)
        if self._http.force_exit:  # otherwise they are told to by now
            for request in requests:
                request.cancel()
        if requests:
            await asyncio.wait(requests, timeout=LEAVE_SECONDS)

    def _stop(self, number: int) -> None:
        """A signal: let requests end, then everything; the second one does not wait."""
        if self._http is not None and self._gateway is not None:
            self._http.force_exit = bool(self.signal)
            self._gateway.ending = self._http.should_exit = True
        elif self._main is not None and not self.signal:
            self._main.cancel()
        if self.signal and self.child is not None:
            self.child.hurry()
        self.signal = number


class _Uvicorn(uvicorn.Server):
    """With the signals left to us: vLLM must be ended, too."""

    def capture_signals(self) -> Any:
        return nullcontext()


# ---- parts -----------------------------------------------------------------------------------------------------------


def _upstream(serving: Serving, model: Any, tokenizer: Any) -> Upstream:
    return Upstream(model, tokenizer, kv_transfer=serving.kv_transfer, folder=serving.folder, timeout=serving.timeout)


def _files(serving: Serving) -> dict[str, ChainFile]:
    """By name."""
    options: dict[str, Any] = {"latent_steps": serving.latent_steps, "max_new_tokens": serving.max_new_tokens}
    if not serving.chains:
        return {name: read_builtin(name, **options) for name in builtin_chains()}
    files: dict[str, ChainFile] = {}
    for source in serving.chains:
        file = read_chain(source, **options)
        if file.name in files:
            raise LatentMASError(
                f"{file.source} and {files[file.name].source} are both called {file.name!r}, and requests name chains by that; "
                "give one of them another name"
            )
        files[file.name] = file
    return files


def _chains(
    serving: Serving, files: dict[str, ChainFile], model: Any, tokenizer: Any, upstream: Upstream, console: Console
) -> dict[str, Chain]:
    """By name; models that agents bring along are loaded once, and the aligner is measured once."""
    models: dict[str, tuple[Any, Any]] = {}
    aligner: str | Aligner = serving.aligner
    chains: dict[str, Chain] = {}
    for name, file in files.items():
        agents = [
            [_own(a, serving.model) for a in entry] if isinstance(entry, list) else _own(entry, serving.model)
            for entry in file.agents
        ]
        every = serial(agents)
        try:
            if every[-1].model is not None:
                raise LatentMASError(
                    f"its last agent runs on {every[-1].model}, and vLLM on {serving.source}; serve it with --model "
                    f"{every[-1].model}"
                )
            for other in {agent.model for agent in every} - {None}:
                assert other is not None
                if other not in models:
                    models[other] = load_model(other, dtype=serving.dtype, device=serving.device)
            if isinstance(aligner, str) and any(agent.thinks and agent.model is None for agent in every):
                aligner = build_aligner(model, aligner)
            chains[name] = Chain(
                model, tokenizer, agents, aligner=aligner, engine=serving.engine, weights=serving.weights,
                budget=file.budget, models=models, decoder=upstream,
            )  # fmt: skip
        except ValueError as error:
            _refuse(serving, chains, name, error, console)
    _check_any(chains)
    return chains


def _own(agent: Agent, served: str | None) -> Agent:
    """What --model names is loaded once."""
    return replace(agent, model=None) if agent.model == served else agent


def _refuse(serving: Serving, chains: dict[str, Chain], name: str, error: ValueError, console: Console) -> None:
    """A chain that cannot be served: an error where it was asked for, a warning where it merely comes with the package."""
    chains.pop(name, None)
    if serving.chains:
        raise LatentMASError(f"chain {name}: {error}") from error
    _say(console, f"chain {name} is left out: {error}", "warning: ")


def _check_any(chains: dict[str, Chain]) -> None:
    if not chains:
        raise LatentMASError(
            "no chain that comes with the package can be served like this, for the reasons above; make room for them (a "
            "larger --max-model-len of vLLM, fewer --latent-steps or --max-new-tokens), or name a chain with --chain"
        )


def _listening(host: str, port: int) -> socket.socket:
    """Before anything is loaded, so that an address that is taken is known at once; who connects waits until then."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(2048)  # an address that is only bound is not taken yet
        return bound
    except (OSError, OverflowError) as error:
        raise LatentMASError(
            f"cannot listen at {host} port {port}: {error}; name others with --host and --port"
        ) from error


def _say(console: Console, line: str, mark: str = "") -> None:
    console.print(Text(mark, "yellow").append(line, "not bold default"), soft_wrap=True)
