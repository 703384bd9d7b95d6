"""Requests as vLLM takes them: prompts, sampling parameters, and what is checked of an answer."""

import pytest
import torch
from latentmas.backends.base import Completion, EngineError, GenerationRequest
from latentmas.backends.kv_file import KVFileRow
from latentmas.backends.vllm.request import PackedPrompt, RequestPacker, checked_completion, sampling_params
from tiny_models import TINY, tiny_model

from latentmas_kernels import generate

MODEL = tiny_model("llama")
WIDTH = TINY["hidden_size"]


def cache_of(rows=2, length=5):
    ids = torch.randint(90, (rows, length), generator=torch.Generator().manual_seed(0))
    return generate(MODEL, ids, max_new_tokens=1, engine="eager").past_key_values


def test_a_cache_is_a_file_and_placeholders(tmp_path):
    packer = RequestPacker(MODEL, "kv", tmp_path)
    requests = [GenerationRequest([7, 8], 4, (2,), row=1), GenerationRequest([9], 4, (2,))]
    behind, alone = packer.pack(cache_of(), requests)
    assert behind.row is not None
    assert (behind.token_ids, behind.slots, behind.row.row) == ([0] * 5 + [7, 8], 5, 1)
    assert behind.embeds is None
    assert (alone.token_ids, alone.slots, alone.row) == ([9], 0, None)
    assert [path.name for path in tmp_path.iterdir()] == [behind.row.file]
    behind.close()
    alone.close()
    assert not list(tmp_path.iterdir())


def test_without_a_cache_nothing_is_written(tmp_path):
    (prompt,) = RequestPacker(MODEL, "kv", tmp_path).pack(None, [GenerationRequest([7, 8], 4, ())])
    assert prompt == PackedPrompt([7, 8])
    assert not list(tmp_path.iterdir())


def test_inputs_of_a_cache_come_before_the_prompt(tmp_path):
    packer, vector = RequestPacker(MODEL, "embeds", tmp_path), torch.ones(WIDTH)
    mixed, tokens = packer.pack(
        cache_of(),
        [
            GenerationRequest([7], 4, (), row=0, slot_inputs=[3, vector]),
            GenerationRequest([7], 4, (), row=1, slot_inputs=[3]),
        ],
    )
    assert mixed.embeds is not None
    assert (mixed.token_ids, mixed.embeds.is_token) == ([3, 0, 7], [True, False, True])
    assert torch.equal(mixed.embeds.embeds[1], vector)
    assert (tokens.token_ids, tokens.embeds) == ([3, 7], None)
    assert (mixed.slots, tokens.slots) == (0, 0)
    assert not list(tmp_path.iterdir())


def test_other_transfers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="got kv_transfer 'text'; supported are kv, embeds"):
        RequestPacker(MODEL, "text", tmp_path)


def test_the_ends_are_those_of_the_request():
    request = GenerationRequest([1], 4, (2, 5), temperature=0.5, top_p=0.9, seed=3)
    assert sampling_params(request) == {
        "temperature": 0.5, "top_p": 0.9, "seed": 3, "max_tokens": 4, "ignore_eos": True, "stop_token_ids": [2, 5],
    }  # fmt: skip


def test_what_is_checked_of_an_answer():
    """A cache that was not loaded is an error, and never a worse answer."""
    prompt = PackedPrompt([0] * 5 + [7, 8], None, KVFileRow("a.latentmas-kv", 0, 5))
    assert checked_completion(prompt, [4], "stop", 6, "request 0") == Completion([4], "stop", 1)
    assert checked_completion(PackedPrompt([7]), [4], "length", None, "request 0", [-0.5]) == Completion(
        [4], "length", 1, [-0.5]
    )
    with pytest.raises(EngineError, match="1 of 5 slots of memory as placeholders in request 0"):
        checked_completion(prompt, [4], "stop", 4, "request 0")
    with pytest.raises(EngineError, match="--enable-prompt-tokens-details"):
        checked_completion(prompt, [4], "stop", None, "request 0")
    with pytest.raises(EngineError, match="vLLM ended request 0 with 'error'; its log says why"):
        checked_completion(prompt, [4], "error", 5, "request 0")
