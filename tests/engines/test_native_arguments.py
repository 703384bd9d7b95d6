"""The border to C++: an argument of a wrong dtype, shape, stride or device is an error that names it, never a crash."""

import itertools
from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from latentmas_kernels import extension as native
from latentmas_kernels.cache.latent_cache import LatentCache
from latentmas_kernels.engines.native import NativeEngine, quantize_rows
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.models.packed_weights import pack_weights

if native.extension() is None:
    pytest.skip(native.extension_state(), allow_module_level=True)

C = native.extension()
MODEL = tiny_model("qwen3")
ENGINE = NativeEngine(MODEL, Architecture.of(MODEL))
W = pack_weights(MODEL, Architecture.of(MODEL))
WIDTH, VOCAB = W.embedding.shape[1], W.lm_head.shape[0]
STEPS = 3
GREEDY = C.Sampling(do_sample=False, temperature=1.0, top_k=0, top_p=1.0)


def zeros() -> LatentCache:
    """An empty cache whose unused slots may be read as well: they are not what lay in that memory before."""
    cache = LatentCache.for_model(ENGINE.architecture, 2, 70)
    cache.buffer.zero_()
    return cache


def kv_cache(**change: Any) -> Any:
    cache = zeros()
    cache.lengths += 65
    given = {
        "keys": cache.keys, "values": cache.values, "positions": cache.positions, "lengths": cache.lengths,
        "next_position": cache.next_position, "prefix_row": torch.tensor([0, 0]), "prefix_len": torch.tensor([0, 64]),
    }  # fmt: skip
    return C.KVCache(**{**given, **change})


def extend(**change: Any) -> None:
    given = {
        "counts": torch.tensor([4, 2]), "token_ids": torch.ones(2, 4, dtype=torch.int64), "embeds": None,
        "states": torch.zeros(2, WIDTH), "logits": torch.zeros(2, VOCAB),
    }  # fmt: skip
    ENGINE.runner.extend(kv_cache(), **{**given, **change})


def run_latent(**change: Any) -> None:
    given = {
        "seed": torch.ones(2, WIDTH), "feedback": C.Feedback(target_norm=1.0, aligner=torch.eye(WIDTH)),
        "params": C.LatentParams(steps=torch.tensor([STEPS, 1])), "latents": torch.zeros(2, STEPS, WIDTH),
        "last_hidden": torch.zeros(2, WIDTH), "states": torch.zeros(2, STEPS, WIDTH), "on_step": None,
    }  # fmt: skip
    ENGINE.runner.run_latent(kv_cache(), **{**given, **change})


def decode_params(**change: Any) -> Any:
    given = {
        "sampling": GREEDY, "max_new_tokens": 3, "min_new_tokens": 0, "eos_token_ids": [],
        "penalty_mask": torch.zeros(2, VOCAB, dtype=torch.bool),
    }  # fmt: skip
    return C.DecodeParams(**{**given, **change})


def decode(**change: Any) -> None:
    given = {
        "logits": torch.zeros(2, VOCAB), "params": decode_params(),
        "token_ids": torch.zeros(2, 3, dtype=torch.int64), "on_token": None,
    }  # fmt: skip
    ENGINE.runner.decode(kv_cache(), **{**given, **change})


def runner(**change: Any) -> Any:
    """A Runner of the model; a change "qkv.weight" is one of the second layer."""
    w, layers = W, []
    for index, layer in enumerate(w.layers):
        parts = dict(vars(layer))
        linears = {
            name: {"weight": parts.pop(name), "bias": parts.pop(f"{name}_bias"), "scales": None}
            for name in ("qkv", "output", "gate_up", "down")
        }
        if index == 1:
            for name in [name for name in change if name in parts or name.split(".")[0] in linears]:
                first, _, field = name.partition(".")
                if field:
                    linears[first][field] = change.pop(name)
                else:
                    parts[first] = change.pop(name)
        layers.append(C.Layer(**parts, **{name: C.Linear(**given) for name, given in linears.items()}))
    given = {
        "embedding": w.embedding, "layers": layers, "final_norm": w.final_norm, "lm_head": C.Linear(w.lm_head),
        "inv_freq": w.inv_freq, "query_heads": w.query_heads, "kv_heads": w.kv_heads, "head_dim": w.head_dim,
        "intermediate_size": w.intermediate, "eps": w.eps, "scale": w.scale, "attention_scaling": w.attention_scaling,
    }  # fmt: skip
    return C.Runner(C.Model(**{**given, **change}))


