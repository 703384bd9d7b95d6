"""Models that a program has edited: what an engine computes is what plain transformers computes, or it is refused by name.

transformers reads its numbers off the modules each time, so an edit takes effect at once: before a first call and after one.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import FAMILIES, PlainLoop, feed_back, ragged, real, tiny_model
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from latentmas_kernels import UnsupportedModelError, accelerate, generate, latent_generate
from latentmas_kernels.architecture import Architecture
from latentmas_kernels.engines import fast_engine
from latentmas_kernels.engines.once import warn_once

IDS, MASK = ragged([12, 9])  # longer than the windows of 8
STEPS, TOKENS = 2, 3
EFFECT = 1e-2
"""Least change of the plain model's logits that makes an edit worth trying."""


def close(got: Tensor, want: Tensor) -> bool:
    return got.shape == want.shape and torch.allclose(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


@torch.no_grad()
def plain_thoughts(model: Any) -> tuple[Tensor, Tensor]:
    """Latents [B, steps, D] and logits [B, V] behind the prompt alone, row by row on transformers' own cache."""
    latents, logits = [], []
    for row in range(len(IDS)):
        ids = real(IDS, MASK, row)
        latents.append(PlainLoop(model, feed_back(model, "identity")).think(ids, STEPS)[0])
        logits.append(PlainLoop(model, feed_back(model, "identity")).forward(input_ids=ids)[1])
    return torch.stack(latents), torch.cat(logits)


def plain_scores(model: Any) -> Tensor:
    """Logits [B, tokens, V] of the model's own generate()."""
    out = model.generate(
        IDS, attention_mask=MASK, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(out.logits, dim=1)


def thoughts(model: Any, engine: str) -> tuple[Tensor, str]:
    """Latents of the engine, and which one ran."""
    out = latent_generate(model, IDS, MASK, latent_steps=STEPS, aligner="identity", engine=engine)
    return out.latents, out.metrics.engine


def tokens(model: Any, engine: str) -> Tensor:
    return generate(model, IDS, MASK, max_new_tokens=TOKENS, eos_token_id=None, engine=engine).sequences


def first_call(model: Any) -> None:
    """A call of every kind, so that all that is kept of a model is there."""
    with accelerate(model):  # first: leaving the block moves the weights, and what was kept of them counts no more
        plain_scores(model)
    for engine in ("eager", "native"):
        thoughts(model, engine)
        tokens(model, engine)


def refusal(call: Callable[..., Any], *args: Any) -> str:
    """How a call is refused by name; "" where it is not refused."""
    try:
        call(*args)
    except UnsupportedModelError as error:
        return str(error)
    except ValueError as error:
        assert "does not cover" in str(error) or "NaN or Inf" in str(error), error
        return str(error)
    return ""


@pytest.fixture(autouse=True)
def quiet():
    """Warnings of the fallback have tests of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def of_layers(*path: str, layers: slice = slice(None)) -> Callable[[Any], list[Any]]:
    """The modules at a path below each of the layers."""

    def find(model: Any) -> list[Any]:
        found = list(model.model.layers[layers])
        for name in path:
            found = [getattr(module, name) for module in found]
        return found

    return find


def put(find: Callable[[Any], list[Any]], name: str, value: Any) -> Callable[[Any], None]:
    """Set an attribute; of a number by a function of the old value."""

    def edit(model: Any) -> None:
        for module in find(model):
            setattr(module, name, value(getattr(module, name)) if callable(value) else copy.deepcopy(value))

    return edit


def ten_thousandfold(eps: float) -> float:
    return eps * 1e5


def doubled(number: float) -> float:
    return number * 2


def activation(name: str) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.act_fn = ACT2FN[name]

    return edit


def with_bias(model: Any) -> None:
    model.lm_head.bias = nn.Parameter(torch.randn(97, generator=torch.Generator().manual_seed(3)))


def other_mlp(model: Any) -> None:
    """Of another family: the same products with GELU between them."""
    config = copy.deepcopy(model.config)
    config.hidden_act = "gelu_pytorch_tanh"
    mlp = GemmaMLP(config).eval()
    mlp.load_state_dict(model.model.layers[1].mlp.state_dict())
    model.model.layers[1].mlp = mlp


def other_attention(model: Any) -> None:
    torch.manual_seed(3)
    options = {"layer_types": ["full_attention"] * 3, "sliding_window": None, **SIZES}
    attention = Qwen3Attention(CONFIG_MAPPING["qwen3"](**options), 1).eval()
    attention.config = model.config
    model.model.layers[1].self_attn = attention


SIZES = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 3}


def set_config(**entries: Any) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        for name, value in entries.items():
            setattr(model.config, name, copy.deepcopy(value))

    return edit


SECOND = slice(1, 2)
ATTENTION, MLP = of_layers("self_attn"), of_layers("mlp")


def norm(model: Any) -> list[Any]:
    return [model.model.norm]


def all_norms(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "variance_epsilon")]


# name: family, edit
EDITS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "scaling of all layers": ("llama", put(ATTENTION, "scaling", doubled)),
    "scaling of one layer": ("qwen2", put(of_layers("self_attn", layers=SECOND), "scaling", doubled)),
    "eps of one norm": (
        "llama", put(of_layers("input_layernorm", layers=SECOND), "variance_epsilon", ten_thousandfold)),
    "eps of all norms": ("qwen3", put(all_norms, "variance_epsilon", ten_thousandfold)),
    "eps of the final norm": ("mistral-window", put(norm, "variance_epsilon", lambda eps: eps * 1e6)),
    "eps of a q_norm": ("qwen3", put(of_layers("self_attn", "q_norm"), "variance_epsilon", lambda eps: eps * 1e6)),
    "relu2": ("llama", activation("relu2")),
    "gelu": ("qwen2", activation("gelu")),
    "quick_gelu": ("llama", activation("quick_gelu")),
    "gelu_pytorch_tanh": ("qwen3", activation("gelu_pytorch_tanh")),
    "a function as the activation": ("llama", put(of_layers("mlp", layers=SECOND), "__dict__", None)),
    "bias of the lm_head": ("llama", with_bias),
    "bias of the lm_head, tied": ("llama-tied", with_bias),
    "mlp of another class": ("llama", other_mlp),
    "attention of another class": ("llama", other_attention),
    "max_norm": ("llama", lambda model: setattr(model.model.embed_tokens, "max_norm", 0.1)),
    "window of Mistral, other": ("mistral-window", set_config(sliding_window=3)),
    "window of Mistral, none": ("mistral-window", set_config(sliding_window=None)),
    "window of Qwen, other": ("qwen2-mixed", set_config(sliding_window=3)),
    "layer types of Qwen": (
        "qwen3-mixed", set_config(layer_types=["full_attention", "sliding_attention", "full_attention"])),
    "layer types of Qwen, all full": ("qwen3-mixed", set_config(layer_types=["full_attention"] * 3)),
    "RoPE, frequencies": ("llama", lambda model: model.model.rotary_emb.inv_freq.mul_(0.3)),
    "RoPE, scaling": ("qwen2", put(lambda model: [model.model.rotary_emb], "attention_scaling", 2.5)),
    "one layer left out by the configuration": ("llama", set_config(num_hidden_layers=2)),
}  # fmt: skip


def relu_as_a_function(model: Any) -> None:
    """What torch keeps as a module cannot be set to a function; a function has to go into the module's own state."""
    del model.model.layers[1].mlp.act_fn
    model.model.layers[1].mlp.act_fn = nn.functional.relu


EDITS["a function as the activation"] = ("llama", relu_as_a_function)


@pytest.mark.parametrize("moment", ["before a first call", "after one"])
@pytest.mark.parametrize("name", EDITS)
def test_an_edited_model_gives_what_transformers_gives(name, moment):
    family, edit = EDITS[name]
    model = tiny_model(family)
    with torch.no_grad():
        unedited = plain_thoughts(model)[1]
        if moment == "after one":
            first_call(model)
        edit(model)
    latents, logits = plain_thoughts(model)
    assert (logits - unedited).abs().max() > EFFECT, "the edit has no effect"
    scores = plain_scores(model)
    for engine in ("auto", "eager"):
        assert close(thoughts(model, engine)[0], latents), engine
        assert torch.equal(tokens(model, engine)[:, -TOKENS:], scores.argmax(-1)), engine
    if not refusal(thoughts, model, "native"):
        assert close(thoughts(model, "native")[0], latents)
    with accelerate(model):
        assert close(plain_scores(model), scores)
