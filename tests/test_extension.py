"""The C++ extension, doctor, storage and setup.py."""

import importlib.machinery
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import latentmas_kernels
from latentmas_kernels import doctor, latent_generate
from latentmas_kernels.extension import _load, extension, extension_state
from latentmas_kernels.ops.realign import realign, realign_reference
from latentmas_kernels.storage import atomic_write, cache_folder

ROOT = Path(__file__).parent.parent
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
needs_extension = pytest.mark.skipif(extension() is None, reason=extension_state())


@pytest.fixture
def looked_for_again(monkeypatch):
    """The extension is looked for anew in the test, and once more after it. Torn down before monkeypatch's changes."""
    _load.cache_clear()
    yield monkeypatch
    _load.cache_clear()


@pytest.fixture
def missing(looked_for_again):
    """The extension was never built."""
    find_spec = importlib.util.find_spec

    def find(name, package=None):
        return None if name == "latentmas_kernels._C" else find_spec(name, package)

    looked_for_again.setattr(importlib.util, "find_spec", find)


@pytest.fixture
def broken(looked_for_again, tmp_path):
    """The file of the extension holds something else."""
    (tmp_path / f"_C{SUFFIX}").write_bytes(b"this is no shared library" * 100)
    looked_for_again.delitem(sys.modules, "latentmas_kernels._C", raising=False)
    looked_for_again.delattr(latentmas_kernels, "_C", raising=False)
    looked_for_again.setattr(latentmas_kernels, "__path__", [str(tmp_path), *latentmas_kernels.__path__])


def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 100, generator=generator), torch.randn(130, 100, generator=generator)


# ---- doctor and the extension --------------------------------------------------------------------------------------


def test_doctor_reports_every_topic_in_a_line_of_its_own():
    report = doctor()
    assert list(report.lines) == [
        "python",
        "torch",
        "transformers",
        "triton",
        "devices",
        "instruction sets",
        "threads",
        "native kernels",
        "triton kernels",
        "native engine",
        "cuda engine",
        "generic engine",
        "eager engine",
    ]
    assert report.lines["torch"] == version("torch")
    assert report.lines["devices"].startswith("cpu")
    assert report.lines["threads"] == str(torch.get_num_threads())
    assert report.model is None
    lines = str(report).splitlines()
    assert len(lines) == len(report.lines)
    for line, (topic, state) in zip(lines, report.lines.items(), strict=True):
        assert line.startswith(topic)
        assert line.endswith(f"  {state}")
    assert len({line.index(state) for line, state in zip(lines, report.lines.values(), strict=True)}) == 1


@needs_extension
def test_doctor_names_a_version_that_does_not_fit_and_one_that_does(monkeypatch):
    module = sys.modules["latentmas_kernels.diagnostics"]
    monkeypatch.setattr(module, "requires", lambda name: ["torch>=2.11,<2.15", "transformers>=5.17,<5.25", "rich>=13"])
    versions = {"torch": "2.13.0+cpu", "transformers": "5.25.1", "triton": "3.9.0"}
    monkeypatch.setattr(module, "_version", versions.__getitem__)
    packages = doctor().packages
    assert packages["torch"] == "2.13.0+cpu"
    assert packages["triton"] == "3.9.0"
    assert packages["transformers"] == (
        "5.25.1, which latentmas-kernels was not tested with; install one that fits: pip install 'transformers<5.25,>=5.17'"
    )


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_versions_installed_here_fit(package):
    assert "not tested" not in doctor().packages[package]


def test_doctor_names_the_instruction_set_that_runs():
    from latentmas_kernels import _C

    report = doctor()
    assert report.kernels["native"].on
    assert report.lines["native kernels"].startswith(f"on: {_C.active_isa()}")
    assert report.instruction_sets[0] == _C.active_isa()
    assert sorted(report.instruction_sets) == sorted(_C.available_isas().split())
    assert "portable" in report.instruction_sets
    assert extension() is _C


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_doctor_says_why_triton_kernels_are_off(monkeypatch):
    module = sys.modules["latentmas_kernels.diagnostics"]
    monkeypatch.setattr(module, "_version", lambda package: "9.9")
    assert doctor().lines["triton kernels"] == "off: triton 9.9 is installed, but there is no CUDA device"
    monkeypatch.setattr(module, "_version", lambda package: "not installed")
    assert doctor().lines["triton kernels"] == "off: triton is not installed"


