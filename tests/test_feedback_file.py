"""What auto measured, on disk: read by the next process, and by none whose measurement could be another."""

import copy
import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, tiny_model
from torch import nn

from latentmas_kernels import accelerate, alignment, build_aligner, feedback_file
from latentmas_kernels.feedback_file import measurement_key

NATS = {"ridge": 0.25, "soft": 4.5}


@pytest.fixture
def measured(monkeypatch):
    """How often the model was measured; the nats are NATS."""
    calls = []

    def measure(model, aligners):
        calls.append([aligner.kind for aligner in aligners])
        return {aligner.kind: NATS.get(aligner.kind, 0.5) for aligner in aligners}

    monkeypatch.setattr(alignment, "feedback_kl_nats", measure)
    return calls


def anew(model=None, **options):
    """As in a new process: nothing is in memory."""
    alignment._built.clear()
    return build_aligner(tiny_model() if model is None else model, **options)


def stored(tmp_path):
    return sorted((tmp_path / "cache" / "feedback").iterdir())


# ---- kept ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_next_process_reads_what_was_measured(tmp_path, measured, name):
    first = anew(tiny_model(name))
    second = anew(tiny_model(name))
    assert len(measured) == 1
    assert (second.kind, second.kl_nats, second.reason) == (first.kind, first.kl_nats, first.reason)
    assert [path.suffix for path in stored(tmp_path)] == [".json"]
    assert stored(tmp_path)[0].stat().st_size < 300


def test_real_measurements_are_the_same_read_back():
    first, second = anew(), anew()
    assert (
        first.kl_nats
        == second.kl_nats
        == alignment.feedback_kl_nats(
            tiny_model(), [build_aligner(tiny_model(), "ridge"), build_aligner(tiny_model(), "soft")]
        )
    )


def test_another_process_finds_it(tmp_path, measured):
    """The key has nothing in it that differs between processes, such as addresses or the order of sets."""
    code = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, *{sys.path!r}]
