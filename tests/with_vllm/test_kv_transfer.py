"""Keys and values in vLLM: the same tokens and log-probabilities as here, whatever the chain did to its memory."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from latentmas import METHODS, Chain, MemoryPolicy
from latentmas.backends.base import EngineError, GenerationRequest, LockstepTokens
from latentmas.backends.kv_file import SUFFIX, KVFile, KVFileRow
from latentmas.backends.vllm import Vllm
from latentmas.backends.vllm.request import PackedPrompt
from latentmas.chain.run import PendingAnswer
from latentmas.default_model import default_model_folder
from logprobs import logprobs_of, rows_of
from vllm.distributed.kv_transfer import get_kv_transfer_group

from latentmas_kernels import LatentCache, generate

pytestmark = pytest.mark.usefixtures("keys_are_moved_by_torch")

QUESTIONS = [
    "How many legs have 3 cats and 2 birds?",
    "Name the capital of France and say why it is famous.",
    "What is 12 times 7?",
]
MEMORIES = {"full": None, "cut": MemoryPolicy(slots=40), "latent-only": MemoryPolicy(kinds="latent")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kv-files")


@pytest.fixture(scope="module")
def vllm(float32: tuple[Any, Any], folder: Path) -> Iterator[Vllm]:
    """With few slots, so that requests wait for each other and blocks are used again."""
    with Vllm(
        str(default_model_folder()), float32[0], folder=folder, logprobs=True,
        settings={"max_model_len": 2048, "max_num_seqs": 8},
    ) as engine:  # fmt: skip
        yield engine


@pytest.fixture(autouse=True)
def nothing_is_left(folder: Path) -> Iterator[None]:
    yield
    assert list(folder.iterdir()) == []


def agents_of(method: str, memory: MemoryPolicy | None, steps: int = 6, tokens: int = 16) -> list[Any]:
    def with_memory(agent: Any) -> Any:
        return agent if memory is None else replace(agent, memory=memory)

    agents = METHODS[method](steps, tokens)
    return [[with_memory(a) for a in entry] if isinstance(entry, list) else with_memory(entry) for entry in agents]


def prepared(
    vllm: Vllm, float32: tuple[Any, Any], memory: MemoryPolicy | None, question: str, method: str = "latent"
) -> PendingAnswer:
    return Chain(*float32, agents_of(method, memory), decoder=vllm).prepare([question])


def here(model: Any, memory: LatentCache, prompt: list[int], count: int) -> list[int]:
    """What our own engine writes."""
    out = generate(model, torch.tensor([prompt]), past_key_values=memory, max_new_tokens=count, eos_token_id=None)
    return out.sequences[0, -count:].tolist()


@pytest.mark.parametrize("memory", MEMORIES)
def test_tokens_and_logprobs_are_those_of_our_own_engine(memory: str, vllm: Vllm, float32: tuple[Any, Any]) -> None:
    ready = prepared(vllm, float32, MEMORIES[memory], QUESTIONS[0])
    assert ready.memory is not None
    prompt = ready.requests[0].prompt
    (written,) = vllm.write(ready.memory, [GenerationRequest(prompt, 48, (), row=0)])
    expected = here(float32[0], ready.memory, prompt, 48)
    assert written.ids == expected
    error = (torch.tensor(written.logprobs) - logprobs_of(float32[0], ready.memory, prompt, expected)).abs().max()
    assert error < 1e-4
    assert written.computed_tokens == len(prompt), "the memory was read again"
    assert written.finish_reason == "length"


@pytest.mark.parametrize(
    ("method", "memory"),
    [("single", "full"), ("text", "full")]
    + [(method, memory) for method in METHODS if method not in ("single", "text") for memory in MEMORIES],
)
def test_chains_say_what_they_say_here(method: str, memory: str, vllm: Vllm, float32: tuple[Any, Any]) -> None:
    agents = agents_of(method, MEMORIES[memory])
    expected = Chain(*float32, agents).run(QUESTIONS)
    got = Chain(*float32, agents, decoder=vllm).run(QUESTIONS)
    assert got.answers == expected.answers  # texts, why they ended, and every agent's turn


def test_32_chains_in_one_batch_twice(vllm: Vllm, float32: tuple[Any, Any]) -> None:
    """No answer crosses to another chain, with prefix caching on and the same placeholders everywhere."""
    ready = [
        prepared(vllm, float32, MEMORIES[memory], f"What is {number} times {number + 3}?", method)
        for number in range(4)
        for method, memory in (
            ("latent", "full"),
            ("latent", "cut"),
            ("latent", "latent-only"),
            ("hierarchical", "full"),
            ("hierarchical", "latent-only"),
            ("debate", "full"),
            ("debate", "cut"),
            ("mix", "full"),
        )
    ]
    memories = [of.memory for of in ready if of.memory is not None]
    assert len(memories) == 32
    together = rows_of(memories, float32[0])
    requests = [GenerationRequest(of.requests[0].prompt, 10, (), row=row) for row, of in enumerate(ready)]
    expected = [
        here(float32[0], memory, request.prompt, 10) for memory, request in zip(memories, requests, strict=True)
    ]
    assert len({tuple(ids) for ids in expected}) > 24, "the chains must have different things to say"
    for _ in range(2):
        assert [written.ids for written in vllm.write(together, requests)] == expected


def test_agents_side_by_side_share_what_was_loaded(vllm: Vllm, float32: tuple[Any, Any]) -> None:
    """Two requests behind one row find its whole blocks in the prefix cache of the first: it is the same memory."""
    ready = prepared(vllm, float32, None, " ".join(QUESTIONS * 6))
    assert ready.memory is not None
    first = vllm.write(
        ready.memory, [GenerationRequest([5, 6, 7], 8, (), row=0), GenerationRequest([8, 9], 8, (), row=0)]
    )
    assert [written.ids for written in first] == [
        here(float32[0], ready.memory, [5, 6, 7], 8),
        here(float32[0], ready.memory, [8, 9], 8),
    ]


def test_memory_that_ends_at_a_block(vllm: Vllm, float32: tuple[Any, Any]) -> None:
    """Lengths about a multiple of vLLM's block (128 on a CPU)."""
    whole = prepared(vllm, float32, None, " ".join(QUESTIONS * 10)).memory
    assert whole is not None
    assert int(whole.lengths) > 256
    for length in (1, 127, 128, 129, 256):
        memory = whole.fork()
        memory.truncate(torch.tensor([length]))
        for prompt in ([5], list(range(5, 140))):
            (written,) = vllm.write(memory, [GenerationRequest(prompt, 6, (), row=0)])
            assert written.ids == here(float32[0], memory, prompt, 6), (length, len(prompt))
            assert written.computed_tokens == len(prompt)


