"""Backends by name, and the import paths that users write: in their code, and in vLLM's configuration."""

import contextlib
import inspect
import sys
import types
from importlib import import_module
from unittest.mock import MagicMock

import pytest
from latentmas.backends import BACKENDS, DECODERS, check_installed, open_backend
from latentmas.backends.base import Completion, GenerationRequest
from latentmas.backends.vllm.launch import kv_config
from tiny_models import tiny_model

from latentmas_kernels.models.fingerprint import ModelFingerprint


def test_names_of_decoders():
    assert DECODERS == ("own", "vllm")


def test_a_backend_is_opened_by_its_name(monkeypatch):
    made = []
    module = types.SimpleNamespace(Vllm=lambda *given, **options: made.append((given, options)))
    monkeypatch.setitem(sys.modules, "latentmas.backends.vllm.engine", module)
    open_backend("vllm", "a/model", "loaded", kv_transfer="embeds", folder=None, settings={})
    assert made == [(("a/model", "loaded"), {"kv_transfer": "embeds", "folder": None, "settings": {}})]


def test_a_backend_that_is_not_vllm_is_opened_and_ended(monkeypatch):
    """Callers know no more of it than the protocol, and that it is a context manager."""
    ended = []

    class Backend(contextlib.AbstractContextManager):
        stamp, max_model_len = None, 100

        def __init__(self, name, model, *, kv_transfer):
            self.kv_transfer = kv_transfer

        def write(self, cache, requests, on_tokens=None):
            return [Completion([1], "stop", 1) for _ in requests]

        def __exit__(self, *error):
            ended.append(self)

    monkeypatch.setitem(sys.modules, "other_backend", types.SimpleNamespace(Other=Backend))
    monkeypatch.setitem(BACKENDS, "other", ("other_backend", "Other"))
    with open_backend("other", "a/model", "loaded", kv_transfer="kv") as backend:
        assert backend.write(None, [GenerationRequest([5], 1, ())]) == [Completion([1], "stop", 1)]
        assert not ended
    assert ended == [backend]
    assert inspect.signature(open_backend).return_annotation == "AbstractContextManager[TextBackend]"


@pytest.mark.parametrize("there", [True, False])
def test_an_engine_that_is_not_installed_is_said_before_it_is_imported(monkeypatch, there):
    monkeypatch.setattr("latentmas.backends.vllm.launch.find_spec", lambda name: object() if there else None)
    if there:
        check_installed("vllm")
    else:
        with pytest.raises(ValueError, match="vLLM is not installed here; docs/vllm.md"):
            check_installed("vllm")


def test_the_path_of_the_connector_in_vllm_configurations(monkeypatch, tmp_path):
    """Users have it in files; here with stubs in place of vLLM."""
    config = kv_config(ModelFingerprint.of(tiny_model("llama")), tmp_path)
    assert config["kv_connector_module_path"] == "latentmas.backends.connector"
    base = types.ModuleType("base")
    base.KVConnectorBase_V1 = base.KVConnectorMetadata = object
    base.KVConnectorRole = MagicMock()
    for name in ("vllm", "vllm.distributed", "vllm.logger", "vllm.model_executor", "vllm.model_executor.models"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    for name in ("vllm.distributed.parallel_state", "vllm.model_executor.models.utils"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    monkeypatch.setitem(sys.modules, "vllm.distributed.kv_transfer.kv_connector.v1.base", base)
    for name in ("latentmas.backends.connector", "latentmas.backends.vllm.connector"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = import_module(config["kv_connector_module_path"])
    try:
        connector = getattr(module, config["kv_connector"])
        assert connector.__module__ == "latentmas.backends.vllm.connector"
    finally:
        for name in ("latentmas.backends.connector", "latentmas.backends.vllm.connector"):
            monkeypatch.delitem(sys.modules, name)
