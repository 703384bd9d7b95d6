"""accelerate(model).generate() against plain model.generate(), over options that hypothesis draws."""

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from numerics import summed_in_halves
from tiny_models import VOCAB, ragged, tiny_model
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StaticCache, StoppingCriteria

from latentmas_kernels.hf import accelerate
from latentmas_kernels.models.architecture import Architecture

FAMILIES = ("llama", "qwen2-mixed", "qwen3", "mistral-window")
MODELS: dict[str, tuple[Any, Any]] = {}
TOLERANCE = 2e-5


class EveryThird(LogitsProcessor):
    """A processor that nobody knows: no token that is divisible by three."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, ::3] = -torch.inf
        return scores


class After(StoppingCriteria):
    """A criterion that nobody knows: ends a row at the first token below a bound."""

    def __init__(self, bound: int) -> None:
        self.bound = bound

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids[:, -1] < self.bound


def pair(name: str) -> tuple[Any, Any]:
    """A plain model and an accelerated one of the same weights."""
    if name not in MODELS:
        plain = tiny_model(name)
        MODELS[name] = plain, accelerate(copy.deepcopy(plain))
    return MODELS[name]


maybe = st.none


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """Options of generate() that belong to greedy decoding and sampling."""
    length = draw(st.integers(1, 14))
    drawn = {
        "min_new_tokens": draw(maybe() | st.integers(0, length)),
        "eos_token_id": draw(
            maybe() | st.integers(3, VOCAB - 1) | st.lists(st.integers(3, VOCAB - 1), min_size=2, max_size=30)
        ),
        "pad_token_id": draw(st.sampled_from([0, 0, 0, 5])),
        "repetition_penalty": draw(maybe() | st.sampled_from([0.7, 1.0, 1.3, 2.0])),
        "no_repeat_ngram_size": draw(maybe() | st.sampled_from([1, 2])) if draw(st.booleans()) else None,
        "suppress_tokens": draw(maybe() | st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20)),
        "bad_words_ids": draw(maybe() | st.just([[4], [9, 10]])) if draw(st.booleans()) else None,
        "renormalize_logits": draw(maybe() | st.just(True)) if draw(st.booleans()) else None,
        "use_cache": draw(st.sampled_from([True, True, True, False])),
    }
    if draw(st.booleans()):
        drawn |= {
            "do_sample": True,
            "temperature": draw(maybe() | st.sampled_from([0.5, 1.0, 1.7])),
            "top_k": draw(st.sampled_from([None, 0, 1, 5, 50, 1000])),
            "top_p": draw(maybe() | st.sampled_from([0.3, 0.9, 1.0])),
            "min_p": draw(maybe() | st.sampled_from([0.02, 0.3])),
            "typical_p": draw(maybe() | st.just(0.8)) if draw(st.booleans()) else None,
        }
    drawn["max_new_tokens"] = length
    return {name: value for name, value in drawn.items() if value is not None}


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "lengths": draw(st.lists(st.integers(1, 19), min_size=1, max_size=4)),
        "seed": draw(st.integers(0, 1000)),
        "options": draw(options()),
        "by_length": draw(st.booleans()),  # max_length instead of max_new_tokens
        "as_config": draw(st.booleans()),  # a GenerationConfig instead of keywords
        "embeds": draw(st.sampled_from([False, False, True])),
        "past": draw(st.sampled_from([None, None, "dynamic", "dynamic, whole", "static", "empty"])),
        "returns": draw(st.sampled_from(["ids", "dict", "scores", "logits", "both"])),
        "processor": draw(st.sampled_from([False, False, False, True])),
        "criterion": draw(maybe() | st.integers(0, 20)) if draw(st.booleans()) else None,
        "sequences": draw(st.integers(1, 3)),
    }


def run(model: Any, call: dict[str, Any]) -> tuple[Any, Tensor]:
    """The call on a model; what it returns, and the mask of its cache's real columns before the new tokens."""
    vocab = model.config.vocab_size
    ids, mask = ragged(call["lengths"], seed=call["seed"], vocab=vocab)
    given: dict[str, Any] = dict(call["options"])
    given["return_dict_in_generate"] = call["returns"] != "ids"
    given["output_scores"] = call["returns"] in ("scores", "both")
    given["output_logits"] = call["returns"] in ("logits", "both")
    inputs: dict[str, Any] = {"inputs": ids, "attention_mask": mask}
    if call["embeds"]:
        inputs = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask}
    elif call["past"] is not None:
        before, before_mask = ragged([3 + length % 9 for length in call["lengths"]], seed=7, vocab=vocab)
        whole = torch.cat([before, ids], dim=1)
        mask = torch.cat([before_mask, mask], dim=1)
        cache = (
            StaticCache(model.config, max_cache_len=80)
            if call["past"] == "static"
            else DynamicCache(config=model.config)
        )
        if call["past"] != "empty":
            with torch.no_grad():
                positions = (before_mask.cumsum(1) - 1).clamp_min(0)
                model(before, attention_mask=before_mask, position_ids=positions, past_key_values=cache, use_cache=True)
        inputs = {"past_key_values": cache, "attention_mask": mask}
        inputs["inputs"] = ids if call["past"] in ("dynamic", "static") else whole
    if call["by_length"]:
        given["max_length"] = given.pop("max_new_tokens") + inputs.get("inputs", ids).shape[1]
    if call.get("sampled"):
        inputs["num_return_sequences"] = call["sequences"]
    extra: dict[str, Any] = {}
    if call["processor"]:
        extra["logits_processor"] = [EveryThird()]
    if call["criterion"] is not None:
        extra["stopping_criteria"] = [After(call["criterion"])]
    torch.manual_seed(call["seed"])
    if call["as_config"]:
        sequences = inputs.pop("num_return_sequences", 1)
        config = GenerationConfig(**given, num_return_sequences=sequences)
        return model.generate(**inputs, generation_config=config, **extra), mask
    return model.generate(**inputs, **given, **extra), mask