# ---- what goes wrong is one request's affair -------------------------------------------------------------------------


@pytest.fixture
def ready(vllm: Vllm, float32: tuple[Any, Any]) -> PendingAnswer:
    return prepared(vllm, float32, None, QUESTIONS[0])


def check_lives(vllm: Vllm, float32: tuple[Any, Any], ready: PendingAnswer) -> None:
    """The engine answers the next request as if nothing had been."""
    assert ready.memory is not None
    (written,) = vllm.write(ready.memory, [GenerationRequest(ready.requests[0].prompt, 12, (), row=0)])
    assert written.ids == here(float32[0], ready.memory, ready.requests[0].prompt, 12)


def send(vllm: Vllm, prompt: list[int], row: Any) -> Any:
    """Past the checks of `write`, as a stranger would; the prompt comes after the row's placeholders."""
    packed = PackedPrompt([0] * row.slots + prompt, None, row)
    return vllm._run([GenerationRequest(prompt, 4, ())], [packed], LockstepTokens(1, None))


def test_nan_is_refused_before_it_is_sent(vllm: Vllm, float32: tuple[Any, Any], ready: PendingAnswer) -> None:
    assert ready.memory is not None
    spoiled = ready.memory.fork()
    spoiled.buffer[1, 7, 0, 2, 11, 3] = float("nan")
    with pytest.raises(ValueError, match="row 0 of the memory holds NaN or Inf"):
        vllm.write(spoiled, [GenerationRequest([5], 4, (), row=0)])
    check_lives(vllm, float32, ready)


