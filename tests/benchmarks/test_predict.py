"""The arithmetic of the predictions: bytes and launches are those of the engine, and the page is what the script writes."""

import json

import predict
import pytest
import torch
from bench_engine import prepare
from peers import Start
from predict import FIVE, KV, MODELS, PUBLIC, SEVEN, Fit, bytes_of, fits_of, launches_of
from replays import LOG_STEPS, Replays
from shapes import SHAPES, build_model, sizes_of

from latentmas_kernels import LatentCache
from latentmas_kernels.engines.cuda_graphs import EagerReplay
from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.models.packed_weights import pack_weights
from latentmas_kernels.ops.triton.launch import INTERPRETER, LaunchTarget


@pytest.mark.parametrize("shape", [*MODELS, "qwen2.5-0.5b"])  # the last one has biases
def test_bytes_are_those_of_the_packed_weights_and_the_cache(shape):
    model = build_model(shape, torch.bfloat16, "meta")
    model.model.rotary_emb.inv_freq = torch.ones(
        sizes_of(shape)["head_dim"] // 2
    )  # its values are compared, so they exist
    architecture = Architecture.of(model)
    weights = pack_weights(model, architecture)
    latent, token = (bytes_of(shape, step, 3, 40) for step in ("latent", "token"))
    assert latent.layers == token.layers == weights.decoder_bytes
    assert token.ends == weights.lm_head.nbytes
    cache = LatentCache.for_model(architecture, 3, 40)
    assert latent.kv == token.kv == cache.keys.nbytes + cache.values.nbytes
    assert latent.moved == latent.layers + latent.ends + latent.kv


def test_a_latent_step_reads_w_a_where_the_embeddings_are_not_tied():
    assert not SHAPES["qwen3-8b"][2]
    assert bytes_of("qwen3-8b", "latent", 1, 0).ends == torch.empty(4096, 4096, device="meta").nbytes
    assert bytes_of("qwen3-4b", "latent", 1, 0).ends == 0


def counted_launches(monkeypatch, layers, *, with_w_a=False):
    """Launches of a latent and of a token step, none of them run."""
    model, aligner = prepare("tiny", torch.float32, "cpu", layers)
    if with_w_a:
        width = model.config.hidden_size
        aligner = type(aligner)("ridge", 1.0, weight=torch.eye(width))
    seen = []
    monkeypatch.setattr(LaunchTarget, "launch", lambda self, kernel, *args, **constants: seen.append(kernel))
    side = Replays(Start.random(model, aligner, 1, 4, LOG_STEPS), INTERPRETER, EagerReplay())
    counts = {}
    for phase in ("latent", "token"):
        seen.clear()
        side.replay(phase, 1)
        counts[phase] = len(seen)
    return counts


def test_launches_at_the_ends_are_those_of_a_step(monkeypatch):
    one, two = (counted_launches(monkeypatch, layers) for layers in (1, 2))
    layers = sizes_of("tiny")["num_hidden_layers"]
    assert layers == 2
    for phase in ("latent", "token"):
        per_layer = two[phase] - one[phase]
        assert two[phase] == launches_of("tiny", phase, per_layer)
    with_w_a = counted_launches(monkeypatch, 2, with_w_a=True)["latent"] - two["latent"]
    assert with_w_a == launches_of("qwen3-8b", "latent", FIVE) - launches_of("qwen3-4b", "latent", FIVE) == 1


def test_a_layer_is_five_launches(monkeypatch):
    one, two = (counted_launches(monkeypatch, layers) for layers in (1, 2))
    assert [two[phase] - one[phase] for phase in one] == [FIVE, FIVE]


@pytest.mark.parametrize("card", PUBLIC)
def test_both_readings_give_the_graph_that_they_are_fitted_to(card):
    moved = predict.public_bytes()
    fits = fits_of(card)
    for fit in fits.values():
        assert fit.us(predict.PUBLIC_KERNELS, moved) == pytest.approx(PUBLIC[card].graph)
    assert fits["persistent"].us(1, moved) == pytest.approx(PUBLIC[card].persistent)
    assert all(fit.launch_us > 0 and fit.gb_s < PUBLIC[card].sheet for fit in fits.values())


def test_a_fit_finds_the_numbers_that_samples_were_made_with():
    made = Fit(1.3, 3700)
    samples = [(n, moved, made.us(n, moved)) for n, moved in ((142, 9e8), (182, 14e9), (84, 2.5e9))]
    assert predict.fit(samples) == pytest.approx(made)


def test_the_page_is_what_the_script_writes():
    assert predict.PREDICTED.read_text() == predict.document(), "run python benchmarks/predict.py"


def results(tmp_path, device, fit):
    """A results file as bench_replay.py and bench_engine.py write it, with the times of `fit`."""
    replay, engine = {}, {}
    for shape in MODELS[:3]:
        about = {"device": device, "shape": shape, "batch": 1, "dtype": "bfloat16"}
        us = {
            step: fit.us(launches_of(shape, step, FIVE), bytes_of(shape, step, 1, KV).moved)
            for step in ("latent", "token")
        }
        replay[f"{shape} pdl"] = {**about, "pdl": True, **{s: {"us": t, "kv": KV} for s, t in us.items()}}
        replay[f"{shape} no pdl"] = {**about, "pdl": False, **{s: {"us": 9 * t, "kv": KV} for s, t in us.items()}}
        engine[shape] = {**about, **{s: {"ms": 2 * t / 1e3, "kv": KV} for s, t in us.items()}}
    engine["left out"] = {"skipped": "no room"}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"replay": replay, "engine": engine}))
    return path


def test_measured_steps_stand_beside_both_predictions(tmp_path):
    own = fits_of("H200")["cold"]
    lines = predict.comparison(str(results(tmp_path, "NVIDIA H200", own)))
    assert "predictions for an H200" in lines[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| replay")]
    assert len(rows) == 6  # those with PDL
    assert all(row[3].endswith("(1.00)") for row in rows)
    assert [row[4].endswith("(1.00)") for row in rows if "0.6b" in row[0]] == [
        False,
        False,
    ]  # both agree on other shapes
    engine = [line for line in lines if line.startswith("| engine")]
    assert len(engine) == 6
    assert all("(2.00)" in line for line in engine)
    assert f"a = {own.launch_us:.2f} us, b = {own.gb_s:.0f} GB/s" in lines[-1]


def test_an_unknown_card_has_no_prediction(tmp_path):
    said = predict.comparison(str(results(tmp_path, "AMD EPYC, 2 cores", Fit(1, 1000))))
    assert said == ["no prediction for AMD EPYC, 2 cores; there are some for H100, H200"]


def test_seven_launches_a_layer_are_never_predicted_to_be_faster_than_five():
    for card in PUBLIC:
        for fit in fits_of(card).values():
            for shape in MODELS:
                moved = bytes_of(shape, "latent", 1, KV).moved
                assert fit.us(launches_of(shape, "latent", SEVEN), moved) > fit.us(
                    launches_of(shape, "latent", FIVE), moved
                )
