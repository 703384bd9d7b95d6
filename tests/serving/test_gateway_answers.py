"""Answers of the gateway: what a client gets, and what vLLM is asked for it."""

import asyncio
import base64
import gc
import io
import json
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from latentmas.backends.base import PromptEmbeds
from served_gateway import QUESTION, SECONDS, ServedGateway, error_of, until


def test_an_answer(served: ServedGateway) -> None:
    response = served.ask()
    assert response.status_code == 200, response.text
    answer = response.json()
    assert (answer["object"], answer["model"]) == ("chat.completion", "thinks")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": " w0 w1 w2 w3 w4 w5", "refusal": None}
    assert choice["finish_reason"] == "length"
    prompts = [len(served.tokenizer(text).input_ids) for text in ("Why? Plan.\n\n", "\n\nAnswer.\n\n")]
    prompts[1] -= 1  # the beginning of a text is there once
    assert answer["usage"] == {
        "prompt_tokens": sum(prompts), "completion_tokens": 6, "total_tokens": sum(prompts) + 6,
        "completion_tokens_details": {"reasoning_tokens": 0}, "latent_steps": 3,
        "latentmas": [
            {"agent": "planner", "prompt_tokens": prompts[0], "latent_steps": 3, "new_tokens": 0},
            {"agent": "judger", "prompt_tokens": prompts[1], "latent_steps": 0, "new_tokens": 6},
        ],
    }  # fmt: skip
    (body,) = served.fake.seen
    slots = prompts[0] + 3
    assert body["prompt"][:slots] == [0] * slots
    assert served.tokenizer.decode(body["prompt"][slots:]) == "\n\nAnswer.\n\n"
    assert body["kv_transfer_params"]["latentmas_slots"] == slots
    assert body["cache_salt"] == body["kv_transfer_params"]["latentmas_file"] + ":0"
    sampling = {
        "temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0,
        "frequency_penalty": 0, "max_tokens": 6, "min_tokens": 0, "stop": [], "ignore_eos": True, "stop_token_ids": [2],
        "skip_special_tokens": True, "return_token_ids": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert {name: body[name] for name in sampling} == sampling
    assert served.empty()


def test_a_stream_is_the_answer_in_pieces(served: ServedGateway) -> None:
    served.fake.stop_after = 3
    (role, *words, ending, usage, done) = served.events(stream_options={"include_usage": True})
    assert role[1]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [event["choices"][0]["delta"] for _, event in words] == [{"content": f" w{n}"} for n in range(3)]
    assert (ending[1]["choices"][0]["delta"], ending[1]["choices"][0]["finish_reason"]) == ({}, "stop")
    whole = served.ask().json()
    assert (
        "".join(event["choices"][0]["delta"]["content"] for _, event in words)
        == (whole["choices"][0]["message"]["content"])
    )
    assert (usage[1]["choices"], usage[1]["usage"]) == ([], whole["usage"])
    assert done[1] == "[DONE]"
    assert len({event["id"] for _, event in (role, *words, ending, usage)}) == 1
    assert not any("usage" in event for _, event in served.events()[:-1])
    assert served.empty()


def test_what_a_request_asks_of_the_text(served: ServedGateway) -> None:
    response = served.ask(
        temperature=0.7, top_p=0.9, max_tokens=2, stop="x", presence_penalty=0.5, frequency_penalty=-1, n=1, logprobs=False,
        response_format={"type": "text"}, user="me", metadata={"a": "b"}, tools=None,
        messages=[
            {"role": "developer", "content": "Be"},
            {"role": "user", "content": [{"type": "text", "text": "br"}, {"type": "text", "text": "ief"}]},
        ],
    )  # fmt: skip
    assert response.status_code == 200, response.text
    first, asked = response.json()["usage"]["latentmas"][0], "Be\n\nbrief Plan.\n\n"
    assert first["prompt_tokens"] == len(served.tokenizer(asked).input_ids)
    (body,) = served.fake.seen
    want = {
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 2,
        "stop": ["x"],
        "presence_penalty": 0.5,
        "frequency_penalty": -1,
    }
    assert {name: body[name] for name in want} == want
    assert served.ask(max_completion_tokens=3).json()["usage"]["completion_tokens"] == 3


def test_a_seed_decides_what_is_drawn_whatever_comes_in_between(served: ServedGateway) -> None:
    """The first writer of one request waits until another request has drawn."""
    drawn = threading.Event()

    async def wait(number: int, body: dict[str, Any]) -> None:
        while body["max_tokens"] == 4 and body["temperature"] == 0.5 and not drawn.is_set():
            await asyncio.sleep(0.01)

    served.fake.on_token = wait
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(served.ask, model="mixes", temperature=0.5, seed=7)
        until(lambda: served.fake.seen)
        assert served.ask(model="mixes", temperature=0.6, seed=8).status_code == 200
        drawn.set()
        assert slow.result(SECONDS).status_code == 200
    assert served.ask(model="mixes", temperature=0.5, seed=7).status_code == 200
    seeds = [body["seed"] for body in served.fake.seen if body["temperature"] == 0.5]
    assert seeds[:2] == seeds[2:]
    assert len(set(seeds)) == 2
    for _ in range(2):
        served.ask(temperature=0.4)
    assert len({body["seed"] for body in served.fake.seen if body["temperature"] == 0.4}) == 2


def test_a_request_that_fails_leaves_what_others_draw_alone(served: ServedGateway) -> None:
    """The text in the middle of one request fails while another one has the turn and has not drawn yet."""
    thinking, failed = threading.Event(), threading.Event()
    prepare = served.chains["thinks"].prepare

    def waiting(questions: list[str], **options: Any) -> Any:
        thinking.set()
        assert failed.wait(SECONDS)
        return prepare(questions, **options)

    async def fail(number: int, body: dict[str, Any]) -> None:
        while not thinking.is_set():
            await asyncio.sleep(0.01)
        raise ConnectionError

    assert served.ask(temperature=0.5, seed=7).status_code == 200
    served.chains["thinks"].prepare = waiting  # type: ignore[method-assign]
    served.fake.on_token = fail
    with ThreadPoolExecutor() as pool:
        fails = pool.submit(served.ask, model="mixes", temperature=0.4, seed=9)
        until(lambda: len(served.fake.seen) == 2)
        draws = pool.submit(served.ask, temperature=0.5, seed=7)
        assert fails.result(SECONDS).status_code == 502
        served.fake.on_token = None
        failed.set()
        assert draws.result(SECONDS).status_code == 200
    assert len({body["seed"] for body in served.fake.seen if body["temperature"] == 0.5}) == 1


def test_characters_that_some_take_for_ends_of_lines(served: ServedGateway) -> None:
    served.fake.suffix = "\u2028\u2029\x85\x0b\x1c\xe9\U0001f600"
    want = "".join(f" w{number}{served.fake.suffix}" for number in range(6))
    assert served.ask().json()["choices"][0]["message"]["content"] == want
    events = served.client.post("/v1/chat/completions", json={"model": "thinks", "messages": QUESTION, "stream": True})
    lines = [line.removeprefix("data: ") for line in events.iter_lines() if line.startswith("data: {")]
    assert "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines) == want


def test_a_memory_is_freed_once_it_is_handed_over(served: ServedGateway) -> None:
    pack, memories = served.vllm.pack, list[Any]()

    def packing(memory: Any, requests: Any) -> Any:
        memories.append(weakref.ref(memory))
        return pack(memory, requests)

    async def look(number: int, body: dict[str, Any]) -> None:
        gc.collect()
        assert [memory() for memory in memories] == [None]

    served.vllm.pack, served.fake.on_token = packing, look  # type: ignore[method-assign]
    assert served.ask().status_code == 200


def test_agents_that_write_in_the_middle_let_others_think(served: ServedGateway) -> None:
    """Each text waits until both requests are writing, which is never where one has the model to itself."""

    async def wait(number: int, body: dict[str, Any]) -> None:
        while len(served.fake.seen) < 2:
            await asyncio.sleep(0.01)

    served.fake.on_token = wait
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(served.ask, model="mixes") for _ in range(2)]
        usages = [answer.result(SECONDS).json()["usage"] for answer in answers]
    for usage in usages:
        assert [agent["new_tokens"] for agent in usage["latentmas"]] == [0, 4, 6]
        assert usage["completion_tokens_details"] == {"reasoning_tokens": 4}
        assert usage["completion_tokens"] == 10
    assert served.empty()