def test_nan_in_a_file_ends_that_request_only(
    vllm: Vllm, float32: tuple[Any, Any], ready: PendingAnswer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ready.memory is not None
    spoiled = ready.memory.fork()
    spoiled.buffer[0, 20, 0, 1, 3, 5] = float("nan")
    with monkeypatch.context() as patch:
        patch.setattr("latentmas.backends.kv_file.check_finite", lambda *_: None)
        file = KVFile(spoiled, vllm.stamp, folder)
    with closing(file), pytest.raises(EngineError, match="ended request 0 with 'error'"):
        send(vllm, [5, 6], file.rows[0])
    check_lives(vllm, float32, ready)


def test_a_missing_file_ends_that_request_only(vllm: Vllm, float32: tuple[Any, Any], ready: PendingAnswer) -> None:
    with pytest.raises(EngineError, match="ended request 0 with 'error'"):
        send(vllm, [5], KVFileRow(f"nobody{SUFFIX}", 0, 40))
    check_lives(vllm, float32, ready)


@pytest.mark.parametrize("salt", [None, "mine"])
def test_another_salt_ends_that_request_only(
    salt: str | None, vllm: Vllm, float32: tuple[Any, Any], ready: PendingAnswer
) -> None:
    assert ready.memory is not None
    with closing(KVFile(ready.memory, vllm.stamp, vllm.folder)) as file:
        (row,) = file.rows
        salted = SimpleNamespace(params=row.params, slots=row.slots, salt=salt)
        with pytest.raises(EngineError, match="ended request 0 with 'error'"):
            send(vllm, [5], salted)
    check_lives(vllm, float32, ready)


def test_parameters_from_a_stranger_end_that_request_only(
    vllm: Vllm, float32: tuple[Any, Any], ready: PendingAnswer
) -> None:
    for params in (
        {"latentmas_file": "../../etc/passwd", "latentmas_row": 0, "latentmas_slots": 3},
        {"latentmas_file": 7, "latentmas_row": "x"},
        {"latentmas_row": 0},
        {"latentmas_file": f"nobody{SUFFIX}", "latentmas_row": 0, "latentmas_slots": 10**9},
    ):
        stranger = SimpleNamespace(params=params, slots=0, salt="s")
        with pytest.raises(EngineError, match="ended request 0 with 'error'"):
            send(vllm, [5, 6, 7], stranger)
    check_lives(vllm, float32, ready)


def test_a_second_model_is_refused(vllm: Vllm, float32: tuple[Any, Any], ready: PendingAnswer) -> None:
    """The same shapes and other weights: by the chain, and by the engine for a file that came another way."""
    assert ready.memory is not None
    other = replace(vllm.stamp, fingerprint="0" * 64)
    with (
        closing(KVFile(ready.memory, other, vllm.folder)) as file,
        pytest.raises(EngineError, match="ended request 0 with 'error'"),
    ):
        send(vllm, [5], file.rows[0])
    model = float32[0]
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    try:
        with pytest.raises(ValueError, match="start it with the last agent's model"):
            Chain(*float32, METHODS["latent"](2, 2), decoder=vllm)
    finally:
        with torch.no_grad():
            model.model.norm.weight[0] -= 1
    check_lives(vllm, float32, ready)


def test_too_long_a_prompt_is_refused_before_it_is_sent(
    vllm: Vllm, float32: tuple[Any, Any], ready: PendingAnswer
) -> None:
    assert ready.memory is not None
    room = vllm.max_model_len - int(ready.memory.lengths) - 4
    with pytest.raises(
        ValueError, match=rf"request 0 has {vllm.max_model_len - 3} tokens \({int(ready.memory.lengths)} of"
    ):
        vllm.write(ready.memory, [GenerationRequest([5] * (room + 1), 4, (), row=0)])
    (written,) = vllm.write(ready.memory, [GenerationRequest([5] * room, 4, (), row=0)])
    assert len(written.ids) == 4
    check_lives(vllm, float32, ready)


def test_a_memory_that_vllm_did_not_take_is_an_error(
    vllm: Vllm, float32: tuple[Any, Any], ready: PendingAnswer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that skip the prefix cache skip connectors as well, in silence."""
    assert ready.memory is not None
    sampling = vllm._sampling

    def skipping(*given: Any) -> Any:
        params = sampling(*given)
        params.skip_reading_prefix_cache = True
        return params

    with monkeypatch.context() as patch:
        patch.setattr(vllm, "_sampling", skipping)
        with pytest.raises(EngineError, match="of memory as placeholders in request 0"):
            vllm.write(ready.memory, [GenerationRequest([5], 4, (), row=0)])
    check_lives(vllm, float32, ready)


def test_what_fails_while_it_is_loaded_ends_that_request_only(
    vllm: Vllm, float32: tuple[Any, Any], ready: PendingAnswer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device without memory, say."""
    assert ready.memory is not None

    def fail(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("latentmas.backends.vllm.connector.read_kv_rows", fail)
        with pytest.raises(EngineError, match="ended request 0 with 'error'"):
            vllm.write(ready.memory, [GenerationRequest([5], 4, (), row=0)])
    check_lives(vllm, float32, ready)


def test_attention_that_takes_no_keys_from_outside_is_refused(vllm: Vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its requests would read whatever was there before."""
    connector = get_kv_transfer_group()
    names = dict.fromkeys(connector._names)
    connector.register_kv_caches(names)
    with pytest.raises(ValueError, match="2 layers with a paged cache of 30"):
        connector.register_kv_caches(dict(list(names.items())[:2]))
    layer = connector._vllm_config.compilation_config.static_forward_context[connector._names[3]]
    monkeypatch.delattr(type(layer.impl), "do_kv_cache_update")
    with pytest.raises(ValueError, match="Impl, which has no do_kv_cache_update; .* another attention_backend"):
        connector.register_kv_caches(names)


def test_a_second_engine_in_one_process_is_refused(vllm: Vllm, float32: tuple[Any, Any], default_folder: Path) -> None:
    """They would share the first one's connector."""
    with pytest.raises(ValueError, match="there is an engine with a connector in this process.*close it first"):
        Vllm(str(default_folder), float32[0], settings={"max_model_len": 512})


def test_an_interrupt_ends_the_requests(vllm: Vllm, float32: tuple[Any, Any], ready: PendingAnswer) -> None:
    assert ready.memory is not None

    def interrupt(step: int, tokens: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vllm.write(ready.memory, [GenerationRequest([5], 200, (), row=0)] * 3, interrupt)
    assert not vllm._engine.has_unfinished_requests()
    check_lives(vllm, float32, ready)


def test_seeds_and_temperatures(vllm: Vllm, ready: PendingAnswer) -> None:
    assert ready.memory is not None

    def texts(*seeds: int) -> list[list[int]]:
        requests = [GenerationRequest([5], 24, (), row=0, temperature=1.0, top_p=0.9, seed=seed) for seed in seeds]
        return [written.ids for written in vllm.write(ready.memory, requests)]

    first = texts(1, 2)
    assert first == texts(1, 2)
    assert first[0] != first[1]


def test_ends_are_those_of_the_request(vllm: Vllm, float32: tuple[Any, Any], ready: PendingAnswer) -> None:
    assert ready.memory is not None
    prompt = ready.requests[0].prompt
    expected = here(float32[0], ready.memory, prompt, 12)
    end = next(token for token in expected if expected.index(token) >= 3)
    (written,) = vllm.write(ready.memory, [GenerationRequest(prompt, 12, (end,), row=0)])
    assert written.ids == expected[: expected.index(end) + 1]
    assert written.finish_reason == "stop"
