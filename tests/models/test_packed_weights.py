"""Packed weights: views of the live modules, no second copy, and a reason for every model that is not covered."""

import copy

import pytest
import torch
from tiny_models import FAMILIES, OTHERS, ragged, tiny_model
from torch import nn

from latentmas_kernels import latent_generate
from latentmas_kernels.extension import extension
from latentmas_kernels.models import families
from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.models.module_settings import reading_once, state_of
from latentmas_kernels.models.packed_weights import (
    UnsupportedWeights,
    pack_weights,
    unpack_weights,
    unsupported_reason,
    weights_key,
)

needs_extension = pytest.mark.skipif(extension() is None, reason="the extension is not built")


def pack(model):
    return pack_weights(model, Architecture.of(model))


def storages(model):
    return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packing_changes_neither_the_model_nor_its_size(family):
    model = tiny_model(family)
    ids, mask = ragged([6, 3])
    logits, parameters = model(ids, attention_mask=mask).logits, dict(model.named_parameters())
    state = {name: t.clone() for name, t in model.state_dict().items()}
    size = sum(storages(model).values())
    weights = pack(model)
    assert sum(storages(model).values()) == size
    assert dict(model.named_parameters()) == parameters
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert torch.equal(model(ids, attention_mask=mask).logits, logits)
    for layer, module in zip(weights.layers, model.model.layers, strict=True):
        attention, mlp = module.self_attn, module.mlp
        for merged, parts in ((layer.qkv, "qkv"), (layer.qkv_bias, "qkv")):
            names = [getattr(attention, f"{part}_proj") for part in parts]
            given = [n.weight if merged is layer.qkv else n.bias for n in names]
            if given[0] is None:
                assert merged is None
                continue
            assert torch.equal(merged, torch.cat(given))
            assert {p.untyped_storage().data_ptr() for p in given} == {merged.untyped_storage().data_ptr()}
        assert torch.equal(layer.gate_up, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        assert layer.output.data_ptr() == attention.o_proj.weight.data_ptr()
    assert weights.decoder_bytes == sum(p.nbytes for p in model.model.parameters()) - weights.embedding.nbytes


def test_packing_twice_moves_nothing():
    model = tiny_model("qwen2")
    first = pack(model)
    second = pack(model)
    assert first.key == second.key
    assert first.layers[0].qkv.data_ptr() == second.layers[0].qkv.data_ptr()


@pytest.mark.parametrize("family", ["llama-tied", "qwen2"])
def test_unmerge_gives_every_parameter_its_own_storage(family):
    model = tiny_model(family)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    merged = pack(model)  # held: its addresses are not given away
    unpack_weights(model)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (family == "llama-tied")
    assert pack(model).key != merged.key


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.bfloat16(),
        lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
        lambda m: setattr(m.model.norm, "weight", nn.Parameter(torch.ones(48))),
        lambda m: m.model.rotary_emb.inv_freq.mul_(0.5),
        lambda m: setattr(m.model.layers[2].self_attn, "q_proj", nn.Linear(48, 64, bias=False)),
    ],
    ids=["cast", "assign", "norm", "rope", "module"],
)
def test_the_key_tells_that_the_weights_moved(change):
    model = tiny_model("llama")
    before = pack(model).key
    change(model)
    assert pack(model).key != before


def test_packing_and_its_key_wait_for_no_device():
    """On a device without values there is none to wait for: whatever reads one raises."""
    with torch.device("meta"):
        model = tiny_model("llama")
    architecture = Architecture.of(model)
    assert unsupported_reason(model, architecture) is None
    assert pack_weights(model, architecture).key == weights_key(model, architecture)[0]


def test_what_is_known_of_a_model_is_not_used_for_another_place_of_a_module():
    """The same modules and weights, under each other's names."""
    model = tiny_model("llama")
    before = pack(model).key
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj
    after = pack(model).key
    assert after != before
    architecture = Architecture.of(model)
    mlp._modules["spare"] = mlp._modules.pop("act_fn")  # the last of its modules, as before
    with pytest.raises(AttributeError, match="act_fn"):
        unsupported_reason(model, architecture)


def test_a_model_is_read_once_within_reading_once():
    model, other = tiny_model("llama"), tiny_model("llama")
    with reading_once():
        first = state_of(model)
        assert state_of(model) is first
        assert state_of(other).key != first.key
        pack(model)  # moves weights
        assert state_of(model).key != first.key
    assert state_of(model) is not state_of(model)