LAYER = W.layers[1]
TENSORS = {
    extend: {
        "counts": torch.tensor([4, 2]), "token_ids": torch.ones(2, 4, dtype=torch.int64),
        "states": torch.zeros(2, WIDTH), "logits": torch.zeros(2, VOCAB),
    },
    run_latent: {
        "seed": torch.ones(2, WIDTH), "latents": torch.zeros(2, STEPS, WIDTH),
        "last_hidden": torch.zeros(2, WIDTH), "states": torch.zeros(2, STEPS, WIDTH),
    },
    decode: {"logits": torch.zeros(2, VOCAB), "token_ids": torch.zeros(2, 3, dtype=torch.int64)},
    kv_cache: {
        "keys": zeros().keys,
        "values": zeros().values,
        "positions": torch.zeros(2, 70, dtype=torch.int64), "lengths": torch.tensor([65, 65]),
        "next_position": torch.tensor([65, 65]), "prefix_row": torch.tensor([0, 0]), "prefix_len": torch.tensor([0, 64]),
    },
    runner: {
        "embedding": W.embedding, "final_norm": W.final_norm, "inv_freq": W.inv_freq,
        "input_norm": LAYER.input_norm, "query_norm": LAYER.query_norm, "key_norm": LAYER.key_norm,
        "mlp_norm": LAYER.mlp_norm, "qkv.weight": LAYER.qkv, "output.weight": LAYER.output,
        "gate_up.weight": LAYER.gate_up, "down.weight": LAYER.down,
    },
}  # fmt: skip
ALL = [(call, name) for call, tensors in TENSORS.items() for name in tensors]
IDS = [f"{call.__name__}-{name}" for call, name in ALL]


@pytest.mark.parametrize("call", TENSORS)
def test_good_arguments_run(call):
    call()
    call(**TENSORS[call])


@pytest.mark.parametrize(("call", "name"), ALL, ids=IDS)
def test_a_wrong_tensor_is_an_error_that_names_it(call, name):
    tensor = TENSORS[call][name]
    other_dtype = tensor.int() if tensor.dtype == torch.int64 else tensor.double()
    more = torch.cat([tensor, tensor[:1]])
    for wrong in (other_dtype, tensor[None], more, tensor[:0], tensor.to("meta"), tensor.tolist(), tensor.data_ptr()):
        shorter_or_longer = (
            isinstance(wrong, torch.Tensor) and wrong.dim() == tensor.dim() and len(wrong) != len(tensor)
        )
        if (name == "embedding" and wrong is more) or (name == "keys" and shorter_or_longer):
            continue  # a longer embedding is right, and the other tensors of a cache are checked against the keys
        with pytest.raises(LatentMASError, match=rf"{name.replace('.', '[.]')} must be"):
            call(**{name: wrong})


@pytest.mark.parametrize(("call", "name"), ALL, ids=IDS)
def test_a_strided_tensor_is_an_error_that_names_it(call, name):
    tensor = TENSORS[call][name]
    strided = torch.stack([tensor, tensor], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    with pytest.raises(
        LatentMASError, match=rf"{name.replace('.', '[.]')} must be .*contiguous.*; got .* with strides"
    ):
        call(**{name: strided})


@pytest.mark.parametrize("call", TENSORS)
def test_swapped_tensors_are_an_error_where_their_types_differ_and_never_a_crash(call):
    tensors = TENSORS[call]
    for a, b in itertools.combinations(tensors, 2):
        swapped = {a: tensors[b], b: tensors[a]}
        if (tensors[a].dtype, tensors[a].shape) == (tensors[b].dtype, tensors[b].shape):
            if {a, b} & {"prefix_row", "prefix_len"}:
                continue
            call(**swapped)
        else:
            with pytest.raises(LatentMASError, match="must be"):
                call(**swapped)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lengths": torch.tensor([65, 69])}, "row 1 of length 69 has no room for 2 more of 70 slots"),
        ({"lengths": torch.tensor([-1, 65])}, "row 0 of length -1 has no room"),
        (
            {"prefix_len": torch.tensor([0, 63])},
            "row 1 cannot share 63 slots with row 0; supported are multiples of 64",
        ),
        ({"prefix_len": torch.tensor([0, 128])}, "cannot share 128 slots"),
        ({"prefix_len": torch.tensor([-64, 0])}, "cannot share -64 slots"),
        ({"prefix_row": torch.tensor([0, 2])}, "cannot share 64 slots with row 2"),
        ({"prefix_row": torch.tensor([0, -1])}, "cannot share 64 slots with row -1"),
        ({"prefix_row": torch.tensor([0, 64]), "prefix_len": torch.tensor([0, 1])}, "cannot share 1 slots with row 64"),
    ],
)
def test_a_cache_whose_rows_do_not_fit_is_an_error(change, words):
    tensors = TENSORS[extend]
    with pytest.raises(LatentMASError, match=words):
        ENGINE.runner.extend(kv_cache(**change), **{**tensors, "counts": torch.tensor([2, 2]), "embeds": None})


