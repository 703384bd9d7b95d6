"""What goes wrong while an engine is set up sends an accelerated model to transformers' own loop, with the reason."""

import copy
import re
from typing import Any

import pytest
import torch
from plain_and_accelerated import Pair
from tiny_models import TINY, ragged, tiny_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaForCausalLM

from latentmas_kernels import (
    LatentCache,
    UnsupportedModelError,
    accelerate,
    build_aligner,
    doctor,
    generate,
    latent_generate,
    restore,
)
from latentmas_kernels.engines import NativeEngine
from latentmas_kernels.models.architecture import Architecture

IDS, MASK = ragged([3, 9])
BATCH = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 5}


def raising(error: Exception) -> Any:
    def raises(*args: Any, **kwargs: Any) -> Any:
        raise error

    return raises


# Where a call is set up, what goes wrong there, and what the reason says.
PLACES = {
    "inputs": (
        "latentmas_kernels.hf.decode.unsupported_reason", AttributeError("no such mask"), "AttributeError: no such mask"
    ),
    "configuration": (
        "latentmas_kernels.models.architecture.find_layout", TypeError("None"), "could not be read (TypeError: None)"
    ),
    "families": ("latentmas_kernels.engines.native.unsupported_reason", KeyError("rope_type"), "KeyError: 'rope_type'"),
    "weights": ("latentmas_kernels.engines.native.pack_weights", RuntimeError("shape\nmore"), "in RuntimeError: shape"),
    "memory": ("latentmas_kernels.engines.NativeEngine.__init__", MemoryError(), "in MemoryError"),
    "device": ("latentmas_kernels.engines.NativeEngine.__init__", torch.OutOfMemoryError("3 GiB"), "OutOfMemoryError: 3 GiB"),
    "values": ("latentmas_kernels.engines.NativeEngine.__init__", ValueError("a table"), "ValueError: a table"),
    "check": ("latentmas_kernels.hf.decode.check_finite_weights", NotImplementedError("sum"), "NotImplementedError: sum"),
    "room": ("latentmas_kernels.hf.decode.LatentCache.for_model", RuntimeError("no pages"), "RuntimeError: no pages"),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_whatever_goes_wrong_before_work_goes_to_transformers(pair: Pair, monkeypatch: pytest.MonkeyPatch, place: str):
    where, error, words = PLACES[place]
    want = pair.plain.generate(**BATCH)
    monkeypatch.setattr(where, raising(error))
    assert torch.equal(pair.ours.generate(**BATCH), want)
    assert len(pair.left) == 1
    assert "runs in transformers' own loop, since" in pair.left[0]
    assert words in pair.left[0]
    assert "\n" not in pair.left[0]
    accelerate(pair.ours, engine="native")
    with pytest.raises(ValueError, match="engine='native' does not cover this call, since"):
        pair.ours.generate(**BATCH)


@pytest.mark.parametrize("place", ["inputs", "configuration", "check", "room"])
def test_with_latent_steps_it_is_an_error_with_the_reason(pair: Pair, monkeypatch: pytest.MonkeyPatch, place: str):
    """What transformers' loop cannot do."""
    where, error, words = PLACES[place]
    monkeypatch.setattr(where, raising(error))
    with pytest.raises(ValueError, match=f"latent_steps=2 cannot be taken in this call, since .*{re.escape(words)}"):
        pair.ours.generate(**BATCH, latent_steps=2)


@pytest.mark.parametrize("place", ["families", "weights", "memory", "device", "values"])
def test_without_a_fast_engine_the_eager_one_runs_and_says_why(model: Any, monkeypatch: pytest.MonkeyPatch, place: str):
    where, error, words = PLACES[place]
    want = latent_generate(model, IDS, MASK, latent_steps=2, aligner="ridge", engine="eager")
    monkeypatch.setattr(where, raising(error))
    warned: list[str] = []
    monkeypatch.setattr("latentmas_kernels.engines.registry.warn_once", warned.append)
    got = latent_generate(model, IDS, MASK, latent_steps=2, aligner="ridge")
    assert torch.equal(got.latents, want.latents)
    assert got.metrics.engine == "eager"
    assert len(warned) == 1
    assert words in warned[0]


@pytest.mark.parametrize("call", [latent_generate, generate])
def test_a_configuration_that_cannot_be_read_is_refused_by_name(model: Any, monkeypatch: pytest.MonkeyPatch, call: Any):
    monkeypatch.setattr(type(model.config), "get_text_config", raising(AttributeError("no decoder")))
    with pytest.raises(
        UnsupportedModelError, match=r"configuration of LlamaForCausalLM could not be read \(AttributeError"
    ):
        call(model, IDS, MASK)
    assert "could not be read (AttributeError" in doctor(model).engines["eager"].why


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"latent_steps": -1}, "latent_steps must be an integer"),
        ({"latent_steps": 2, "aligner": "w_b"}, "got aligner='w_b'"),
        ({"input_ids": torch.tensor([[5, 97]])}, "has token ids 0 to 96"),
        ({"attention_mask": torch.zeros(1, 2)}, "all zeros in row"),
    ],
)
def test_what_the_caller_got_wrong_is_an_error_still(pair: Pair, options: dict[str, Any], words: str):
    options = {"input_ids": torch.tensor([[5, 6]]), "max_new_tokens": 2, **options}
    accelerate(pair.ours, aligner=options.pop("aligner", "auto"))
    with pytest.raises(ValueError, match=words):
        pair.ours.generate(**options)
    assert not pair.left


