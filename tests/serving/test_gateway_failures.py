"""Statuses of failures: a vLLM server that refuses, fails, dies or says nothing, and memory that runs out."""

import asyncio
import errno
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import ServedApp
from latentmas.serving.protocol import ChatCompletionRequest
from served_gateway import SECONDS, ServedGateway, error_of, until

from latentmas_kernels.cache.free_memory import InsufficientMemoryError
from latentmas_kernels.errors import LatentMASError


def failing(served: ServedGateway, status: int, code: str, said: str, *, begun: bool) -> None:
    """Without a stream it is that status; in one that has begun, an event in place of the end."""
    error = error_of(served.ask(), status)
    assert error["code"] == code
    assert said in error["message"]
    if begun:
        *words, (name, last) = served.events()
        assert name == "event: error"
        assert last["error"] == error
        assert all(event["choices"][0]["finish_reason"] is None for _, event in words)
    else:
        assert error_of(served.ask(stream=True), status) == error
    assert served.empty()


def test_memory_that_was_not_found_is_no_answer(served: ServedGateway) -> None:
    served.fake.cached = lambda slots: slots - 1
    failing(served, 502, "vllm_failed", "1 of 16 slots of memory as placeholders", begun=True)
    served.fake.cached = lambda slots: None
    failing(served, 502, "vllm_failed", "--enable-prompt-tokens-details", begun=True)
    assert served.ask(model="alone").status_code == 200  # without a memory there is nothing to find


def test_a_server_that_refuses_or_fails(served: ServedGateway) -> None:
    served.fake.refuse = 500
    failing(served, 502, "vllm_failed", "status 500", begun=False)
    served.fake.refuse, served.fake.error_at = None, 2
    failing(served, 502, "vllm_failed", "the engine burns", begun=True)
    served.fake.error_at = 0
    failing(served, 502, "vllm_failed", "the engine burns", begun=False)


def test_whether_to_send_a_request_again(served: ServedGateway) -> None:
    """Clients do so by themselves, and the chain would think again."""
    for status, told, code in ((400, 400, "vllm_refused"), (413, 400, "vllm_refused"), (422, 400, "vllm_refused")):
        served.fake.refuse = status
        failing(served, told, code, f"status {status}", begun=False)
        assert served.ask().headers["x-should-retry"] == "false"
    for status in (429, 503):
        served.fake.refuse = status
        failing(served, 503, "vllm_busy", f"status {status}", begun=False)
        assert int(served.ask().headers["retry-after"]) > 0
    served.fake.refuse = None
    assert served.ask().status_code == 200


