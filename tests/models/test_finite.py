"""finite: weights that hold NaN or Inf are refused, once per state of the model."""

from itertools import pairwise

import pytest
import torch
from tiny_models import VOCAB, ragged, tiny_model
from torch import nn

from latentmas_kernels import generate, latent_generate
from latentmas_kernels.models.finite import check_finite_weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_named(dtype, value):
    model = tiny_model().to(dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[79, 47] = value
        model.model.norm.weight[0] = value
    with pytest.raises(
        ValueError, match=r"NaN or Inf in 2 of its weights \(first: model.layers.1.mlp.up_proj.weight\)"
    ):
        check_finite_weights(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[79, 47] = model.model.norm.weight[0] = 1.0
    check_finite_weights(model)
    assert model.model.norm.weight.isfinite().all()


def test_infinities_of_both_signs_do_not_cancel():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0], model.lm_head.weight[0, 1] = float("inf"), -float("inf")
    with pytest.raises(ValueError, match=r"first: lm_head.weight"):
        check_finite_weights(model)


def test_changes_are_noticed_and_unchanged_weights_are_not_read_again(monkeypatch):
    """In place, behind the same address; and a parameter put in place of another."""
    model = tiny_model()
    check_finite_weights(model)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "stack", lambda *_: pytest.fail("read again"))
        check_finite_weights(model)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    for _ in range(2):  # a refusal is not remembered as a pass
        with pytest.raises(ValueError, match="first: lm_head.weight"):
            check_finite_weights(model)
    model.lm_head.weight = nn.Parameter(torch.ones(VOCAB, 48))
    check_finite_weights(model)
    model.lm_head.weight = nn.Parameter(torch.full((VOCAB, 48), float("inf")))
    with pytest.raises(ValueError, match="first: lm_head.weight"):
        check_finite_weights(model)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 3e38), (torch.bfloat16, -3e38), (torch.float16, 65504.0)])
def test_large_finite_weights_are_fine(dtype, value):
    """Their sum overflows, or would overflow in their own dtype."""
    model = tiny_model().to(dtype)
    with torch.no_grad():
        model.lm_head.weight.fill_(value)
    assert not model.lm_head.weight.sum().isfinite()
    check_finite_weights(model)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")  # beside them, what is wrong is still found
    with pytest.raises(ValueError, match=r"in 1 of its weights \(first: model.norm.weight\)"):
        check_finite_weights(model)


@pytest.mark.parametrize("call", [latent_generate, generate])
def test_calls_refuse_weights_that_are_not_finite(call):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"first: model.layers.0.self_attn.q_proj.weight"):
        call(model, *ragged([3, 5]))


def test_weight_states_of_two_models_do_not_mix():
    """Each model is read for itself."""
    good, bad = tiny_model(), tiny_model()
    with torch.no_grad():
        bad.lm_head.weight[0, 0] = float("nan")
    for first, second in pairwise([good, bad, good]):
        for model in (first, second):
            if model is good:
                check_finite_weights(model)
            else:
                with pytest.raises(ValueError, match="lm_head.weight"):
                    check_finite_weights(model)
