"""What people do with a model after accelerate(): right answers, by our engine or by transformers, never of stale weights."""

import copy
import io
import json
import pickle
import subprocess
import sys
import threading
import warnings
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import save_torch_model
from safetensors.torch import load_file, save_model
from tiny_models import OTHERS, VOCAB, ragged, tiny_model
from tokenizers_offline import character_tokenizer
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from latentmas_kernels import latent_generate
from latentmas_kernels.hf import ModelWrapper, accelerate, restore
from latentmas_kernels.models.packed_weights import pack_weights

IDS, MASK = ragged([4, 11, 2])


def answer(model: Any, **options: Any) -> Tensor:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(IDS, attention_mask=MASK, **{"max_new_tokens": 10, "eos_token_id": None, **options})


def logits(model: Any) -> Tensor:
    """Of the next token [3, V]: what is compared where greedy tokens might hide a small change."""
    out = model.generate(
        IDS, attention_mask=MASK, max_new_tokens=1, output_logits=True, return_dict_in_generate=True, eos_token_id=None
    )
    return out.logits[0]


def plain_twin(model: Any) -> Any:
    """A plain model of the same kind and the present weights."""
    twin = (
        type(model).__mro__[2](model.config)
        if "_Accelerated" in str(type(model).__mro__)
        else type(model)(model.config)
    )
    twin = twin.to(model.dtype).eval()
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    twin.generation_config = copy.deepcopy(model.generation_config)
    return twin


