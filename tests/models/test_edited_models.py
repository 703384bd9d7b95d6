"""Models that a program has edited: what an engine computes is what plain transformers computes, or it is refused by name.

transformers reads its numbers off the modules each time, so an edit takes effect at once: before a first call and after one.
"""

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import feed_back, ragged, real, tiny_model
from tokenizers_offline import character_tokenizer
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, DynamicCache, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama import modeling_llama
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from latentmas_kernels import LatentCache, UnsupportedModelError, accelerate, generate, latent_generate
from latentmas_kernels.hf import ModelWrapper
from latentmas_kernels.hf.legacy_cache import LegacyCache
from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.warn_once import warn_once

IDS, MASK = ragged([12, 9])  # longer than the windows of 8
STEPS, TOKENS = 2, 3
EFFECT = 1e-2
"""Least change of the plain model's logits that makes an edit worth trying."""


def close(got: Tensor, want: Tensor) -> bool:
    return got.shape == want.shape and torch.allclose(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


@torch.no_grad()
def plain_latents(model: Any) -> tuple[Tensor, Tensor]:
    """Latents [B, steps, D] and the state [B, D] behind the prompt: each row by itself, over its whole sequence every time."""
    decoder, latents, first = model.get_decoder(), [], []
    for row in range(len(IDS)):
        sequence, own = model.get_input_embeddings()(real(IDS, MASK, row)), []
        back = feed_back(model, "identity")
        for _ in range(STEPS):
            state = decoder(inputs_embeds=sequence, use_cache=False).last_hidden_state[:, -1]
            first += [] if own else [state]
            own.append(back(state, state))
            sequence = torch.cat([sequence, own[-1][:, None]], dim=1)
        latents.append(torch.cat(own))
    return torch.stack(latents), torch.cat(first)


def plain_scores(model: Any) -> Tensor:
    """Logits [B, tokens, V] of the model's own generate()."""
    out = model.generate(
        IDS, attention_mask=MASK, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(out.logits, dim=1)


def latents_and_engine(model: Any, engine: str) -> tuple[Tensor, str]:
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
        latents_and_engine(model, engine)
        tokens(model, engine)


def refusal(call: Callable[..., Any], *args: Any) -> str:
    """How a call is refused by name; "" where it is not refused."""
    try:
        call(*args)
    except UnsupportedModelError as error:
        return str(error)
    except ValueError as error:
        if is_refusal(error):
            return str(error)
        raise
    return ""


def is_refusal(error: Exception) -> bool:
    return isinstance(error, UnsupportedModelError) or (
        isinstance(error, ValueError) and any(words in str(error) for words in ("does not cover", "NaN or Inf"))
    )


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
        unedited = plain_scores(model)
        if moment == "after one":
            first_call(model)
        edit(model)
    got = {
        engine: (latents_and_engine(model, engine)[0], tokens(model, engine)[:, -TOKENS:])
        for engine in ("auto", "eager")
    }
    latents, scores = plain_latents(model)[0], plain_scores(model)
    assert (scores - unedited).abs().max() > EFFECT, "the edit has no effect"
    for engine, (ours, token_ids) in got.items():
        assert close(ours, latents), engine
        assert torch.equal(token_ids, scores.argmax(-1)), engine
    if not refusal(latents_and_engine, model, "native"):
        assert close(latents_and_engine(model, "native")[0], latents)
    with accelerate(model):
        assert close(plain_scores(model), scores)


# ---- every attribute that the forwards read ---------------------------------------------------------------------------

MODULE_STATE = frozenset(vars(nn.Module())) - {"training"}
# What torch.compile and transformers' description of outputs go by; they say nothing about numbers.
NO_NUMBERS = {"_compiled_call_impl", "call_super_init", "per_layer_config", "return_dict"}
OTHER_LAYERS = re.compile(r"layers\.[02]")
ABSENT = object()


@torch.no_grad()
def attributes_read(model: Any) -> list[tuple[str, str]]:
    """Path of the module (or "config") and name of what a prefill and a step behind it read, of one layer of all."""
    read: set[tuple[str, str]] = set()
    objects = [("config", model.config), *model.named_modules()]
    kinds = [type(one) for _, one in objects]
    for (path, one), kind in zip(objects, kinds, strict=True):

        def record(self: Any, name: str, kind: Any = kind, path: str = path) -> Any:
            read.add((path, name))
            return kind.__getattribute__(self, name)

        one.__class__ = type(kind.__name__, (kind,), {"__getattribute__": record, "__module__": kind.__module__})
    past = model(IDS, attention_mask=MASK, use_cache=True).past_key_values
    more = torch.cat([MASK, MASK[:, :1]], dim=1)
    model(IDS[:, :1], attention_mask=more, past_key_values=past, use_cache=True)
    for (_, one), kind in zip(objects, kinds, strict=True):
        one.__class__ = kind
    modules = dict(objects)
    return [
        (path, name)
        for path, name in sorted(read)
        if name not in MODULE_STATE | NO_NUMBERS and not name.startswith("__") and not OTHER_LAYERS.search(path)
        and (not callable(value := getattr(modules[path], name, None)) or isinstance(value, nn.Module))
    ]  # fmt: skip


class Twice(nn.Module):
    """In the place of a module: what it gives, doubled."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*args, **kwargs)
        if isinstance(out, Tensor):
            return out * 2
        return type(out)([out[0] * 2, *out[1:]]) if isinstance(out, (tuple, list)) else out


def other_values(owner: Any, value: Any) -> list[Any]:
    """What an attribute could be changed to."""
    if value is ABSENT:
        return [8, False]
    if value is None:
        if isinstance(owner, nn.Linear):
            return [nn.Parameter(torch.linspace(-1, 1, owner.out_features))]
        return [1]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value * 2, max(0, value - 1)]
    if isinstance(value, float):
        return [value * 3 + 1e-3]
    if isinstance(value, str):
        return ["eager", "dynamic"]
    if isinstance(value, list):
        return [value[::-1], [value[1]] * len(value), value[:1]]
    if isinstance(value, nn.ModuleList):
        return [nn.ModuleList(reversed(value)), value[:1], nn.ModuleList([*value, value[0]])]
    if isinstance(value, nn.Module):
        return [Twice(value)]
    if isinstance(value, nn.Parameter):
        return [nn.Parameter(value.detach() * 1.5)]
    if isinstance(value, Tensor):
        return [value * 0.5]
    if isinstance(value, PreTrainedConfig):
        other = copy.copy(value)
        other.sliding_window, other._attn_implementation_internal = 3, "eager"
        return [other]
    raise AssertionError(f"no edit is known for a {type(value).__name__}")


def all_edits(family: str) -> list[tuple[str, str, int]]:
    model, edits = tiny_model(family), []
    for path, name in attributes_read(model):
        owner = model.config if path == "config" else model.get_submodule(path)
        edits += [(path, name, i) for i in range(len(other_values(owner, getattr(owner, name, ABSENT))))]
    return edits


def apply(model: Any, path: str, name: str, number: int) -> None:
    owner = model.config if path == "config" else model.get_submodule(path)
    value = other_values(owner, getattr(owner, name, ABSENT))[number]
    if isinstance(owner, nn.ModuleList):
        owner[int(name)] = value
    else:
        setattr(owner, name, value)


def outcome(call: Callable[..., Any], *args: Any) -> Any:
    """A tensor, or what was raised."""
    try:
        return call(*args)
    except Exception as error:
        return error


def only(call: Callable[..., Any], *args: Any) -> Tensor:
    """The first of what a call gives."""
    return call(*args)[0]


def verdict(want: Any, got: Any) -> str:
    """ "" where what an engine gave is what transformers gives, or a refusal; else how it is not."""
    if isinstance(got, Exception):
        return "" if is_refusal(got) or isinstance(want, Exception) else f"raised {got!r}"
    if isinstance(want, Exception):
        return f"answered where transformers raises {want!r}"
    return (
        ""
        if close(got, want)
        else f"is {float((got - want).abs().max()):.2g} off"
        if got.shape == want.shape
        else "shape"
    )


@pytest.mark.parametrize("moment", ["before a first call", "after one"])
@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen2-mixed", "qwen3-mixed"])
def test_whatever_the_forwards_read_may_be_edited(family, moment):
    """Each attribute of the modules and the configuration that a plain forward reads, one by one."""
    edits, wrong, answered = all_edits(family), [], 0
    for path, name, number in edits:
        model = tiny_model(family)
        if moment == "after one":
            first_call(model)
        try:
            apply(model, path, name, number)
        except Exception:  # transformers' own checks do not let it be set
            continue
        got = {engine: outcome(only, latents_and_engine, model, engine) for engine in ("native", "eager")}
        want = outcome(only, plain_latents, model)
        scores = outcome(plain_scores, model)
        with accelerate(model):
            got["accelerate"] = outcome(plain_scores, model)
        answered += isinstance(got["eager"], Tensor)
        for engine, value in got.items():
            how = verdict(scores if engine == "accelerate" else want, value)
            if how:
                wrong.append(f"{path}.{name} {number} {engine}: {how}")
    assert not wrong, "\n".join(wrong)
    assert len(edits) > 60
    assert answered > len(edits) / 2


# ---- layers that were taken out, put in or moved ----------------------------------------------------------------------


def without(*layers: int) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        for index in sorted(layers, reverse=True):
            del model.model.layers[index]

    return edit


def both(*edits: Callable[[Any], None]) -> Callable[[Any], None]:
    return lambda model: [edit(model) for edit in edits] and None


def renumbered(model: Any) -> None:
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index


def grown(model: Any) -> None:
    """A passthrough merge: the middle of the list twice, each layer with a place of its own."""
    layers = model.model.layers
    model.model.layers = nn.ModuleList([layers[0], layers[1], copy.deepcopy(layers[1]), layers[2]])
    model.config.num_hidden_layers = 4
    renumbered(model)


def swapped(model: Any) -> None:
    layers = model.model.layers
    layers[0], layers[2] = layers[2], layers[0]


CUTS: dict[str, tuple[str, Callable[[Any], None], tuple[int, ...]]] = {
    "the last": ("llama", without(2), (0, 1)),
    "the last, in the configuration too": ("qwen2", both(without(2), set_config(num_hidden_layers=2)), (0, 1)),
    "one in the middle": ("llama", without(1), (0, 2)),
    "one in the middle, in the configuration too": ("qwen3", both(without(1), set_config(num_hidden_layers=2)), (0, 2)),
    "one in the middle, renumbered": (
        "mistral-window", both(without(1), set_config(num_hidden_layers=2), renumbered), (0, 1)),
    "the first": ("llama-tied", without(0), (1, 2)),
    "all but one": ("qwen2", without(0, 2), (1,)),
    "twice the middle": ("llama", grown, (0, 1, 2, 3)),
    "in another order": ("qwen3", swapped, (2, 1, 0)),
}  # fmt: skip


@pytest.mark.parametrize("moment", ["before a first call", "after one"])
@pytest.mark.parametrize("name", CUTS)
def test_a_model_with_other_layers_gives_what_its_forward_gives(name, moment):
    family, edit, slots = CUTS[name]
    model = tiny_model(family)
    if moment == "after one":
        first_call(model)
    edit(model)
    assert Architecture.of(model).slots == slots
    got = {engine: latents_and_engine(model, engine) for engine in ("auto", "native", "eager")}
    latents = plain_latents(model)[0]
    for engine, (ours, ran) in got.items():
        assert close(ours, latents), engine
        assert ran == ("eager" if engine == "eager" else "native")
    want = outcome(plain_scores, model)  # transformers' cache has no place behind those of the configuration
    if isinstance(want, Tensor):
        with accelerate(model):
            assert close(plain_scores(model), want)


@torch.no_grad()
def test_a_cache_of_a_model_without_one_of_its_layers_goes_to_transformers_and_back():
    """The place of the layer that was taken out stays empty in transformers' cache; in ours nothing reads it."""
    model = tiny_model("llama")
    del model.model.layers[1]
    ids = real(IDS, MASK, 0)
    theirs = DynamicCache()
    model(ids[:, :8], past_key_values=theirs)
    ours = generate(model, ids[:, :8], max_new_tokens=1, eos_token_id=None).past_key_values
    ours.keys[1] = ours.values[1] = float("nan")
    want = model(ids).logits[:, -1].argmax(-1)
    assert generate(model, ids[:, 8:], past_key_values=theirs, max_new_tokens=1).sequences[0, -1] == want
    assert generate(model, ids[:, 8:], past_key_values=ours, max_new_tokens=1).sequences[0, -1] == want
    logits = model(ids[:, 8:], past_key_values=ours.to_hf()).logits[:, -1]
    assert logits.argmax(-1) == want
    shorter = ours.fork()
    shorter.keep(torch.arange(8)[None] != 2)
    shorter.rebase(model)
    assert shorter.next_position.tolist() == [7]


def pruned() -> Any:
    """A model of three places, in the second of which no layer runs."""
    model = tiny_model("llama")
    model.generation_config.eos_token_id = None
    without(1)(model)
    model.config.num_hidden_layers = 2
    return model


def columns_of(cache: Any) -> list[int | None]:
    return [layer.keys.shape[2] if layer.is_initialized else None for layer in cache.layers]


def lines(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


@torch.no_grad()
def test_a_ragged_cache_without_one_of_its_layers_keeps_its_padding_known():
    model, new = pruned(), lines([5, 6, 7], [8, 9, 10])
    latent_cache = latent_generate(model, IDS, MASK, latent_steps=STEPS, aligner="identity").past_key_values
    want = generate(model, new, past_key_values=latent_cache, max_new_tokens=TOKENS).sequences
    theirs = latent_cache.to_hf()
    full = theirs.attention_mask(torch.ones_like(new))
    model(new, past_key_values=theirs, attention_mask=full, position_ids=(full.cumsum(1) - 1)[:, -3:])
    assert columns_of(theirs) == [17, None, 17]
    assert torch.equal(theirs.attention_mask(), full)
    with pytest.raises(ValueError, match="the others are padding"):
        model(new, past_key_values=copy.deepcopy(theirs))
    longer = LatentCache.from_hf(theirs)
    assert longer.lengths.tolist() == [17, 14]
    generate(model, new, past_key_values=theirs, max_new_tokens=TOKENS)
    for layer in theirs.layers:
        if layer.is_initialized:  # transformers 5.17 does not look
            layer.crop(-3)
    assert torch.equal(generate(model, new, past_key_values=theirs, max_new_tokens=TOKENS).sequences, want)


@torch.no_grad()
def test_zeros_that_the_other_layers_have_outgrown_are_a_place_without_a_layer():
    """As in tuples of (keys, values), which have to hold something there."""
    model, new = pruned(), lines([5, 6, 7], [8, 9, 10])
    wrapper = ModelWrapper(model, character_tokenizer(pad=False), aligner="identity", cache="legacy")
    theirs = wrapper.generate_latent_batch(IDS, MASK, latent_steps=STEPS)
    latent_cache = LatentCache.from_hf(theirs)
    theirs = LegacyCache.of(list(theirs))
    assert columns_of(theirs) == [14, 14, 14]
    full = theirs.attention_mask(torch.ones_like(new))
    model(new, past_key_values=theirs, attention_mask=full, position_ids=(full.cumsum(1) - 1)[:, -3:])
    assert columns_of(theirs) == [17, 14, 17]
    assert torch.equal(theirs.attention_mask(), full)
    texts = wrapper.generate_text_batch(new, past_key_values=theirs, max_new_tokens=TOKENS, temperature=0)[0]
    read = latent_generate(model, new, latent_steps=0, past_key_values=latent_cache).past_key_values
    assert texts == wrapper.generate_text_batch(new, past_key_values=read, max_new_tokens=TOKENS, temperature=0)[0]


@pytest.mark.parametrize("filled", [True, False], ids=["filled by the model", "empty"])
@torch.no_grad()
def test_a_pruned_models_cache_holds_what_plain_transformers_leaves_in_it(filled):
    """Turn by turn, by generate() of the accelerated model and a plain forward in between."""
    results = []
    for fast in (False, True):
        model, cache, ids = pruned(), DynamicCache(), real(IDS, MASK, 0)
        options = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0, "past_key_values": cache}
        if filled:
            model(ids[:, :5], past_key_values=cache)
        if fast:
            accelerate(model)
        new_ids, counts = ids, []
        for _ in range(2):
            new_ids = model.generate(new_ids, attention_mask=torch.ones_like(new_ids), **options)
            counts.append(columns_of(cache))
            model(new_ids[:, -1:], past_key_values=cache)
            new_ids = torch.cat([new_ids, lines([5, 6])], 1)
            counts.append(columns_of(cache))
        results.append((new_ids.tolist(), counts))
    assert results[0] == results[1]


@torch.no_grad()
def test_places_without_a_layer_are_zeros_however_a_cache_is_copied(tmp_path, monkeypatch):
    """Memory that was not set would travel on: here it is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **of: empty(*size, **of).fill_(float("nan")))
    model = pruned()
    latent_cache = latent_generate(model, IDS, MASK, latent_steps=STEPS, aligner="identity").past_key_values
    latent_cache.save(tmp_path / "memory.safetensors", model)
    theirs = latent_cache.to_hf()
    for copied in (
        latent_cache, latent_cache.fork(40), latent_cache.select([1, 0]), latent_cache.fork_rows(2, capacity=40),
        latent_cache.branch(),
        copy.deepcopy(latent_cache),
        LatentCache.load(tmp_path / "memory.safetensors", model), LatentCache.concat([latent_cache], model),
        LatentCache.from_hf(theirs, capacity=40), latent_generate(model, IDS, past_key_values=theirs).past_key_values,
    ):  # fmt: skip
        assert copied.gaps == (1,)
        assert not copied.buffer[:, 1].any()
        assert columns_of(copied.to_hf())[1] is None
    with pytest.raises(ValueError, match=r"holds nothing in the places \[1\] of layers that LlamaForCausalLM runs"):
        generate(tiny_model("llama"), IDS, past_key_values=theirs)


@pytest.mark.parametrize("how", ["the same object", "a copy"])
def test_layers_that_share_a_place_in_the_cache_are_refused_with_the_remedy(how):
    """transformers' own cache would mix their keys up, without a word."""
    model = tiny_model("llama")
    layer = model.model.layers[1]
    model.model.layers.append(layer if how == "the same object" else copy.deepcopy(layer))
    model.config.num_hidden_layers = 4
    for engine in ("auto", "eager", "native"):
        with pytest.raises(
            UnsupportedModelError, match="layer_idx 1. Give each layer of the list an object and a layer_idx"
        ):
            latents_and_engine(model, engine)
    want = outcome(plain_scores, model)
    with accelerate(model):
        assert not verdict(want, outcome(plain_scores, model))
    model.model.layers[3] = copy.deepcopy(layer)
    renumbered(model)
    assert close(latents_and_engine(model, "native")[0], plain_latents(model)[0])


# ---- settings that the model's code does not read ---------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["when it is made", "before a first call", "after one"])
@pytest.mark.parametrize(
    ("family", "entries", "windows"),
    [
        ("llama", {"sliding_window": 8}, (None, None, None)),
        ("llama", {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3}, (None, None, None)),
        ("mistral-window", {"sliding_window": 8, "layer_types": ["full_attention"] * 3}, (8, 8, 8)),
        ("mistral-window", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, (8, 8, 8)),
        ("qwen2-mixed", {"hidden_act": "gelu", "rms_norm_eps": 0.1}, (8, None, 8)),
    ],
)
def test_layout_are_those_of_the_code_and_not_of_the_configuration(family, entries, windows, moment):
    if moment == "when it is made":
        entries = {name: value for name, value in entries.items() if name in ("sliding_window", "layer_types")}
        model = tiny_model(family, **entries)
    else:
        model = tiny_model(family)
        if moment == "after one":
            first_call(model)
        set_config(**entries)(model)
    assert Architecture.of(model).windows == windows
    for engine in ("native", "eager"):
        assert close(latents_and_engine(model, engine)[0], plain_latents(model)[0])
    want = outcome(plain_scores, model)
    with accelerate(model):
        got = outcome(plain_scores, model)
    assert isinstance(want, Exception) or close(got, want)


def test_a_cache_that_forgets_what_layers_attend_to_is_left_to_transformers(monkeypatch):
    """A Llama with a sliding_window attends to all, but transformers makes it a cache of the last positions."""
    model, left = tiny_model("llama", sliding_window=8), []
    monkeypatch.setattr("latentmas_kernels.hf.decode.warn_once", left.append)
    with accelerate(model):
        plain_scores(model)
        assert left == [
            "LlamaForCausalLM: generate() runs in transformers' own loop, since the cache of its configuration keeps 8 "
            "positions of layer 0, whose code attends to all"
        ]
        out = model.generate(IDS, attention_mask=MASK, latent_steps=2, max_new_tokens=2, do_sample=False)
        assert out.shape == (2, 14)


@torch.no_grad()
def test_a_past_that_lacks_what_layers_attend_to_is_refused():
    model = tiny_model("llama", sliding_window=8)
    ids = real(IDS, MASK, 0)
    past = model(ids, use_cache=True).past_key_values
    words = r"kept the last 7 of 12 positions in layer 0, where LlamaForCausalLM attends to all of them. Pass a cache"
    with pytest.raises(ValueError, match=words):
        generate(model, ids[:, :2], past_key_values=past, max_new_tokens=1)
    mistral = tiny_model("mistral-window")
    past = mistral(ids, use_cache=True).past_key_values
    want = mistral(torch.cat([ids, ids[:, :2]], dim=1)).logits[:, -1].argmax(-1)
    assert generate(mistral, ids[:, :2], past_key_values=past, max_new_tokens=1).sequences[0, -1] == want


# ---- warnings and errors ---------------------------------------------------------------------------------------------


def test_an_edited_model_runs_on_eager_with_one_warning_that_says_why():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.scaling *= 2
    warn_once.cache_clear()
    words = r"runs on the eager engine, since model.layers.1.self_attn.scaling is 0.5, that of the first layer 0.25"
    with pytest.warns(RuntimeWarning, match=words):
        assert latents_and_engine(model, "auto")[1] == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latents_and_engine(model, "auto")
    with pytest.raises(
        ValueError, match="engine='native' does not cover this LlamaForCausalLM: model.layers.1.self_attn.scal"
    ):
        latents_and_engine(model, "native")


def test_what_was_refused_is_looked_at_again():
    model = tiny_model("llama")
    right = model.model.layers[1].self_attn.q_proj
    model.model.layers[1].self_attn.head_dim = 15
    with pytest.raises(UnsupportedModelError, match="its forward does not run over 2 tokens"):
        latents_and_engine(model, "eager")
    model.model.layers[1].self_attn.head_dim = 16
    model.model.layers[1].self_attn.q_proj = nn.Linear(40, 64)
    with pytest.raises(RuntimeError):
        plain_latents(model)
    with pytest.raises((ValueError, RuntimeError)):
        latents_and_engine(model, "auto")
    model.model.layers[1].self_attn.q_proj = right
    assert close(latents_and_engine(model, "native")[0], plain_latents(model)[0])


@pytest.mark.parametrize("moment", ["before a first call", "after one"])
def test_functions_of_a_family_that_were_replaced_are_run(moment, monkeypatch):
    """As libraries of fused kernels do; this one rotates the other way round."""
    model = tiny_model("llama")
    if moment == "after one":
        first_call(model)
    right = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: right(q, k, cos, -sin * 0.5))
    assert "apply_rotary_pos_emb of transformers.models.llama.modeling_llama was replaced" in refusal(
        latents_and_engine, model, "native"
    )
    assert close(latents_and_engine(model, "auto")[0], plain_latents(model)[0])