def test_unknown_engines_and_weights_that_are_not_finite_are_errors_still(pair: Pair):
    with pytest.raises(ValueError, match="got engine='fast'"):
        accelerate(pair.ours, engine="fast")
    with torch.no_grad():
        pair.ours.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf in 1 of its weights"):
        pair.ours.generate(**BATCH)
    assert not pair.left


@pytest.mark.parametrize("method", ["extend", "decode"])
def test_what_goes_wrong_at_work_is_not_swallowed(pair: Pair, monkeypatch: pytest.MonkeyPatch, method: str):
    """The prompt or tokens are done, a streamer may have them: transformers does not begin anew."""
    monkeypatch.setattr(NativeEngine, method, raising(RuntimeError("a core went away")))
    with pytest.raises(RuntimeError, match="a core went away"):
        pair.ours.generate(**BATCH)
    assert not pair.left


def test_doctor_names_what_goes_wrong(model: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("latentmas_kernels.engines.native.unsupported_reason", raising(KeyError("rope_type")))
    assert doctor(model).lines["native engine"] == "off: looking at the model ended in KeyError: 'rope_type'"


# ---- loops of a model's own -----------------------------------------------------------------------------------------


def test_a_class_with_a_decoding_loop_of_its_own_keeps_it(pair: Pair):
    class Backwards(LlamaForCausalLM):
        def _sample(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return input_ids.flip(1)

    pair.ours.__class__ = Backwards
    accelerate(pair.ours)
    assert torch.equal(pair.ours.generate(**BATCH), IDS.flip(1))
    assert "its decoding loop is one of its own" in pair.left[0]


def test_a_generate_on_the_object_is_used_with_a_warning(pair: Pair):
    pair.plain.generate = lambda ids: ids.flip(1)
    assert accelerate(pair.plain) is pair.plain
    assert torch.equal(pair.plain.generate(IDS), IDS.flip(1))
    assert "del model.generate" in pair.left[0]
    del pair.plain.generate
    assert torch.equal(pair.plain.generate(**BATCH), pair.ours.generate(**BATCH))
    assert len(pair.left) == 1


# ---- weights that are only there during a forward -------------------------------------------------------------------


def offload(model: Any, how: str, folder: Any) -> Any:
    """`how` is "cpu" or "disk" for all of it, or the names of the parts that go to the disk."""
    library = pytest.importorskip("accelerate")
    if how in ("cpu", "disk"):
        more = {} if how == "cpu" else {"offload_dir": folder}
        return getattr(library, f"{how}_offload")(model, execution_device=torch.device("cpu"), **more)
    parts = [
        "model.embed_tokens",
        *(f"model.layers.{i}" for i in range(3)),
        "model.norm",
        "model.rotary_emb",
        "lm_head",
    ]
    where = {part: "disk" if part in how.split() else "cpu" for part in parts}
    return library.dispatch_model(model, where, main_device="cpu", offload_dir=folder, force_hooks=True)


OFFLOADS = {
    "cpu": "embeddings offloaded",
    "disk": "embeddings offloaded",
    "model.embed_tokens lm_head": "embeddings offloaded",
    "model.layers.1": "hooks",
    "lm_head": "hooks",
}


@pytest.mark.parametrize("how", OFFLOADS)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2"])
def test_offloaded_models_run_in_transformers_loop(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, name: str, how: str):
    pair = Pair(name, monkeypatch)
    offload(pair.ours, how, tmp_path)
    pair.assert_same(
        **BATCH, left="none of LlamaFor" if name == "gemma2" and OFFLOADS[how] == "hooks" else OFFLOADS[how]
    )
    assert OFFLOADS[how] != "hooks" or "on:" in doctor(pair.ours).lines["eager engine"]
    assert OFFLOADS[how] == "hooks" or OFFLOADS[how] in doctor(pair.ours).engines["eager"].why


@pytest.mark.parametrize("how", OFFLOADS)
def test_latent_steps_of_offloaded_models_run_or_say_why(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, how: str):
    """Layers may lie anywhere. Of the embeddings, an aligner reads those that it is made of."""
    monkeypatch.setattr("latentmas_kernels.engines.registry.warn_once", lambda _: None)
    plain = tiny_model("llama")
    away = offload(copy.deepcopy(plain), how, tmp_path)
    for kind in ("ridge", "soft", "identity"):
        if OFFLOADS[how] != "hooks" or (how == "lm_head" and kind == "ridge"):
            with pytest.raises(UnsupportedModelError, match="offloaded"):
                latent_generate(away, IDS, MASK, latent_steps=2, aligner=kind)
        else:
            want = latent_generate(plain, IDS, MASK, latent_steps=2, aligner=kind, engine="eager")
            got = latent_generate(away, IDS, MASK, latent_steps=2, aligner=kind)
            assert torch.equal(got.latents, want.latents)
            assert torch.equal(got.last_hidden, want.last_hidden)


def test_an_offloaded_target_of_an_aligner_is_refused(model: Any, tmp_path: Any):
    target = offload(tiny_model("llama"), "cpu", tmp_path)
    with pytest.raises(UnsupportedModelError, match="has its embeddings offloaded"):
        build_aligner(model, "soft", target_model=target)


# ---- configurations that do not tell what a forward writes ----------------------------------------------------------


def causal(model_type: str, **options: Any) -> Any:
    torch.manual_seed(0)
    given = {name: value for name, value in {**TINY, **options}.items() if value is not None}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**given)).eval()


