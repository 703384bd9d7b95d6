"""A running vLLM server as a chain's decoder, without the gateway."""

from pathlib import Path
from typing import Any

import pytest
from fake_vllm import FakeVllm, ServedApp
from latentmas import Agent, Chain
from latentmas.backends.base import GenerationRequest
from latentmas.backends.vllm import VllmServer
from tokenizers_offline import character_tokenizer

AGENTS = [
    Agent("planner", "{question} Plan.", latent_steps=3),
    Agent("writer", "Draft.", max_new_tokens=4),
    Agent("judger", "Answer.", max_new_tokens=6),
]


@pytest.mark.parametrize("kv_transfer", ["kv", "embeds"])
def test_a_chain_decodes_at_a_server_without_an_event_loop(model: Any, tmp_path: Path, kv_transfer: str) -> None:
    """`wait` is asyncio.run: each text of the chain has a loop of its own."""
    tokenizer = character_tokenizer()
    server = VllmServer(model, tokenizer, kv_transfer=kv_transfer, folder=tmp_path)
    fake = FakeVllm(next(iter(server._probe_text.likely)))

    async def app() -> Any:
        return fake.app

    with ServedApp(app) as below:
        server.set_url(below.url)
        with pytest.raises(ValueError, match="started for 0 together"):  # it is not connected yet
            server.write(None, [GenerationRequest([5], 4, ())])
        server._wait(server.connect())
        answers = Chain(model, tokenizer, AGENTS, aligner="identity", decoder=server).run(["Why?", "How?"]).answers
    assert [[turn.new_tokens for turn in answer.turns] for answer in answers] == [[0, 4, 6]] * 2
    assert [body["max_tokens"] for body in fake.seen] == [4, 4, 6, 6]
    assert all(("prompt_embeds" in body) == (kv_transfer == "embeds") for body in fake.seen)
    assert not list(tmp_path.iterdir())
