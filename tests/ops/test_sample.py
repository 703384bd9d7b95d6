"""sample: greedy and drawn tokens, in the interpreter against the torch reference and transformers' filters."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from latentmas_kernels.ops.sample import philox_uniform, sample, sample_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def logits_of(rows, vocabulary, seed=0, scale=3.0):
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocabulary, generator=draw) * scale).to(DEVICE)


def test_philox_known_answer():
    """Philox 4x32-10 of Random123: key 0, counter 0 gives 0x6627e8d5 first."""
    assert philox_uniform(0, 0) == 0x6627E8D5 * 4.6566127342e-10  # a little below 2 ** -31: 1 is never reached
    assert 0 <= min(philox_uniform(7, i) for i in range(500)) < 0.02
    assert 0.98 < max(philox_uniform(7, i) for i in range(500)) < 1


@pytest.mark.parametrize("vocabulary", [1, 97, 1024, 2500])
def test_interpreter_greedy_takes_the_lowest_of_equals(vocabulary):
    logits = logits_of(3, vocabulary).round()  # many equals, across blocks of 1024 as well
    top = logits.max(dim=1).values
    want = torch.stack([(row == best).nonzero()[0, 0] for row, best in zip(logits, top, strict=True)])
    assert torch.equal(sample(logits), want)


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"),
    [
        (None, 1.0, 1.0),
        (2, 1.0, 0.7),
        (40, 0.9, 1.5),
        (None, 0.5, 1.3),
        (1, 1.0, 1.0),
        (5000, 0.8, 1.0),
        (20, 0.0, 1.0),
    ],
)
def test_interpreter_draws_what_the_reference_draws(top_k, top_p, temperature):
    for vocabulary, draw in ((97, 0), (1500, 3)):
        logits = logits_of(2, vocabulary, seed=draw)
        options = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        seed = 0x1234567890ABCDEF
        got = sample(logits, **options, seed=seed, draw=draw)
        want = sample_reference(logits, True, temperature, top_k or 0, top_p, seed, draw)
        assert torch.equal(got, want)


def test_filters_are_those_of_transformers():
    """Of untied logits the same tokens stay: none that they remove is drawn, and all that they keep are, in their shares."""
    logits = logits_of(1, 12, scale=1.5)
    kept = logits.clone()
    for warper in (TemperatureLogitsWarper(0.8), TopKLogitsWarper(7), TopPLogitsWarper(0.85)):
        kept = warper(None, kept)
    shares = kept.softmax(-1)[0]
    assert 1 < (shares > 0).sum() < 7
    draws = 3000
    got = torch.cat([sample_reference(logits, True, 0.8, 7, 0.85, 11, draw) for draw in range(draws)])
    counted = torch.bincount(got, minlength=12) / draws
    assert torch.equal(counted > 0, shares > 0)
    assert (counted - shares).abs().max() < 4 * (0.25 / draws) ** 0.5


def test_rows_and_draws_are_independent():
    logits = torch.zeros(64, 50, device=DEVICE)
    first = sample_reference(logits, True, 1.0, 0, 1.0, 5, 0)
    assert len(first.unique()) > 20
    assert not torch.equal(first, sample_reference(logits, True, 1.0, 0, 1.0, 5, 1))
    assert not torch.equal(first, sample_reference(logits, True, 1.0, 0, 1.0, 6, 0))


def test_opcheck():
    logits = logits_of(2, 60)
    for do_sample in (False, True):
        torch.library.opcheck(torch.ops.latentmas.sample.default, (logits, do_sample, 1.0, 5, 0.9, 1, 0))


@pytest.mark.parametrize(
    ("logits", "options", "words"),
    [
        (torch.zeros(3), {}, r"logits must be float32 \[B, V\]"),
        (torch.zeros(2, 3).double(), {}, "logits must be float32"),
        (torch.zeros(2, 3), {"temperature": 0.0}, "temperature must be above 0"),
        (torch.zeros(2, 3), {"top_p": 1.5}, "top_p between 0 and 1"),
        (torch.zeros(2, 3), {"top_k": -1}, "top_k 0 or more"),
    ],
)
def test_arguments_out_of_range_are_refused(logits, options, words):
    with pytest.raises(ValueError, match=words):
        sample(logits, **options)