def test_doctor_says_that_the_extension_was_not_built(missing):
    report = doctor()
    state = report.lines["native kernels"]
    assert (report.kernels["native"].on, report.instruction_sets) == (False, [])
    assert state.startswith("off: not built: no C++ compiler was found at install time")
    assert "install g++ or clang++, then install again" in state
    assert extension() is None


def test_doctor_says_that_the_extension_does_not_load(broken):
    state = doctor().lines["native kernels"]
    assert state.startswith("off: built, but it does not load (")
    assert state.endswith("install the package again on this machine")
    assert extension() is None


def test_doctor_describes_the_model_that_it_is_given():
    """On the meta device too: nothing but the configuration is read."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("mistral-window")).eval()
    report = doctor(model)
    assert report.model == (
        "MistralForCausalLM, 3 layers of width 48, 2 KV heads of 16, 0.8 KB a token in float32, 512 positions, windows of 8"
    )
    assert report.lines["model"] == report.model
    assert report.engines["eager"].on


def test_doctor_says_why_a_model_cannot_run():
    config = T5Config(d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=1, vocab_size=20)
    report = doctor(T5ForConditionalGeneration(config))
    assert report.model == "T5ForConditionalGeneration"
    assert not report.engines["eager"].on
    assert report.lines["eager engine"].startswith("off: T5ForConditionalGeneration is an encoder-decoder model")


@needs_extension
def test_doctor_says_where_the_native_engine_is_on(monkeypatch):
    monkeypatch.setenv("LATENTMAS_NUM_THREADS", "3")
    assert doctor().lines["native engine"].startswith("on: whole calls in C++ on 3 threads, for LlamaForCausalLM,")
    model = tiny_model("llama")
    assert doctor(model).lines["native engine"] == "on: whole calls in C++ on 3 threads"
    latent_generate(model, torch.tensor([[5, 6]]), latent_steps=1, aligner="identity", engine="native")
    assert "; kept: scratch 0." in doctor(model).lines["native engine"]
    assert doctor(tiny_model("gemma2")).lines["native engine"].startswith("off: Gemma2ForCausalLM is none of")


def test_doctor_says_that_the_native_engine_needs_the_extension(missing):
    for report in (doctor(), doctor(tiny_model("llama"))):
        assert not report.engines["native"].on
        assert "not built: no C++ compiler was found at install time" in report.lines["native engine"]


def test_doctor_is_json():
    report = doctor()
    document = json.loads(json.dumps(report.to_dict()))
    assert document["packages"]["torch"] == version("torch")
    assert document["kernels"]["native"] == {"on": report.kernels["native"].on, "why": report.kernels["native"].why}


def assert_realign_is_that_of_torch():
    hidden, weight = inputs()
    for dtype in (torch.float32, torch.bfloat16):
        for w in (weight, None):
            assert torch.equal(realign(hidden.to(dtype), w, 1.5), realign_reference(hidden.to(dtype), w, 1.5))
        out = torch.full((3, 130), float("nan"), dtype=dtype)
        assert realign(hidden.to(dtype), weight, 1.5, out=out) is out
        assert torch.equal(out, realign_reference(hidden.to(dtype), weight, 1.5))


def test_realign_runs_on_torch_where_the_extension_was_not_built(missing):
    assert_realign_is_that_of_torch()


def test_realign_runs_on_torch_where_the_extension_does_not_load(broken):
    assert_realign_is_that_of_torch()


@needs_extension
def test_with_and_without_the_extension_the_result_is_the_same(request):
    hidden, weight = inputs()
    with_extension = realign(hidden, weight, 1.5)
    request.getfixturevalue("missing")
    assert extension() is None
    torch.testing.assert_close(realign(hidden, weight, 1.5), with_extension, rtol=1e-5, atol=1e-6)


# ---- setup.py ------------------------------------------------------------------------------------------------------


@pytest.fixture
def source_tree(tmp_path):
    """What setup.py needs of the repository, in a folder of its own, with packages that are next to empty."""
    pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    for package in ("latentmas_kernels", "python/latentmas"):
        (tree / package).mkdir(parents=True)
        (tree / package / "__init__.py").write_text("")
    return tree


def run_setup(tree, *arguments, **environment):
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True)


def test_without_a_compiler_the_package_builds_without_the_extension(source_tree):
    """And says so, in `pip install` (build) as in `pip install -e` (build_ext --inplace)."""
    done = run_setup(source_tree, "build", "build_ext", "--inplace", CXX="/nonexistent/compiler")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler found (looked at $CXX, c++, g++, clang++)" in done.stdout + done.stderr
    assert "install g++ or clang++ and install again" in done.stdout + done.stderr
    assert list(source_tree.rglob("*.so")) == []
    assert not list(source_tree.glob("build/cmake*"))
    assert [path.parent.name for path in source_tree.glob("build/lib*/latentmas_kernels/__init__.py")] == [
        "latentmas_kernels"
    ]


def test_a_compiler_that_fails_is_an_error(source_tree):
    """Not a package without kernels: whoever has a compiler wants to know."""
    done = run_setup(source_tree, "build_ext", "--inplace", CXX=shutil.which("false"))
    assert done.returncode != 0
    assert "no C++ compiler found" not in done.stdout + done.stderr
    assert "CXX" in done.stdout + done.stderr
    assert list(source_tree.rglob("*.so")) == []


# ---- storage -------------------------------------------------------------------------------------------------------


def test_whole_file_replaces_content_at_the_end_of_the_block(tmp_path):
    """Until then readers see the old content; folders on the way are made."""
    path = tmp_path / "one" / "two" / "file.txt"
    for content in ("first", "second"):
        old = path.read_text() if path.exists() else None
        with atomic_write(path) as temporary:
            temporary.write_text(content)
            assert temporary.parent == path.parent
            assert (path.read_text() if path.exists() else None) == old
        assert path.read_text() == content
        assert list(path.parent.iterdir()) == [path]


def test_whole_file_leaves_the_old_file_to_those_who_read_it(tmp_path):
    """A new file takes the place of the old one, which is not written to."""
    path = tmp_path / "file.txt"
    path.write_text("old and longer")
    with path.open() as reader:
        with atomic_write(path) as temporary:
            temporary.write_text("new")
        assert reader.read() == "old and longer"
    assert path.read_text() == "new"


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("old", ["old", None])
def test_whole_file_leaves_things_as_they_were_on_an_exception(tmp_path, old, failure):
    path = tmp_path / "file.txt"
    if old is not None:
        path.write_text(old)
    before = list(tmp_path.iterdir())

    def fail():
        with atomic_write(path) as temporary:
            temporary.write_text("half of")
            raise failure

    with pytest.raises(failure):
        fail()
    assert list(tmp_path.iterdir()) == before
    assert (path.read_text() if path.exists() else None) == old


def test_whole_file_gives_every_writer_a_file_of_its_own(tmp_path):
    """Two at once do not mix; the last to finish wins."""
    path = tmp_path / "file.txt"
    with atomic_write(path) as first, atomic_write(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_cache_folder_follows_the_environment(monkeypatch):
    """$LATENTMAS_CACHE, then $XDG_CACHE_HOME, then ~/.cache; an empty variable is none."""
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("LATENTMAS_CACHE", "/named")
    assert cache_folder() == Path("/named")
    monkeypatch.setenv("LATENTMAS_CACHE", "~/named")
    assert cache_folder() == Path("/home/someone/named")
    monkeypatch.setenv("LATENTMAS_CACHE", "")
    assert cache_folder() == Path("/xdg/latentmas")
    monkeypatch.delenv("LATENTMAS_CACHE")
    assert cache_folder() == Path("/xdg/latentmas")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == Path("/home/someone/.cache/latentmas")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/home/someone/.cache/latentmas")