from tiny_models import tiny_model
from latentmas_kernels.feedback_file import measurement_key
print(measurement_key(tiny_model(), {{"rows": 4}}))
"""
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == measurement_key(tiny_model(), {"rows": 4})


@pytest.mark.parametrize("where", ["saved and loaded", "packed", "accelerated", "a copy", "after a run"])
def test_the_same_model_has_the_same_key(tmp_path, where):
    model = tiny_model()
    before = measurement_key(model, {})
    if where == "saved and loaded":
        model.save_pretrained(tmp_path / "model")
        model = type(model).from_pretrained(tmp_path / "model").eval()
    elif where == "packed":
        from latentmas_kernels.engines import open_engine
        from latentmas_kernels.models.architecture import Architecture

        open_engine("auto", model, Architecture.of(model))
    elif where == "accelerated":
        accelerate(model)
    elif where == "a copy":
        model = copy.deepcopy(model)
    else:
        model(torch.tensor([[5, 6, 7]]))
    assert measurement_key(model, {}) == before


# ---- every change is another key -----------------------------------------------------------------------------------


@torch.no_grad()
def _add(tensor, place, value=1e-3):
    tensor.view(-1)[place] += value


CHANGES = {
    "first element of a weight": lambda m: _add(m.model.layers[1].mlp.up_proj.weight, 0),
    "some element of a weight": lambda m: _add(m.model.layers[2].self_attn.k_proj.weight, 777),
    "last element of the embedding": lambda m: _add(m.model.embed_tokens.weight, -1),
    "the head": lambda m: _add(m.lm_head.weight, 1234),
    "a norm": lambda m: _add(m.model.norm.weight, 3),
    "two rows change places": lambda m: m.lm_head.weight.data.copy_(m.lm_head.weight.data.roll(1, 0)),
    "two columns change places": lambda m: m.lm_head.weight.data.copy_(m.lm_head.weight.data.roll(1, 1)),
    "a buffer that is not saved": lambda m: _add(m.model.rotary_emb.inv_freq, 1),
    "dtype": lambda m: m.bfloat16(),
    "scaling of one layer": lambda m: setattr(m.model.layers[1].self_attn, "scaling", 0.3),
    "eps of one norm": lambda m: setattr(m.model.layers[1].input_layernorm, "variance_epsilon", 1e-2),
    "an activation": lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.GELU()),
    "the form of an activation": lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.GELU("tanh")),
    "an activation that is a function": lambda m: setattr(_without(m.model.layers[0].mlp, "act_fn"), "act_fn", torch.relu),
    "a layer left out": lambda m: m.model.layers.__delitem__(1),
    "a bias": lambda m: setattr(m.lm_head, "bias", nn.Parameter(torch.zeros(97))),
    "a window": lambda m: setattr(m.config, "sliding_window", 8),
    "attention": lambda m: m.set_attn_implementation("eager"),
    "first token": lambda m: setattr(m.generation_config, "bos_token_id", 7),
    "a tensor that is no buffer": lambda m: setattr(m.model.layers[0].mlp, "gain", torch.ones(2)),
}  # fmt: skip


def _without(module, name):
    delattr(module, name)
    return module


def test_no_two_of_these_models_have_the_same_key():
    keys = {"as it is": measurement_key(tiny_model(), {})}
    for name, change in CHANGES.items():
        model = tiny_model()
        change(model)
        keys[name] = measurement_key(model, {})
    assert None not in keys.values()
    assert len(set(keys.values())) == len(keys), keys


@pytest.mark.parametrize("place", [0, 1, 500, 2303])
def test_sums_on_a_device_see_every_element_and_where_it_is(place):
    matrix = torch.randn(48, 48, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int8):
        before = matrix.mul(50).to(dtype)
        after, turned = before.clone(), before.clone()
        after.view(-1)[place] += 1
        turned[[0, 7]] = turned[[7, 0]]
        sums = [feedback_file._sums(m) for m in (before, after, turned, turned[:, [*range(1, 48), 0]])]
        assert len(set(map(tuple, sums))) == 4
        assert feedback_file._sums(before.clone()) == sums[0]


@pytest.mark.parametrize("constant", ["SAMPLE_ROWS", "SAMPLE_TOKENS", "SAMPLE_STEPS", "SAMPLE_SEED", "TOP_K"])
def test_other_settings_of_the_measurement_are_measured_anew(monkeypatch, measured, constant):
    anew()
    monkeypatch.setattr(alignment, constant, getattr(alignment, constant) + 1)
    anew()
    assert len(measured) == 2


def test_another_ridge_is_measured_anew(measured):
    for ridge in (1e-5, 1e-4, 1e-5):
        anew(ridge=ridge)
    assert len(measured) == 2


@pytest.mark.parametrize("package", [torch, feedback_file.transformers], ids=["torch", "transformers"])
def test_another_version_measures_anew(monkeypatch, measured, package):
    anew()
    monkeypatch.setattr(package, "__version__", "99.0.0")
    anew()
    assert len(measured) == 2


def test_the_threshold_is_that_of_today(monkeypatch, measured):
    """The file holds what was measured, not what was made of it."""
    assert anew().kind == "ridge"
    monkeypatch.setattr(alignment, "AUTO_NATS", 0.1)
    assert anew().kind == "soft"
    assert len(measured) == 1


# ---- what cannot be seen is measured every time ---------------------------------------------------------------------


def hook(model):
    return model.model.layers[1].register_forward_hook(lambda *_: None).remove


def hook_before(model):
    return model.model.norm.register_forward_pre_hook(lambda *_: None).remove


def hook_on_all(model):
    return nn.modules.module.register_module_forward_hook(lambda *_: None).remove


def own_forward(model):
    layer = model.model.layers[0].mlp
    layer.forward = lambda x: x
    return lambda: None


class Packed(nn.Parameter):
    pass


def packed_weight(model):
    model.lm_head.weight = Packed(model.lm_head.weight.data)
    return lambda: None


@pytest.mark.parametrize("change", [hook, hook_before, hook_on_all, own_forward, packed_weight])
def test_code_that_cannot_be_seen_is_measured_every_time(tmp_path, measured, change):
    for _ in range(2):
        model = tiny_model()
        undo = change(model)
        try:
            anew(model)
        finally:
            undo()
    assert len(measured) == 2
    assert not (tmp_path / "cache" / "feedback").exists()


def test_nan_is_not_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(alignment, "feedback_kl_nats", lambda model, aligners: {"ridge": float("nan"), "soft": 1.0})
    assert anew().kind == "soft"
    assert not (tmp_path / "cache" / "feedback").exists()


# ---- files that are wrong ------------------------------------------------------------------------------------------


def write(**changes):
    def damage(path):
        facts = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in facts.items() if value is not ...}))

    return damage


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "bytes": lambda path: path.write_bytes(bytes(range(256))),
    "a list": lambda path: path.write_text("[1, 2]"),
    "nested": lambda path: path.write_text("[" * 60_000),
    "large": lambda path: path.write_text(" " * 100_000 + path.read_text()),
    "another format": write(format="latentmas-feedback-0"),
    "another key": write(key="0" * 64),
    "no nats": write(nats={}),
    "another kind": write(nats={"identity": 0.5, "soft": 1.0}),
    "one kind": write(nats={"soft": 1.0}),
    "text": write(nats={"ridge": "0.25", "soft": 1.0}),
    "true": write(nats={"ridge": True, "soft": 1.0}),
    "NaN": write(nats={"ridge": float("nan"), "soft": 1.0}),
    "nats of none": write(nats=None),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_wrong_file_is_measured_again_with_one_warning(tmp_path, measured, damage):
    """After that the file is good again, and nothing else lies beside it."""
    anew()
    (path,) = stored(tmp_path)
    good = path.read_bytes()
    damage(path)
    with pytest.warns(
        UserWarning, match=r"the stored measurement .* is not used \(.*\); it is measured again"
    ) as caught:
        assert anew().kl_nats == NATS
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert stored(tmp_path) == [path]
    assert path.read_bytes() == good
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert anew().kl_nats == NATS
    assert len(measured) == 2


def test_the_file_of_another_model_under_this_name_is_not_believed(tmp_path, measured):
    anew(tiny_model("qwen3"))
    (foreign,) = stored(tmp_path)
    anew()
    mine = next(path for path in stored(tmp_path) if path != foreign)
    mine.write_bytes(foreign.read_bytes())
    with pytest.warns(UserWarning, match="another format or model"):
        anew()
    assert len(measured) == 3


def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path, monkeypatch, measured):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LATENTMAS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match=r"what was measured could not be stored in .*; set LATENTMAS_CACHE") as caught:
        assert anew(tiny_model("llama-tied")).kind == "identity"
    assert len(caught) == 1


def test_a_file_that_cannot_be_read_is_one_warning(tmp_path, monkeypatch, measured):
    """Another user's, say. Played by the call, since root may read all files."""
    anew()
    (path,) = stored(tmp_path)
    read = Path.read_text

    def denied(self, *arguments, **options):
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return read(self, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.warns(UserWarning, match="Permission denied"):
        assert anew().kl_nats == NATS


def test_writers_at_the_same_time_leave_a_whole_file(tmp_path):
    """Whoever is last, each reader sees a file that is whole, or none."""
    model, seen, stop = tiny_model(), [], threading.Event()

    def run():
        while not stop.is_set():
            seen.append(feedback_file.stored_or_measured(model, {}, NATS, lambda: dict(NATS)))

    def spoil():
        while not stop.is_set():
            for path in (tmp_path / "cache" / "feedback").glob("*.json"):
                path.unlink(missing_ok=True)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=work) for work in (run, run, run, spoil)]
        for thread in threads:
            thread.start()
        while len(seen) < 60:
            stop.wait(0.05)
        stop.set()
        for thread in threads:
            thread.join()
    assert seen == [NATS] * len(seen)
    assert [str(one.message) for one in caught if "No such file" not in str(one.message)] == []
    feedback_file.stored_or_measured(model, {}, NATS, lambda: dict(NATS))
    assert len(stored(tmp_path)) == 1, "temporary files are gone"
