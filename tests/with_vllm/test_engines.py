"""What vLLM takes away in the middle of a text, and over several ranks: memories are loaded again, and in parts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from latentmas.backends.base import GenerationRequest
from latentmas.backends.vllm import Vllm
from logprobs import logprobs_of, rows_of
from test_kv_transfer import here, prepared
from transformers import LlamaConfig, LlamaForCausalLM

from latentmas_kernels import latent_generate

pytestmark = pytest.mark.usefixtures("keys_are_moved_by_torch")


def test_preempted_requests_get_their_memory_again(
    float32: tuple[Any, Any], default_folder: Path, tmp_path: Path
) -> None:
    """Five requests in eleven blocks: vLLM takes blocks away in the middle of texts and asks for the memory anew."""
    model, _ = float32
    with Vllm(
        str(default_folder), model, folder=tmp_path,
        settings={"max_model_len": 512, "max_num_seqs": 5, "num_gpu_blocks_override": 12},
    ) as engine:  # fmt: skip
        ready = [prepared(engine, float32, None, f"What is {number} times {number + 3}?") for number in range(5)]
        memories = [of.memory for of in ready if of.memory is not None]
        together = rows_of(memories, model)
        requests = [GenerationRequest(of.requests[0].prompt, 80, (), row=row) for row, of in enumerate(ready)]
        written = engine.write(together, requests)
        (preemptions,) = [m for m in engine._engine.get_metrics() if m.name == "vllm:num_preemptions"]
        assert preemptions.value > 0
    for of, text in zip(ready, written, strict=True):
        assert of.memory is not None
        assert text.ids == here(model, of.memory, of.requests[0].prompt, 80)


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_ranks_take_their_own_heads(kv_heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tensor-parallel ranks, with two KV heads each, and with one that both read."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, head_dim=32,
        num_key_value_heads=kv_heads, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(128, (1, 150))
    memory = latent_generate(model, ids, latent_steps=7, aligner="ridge").past_key_values
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with Vllm(
        str(tmp_path / "model"), model, folder=tmp_path, logprobs=True,
        settings={"max_model_len": 512, "tensor_parallel_size": 2, "skip_tokenizer_init": True},
    ) as engine:  # fmt: skip
        (written,) = engine.write(memory, [GenerationRequest([5, 6], 12, (), row=0)])
    expected = here(model, memory, [5, 6], 12)
    assert written.ids == expected
    assert written.computed_tokens == 2
    error = (torch.tensor(written.logprobs) - logprobs_of(model, memory, [5, 6], expected)).abs().max()
    assert error < 1e-4
