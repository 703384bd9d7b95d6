"""The table of engines: open_engine() and doctor() read it, so that an engine is its own file and an entry."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import ragged, tiny_model

from latentmas_kernels import doctor, generate, latent_generate
from latentmas_kernels.engines import EagerEngine, NativeEngine, check_engine_options, fast_engine, open_engine
from latentmas_kernels.engines.registry import REGISTRY, EngineEntry, engine_names, weight_names
from latentmas_kernels.models.architecture import Architecture


class ToyEngine(EagerEngine):
    name = "toy"


@pytest.fixture
def toy():
    """The functions of an engine's file; the engine is first in the table while the test runs."""
    module = SimpleNamespace(
        unsupported_reason=lambda model, architecture: None if architecture.layers == 3 else "it has not 3 layers",
        memory_report=lambda model: {"toys": 3 * 2**20},
    )
    REGISTRY.insert(
        0, EngineEntry("toy", "toy", "cpu", module, ToyEngine, summary=lambda: "one toy a token", covers="toy models")
    )
    yield module
    del REGISTRY[0]


def opened(engine, model, **options):
    return open_engine(engine, model, Architecture.of(model), **options)


@pytest.mark.parametrize("engine", ["auto", "toy"])
def test_an_engine_in_the_table_runs_calls(toy, engine):
    model = tiny_model("llama")
    assert type(opened(engine, model)) is ToyEngine
    ids, mask = ragged([4, 7])
    latent = latent_generate(model, ids, mask, latent_steps=2, aligner="identity", engine=engine)
    text = generate(model, ids, mask, past_key_values=latent.past_key_values, max_new_tokens=3, engine=engine)
    assert (latent.metrics.engine, text.metrics.engine) == ("toy", "toy")


def test_it_is_a_value_of_the_option_while_it_is_in_the_table(toy):
    check_engine_options("toy", "model")
    assert engine_names() == ("auto", "eager", "toy", "native", "cuda")
    with pytest.raises(ValueError, match="got engine='toys'; supported are 'auto', 'eager', 'toy', 'native', 'cuda'"):
        check_engine_options("toys", "model")


def test_the_names_are_those_of_the_table():
    assert engine_names() == ("auto", "eager", "native", "cuda")
    assert weight_names() == ("model", "int8")
    with pytest.raises(ValueError, match="got engine='toy'; supported are 'auto', 'eager', 'native', 'cuda'"):
        opened("toy", tiny_model("llama"))


def test_the_next_entry_runs_what_it_does_not_cover(toy):
    toy.unsupported_reason = lambda model, architecture: "it is no toy"
    model = tiny_model("llama")
    assert type(opened("auto", model)) is NativeEngine
    with pytest.raises(
        ValueError, match="engine='toy' does not cover this LlamaForCausalLM: it is no toy. Use engine="
    ):
        opened("toy", model)


def test_weights_that_it_does_not_have_run_on_the_engine_that_has_them(toy):
    model = tiny_model("llama")
    assert opened("auto", model, weights="int8").name == "native (int8)"
    with pytest.raises(ValueError, match="runs on the native engine only, and engine='toy' was asked for"):
        opened("toy", model, weights="int8")


def test_weights_that_only_it_has_are_a_value_of_their_option():
    opened_with = []

    class Int4Engine(EagerEngine):
        def __init__(self, model, architecture, *, int4=False):
            opened_with.append(int4)
            super().__init__(model, architecture)

    reasons = [None]
    module = SimpleNamespace(unsupported_reason=lambda *_: reasons[0], memory_report=lambda _: {})
    REGISTRY.append(EngineEntry("toy", "toy", "cpu", module, Int4Engine, summary=str, weights=("int4",)))
    try:
        assert weight_names() == ("model", "int8", "int4")
        model = tiny_model("llama")
        assert type(opened("auto", model, weights="int4")) is Int4Engine
        assert opened_with == [True]
        reasons[0] = "it is no toy"
        with pytest.raises(
            ValueError, match="weights='int4' runs on the toy engine only, and it is no toy. Use weights="
        ):
            opened("auto", model, weights="int4")
    finally:
        REGISTRY.pop()
    with pytest.raises(ValueError, match="got weights='int4'; supported are 'model', 'int8'"):
        opened("auto", model, weights="int4")


def test_an_error_of_its_set_up_is_a_reason(toy):
    def fail(model, architecture):
        raise RuntimeError("the box is empty")

    toy.unsupported_reason = fail
    model = tiny_model("llama")
    reason = "setting up its engine ended in RuntimeError: the box is empty"
    assert fast_engine("toy", model, Architecture.of(model)) == reason


def test_doctor_reports_it(toy):
    report = doctor()
    assert list(report.engines) == ["toy", "native", "cuda", "generic", "eager"]
    assert report.lines["toy engine"] == "on: one toy a token, for toy models"
    assert doctor(tiny_model("llama")).lines["toy engine"] == "on: one toy a token; kept: toys 3.0 MB"
    toy.unsupported_reason = lambda model, architecture: "it is no toy"
    assert doctor(tiny_model("llama")).lines["toy engine"] == "off: it is no toy"


@torch.no_grad()
def test_every_entry_has_what_an_engine_needs():
    model = tiny_model("llama")
    architecture = Architecture.of(model)
    for entry in REGISTRY:
        reason = entry.module.unsupported_reason(model, architecture)
        assert reason is None or isinstance(reason, str)
        assert all(isinstance(size, int) for size in entry.module.memory_report(model).values())
        assert entry.summary()
        assert {"extend", "run_latent", "name", "uses_thread_pool"} <= set(dir(entry.open))