def test_a_cast_copy_is_merged_again():
    """deepcopy and a cast leave queries, keys and values in storages of their own."""
    model = tiny_model("llama")
    pack(model)
    other = copy.deepcopy(model).bfloat16()
    layer = pack(other).layers[0]
    attention = other.model.layers[0].self_attn
    assert layer.qkv.dtype == torch.bfloat16
    with torch.no_grad():
        attention.k_proj.weight.fill_(3)
    assert (layer.qkv[64:96] == 3).all()
    assert not (pack(model).layers[0].qkv == 3).any()


class Adapter(nn.Module):
    """A LoRA as PEFT puts it into the place of a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.lora_A, self.lora_B = base, nn.Linear(48, 2, bias=False), nn.Linear(2, 64, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def adapt(model):
    model.model.layers[0].self_attn.q_proj = Adapter(model.model.layers[0].self_attn.q_proj)


def quantize(model):
    linear = model.model.layers[1].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)


def patch(model):
    model.model.layers[0].forward = model.model.layers[0].forward


def dynamic(model):
    model.model.rotary_emb.rope_type = "dynamic"


def activate(model):
    model.model.layers[1].mlp.act_fn = nn.GELU()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (adapt, r"model.layers.0.self_attn.q_proj is a test_packed_weights.Adapter, not a plain layer"),
        (quantize, r"model.layers.1.mlp.down_proj holds a Parameter of torch.int8, not a parameter of torch.float32"),
        (patch, r"model.layers.0 has hooks or a forward of its own"),
        (lambda m: m.lm_head.register_forward_pre_hook(lambda *_: None), r"lm_head has hooks"),
        (activate, r"model.layers.1.mlp.act_fn is a torch.nn.modules.activation.GELU, not a plain layer"),
        (dynamic, r"its RoPE is of type 'dynamic'; covered are default, linear, llama3, yarn"),
        (lambda m: m.double(), r"its dtype is torch.float64; covered are bfloat16 and float32"),
        (lambda m: m.model.layers[0].mlp.up_proj.double(), r"up_proj holds a Parameter of torch.float64"),
        (lambda m: m.lm_head.to("meta"), r"lm_head is on meta, the embedding on cpu"),
    ],
)
def test_what_is_not_covered_has_a_reason(change, reason):
    model = tiny_model("llama")
    change(model)
    architecture = Architecture.of(model)
    with pytest.raises(UnsupportedWeights, match=reason):
        pack_weights(model, architecture)
    assert unsupported_reason(model, architecture)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "mixtral", "olmo2"])
def test_other_families_have_a_reason(family):
    model = tiny_model(family)
    assert "is none of LlamaForCausalLM, MistralForCausalLM" in unsupported_reason(model, Architecture.of(model))


@pytest.mark.parametrize("engine", ["pack", pytest.param("native", marks=needs_extension)])
def test_a_family_is_one_row(engine, monkeypatch):
    """Seed-OSS computes what Llama does; it is not covered, and would be with a row."""
    monkeypatch.setitem(OTHERS, "seed-oss", {"model_type": "seed_oss"})
    model = tiny_model("seed-oss")
    assert "is none of LlamaForCausalLM" in unsupported_reason(model, Architecture.of(model))
    ids, mask = ragged([6, 3])
    want = latent_generate(model, ids, mask, latent_steps=4, engine="eager").latents
    monkeypatch.setitem(families.FAMILIES, "SeedOssForCausalLM", families.Family("SeedOss"))
    if engine == "pack":
        weights = pack(model)
        assert torch.equal(weights.layers[0].down, model.model.layers[0].mlp.down_proj.weight)
    else:
        got = latent_generate(model, ids, mask, latent_steps=4, engine="native")
        assert got.metrics.engine == "native"
        torch.testing.assert_close(got.latents, want, rtol=1e-4, atol=1e-4)


def test_subclasses_are_not_taken_for_their_base():
    from transformers import LlamaForCausalLM

    class Other(LlamaForCausalLM):
        pass

    model = tiny_model("llama")
    model.__class__ = Other
    assert unsupported_reason(model, Architecture.of(model)) == (
        "Other is none of LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"
    )


@torch.no_grad()
def test_transformers_own_hooks_are_no_obstacle():
    """output_hidden_states leaves hooks on every layer; they only look."""
    model = tiny_model("llama")
    model(torch.tensor([[3, 4]]), output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    assert unsupported_reason(model, Architecture.of(model)) is None
