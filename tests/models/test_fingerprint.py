"""fingerprint: which changes of a model it shows, and which it leaves out."""

import pytest
import torch
from tiny_models import FAMILIES, OTHERS, ragged, tiny_model
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.models.fingerprint import model_fingerprint
from latentmas_kernels.models.packed_weights import pack_weights


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_the_fingerprint_is_that_of_the_checkpoint(name, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation).eval()
    assert model_fingerprint(again) == model_fingerprint(model)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.mul_(1.01)
    assert model_fingerprint(again) != model_fingerprint(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_engines_that_merge_weights_leave_the_fingerprint(name):
    model = tiny_model(name)
    before = model_fingerprint(model)
    pack_weights(model, Architecture.of(model))
    assert model_fingerprint(model) == before


def test_what_is_no_matter_of_keys_and_values_leaves_the_fingerprint():
    model = tiny_model("llama")
    before = model_fingerprint(model)
    model.__class__ = type(type(model).__name__, (type(model),), {"more": lambda self: None})
    model.config.eos_token_id, model.config.use_cache, model.config._name_or_path = 5, False, "elsewhere"
    model.set_attn_implementation("eager")
    model.requires_grad_(False)
    assert model_fingerprint(model) == before


def test_training_adapters_and_settings_change_the_fingerprint():
    seen = {model_fingerprint(tiny_model("llama"))}
    model = tiny_model("llama")
    ids, _ = ragged([8, 8])
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    seen.add(model_fingerprint(model))

    model = tiny_model("llama")
    with torch.no_grad():  # a merged LoRA of rank 1 on one product
        model.model.layers[1].self_attn.q_proj.weight += 1e-3 * torch.randn(64, 1) @ torch.randn(1, 48)
    seen.add(model_fingerprint(model))

    model = tiny_model("llama")
    model.config.rope_parameters["rope_theta"] = 500.0
    seen.add(model_fingerprint(model))
    seen.add(model_fingerprint(tiny_model("llama-tied")))
    assert len(seen) == 5


def test_every_column_of_a_square_matrix_can_be_seen():
    """Steps of size / 64 would all fall into the first one of a matrix 64 wide."""
    model = tiny_model("llama", hidden_size=64)
    before = model_fingerprint(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[:, 1:] += 1
    assert model_fingerprint(model) != before


def test_weights_that_are_not_in_memory_have_no_fingerprint():
    with pytest.raises(ValueError, match="lm_head.weight of LlamaForCausalLM is no tensor in memory.*without that"):
        model_fingerprint(tiny_model("llama").to("meta"))


def test_the_fingerprint_looks_everywhere_in_a_matrix():
    """In the last of many rows and in every column, whatever the sizes are."""
    for rows, columns in ((126, 48), (97, 48), (128, 64)):
        model = tiny_model("llama", vocab_size=rows, hidden_size=columns)
        before = model_fingerprint(model)
        for region in (slice(rows // 2, None), slice(0, rows // 2)):
            with torch.no_grad():
                model.model.embed_tokens.weight[region, : columns // 2] += 1
            assert model_fingerprint(model) != before
            before = model_fingerprint(model)


def test_the_fingerprint_knows_names_and_buffers():
    model, before = tiny_model("llama"), model_fingerprint(tiny_model("llama"))
    attention = model.model.layers[0].self_attn
    attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj
    assert model_fingerprint(model) != before
    model.register_buffer("extra", torch.zeros(3))
    with_buffer = model_fingerprint(model)
    model.extra += 1
    assert model_fingerprint(model) != with_buffer


def test_the_fingerprint_knows_the_active_adapter():
    peft = pytest.importorskip("peft", minversion=MIN_PEFT_VERSION)  # below it transformers refuses to add one
    model = tiny_model("llama")
    for name in ("a", "b"):
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False), name)
    seen = set()
    for name in ("a", "b"):
        model.set_adapter(name)
        seen.add(model_fingerprint(model))
    model.disable_adapters()
    seen.add(model_fingerprint(model))
    assert len(seen) == 3


def test_odd_configurations_have_a_fingerprint():
    model, before = tiny_model("llama"), model_fingerprint(tiny_model("llama"))
    model.config.id2label = {0: "no", 1: "yes"}
    assert model_fingerprint(model) == before
    model.config.note = torch.float16
    assert model_fingerprint(model) != before