@pytest.fixture(params=["model", "int8"])
def weights(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model() -> Any:
    return accelerate(tiny_model("llama"))


@pytest.fixture
def reasons(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Why calls were left to transformers."""
    warned: list[str] = []
    monkeypatch.setattr("latentmas_kernels.hf.decode.warn_once", warned.append)
    return warned


# ---- the same object, and back again --------------------------------------------------------------------------------


def test_same_object_same_name(model):
    plain = tiny_model("llama")
    same = accelerate(plain)
    assert same is plain
    assert isinstance(plain, LlamaForCausalLM)
    assert (type(plain).__name__, type(plain).__module__) == ("LlamaForCausalLM", LlamaForCausalLM.__module__)
    assert type(plain).__doc__ == LlamaForCausalLM.__doc__


def test_context_manager_undoes_it():
    plain = tiny_model("llama")
    want = answer(plain)
    before = {name: p.data_ptr() for name, p in plain.named_parameters()}
    assert len(before) == len(set(before.values()))
    with accelerate(plain) as inside:
        assert inside is plain
        assert torch.equal(answer(plain, latent_steps=0), want)
    assert type(plain) is LlamaForCausalLM
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in plain.parameters())
    assert torch.equal(answer(plain), want)
    with pytest.raises(ValueError, match="latent_steps"):
        answer(plain, latent_steps=1)


def test_context_manager_undoes_it_after_an_error():
    plain = tiny_model("llama")
    with pytest.raises(ZeroDivisionError), accelerate(plain):
        raise ZeroDivisionError
    assert type(plain) is LlamaForCausalLM


def test_context_managers_nest():
    plain = tiny_model("llama")
    with accelerate(plain, engine="eager"):
        with accelerate(plain, engine="native"):
            with accelerate(plain):
                assert type(plain)._options["engine"] == "auto"
            assert type(plain)._options["engine"] == "native"
        assert type(plain)._options["engine"] == "eager"
    assert type(plain) is LlamaForCausalLM


def test_first_use_in_inference_mode_leaves_a_model_that_trains(model):
    with torch.inference_mode():
        answer(model)
    model.train()
    model(IDS, attention_mask=MASK, labels=IDS).loss.backward()
    with torch.inference_mode():
        restore(model)
    model(IDS, attention_mask=MASK, labels=IDS).loss.backward()


def test_twice_changes_the_options_and_once_undoes_it(model):
    first = type(model)
    accelerate(model, engine="eager")
    assert type(model) is not first
    assert type(model)._options["engine"] == "eager"
    assert type(restore(model)) is LlamaForCausalLM


def test_restore_leaves_tied_and_foreign_storages_alone():
    tied = tiny_model("llama-tied")
    both = torch.stack([tied.model.norm.weight.detach(), torch.ones(48)])  # a view that is none of ours
    tied.model.norm.weight.data = both[0]
    accelerate(tied)
    want = answer(tied)
    restore(tied)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert tied.model.norm.weight.data_ptr() == both.data_ptr()
    assert torch.equal(answer(tied), want)


# ---- saving and copying ---------------------------------------------------------------------------------------------


def hub_model(model, folder):
    save_torch_model(model, folder)
    return load_file(folder / "model.safetensors")


def one_file(model, folder):
    save_model(model, str(folder / "one.safetensors"))
    return load_file(folder / "one.safetensors")


@pytest.mark.parametrize("save", [hub_model, one_file], ids=["huggingface_hub", "safetensors"])
@pytest.mark.parametrize("used", ["accelerated", "latent_generate", "ModelWrapper"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2"])
def test_savers_that_go_by_storage_work_behind_restore(family, used, save, tmp_path):
    """And refuse loudly before: nothing is dropped in silence."""
    model = tiny_model(family)
    want = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if used == "accelerated":
        answer(accelerate(model))
    elif used == "latent_generate":
        latent_generate(model, IDS, MASK, latent_steps=1)
    else:
        ModelWrapper(model, character_tokenizer()).generate_latent_batch(IDS, MASK, latent_steps=1)
    with pytest.raises(RuntimeError, match="covering the entire storage"):
        save(model, tmp_path)
    assert restore(model) is model
    saved = save(model, tmp_path)
    missing = set(want) - set(saved)
    assert len(missing) == (family == "llama-tied")
    assert missing <= {"lm_head.weight", "model.embed_tokens.weight"}, "one of the two that are tied"
    for name, tensor in saved.items():
        assert torch.equal(tensor, want[name])


def test_save_pretrained(model, tmp_path):
    want = answer(model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == ["LlamaForCausalLM"]
    assert "latentmas" not in (tmp_path / "config.json").read_text().lower()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is LlamaForCausalLM
    assert torch.equal(answer(loaded), want)


def test_pickle_needs_nothing_of_ours(model, tmp_path):
    want = answer(model)
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        loaded = pickle.loads(pickle.dumps(model, protocol))
        assert type(loaded) is LlamaForCausalLM
        assert torch.equal(answer(loaded), want)
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys, torch; m = torch.load(sys.argv[1], weights_only=False); "
        "assert not any(name.split('.')[0] == 'latentmas_kernels' for name in sys.modules); assert m.generate is not None"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    # Merged products are one storage; each part must not drag the whole along.
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert buffer.tell() < 1.2 * sum(p.nbytes for p in model.parameters()) + 20_000


def test_deepcopy_is_accelerated_and_has_weights_of_its_own(model, reasons):
    want = answer(model)
    twin = copy.deepcopy(model)
    assert isinstance(twin, LlamaForCausalLM)
    assert torch.equal(answer(twin, latent_steps=0), want)
    with torch.no_grad():
        twin.model.layers[0].self_attn.k_proj.weight.mul_(2)
    assert torch.equal(answer(model), want)
    assert torch.equal(answer(twin), answer(plain_twin(twin)))
    assert copy.copy(model).config is model.config
    assert not reasons


def test_state_dict_round_trip(model, reasons, weights):
    accelerate(model, weights=weights)
    logits(model)
    other = tiny_model("llama")
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.05 * torch.randn_like(p))
    for assign in (False, True):
        model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        torch.testing.assert_close(
            logits(model), logits(accelerate(copy.deepcopy(other), weights=weights)), atol=2e-5, rtol=0
        )
        other.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)
    assert not reasons


# ---- changing it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_to_dtype(model, reasons, dtype):
    answer(model)
    model.to(dtype)
    torch.testing.assert_close(logits(model).float(), logits(plain_twin(model)).float(), atol=0.02, rtol=0)
    assert len(reasons) == (dtype == torch.float16)
    model.to(torch.float32)
    assert torch.equal(answer(model), answer(plain_twin(model)))


def test_training_mode_runs_in_transformers(reasons):
    model = accelerate(tiny_model("llama", attention_dropout=0.5))
    want = answer(model)
    model.train()
    assert not torch.equal(answer(model), want), "dropout must be on"
    assert "training mode" in reasons[-1]
    model.eval()
    reasons.clear()
    assert torch.equal(answer(model), want)
    assert not reasons


def test_a_training_step_between_two_answers(model, reasons, weights):
    accelerate(model, weights=weights)
    before = logits(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()
    model(IDS, attention_mask=MASK, labels=IDS).loss.backward()
    optimizer.step()
    model.eval()
    after = logits(model)
    assert (after - before).abs().max() > 1e-3
    fresh = accelerate(plain_twin(model), weights=weights)
    torch.testing.assert_close(after, logits(fresh), atol=2e-5, rtol=0)
    assert not reasons


@pytest.mark.parametrize("change", ["in place", "data", "order", "head", "new data", "new parameter", "bias"])
def test_change_of_a_weight_is_seen(model, reasons, weights, change):
    accelerate(model, weights=weights)
    before = logits(model)
    projection = model.model.layers[1].self_attn.v_proj
    with torch.no_grad():
        if change == "in place":
            projection.weight.mul_(1.5)
        elif change == "data":
            projection.weight.data.mul_(1.5)  # counted by no version
        elif change == "order":  # of rows: the sum of all words stays
            projection.weight.data[:] = projection.weight.data.flip(0)
        elif change == "head":
            model.lm_head.weight.data.mul_(1.5)
        elif change == "new data":
            projection.weight.data = projection.weight.data * 1.5
        elif change == "new parameter":
            projection.weight = nn.Parameter(projection.weight * 1.5)
        else:
            model.model.layers[1].self_attn.o_proj.bias = nn.Parameter(torch.randn(48))
    after = logits(model)
    assert (after - before).abs().max() > 1e-3
    if change == "bias":
        return
    torch.testing.assert_close(after, logits(accelerate(plain_twin(model), weights=weights)), atol=2e-5, rtol=0)
    assert not reasons


def lora(model: Any) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("first", ["used before", "fresh"])
def test_lora_added_merged_and_removed(reasons, weights, first):
    """Each state against the same steps on a plain model."""
    base = accelerate(tiny_model("llama"), weights=weights, engine="auto")
    if first == "used before":
        logits(base)
    plain_base = tiny_model("llama")
    bare = logits(base)

    adapted, plain_adapted = lora(base), lora(plain_base)
    assert torch.equal(answer(adapted), answer(plain_adapted))
    assert "not a plain layer" in reasons[-1]
    with adapted.disable_adapter():
        assert torch.equal(answer(adapted), answer(tiny_model("llama")))
    reasons.clear()

    merged, plain_merged = adapted.merge_and_unload(), plain_adapted.merge_and_unload()
    assert merged is base
    expected = logits(accelerate(copy.deepcopy(plain_merged), weights=weights))
    assert (expected - bare).abs().max() > 1e-3
    torch.testing.assert_close(logits(merged), expected, atol=2e-5, rtol=0)
    if weights == "model":
        assert torch.equal(answer(merged), answer(plain_merged))

    again = lora(merged)  # and one that is taken off again
    unloaded = again.unload()
    torch.testing.assert_close(logits(unloaded), expected, atol=2e-5, rtol=0)
    assert not reasons


def test_lora_merged_in_place_and_unmerged(model, reasons):
    answer(model)
    adapted = lora(model)
    plain_adapted = lora(tiny_model("llama"))
    for step in ("merge_adapter", "unmerge_adapter"):
        for m in (adapted, plain_adapted):
            getattr(m, step)()
        assert torch.equal(answer(adapted), answer(plain_adapted)), step


def test_accelerating_a_wrapper(model):
    """A PeftModel is not what transformers generates with; its base is."""
    with pytest.raises(ValueError, match="pass the model inside"):
        accelerate(lora(tiny_model("llama")))


def test_prompt_tuning_runs_in_transformers(model, reasons):
    """peft puts its virtual tokens in by a prepare_inputs_for_generation of its own, which an engine would pass by."""
    answers = []
    for base in (model, tiny_model("llama")):
        torch.manual_seed(0)
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        answers.append(answer(peft.get_peft_model(base, config).eval()))
    assert torch.equal(*answers)
    assert "of its own" in reasons[-1]


def test_hooks_run_in_transformers(model, reasons):
    want = answer(model)
    handle = model.model.layers[0].register_forward_hook(lambda module, args, out: out * 1.5)
    assert not torch.equal(answer(model), want)
    assert "hooks" in reasons[-1]
    handle.remove()
    reasons.clear()
    assert torch.equal(answer(model), want)
    assert not reasons


def test_hooks_on_all_modules_run_in_transformers(model, reasons):
    want = answer(model)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out * 1.5 if isinstance(module, nn.Linear) else None
    )
    try:
        assert not torch.equal(answer(model), want)
    finally:
        handle.remove()
    assert "hooks on all modules" in reasons[-1]
    assert torch.equal(answer(model), want)


def test_a_replaced_forward_runs_in_transformers(model, reasons, monkeypatch):
    want = answer(model)
    forward = LlamaMLP.forward

    def louder(self: Any, x: Tensor) -> Tensor:
        return 1.5 * forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", louder)
    assert not torch.equal(answer(model), want)
    assert "forward of LlamaMLP was replaced" in reasons[-1]


class ScaledLinear(nn.Linear):
    """Stands for quantised layers: the weight is not what it looks like."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.1


@pytest.mark.parametrize("how", ["replaced layers", "dynamic quantization"])
def test_quantised_layers_run_in_transformers(reasons, how):
    def quantised() -> Any:
        model = tiny_model("llama")
        if how == "dynamic quantization":
            return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        for layer in model.model.layers:
            layer.mlp.down_proj.__class__ = ScaledLinear
        return model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(answer(accelerate(quantised())), answer(quantised()))
    assert "not a plain layer" in reasons[-1]


def test_weights_of_nan_are_an_error(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        model.generate(IDS, attention_mask=MASK, max_new_tokens=2)


# ---- other models ---------------------------------------------------------------------------------------------------

HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2, "num_experts": 2,
        "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "mamba": {"num_hidden_layers": 2, "state_size": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_decoders_run_in_transformers(reasons, name):
    plain = tiny_model(name)
    model = accelerate(copy.deepcopy(plain))
    assert torch.equal(answer(model), answer(plain))
    assert len(reasons) == 1
    got = answer(model, latent_steps=3)  # which the eager engine takes
    assert got.shape == (3, IDS.shape[1] + 10)


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrid_models_run_in_transformers(reasons, name):
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**{**sizes, **HYBRIDS[name]})).eval()
    model = accelerate(copy.deepcopy(plain))
    assert torch.equal(answer(model), answer(plain))
    assert len(reasons) == 1
    with pytest.raises(ValueError, match="latent_steps=2 cannot be taken in this call"):
        answer(model, latent_steps=2)


def test_encoder_decoder_runs_in_transformers(reasons):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    plain = T5ForConditionalGeneration(config).eval()
    model = accelerate(copy.deepcopy(plain))
    assert torch.equal(answer(model, eos_token_id=1), answer(plain, eos_token_id=1))
    assert reasons


def test_a_subclass_with_a_forward_of_its_own_runs_in_transformers(reasons):
    class Colder(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits.flip(-1)
            return out

    model = tiny_model("llama")
    model.__class__ = Colder
    want = answer(model)
    assert torch.equal(answer(accelerate(model)), want)
    assert reasons


# ---- merging under way ----------------------------------------------------------------------------------------------


def test_two_threads_merge_weights_once(model):
    from latentmas_kernels.models.architecture import Architecture

    architecture, found, start = Architecture.of(model), [], threading.Barrier(4)

    def work() -> None:
        start.wait()
        found.append(pack_weights(model, architecture).key)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