def test_no_room(served: ServedGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(error: Exception) -> Any:
        def fail(*_: Any, **__: Any) -> Any:
            raise error

        return fail

    for error in (OSError(errno.ENOSPC, "full"), InsufficientMemoryError("full")):
        with monkeypatch.context() as patch:
            patch.setattr("latentmas.backends.vllm.request.KVFile", raising(error))
            response = served.ask()
        assert "--folder" in error_of(response, 503)["message"]
        assert response.json()["error"]["code"] == "folder_unwritable"
        assert int(response.headers["retry-after"]) > 0
    for error in (MemoryError(), InsufficientMemoryError("none"), torch.OutOfMemoryError("none")):
        with monkeypatch.context() as patch:
            patch.setattr(served.chains["thinks"], "prepare", raising(error))
            response = served.ask()
        assert error_of(response, 503)["code"] == "no_room"
        assert response.json()["error"]["message"]
        assert int(response.headers["retry-after"]) > 0
    with monkeypatch.context() as patch:
        patch.setattr(ChatCompletionRequest, "read", raising(KeyError("odd")))
        assert error_of(served.ask(), 500)["code"] == "internal_error"
    assert served.ask().status_code == 200


@pytest.mark.parametrize("error", [KeyError("odd"), ValueError("a bug")])
@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_is_a_500_with_the_id_of_its_traceback(
    served: ServedGateway,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    stream: bool,
) -> None:
    """Only a LatentMASError is what a user can mend; the text of any other exception is for the log."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    for place, name in (("prepare", "thinks"), ("check", "thinks")):
        with monkeypatch.context() as patch:
            patch.setattr(served.chains[name], place, fail)
            response = served.ask(stream=stream)
        told = error_of(response, 500)
        assert (told["code"], told["type"], told["param"]) == ("internal_error", "server_error", None)
        assert str(error) not in told["message"]
        found = re.search(r"chatcmpl-[0-9a-f]{32}", told["message"])
        assert found is not None
        (record,) = [record for record in caplog.records if found[0] in record.getMessage()]
        assert record.exc_info is not None
        assert record.exc_info[1] is error
    assert served.empty()


def test_what_a_user_can_mend_is_told_behind_the_thinking(
    served: ServedGateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise LatentMASError("take another aligner")

    monkeypatch.setattr(served.chains["thinks"], "prepare", fail)
    response = served.ask()
    assert error_of(response, 500) == {
        "message": "take another aligner", "type": "server_error", "param": None, "code": "cannot_answer",
    }  # fmt: skip
    assert response.headers["x-should-retry"] == "false"
    monkeypatch.setattr(served.chains["thinks"], "check", fail)
    assert error_of(served.ask(), 400)["param"] == "messages"
    assert not caplog.records


CHOICE = {"index": 0, "text": "a", "token_ids": [1], "finish_reason": None}
ODD = (
    "[]", "5", "{", "null", "{}", '{"choices": null}', '{"choices": [1]}', json.dumps({"choices": [{**CHOICE, "text": None}]}),
    json.dumps({"choices": [{**CHOICE, "token_ids": 3}]}),
)  # fmt: skip


def test_a_server_that_says_odd_things(served: ServedGateway) -> None:
    for data in ODD:
        served.fake.raw_stream = f"data: {data}\n\n"
        failing(served, 502, "vllm_failed", "not what vLLM says", begun=False)
    for raw in ("", ": ping\n\ndata: [DONE]\n\n", "x"):
        served.fake.raw_stream = raw
        failing(served, 502, "vllm_failed", "broke off", begun=False)
        assert not served.vllm._connected
    served.fake.raw_stream = None
    assert served.ask().status_code == 200


def test_requests_that_wait_for_a_server_share_one_attempt(
    served: ServedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentmas.backends.vllm.server.ASK_SECONDS", 1.0)

    async def hang() -> None:
        await asyncio.sleep(60)

    served.fake.on_get, served.vllm._connected, asked = hang, False, served.fake.models_requests
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(served.ask) for _ in range(8)]
        until(lambda: served.fake.models_requests > asked)
        served.send().close()  # who leaves does not end it for the others
        for answer in answers:
            error = error_of(answer.result(SECONDS), 504)
            assert "for 1 s" in error["message"]
            assert "--timeout" not in error["message"]
            assert answer.result().headers["x-should-retry"] == "false"
    assert served.fake.models_requests == asked + 1
    served.fake.on_get = None
    assert served.ask().status_code == 200


def test_a_server_that_dies_is_tried_out_again(served: ServedGateway) -> None:
    served.fake.disconnect_at = 3
    failing(served, 502, "vllm_failed", "broke off", begun=True)
    served.fake.disconnect_at, probes = None, served.fake.probes
    assert served.ask().status_code == 200
    assert served.fake.probes == probes + 2


def test_a_server_that_dies_for_an_agent_in_the_middle(served: ServedGateway) -> None:
    served.fake.disconnect_at = 3
    error = error_of(served.ask(model="mixes"), 502)
    assert error["code"] == "vllm_failed"
    assert len(served.fake.seen) == 1
    assert served.empty()


def test_a_silent_server(model: Any, tmp_path: Path) -> None:
    with ServedGateway(model, tmp_path, timeout=0.5) as served:
        silent_from = 2

        async def wait(number: int, body: dict[str, Any]) -> None:
            await asyncio.sleep(60 if number >= silent_from else 0)

        served.fake.on_token = wait
        failing(served, 504, "vllm_silent", "0.5 s", begun=True)
        silent_from = 0
        failing(served, 504, "vllm_silent", "0.5 s", begun=False)
        until(lambda: served.fake.disconnected == 4)


def test_a_server_that_is_away_for_a_while(served: ServedGateway) -> None:
    served.vllm_app.__exit__()
    for _ in range(2):
        refused = served.ask(stream=True)
        assert error_of(refused, 503)["code"] == "vllm_unreachable"
        assert int(refused.headers["retry-after"]) > 0
    probes = served.fake.probes

    async def fake() -> Any:
        return served.fake.app

    with ServedApp(fake, served.vllm_app.port):
        assert served.ask().status_code == 200
        assert served.fake.probes == probes + 2
        served.fake.cached = lambda slots: 0  # exchanged for one without the connector
        served.vllm._connected = False
        error = error_of(served.ask(), 500)
        assert "--kv-config" in error["message"]
    assert served.empty()


@pytest.mark.parametrize("kv_transfer", ["kv", "embeds"])
def test_other_servers_are_refused_at_once(model: Any, tmp_path: Path, kv_transfer: str) -> None:
    served = ServedGateway(model, tmp_path, kv_transfer=kv_transfer)
    fake, likely = served.fake, served.fake.probe_token

    async def app() -> Any:
        return fake.app

    async def connect(url: str) -> None:
        served.vllm.set_url(url)
        await served.vllm.connect()

    with ServedApp(app) as below:
        asyncio.run(connect(below.url + "/v1"))
        fake.probe_token = next(token for token in range(97) if token not in served.vllm._probe_text.likely)
        with pytest.raises(ValueError, match="another model"):
            asyncio.run(connect(below.url))
        fake.probe_token = likely
        if kv_transfer == "kv":
            fake.cached = lambda slots: 0
            with pytest.raises(ValueError, match="latentmas serve --kv-config"):
                asyncio.run(connect(below.url))
    with ServedApp(app) as below, pytest.raises(ValueError, match="not what vLLM says"):
        asyncio.run(connect(below.url + "/nowhere"))
    assert not list(tmp_path.iterdir())
