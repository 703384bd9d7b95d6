"""Memories as embeddings: the same answers where nothing was cut, and a refusal with the reason where something was."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from latentmas import METHODS, Budget, Chain, MemoryPolicy
from latentmas.backends.vllm import Vllm
from latentmas.default_model import default_model_folder
from logprobs import logprobs_of
from test_kv_transfer import QUESTIONS, agents_of, here

pytestmark = pytest.mark.usefixtures("keys_are_moved_by_torch")


@pytest.fixture(scope="module")
def vllm(float32: tuple[Any, Any]) -> Iterator[Vllm]:
    with Vllm(
        str(default_model_folder()), float32[0], kv_transfer="embeds", logprobs=True,
        settings={"max_model_len": 2048, "max_num_seqs": 8},
    ) as engine:  # fmt: skip
        yield engine


def test_tokens_and_logprobs_are_those_of_our_own_engine(vllm: Vllm, float32: tuple[Any, Any]) -> None:
    ready = Chain(*float32, agents_of("latent", None), decoder=vllm).prepare([QUESTIONS[0]])
    assert ready.memory is not None
    request = replace(ready.requests[0], max_new_tokens=48, end_ids=())
    thoughts = [slot for slot in request.slot_inputs if not isinstance(slot, int)]
    assert len(thoughts) == 18  # three agents of six steps, among the tokens of their prompts
    (written,) = vllm.write(ready.memory, [request])
    expected = here(float32[0], ready.memory, request.prompt, 48)
    assert written.ids == expected
    error = (
        (torch.tensor(written.logprobs) - logprobs_of(float32[0], ready.memory, request.prompt, expected)).abs().max()
    )
    assert error < 1e-4


@pytest.mark.parametrize("method", ["single", "text", "latent", "mix"])
def test_chains_say_what_they_say_here(method: str, vllm: Vllm, float32: tuple[Any, Any]) -> None:
    agents = agents_of(method, None)
    expected = Chain(*float32, agents).run(QUESTIONS)
    for _ in range(2):  # the second time from the prefix cache
        assert Chain(*float32, agents, decoder=vllm).run(QUESTIONS).answers == expected.answers


@pytest.mark.parametrize(
    ("method", "memory", "budget", "why"),
    [
        ("latent", MemoryPolicy(kinds="latent"), None, "the memory is cut before critic"),
        ("latent", MemoryPolicy(slots=40), None, "the memory is cut before critic"),
        ("latent", None, Budget(slots=400), "a budget may cut the memory before judger"),
        ("hierarchical", None, None, "work side by side"),
        ("debate", None, None, "work side by side"),
    ],
)
def test_what_cannot_be_right_is_refused(
    method: str, memory: MemoryPolicy | None, budget: Budget | None, why: str, vllm: Vllm, float32: tuple[Any, Any]
) -> None:
    with pytest.raises(ValueError, match=why) as refusal:
        Chain(*float32, agents_of(method, memory), decoder=vllm, budget=budget)
    assert "another memory" in str(refusal.value)
    assert "(kv)" in str(refusal.value)


def test_thoughts_that_are_wrong_are_refused_before_they_are_sent(vllm: Vllm, float32: tuple[Any, Any]) -> None:
    """vLLM would die of the width, and answer everything with nonsense after the NaN."""
    chain = Chain(*float32, METHODS["latent"](4, 12), decoder=vllm)
    expected = chain.run(QUESTIONS[:1]).answers
    ready = chain.prepare(QUESTIONS[:1])
    (request,) = ready.requests
    for wrong, why in (
        (torch.full((576,), float("nan")), "holds NaN or Inf"),
        (torch.full((576,), float("inf")), "holds NaN or Inf"),
        (torch.zeros(577), r"has the shape \[577\]; this model reads \[576\]"),
        (torch.zeros(2, 576), r"has the shape \[2, 576\]"),
    ):
        fed = [slot if isinstance(slot, int) else wrong for slot in request.slot_inputs]
        with pytest.raises(ValueError, match=why):
            vllm.write(ready.memory, [replace(request, slot_inputs=fed)])
    with pytest.raises(ValueError, match="vLLM was started for 2048 together"):
        vllm.write(ready.memory, [replace(request, max_new_tokens=2000)])
    assert chain.run(QUESTIONS[:1]).answers == expected