def test_embeddings_are_what_the_memory_was_fed(model: Any, tmp_path: Path) -> None:
    with ServedGateway(model, tmp_path, kv_transfer="embeds") as served:
        assert served.fake.probes == 2
        assert served.ask().status_code == 200
        (body,) = served.fake.seen
        assert "prompt" not in body
        embeds = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])))
        read = served.tokenizer("Why? Plan.\n\n").input_ids
        last = served.tokenizer("\n\nAnswer.\n\n", add_special_tokens=False).input_ids
        assert len(embeds) == len(read) + 3 + len(last)
        table = model.get_input_embeddings().weight
        torch.testing.assert_close(embeds[: len(read)], table[read], rtol=0, atol=0)
        torch.testing.assert_close(embeds[-len(last) :], table[last], rtol=0, atol=0)
        assert served.ask(model="alone").status_code == 200
        assert served.fake.seen[-1]["prompt"] == served.tokenizer("Why? Answer.\n\n").input_ids


def test_embeddings_are_encoded_in_the_thread_of_the_model(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the event loop they would hold up the texts of all other requests: 0.2 s for 8k tokens of 4096."""
    in_loop: list[bool] = []

    def recording(function: Callable[..., Any]) -> Callable[..., Any]:
        def record(*given: Any) -> Any:
            in_loop.append(asyncio._get_running_loop() is not None)
            return function(*given)

        return record

    with ServedGateway(model, tmp_path, kv_transfer="embeds") as served:
        monkeypatch.setattr(PromptEmbeds, "embed_tokens", recording(PromptEmbeds.embed_tokens))
        for module, name in ((torch, "save"), (base64, "b64encode")):
            monkeypatch.setattr(module, name, recording(getattr(module, name)))
        for stream in (False, True):
            assert served.ask(stream=stream).status_code == 200
    assert in_loop == [False] * 6


def test_models_and_health(served: ServedGateway) -> None:
    assert [model["id"] for model in served.client.get("/v1/models").json()["data"]] == ["thinks", "mixes", "alone"]
    assert served.client.get("/v1/models/mixes").json()["id"] == "mixes"
    assert error_of(served.client.get("/v1/models/x"), 404)["code"] == "model_not_found"
    assert served.client.get("/health").status_code == 200
    served.vllm_app.__exit__()
    assert error_of(served.client.get("/health"), 503)["code"] == "vllm_unreachable"


def test_health_of_a_server_that_hangs(served: ServedGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentmas.backends.vllm.server.HEALTH_SECONDS", 0.1)

    async def hang() -> None:
        await asyncio.sleep(60)

    served.fake.on_get = hang
    assert "its log" in error_of(served.client.get("/health"), 503)["message"]