def test_a_cache_of_another_model_is_an_error():
    given = dict(TENSORS[kv_cache])
    more_heads, wider = given["keys"].repeat(1, 1, 2, 1, 1), given["keys"].repeat(1, 1, 1, 1, 2)
    for keys in (more_heads, wider, given["keys"].bfloat16(), given["keys"][:1]):
        with pytest.raises(LatentMASError, match="KVCache: keys must be"):
            ENGINE.runner.extend(kv_cache(keys=keys, values=keys.clone()), **TENSORS[extend], embeds=None)
    with pytest.raises(LatentMASError, match="KVCache: values must be of the strides of keys"):
        kv_cache(values=torch.zeros(*given["keys"].shape[:3], 75, given["keys"].shape[4])[:, :, :, :70])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: extend(token_ids=None), "pass token_ids or embeds"),
        (lambda: extend(embeds=torch.zeros(2, 4, WIDTH)), "pass token_ids or embeds"),
        (lambda: extend(token_ids=None, embeds=torch.zeros(2, 4, WIDTH - 1)), r"extend: embeds must be float32 \[2, any"),
        (lambda: extend(counts=torch.tensor([5, 1])), "counts are above the columns"),
        (lambda: run_latent(params=C.LatentParams(steps=torch.tensor([STEPS]))), "steps must be 1 or more for each row"),
        (lambda: run_latent(params=C.LatentParams(steps=torch.tensor([STEPS, 0]))), "steps must be 1 or more"),
        (lambda: run_latent(params=C.LatentParams(steps=torch.tensor([STEPS + 1, 1]))), "latents must be float32"),
        (lambda: C.LatentParams(steps=[1, 2]), "LatentParams: steps must be a torch tensor; got list"),
        (lambda: C.LatentParams(steps=torch.tensor([1.0])), r"LatentParams: steps must be int64 \[any\]"),
        (lambda: C.Feedback(target_norm=1.0, aligner=3), "Feedback: aligner must be a torch tensor; got int"),
        (lambda: C.Feedback(target_norm=1.0, soft_top_k=17), "soft_top_k must be up to 16"),
        (lambda: run_latent(feedback=C.Feedback(target_norm=1.0, aligner=torch.eye(WIDTH + 1))), "Feedback: aligner must be"),
        (lambda: run_latent(feedback=C.Feedback(target_norm=1.0, aligner=torch.eye(WIDTH).double())), "got float64"),
        (lambda: run_latent(feedback=C.Feedback(target_norm=1.0, soft_top_k=5)), rf"seed must be float32 \[2, {VOCAB}\]"),
        (lambda: decode(params=decode_params(penalty_mask=torch.zeros(2, VOCAB))), "penalty_mask must be bool"),
        (lambda: decode(params=decode_params(penalty_mask=torch.zeros(2, 3).bool())), "penalty_mask must be bool"),
        (lambda: decode(params=decode_params(max_new_tokens=-1)), "max_new_tokens must be 0 or more"),
        (lambda: decode(params=decode_params(max_new_tokens=7), token_ids=torch.zeros(2, 7).long()), "has no room for 6 more"),
        (lambda: C.sample(torch.zeros(2, 3).double(), GREEDY, 0), "sample: logits must be float32"),
        (lambda: C.checksum(torch.zeros(4, 4).T[:2]), "checksum: tensor must be contiguous"),
        (lambda: runner(head_dim=10), "must be float32"),
        (lambda: runner(kv_heads=3), "query heads must be a multiple of key heads"),
        (lambda: runner(slot=-1), "slot must be 0 or more"),
        (lambda: runner(lm_head=C.Linear(W.lm_head[:, 1:].contiguous())), r"Model: lm_head.weight must be float32 \[any, "),
        (lambda: runner(**{"qkv.bias": torch.zeros(3)}), r"Layer 1: qkv.bias must be float32"),
        (lambda: runner(**{"qkv.scales": torch.ones(len(LAYER.qkv))}), r"Layer 1: qkv.weight must be int8"),
    ],
)  # fmt: skip
def test_parameters_that_do_not_fit_are_an_error(call, words):
    with pytest.raises(LatentMASError, match=words):
        call()


def test_int8_weights_need_their_scales():
    packed, scales = quantize_rows(LAYER.qkv)
    runner(**{"qkv.weight": packed, "qkv.scales": scales})
    for change in (
        {"qkv.weight": packed},
        {"qkv.weight": packed, "qkv.scales": scales[1:]},
        {"qkv.weight": packed, "qkv.scales": scales.double()},
    ):
        with pytest.raises(LatentMASError, match=r"Layer 1: qkv[.](weight|scales) must be"):
            runner(**change)


def test_what_python_calls_by_another_name_is_refused():
    with pytest.raises(TypeError):
        C.Layer(input_gain=LAYER.input_norm)
    with pytest.raises(TypeError):
        C.KVCache(1, 2, 3, 4, 5, 6, 7)


@pytest.mark.parametrize(
    "call",
    [
        lambda: C.Linear(*quantize_rows(LAYER.qkv)),
        lambda: C.realign(torch.ones(2, 4), None, 1.0, torch.zeros(2, 4)),
        lambda: C.Sampling(False, 1.0, 0, 1.0),
    ],
    ids=["Linear", "realign", "Sampling"],
)
def test_what_could_be_swapped_unseen_is_passed_by_name(call):
    """A bias has the shape of scales, `out` of hidden states, top_p is a number as temperature is."""
    with pytest.raises(TypeError, match="incompatible"):
        call()