def test_heads_that_differ_by_layer_are_left_to_transformers(monkeypatch: pytest.MonkeyPatch):
    """Gemma 4: wider heads in the layers that attend to everything."""
    options = {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 0,
    }
    plain = causal("gemma4_text", **options)
    warned: list[str] = []
    monkeypatch.setattr("latentmas_kernels.hf.decode.warn_once", warned.append)
    monkeypatch.setattr("latentmas_kernels.engines.registry.warn_once", lambda _: None)
    ours = accelerate(copy.deepcopy(plain))
    assert torch.equal(ours.generate(**BATCH), plain.generate(**BATCH))
    assert "different shapes (2 heads of width 16, 2 heads of width 32)" in warned[0]
    for call in (lambda: latent_generate(plain, IDS, MASK), lambda: ours.generate(**BATCH, latent_steps=2)):
        with pytest.raises(ValueError, match="keys and values of different shapes"):
            call()
    assert "keys and values of different shapes" in doctor(plain).engines["eager"].why
    uniform = causal("gemma4_text", **{**options, "global_head_dim": 16})
    assert latent_generate(uniform, IDS, MASK, latent_steps=2).metrics.engine == "eager"
    got = generate(uniform, IDS, MASK, max_new_tokens=5).sequences
    assert torch.equal(got[:, 9:], uniform.generate(**BATCH)[:, 9:])


def test_rotation_in_part_runs_and_a_forward_that_fails_is_named(monkeypatch: pytest.MonkeyPatch):
    """StableLM rotates a quarter of each head; a quarter of 12 is odd, which transformers itself cannot run."""
    monkeypatch.setattr("latentmas_kernels.engines.registry.warn_once", lambda _: None)
    monkeypatch.setattr("latentmas_kernels.hf.decode.warn_once", lambda _: None)
    sound, broken = causal("stablelm", hidden_size=64), causal("stablelm", head_dim=12)
    assert torch.equal(accelerate(copy.deepcopy(sound)).generate(**BATCH), sound.generate(**BATCH))
    alone = latent_generate(sound, IDS[:1, -3:], latent_steps=2)
    assert torch.allclose(latent_generate(sound, IDS, MASK, latent_steps=2).latents[0], alone.latents[0], atol=1e-5)
    for model in (broken, accelerate(copy.deepcopy(broken))):
        with pytest.raises(RuntimeError, match="must match the size"):
            model.generate(**BATCH)
        with pytest.raises(
            UnsupportedModelError, match=r"its forward does not run .*RuntimeError: The size of tensor a"
        ):
            latent_generate(restore(model), IDS, MASK)


@pytest.mark.parametrize(
    ("model_type", "options", "heads"),
    [
        ("falcon", {"multi_query": True, "alibi": False, "new_decoder_architecture": False}, 1),
        ("falcon", {"multi_query": True, "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}, 4),
        ("gpt_bigcode", {"multi_query": True}, 1),
        ("gpt_bigcode", {"multi_query": False, "n_head": 4}, 4),
    ],
)
def test_one_kv_head_for_all_queries(model_type: str, options: dict[str, Any], heads: int):
    model = causal(model_type, hidden_size=64, head_dim=None, num_key_value_heads=None, **options)
    architecture = Architecture.of(model)
    assert (architecture.kv_heads, architecture.head_dim) == (heads, 16)
    out = generate(model, IDS, MASK, max_new_tokens=5, engine="eager")
    assert isinstance(out.past_key_values, LatentCache)
    assert torch.equal(out.sequences[:, 9:], model.generate(**BATCH)[:, 9:])


def test_layout_that_are_counted_in_columns_are_refused():
    """GPT-Neo's local layers: in a ragged batch they would see other positions."""
    local = causal(
        "gpt_neo", num_hidden_layers=2, attention_types=[[["global", "local"], 1]], num_key_value_heads=4, head_dim=12
    )
    with pytest.raises(UnsupportedModelError, match="GPTNeoForCausalLM has layers of type local"):
        Architecture.of(local)
    everywhere = causal(
        "gpt_neo", num_hidden_layers=2, attention_types=[[["global"], 2]], num_key_value_heads=4, head_dim=12
    )
    got = generate(everywhere, IDS, MASK, max_new_tokens=5, engine="eager").sequences
    assert torch.equal(got[:, 9:], everywhere.generate(**BATCH)[:, 9:])