def check(models: tuple[Any, Any], call: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    plain, ours = models
    options = call["options"]
    sampled = options.get("do_sample", False)
    # The engines have a random generator of their own; with what is recorded they draw from torch's, as transformers does.
    # Whether that own loop draws from the same distribution is another test.
    call["sampled"] = sampled and call["past"] is None
    if sampled and call["returns"] in ("ids", "dict", "logits"):
        call["returns"] = "both"
    assume(not (call["past"] and not options["use_cache"]))  # transformers itself gives other tokens then
    if call["embeds"]:
        call["past"] = None
    if call["past"] and any(Architecture.of(plain).windows):
        # transformers counts a window in columns: padding between the past and the new tokens uses it up there, not here.
        call["lengths"] = call["lengths"][:1] * len(call["lengths"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*transformers' own loop")  # it must be our engine that runs
        (want, mask), (got, _) = run(plain, call), run(ours, call)
    if isinstance(want, Tensor):
        assert torch.equal(got, want)
        return
    assert type(got) is type(want)
    for which in ("logits", "scores"):
        theirs, mine = getattr(want, which), getattr(got, which)
        assert (theirs is None) == (mine is None)
        for a, b in zip(mine or (), theirs or (), strict=True):
            either = a.isinf() | b.isinf()
            assert ((a - b).masked_fill(either, 0).abs() < tolerance).all()
            differ = (a.isinf() != b.isinf()).sum(1)
            assert (differ <= 2).all()
            # Tokens at the very edge of top-k or top-p: float32 puts them on either side, and what is drawn next may differ.
            assume(not differ.any())
    assert torch.equal(got.sequences, want.sequences)
    theirs, mine = want.past_key_values, got.past_key_values
    assert type(mine) is type(theirs)
    if theirs is None:
        return
    assert mine.get_seq_length() == theirs.get_seq_length()
    mask = mask.repeat_interleave(len(want.sequences) // len(mask), dim=0)
    real = torch.cat([mask, mask.new_ones(len(mask), int(theirs.get_seq_length()) - mask.shape[1])], dim=1)
    for a, b in zip(mine.layers, theirs.layers, strict=True):
        assert type(a) is type(b)
        assert a.keys.shape == b.keys.shape
        stored = min(a.keys.shape[2], real.shape[1])
        used = real[:, -stored:].bool()[:, None, :, None]
        for x, y in ((a.keys, b.keys), (a.values, b.values)):
            assert ((x - y)[:, :, :stored] * used).abs().max() < tolerance


slow = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)


@pytest.mark.parametrize("name", FAMILIES)
@slow
@given(call=calls())
def test_same_as_plain_generate(name: str, call: dict[str, Any]) -> None:
    check(pair(name), call)


@pytest.fixture(scope="module")
def default_pair(default_model: Any) -> tuple[Any, Any]:
    return default_model, accelerate(copy.deepcopy(default_model))


@pytest.fixture(scope="module")
@torch.no_grad()
def default_rounding(default_model: Any) -> float:
    """The largest distance from float64 of the default model's logits on random text, in two orders of its sums."""
    orders = default_model, summed_in_halves(default_model)
    exact = copy.deepcopy(default_model).double()
    ids, _ = ragged([28] * 8, vocab=default_model.config.vocab_size)
    want = exact(ids).logits
    return max(float((model(ids).logits - want).abs().max()) for model in orders)


@pytest.mark.real_model
@settings(slow, max_examples=25, phases=[Phase.generate])
@given(call=calls())
def test_default_model_same_as_plain_generate(
    default_pair: tuple[Any, Any], default_rounding: float, call: dict[str, Any]
) -> None:
    # Both sides round, and a penalty of 2 and a temperature of 0.5 double what the logits differ by.
    check(default_pair, call, tolerance=4 * 2 * 2 * default_rounding)
