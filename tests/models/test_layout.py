"""How it is found out what the layers of a model attend to: whatever was wrapped, compiled, moved or refused before."""

import copy
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import ragged, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

from latentmas_kernels import UnsupportedModelError, accelerate, doctor, generate, latent_generate
from latentmas_kernels.engines import HFGraphEngine
from latentmas_kernels.inputs import Prompt
from latentmas_kernels.models import layout
from latentmas_kernels.models.architecture import Architecture, cache_argument

IDS, MASK = ragged([20, 14])  # longer than the windows of 8
ESCAPES = "a forward in the place of its own calls modules by another way"


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("engines.registry", "hf.decode"):
        monkeypatch.setattr(f"latentmas_kernels.{module}.warn_once", lambda _: None)


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The decoders that are tried."""
    tried: list[Any] = []
    real = layout._find
    monkeypatch.setattr(layout, "_find", lambda decoder, *rest: (tried.append(decoder), real(decoder, *rest))[1])
    return tried


def wrap(module: nn.Module) -> None:
    """As many libraries do: the new forward calls the bound method that was there before."""
    own = module.forward
    module.forward = functools.wraps(own)(lambda *args, **kwargs: own(*args, **kwargs))  # type: ignore[method-assign]


def written(model: Any, **options: Any) -> torch.Tensor:
    return model.generate(
        IDS, attention_mask=MASK, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    )


# ---- forwards that do not go through the twin -----------------------------------------------------------------------


def test_a_forward_that_calls_the_original_modules_is_refused_and_left_to_transformers():
    model = tiny_model("mistral-window")
    want = written(model)
    wrap(model.model)
    with pytest.raises(UnsupportedModelError, match=ESCAPES):
        Architecture.of(model)
    with accelerate(model):
        assert torch.equal(written(model), want)


def test_a_wrapped_layer_gets_the_windows_of_the_code_or_is_refused():
    model = tiny_model("mistral-window")
    wrap(model.model.layers[1])
    with pytest.raises(UnsupportedModelError, match="not each of its layers attends"):
        Architecture.of(model)
    model = tiny_model("mistral-window")
    wrap(model.model.layers[1].mlp)
    assert Architecture.of(model).windows == (8, 8, 8)


@pytest.mark.parametrize("which", ["the model", "the decoder", "each layer", "an mlp"])
def test_compiled_modules_attend_to_what_they_did(which):
    model = tiny_model("mistral-window")
    want = written(model)
    layers = list(model.model.layers)
    modules = {"the model": [model], "the decoder": [model.model], "each layer": layers, "an mlp": [layers[1].mlp]}
    for module in modules[which]:
        module.compile(backend="eager")
    assert Architecture.of(model).windows == (8, 8, 8)
    out = generate(model, IDS, MASK, max_new_tokens=12, eos_token_id=None)
    assert out.metrics.engine == "native"
    assert torch.equal(out.sequences[:, 20:], want[:, 20:])
    with accelerate(model):
        assert torch.equal(written(model), want)


# ---- models on several devices, and on none -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["clone", "to another dtype and back", "cut"])
@pytest.mark.parametrize("name", ["mistral-window", "qwen2-mixed", "gemma3"])
def test_masks_may_be_copied_on_their_way_to_a_layer(name, how):
    """The hooks of a model that is spread over several devices copy what a layer gets to where the layer is."""
    library = pytest.importorskip("accelerate.hooks")
    move: Callable[[torch.Tensor], torch.Tensor] = {
        "clone": lambda mask: mask.clone(),
        "to another dtype and back": lambda mask: mask.to(torch.float64).to(mask.dtype),
        "cut": lambda mask: mask[..., : mask.shape[-1]].clone(),
    }[how]

    class Move(library.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("attention_mask") is not None:
                kwargs["attention_mask"] = move(kwargs["attention_mask"])
            return args, kwargs

    model = tiny_model(name)
    plain = copy.deepcopy(model)
    for layer in model.model.layers[1:]:
        library.add_hook_to_module(layer, Move())
    assert Architecture.of(model).windows == Architecture.of(plain).windows
    got, want = (
        latent_generate(one, IDS, MASK, latent_steps=2, aligner="identity", engine="eager") for one in (model, plain)
    )
    assert torch.equal(got.latents, want.latents)


def in_place(mask: torch.Tensor) -> torch.Tensor:
    mask &= mask.roll(1, -1)
    return mask


def in_a_copy(mask: torch.Tensor) -> torch.Tensor:
    mask = mask.clone()
    mask[..., :1] = False
    return mask[..., :]


@pytest.mark.parametrize(
    "change",
    [in_place, in_a_copy, lambda mask: mask & mask.roll(1, -1), lambda mask: mask.clone().logical_not_()],
    ids=["in place", "in a copy", "computed", "by a method"],
)
def test_masks_that_are_computed_with_are_others(change):
    """A layer that changes its mask does not see what the mask function says."""
    model = tiny_model("mistral-window")
    attention = model.model.layers[1].self_attn
    real = type(attention).forward
    kind = type("Own", (type(attention),), {})
    kind.forward = lambda self, *args, attention_mask=None, **kwargs: real(
        self, *args, attention_mask=change(attention_mask), **kwargs
    )
    attention.__class__ = kind
    with pytest.raises(UnsupportedModelError, match="other masks than transformers' mask functions make"):
        Architecture.of(model)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-mixed", "qwen3-mixed", "gemma2", "gemma3", "gpt2"])
def test_on_meta_windows_are_those_of_a_model_with_weights(name):
    real = tiny_model(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(real.config).eval()
        found = Architecture.of(model)
    assert found.windows == Architecture.of(real).windows
    assert found.device.type == "meta"
    report = doctor(model)
    assert report.engines["eager"].on
    assert ("windows of 8" in str(report.model)) == any(found.windows)


# ---- what is kept ---------------------------------------------------------------------------------------------------


def wrapped(kind: str) -> Any:
    """A model one of whose modules holds a function, or is of a class, that refers to the whole model."""
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    if kind == "function":
        own = mlp.forward
        mlp.forward = lambda x, whole=model: own(x)
    elif kind == "class":
        real = type(mlp).forward
        mlp.__class__ = type("Own", (type(mlp),), {"forward": lambda self, x, whole=model: real(self, x)})
    elif kind == "refused":
        wrap(model.model)
    return model


@pytest.mark.parametrize("kind", ["function", "class", "refused", "plain"])
@torch.no_grad()
def test_no_model_is_kept_alive_by_what_is_kept_of_it(kind):
    model = wrapped(kind)
    if kind == "refused":
        with pytest.raises(UnsupportedModelError, match=ESCAPES):
            Architecture.of(model)
    else:
        latent_generate(model, IDS, MASK, latent_steps=2, aligner="identity")
        start = latent_generate(model, IDS, MASK, latent_steps=0, max_cache_len=40, engine="eager")
        engine = HFGraphEngine(model, Architecture.of(model))
        engine.extend(start.past_key_values, Prompt(torch.tensor([1, 1]), torch.tensor([[5], [6]])), logits=True)
        assert engine.state.batches
        del engine, start
    alive = [weakref.ref(model), weakref.ref(model.model)]
    del model
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_a_refusal_is_found_once_and_forgotten_with_the_setting_that_caused_it(trials):
    model = tiny_model("mistral-window")
    wrap(model.model)
    accelerate(model)
    for _ in range(3):
        written(model)
        with pytest.raises(UnsupportedModelError, match=ESCAPES):
            Architecture.of(model)
    assert len(trials) == 1
    del model.model.forward
    assert Architecture.of(model).windows == (8, 8, 8)
    assert len(trials) == 2


def test_what_a_forward_fails_with_is_tried_again(trials, monkeypatch):
    """Memory may be there the next time."""
    model = tiny_model("llama")
    with monkeypatch.context() as patched:

        def full(*args: Any, **kwargs: Any) -> Any:
            raise torch.OutOfMemoryError("3 GiB")

        patched.setattr(modeling_llama.LlamaMLP, "forward", full)
        for _ in range(2):
            with pytest.raises(UnsupportedModelError, match="OutOfMemoryError: 3 GiB"):
                Architecture.of(model)
    assert len(trials) == 2
    assert Architecture.of(model).windows == (None, None, None)


def test_functions_of_a_family_that_were_replaced_count(trials, monkeypatch):
    """A refusal, and a layout, end with what the masks were made by."""
    model = tiny_model("mistral-window")
    assert Architecture.of(model).windows == (8, 8, 8)
    with monkeypatch.context() as patched:
        patched.setattr(modeling_mistral, "create_sliding_window_causal_mask", lambda **options: None)
        with pytest.raises(UnsupportedModelError, match="other masks than"):
            Architecture.of(model)
    assert Architecture.of(model).windows == (8, 8, 8)
    Architecture.of(model)
    assert len(trials) == 3


def test_hooks_do_not_change_what_is_attended_to(trials):
    model = tiny_model("mistral-window")
    Architecture.of(model)
    with torch.no_grad():
        model(IDS[1:], output_hidden_states=True)
    model.model.layers[1].register_forward_hook(lambda module, args, output: output)
    assert Architecture.of(model).windows == (8, 8, 8)
    assert len(trials) == 1


# ---- windows of several widths --------------------------------------------------------------------------------------


class TwoWidths(modeling_mistral.MistralModel):
    """Each layer has a window of its own width."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, cache=None,
                inputs_embeds=None, use_cache=None, **kwargs):  # fmt: skip
        past = cache if cache is not None else past_key_values if past_key_values is not None else DynamicCache()
        states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = past.get_seq_length() + torch.arange(states.shape[1])[None]
        rotation, name = (
            self.rotary_emb(states, position_ids=position_ids),
            cache_argument(modeling_mistral.MistralDecoderLayer.forward),
        )
        for index, layer in enumerate(self.layers):
            self.config.sliding_window = self.widths[index]
            options = {"config": self.config, "inputs_embeds": states, "attention_mask": attention_mask, name: past}
            mask = create_sliding_window_causal_mask(**options, position_ids=position_ids)
            states = layer(states, attention_mask=mask, position_ids=position_ids, position_embeddings=rotation,
                           use_cache=True, **{name: past})  # fmt: skip
        return BaseModelOutputWithPast(last_hidden_state=self.norm(states), past_key_values=past)


def two_widths(*widths: int) -> Any:
    model = tiny_model("mistral-window")
    model.model.__class__ = TwoWidths
    model.model.widths = widths
    return model


def test_layout_of_several_widths_are_refused_by_name():
    """Engines make one mask for all layers with a window: it would be that of the first."""
    assert Architecture.of(two_widths(8, 8, 8)).windows == (8, 8, 8)
    model = two_widths(8, 3, 8)
    with pytest.raises(UnsupportedModelError, match=r"windows of different widths \(3, 8\)"):
        Architecture.of(model)
