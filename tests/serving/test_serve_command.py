"""`latentmas serve`: what it refuses, what it listens at, how signals end it."""

import asyncio
import io
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_vllm import ServedApp
from latentmas.backends.vllm.server import VllmServer
from latentmas.serving.config import ServeConfig
from latentmas.serving.server import Server, listen, print_kv_config, serve
from latentmas.serving.vllm_process import VllmProcess
from rich.console import Console
from served_gateway import QUESTION, SECONDS, ServedGateway, error_of, until
from test_vllm_process import SERVER, child_of
from tokenizers_offline import character_tokenizer

from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.fingerprint import ModelFingerprint


def test_what_the_command_refuses_before_it_loads_anything(tmp_path: Path) -> None:
    chain = "agents: [{name: a, output: text, prompt: '{question}'}]"
    (tmp_path / "one.yaml").write_text(chain)
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "one.yaml").write_text(chain)
    console = Console(stderr=True)
    missing = str(tmp_path / "no-model")
    with pytest.raises(ValueError, match="both called 'one'"):
        serve(ServeConfig(missing, [str(tmp_path / "one.yaml"), str(tmp_path / "deeper" / "one.yaml")]), console)
    with pytest.raises(ValueError, match="is no file"):
        serve(ServeConfig(missing, ["nothing.yaml"]), console)
    with pytest.raises(ValueError, match="--vllm-url and options"):
        serve(ServeConfig(missing, vllm_url="http://x", vllm_options=["--seed", "1"]), console)
    with pytest.raises(ValueError, match="behind --"):
        serve(ServeConfig(missing, vllm_options=["chain.yaml"]), console)
    with pytest.raises(ValueError, match="--max-waiting"):
        serve(ServeConfig(missing, max_waiting=0), console)
    with pytest.raises(ValueError, match="got --hand-over text; supported are kv, embeds"):
        serve(ServeConfig(missing, kv_transfer="text"), console)
    with pytest.raises(ValueError, match="got --timeout 0; supported are seconds, more than 0"):
        serve(ServeConfig(missing, timeout=0), console)
    for url in (
        "localhost:8001", "ftp://x", "http://x:bad", "127.0.0.1:8001", "", "http://", "http://:80", "http://x:99999999",
        "http://x:65536", "http://127.0.0.1:0", "http://xn--a:80",
    ):  # fmt: skip
        with pytest.raises(ValueError, match="supported is the address"):
            serve(ServeConfig(missing, vllm_url=url), console)

    async def nothing() -> Any:
        return None

    taken = ServedApp(nothing)
    taken.socket.listen()
    with taken.socket, pytest.raises(ValueError, match=f"port {taken.port}"):
        serve(ServeConfig(missing, port=taken.port), console)


def test_vllm_that_is_not_installed_is_said_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentmas.backends.vllm.launch.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="vLLM is not installed here; .*--vllm-url takes a server that runs elsewhere"):
        serve(ServeConfig(str(tmp_path / "no-model"), ["sequential"], port=0), Console(stderr=True))


@pytest.mark.parametrize("key", ["schlüssel", "sesame\n", " sesame", "a\tb", "\udcff"])
@pytest.mark.parametrize("url", [None, "http://127.0.0.1:8001"])
def test_a_key_that_no_header_can_carry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, url: str | None
) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, "VLLM_API_KEY": key})
    with pytest.raises(LatentMASError, match="got a VLLM_API_KEY with characters") as error:
        serve(ServeConfig(str(tmp_path / "no-model"), vllm_url=url, port=0), Console(stderr=True))
    assert key not in str(error.value)


