"""The KV connector that vLLM loads: writes the KV caches of chains into its paged cache, without a prefill.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "LatentConnector",
        "kv_connector_module_path": "latentmas.backends.connector", "kv_role": "kv_consumer",
        "kv_connector_extra_config": {"folder": "/dev/shm", "fingerprint": "..."}}'

One instance lives in the scheduler and one in each worker. Keys and values are written by the attention backend's own
`do_kv_cache_update`, since every backend lays its cache out differently.
"""

import ctypes
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from latentmas.backends.kv_file import check_finite, kv_heads_of_rank, read_kv_rows
from latentmas.backends.vllm.pending_loads import PendingLoad, PendingLoads
from latentmas_kernels.errors import LatentMASError

logger = init_logger("vllm.latentmas")
PR_SET_PDEATHSIG = 1


@dataclass
class LatentConnectorMetadata(KVConnectorMetadata):
    """The loads of one step, sent by the scheduler to the workers."""

    loads: list[PendingLoad]


class LatentConnector(KVConnectorBase_V1):
    """A KV consumer. A request's file is loaded in the step that allocates its blocks, and again after every preemption."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        settings = vllm_config.kv_transfer_config
        extra = settings.kv_connector_extra_config
        missing = [name for name in ("folder", "fingerprint") if not isinstance(extra.get(name), str)]
        if missing:
            raise LatentMASError(
                f"LatentConnector needs {' and '.join(missing)} in kv_connector_extra_config; `latentmas serve --kv-config` "
                "prints the whole configuration for a model"
            )
        if settings.kv_load_failure_policy != "fail":
            raise LatentMASError(
                f"got kv_load_failure_policy {settings.kv_load_failure_policy!r}; LatentConnector needs 'fail': what vLLM "
                "would compute in place of a memory are its placeholders"
            )
        check_supported(vllm_config)
        if kv_cache_config is not None and len(kv_cache_config.kv_cache_groups) != 1:
            raise _refusal(f"{vllm_config.model_config.model}, whose layers are not all of one kind of attention")
        if role == KVConnectorRole.SCHEDULER and extra.get("owner") == os.getppid():
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # a killed owner cannot end this process
        self.folder, self.fingerprint = Path(extra["folder"]), extra["fingerprint"]
        self.block_size = vllm_config.cache_config.block_size
        self.layers = vllm_config.model_config.get_total_num_hidden_layers()
        self.heads = vllm_config.model_config.get_total_num_kv_heads()
        self.head_dim = vllm_config.model_config.get_head_size()
        self.dtype = vllm_config.model_config.dtype
        self._pending = PendingLoads()
        self._names: list[str] = []
        self._failed: set[int] = set()

    # ---- in the scheduler --------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        external = self._pending.num_new_matched_tokens(
            request.request_id, request.kv_transfer_params, request.cache_salt, request.num_prompt_tokens,
            num_computed_tokens,
        )  # fmt: skip
        return external, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        (ids,) = blocks.get_block_ids()
        self._pending.add(request.request_id, request.kv_transfer_params, ids, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> LatentConnectorMetadata:
        return LatentConnectorMetadata(self._pending.pop_all())

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._pending.discard(request.request_id)
        return False, None

    # ---- in a worker -------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Keep the names of the layers with a paged cache. Raises LatentMASError where one cannot be written to."""
        layers = self._vllm_config.compilation_config.static_forward_context
        for name in kv_caches:
            if not hasattr(layers[name].impl, "do_kv_cache_update"):
                raise _refusal(
                    f"the attention backend {type(layers[name].impl).__name__}, which has no do_kv_cache_update",
                    "start vLLM with another attention_backend",
                )
        layers_of_rank = self._vllm_config.model_config.get_num_layers(self._vllm_config.parallel_config)
        if len(kv_caches) != layers_of_rank:
            raise _refusal(f"{len(kv_caches)} layers with a paged cache of {layers_of_rank}")
        self._names = list(kv_caches)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Write the loads of this step into the paged cache. A load that fails ends its own request only."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, LatentConnectorMetadata)
        for load in metadata.loads:
            try:
                self._load(load, forward_context.no_compile_layers)
            except Exception as error:  # any exception that leaves this method would end the engine, for all requests
                logger.error(
                    "request %s has no memory to go on from: %s: %s", load.request, type(error).__name__, error
                )
                self._failed |= load.block_ids(self.block_size)

    def _load(self, load: PendingLoad, layers: dict[str, Any]) -> None:
        if load.source is None:
            raise LatentMASError(load.fault)
        kv = read_kv_rows(self.folder, load.source, self.fingerprint)
        _, count, heads, _, head_dim = kv.shape
        if (count, heads, head_dim, kv.dtype) != (self.layers, self.heads, self.head_dim, self.dtype):
            raise LatentMASError(
                f"{load.source.file} has {count} layers, {heads} KV heads of {head_dim} in {kv.dtype}; this engine runs "
                f"{self.layers} layers, {self.heads} KV heads of {self.head_dim} in {self.dtype}"
            )
        heads_of_rank = kv_heads_of_rank(
            get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size(), heads
        )
        kv = kv[:, :, heads_of_rank, load.start : load.stop]
        check_finite(kv, load.source.file)
        slot_mapping = None
        assert self._names, "register_kv_caches comes first"
        for name in self._names:
            layer = layers[name]
            # [slots, heads, head_dim], as in a forward.
            keys, values = kv[:, extract_layer_index(name)].transpose(1, 2).to(layer.kv_cache.device).contiguous()
            if slot_mapping is None:
                slot_mapping = load.slot_mapping(self.block_size).to(layer.kv_cache.device)
            layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, slot_mapping)

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: all layers are loaded before the forward."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Do nothing: no KV leaves vLLM."""

    def wait_for_save(self) -> None:
        """Do nothing: no KV leaves vLLM."""


def check_supported(vllm_config: Any) -> None:
    """Raise LatentMASError for an engine whose paged cache does not hold plain keys and values of all positions."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    stored = vllm_config.cache_config.cache_dtype
    dtype = str(model.dtype).removeprefix("torch.")
    if model.use_mla:
        raise _refusal(f"{model.model} with compressed keys and values (MLA)")
    if model.get_sliding_window() is not None:
        raise _refusal(f"{model.model} with a sliding window")
    if stored not in ("auto", dtype):
        raise _refusal(f"kv_cache_dtype {stored} for a model in {dtype}", "leave it at auto")
    if vllm_config.speculative_config is not None:
        raise _refusal("speculative decoding", "start vLLM without it")
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise _refusal("context parallelism", "start vLLM without it")


def _refusal(got: str, remedy: str = "hand embeddings over") -> LatentMASError:
    return LatentMASError(
        f"LatentConnector got {got}; supported are models with full attention in every layer and keys and values in the "
        f"model's dtype: {remedy}"
    )