def test_the_key_of_vllm_is_sent(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = VllmServer(model, character_tokenizer(), folder=tmp_path)
    monkeypatch.setenv("VLLM_API_KEY", "one two~")
    vllm.set_url("http://127.0.0.1:8001")
    assert vllm._http.headers["Authorization"] == "Bearer one two~"


def test_the_connector_is_configured_whatever_a_server_would_refuse(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--kv-config starts no server, so it reads only the options of the model and of the folder."""
    monkeypatch.setattr("latentmas.serving.server.load_model", lambda *_, **__: (model, character_tokenizer()))
    monkeypatch.setattr(os, "environ", {**os.environ, "VLLM_API_KEY": "schlüssel"})
    out = io.StringIO()
    config = ServeConfig(
        folder=tmp_path, vllm_url="nowhere", max_waiting=0, timeout=0, vllm_options=["chain.yaml"], kv_config=True
    )
    print_kv_config(config, Console(file=out))
    extra = json.loads(out.getvalue())["kv_connector_extra_config"]
    assert extra == {"folder": str(tmp_path), "fingerprint": ModelFingerprint.of(model).fingerprint}


@pytest.mark.parametrize("host", ["a..b", f"{'a' * 64}.org", "no such host"])
def test_a_host_that_is_none(host: str) -> None:
    with pytest.raises(LatentMASError, match=f"cannot listen at {host} port 0: .*--host"):
        listen(host, 0)


def test_two_servers_at_one_address() -> None:
    with listen("127.0.0.1", 0) as first, pytest.raises(ValueError, match="--port"):
        listen("127.0.0.1", first.getsockname()[1])


def test_one_client_for_one_address(model: Any, tmp_path: Path) -> None:
    vllm = VllmServer(model, character_tokenizer(), folder=tmp_path)
    for url in ("http://LOCALHOST:8001", "http://127.0.0.1:80", "http://[::1]:80/v1/"):
        vllm.set_url(url)
        assert vllm._http is vllm._http


def run_server(served: ServedGateway, child: VllmProcess | None, meanwhile: Callable[[Server], None]) -> int:
    """The command behind the loading, in this thread, which the signals go to; `meanwhile` in another one."""
    address = listen("127.0.0.1", 0)
    url = None if child is not None else served.vllm_app.url
    server = Server(ServeConfig(vllm_url=url), Console(stderr=True), served.vllm, child, served.chains, address)
    with address, ThreadPoolExecutor(1) as pool:
        other = pool.submit(meanwhile, server)
        code = asyncio.run(asyncio.wait_for(server.run(), SECONDS))
        other.result(SECONDS)
    return code


@pytest.mark.parametrize("signals", [1, 2])
def test_requests_that_the_end_cuts_off(
    served: ServedGateway, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], signals: int
) -> None:
    """At the end of the time that they are given, or at once by the second signal."""
    monkeypatch.setattr("latentmas.serving.server.GRACE_SECONDS", 1 if signals == 1 else 60)

    async def wait(number: int, body: dict[str, Any]) -> None:
        await asyncio.sleep(60 if number or not body["temperature"] else 0)

    served.fake.on_token = wait

    def meanwhile(server: Server) -> None:
        port = server.address.getsockname()[1]
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        body = {"model": "thinks", "messages": QUESTION}
        with ThreadPoolExecutor() as pool, socket.create_connection(("127.0.0.1", port), SECONDS) as slow:
            slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")

            def ask(**fields: Any) -> httpx.Response:
                return httpx.post(url, json={**body, **fields}, timeout=SECONDS, trust_env=False)

            whole, stream = pool.submit(ask), pool.submit(ask, stream=True, temperature=1)
            until(lambda: len(served.fake.seen) == 2)
            time.sleep(0.2)
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)
            answer = whole.result(SECONDS)
            error = error_of(answer, 503)
            assert (error["code"], int(answer.headers["retry-after"]) > 0) == ("server_ending", True)
            *_, name, data = stream.result(SECONDS).text.strip().split("\n")
            assert (name, json.loads(data.removeprefix("data: "))["error"]) == ("event: error", error)
            assert slow.recv(1000).startswith(b"HTTP/1.1 503")

    assert run_server(served, None, meanwhile) == 0
    assert "Traceback" not in capfd.readouterr().err
    assert not list(served.folder.iterdir())


def test_a_second_signal_as_it_starts_ends_it_at_once(served: ServedGateway) -> None:
    child, _ = child_of(
        served.chains["thinks"].model, served.folder,
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(1000)",
    )  # fmt: skip
    child.server = served.vllm

    def meanwhile(server: Server) -> None:
        until(lambda: child._last_lines)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    began = time.monotonic()
    try:
        assert run_server(served, child, meanwhile) == 130
        assert time.monotonic() - began < 8
        assert child._process is not None
        assert child._process.returncode == -signal.SIGKILL
    finally:
        if child._process is not None:
            child._process.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_as_it_starts(served: ServedGateway, number: int, code: int) -> None:
    child, _ = child_of(
        served.chains["thinks"].model, served.folder, "import time; print('slow', flush=True); time.sleep(1000)"
    )

    def meanwhile(server: Server) -> None:
        until(lambda: child._last_lines)
        os.kill(os.getpid(), number)

    assert run_server(served, child, meanwhile) == code
    assert child._process is not None
    assert child._process.returncode == -signal.SIGTERM
    assert served.fake.models_requests == 1, "it was connected once, before this"


def test_vllm_that_does_not_start(served: ServedGateway) -> None:
    child, _ = child_of(served.chains["thinks"].model, served.folder, "print('no gpu'); raise SystemExit(3)")
    with pytest.raises(LatentMASError, match=r"vLLM ended as it started \(exit code 3\)(.|\n)*no gpu"):
        run_server(served, child, lambda server: None)


@pytest.mark.parametrize("dies", [False, True])
def test_vllm_ends_with_the_server_and_the_server_with_vllm(
    served: ServedGateway, tmp_path_factory: pytest.TempPathFactory, capfd: pytest.CaptureFixture[str], dies: bool
) -> None:
    """Its process is one that is healthy; the requests are answered by the other fake."""
    folder = tmp_path_factory.mktemp("process")
    child, _ = child_of(served.chains["thinks"].model, served.folder, SERVER.replace("FOLDER", str(folder)))

    def meanwhile(server: Server) -> None:
        until(lambda: server._http is not None and server._http.started)
        port = server.address.getsockname()[1]
        body = {"model": "thinks", "messages": QUESTION}
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        assert httpx.post(url, json=body, timeout=SECONDS, trust_env=False).status_code == 200
        if not dies:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        (folder / "broken").touch()
        assert child._process is not None
        os.kill(child._process.pid, signal.SIGKILL)

    assert run_server(served, child, meanwhile) == (1 if dies else 0)
    assert child._process is not None
    assert child._process.poll() is not None
    assert (folder / "tidy").exists()
    output = capfd.readouterr().err
    assert "Traceback" not in output
    assert ("the server ends: vLLM did not start 3 times in a row" in output) == dies


def test_no_chain_is_left(served: ServedGateway) -> None:
    served.fake.max_model_len = 10
    with pytest.raises(ValueError, match="--max-model-len"):
        run_server(served, None, lambda server: None)
