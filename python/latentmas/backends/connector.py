"""The import path that vLLM configurations name (`kv_connector_module_path`)."""

from latentmas.backends.vllm.connector import LatentConnector

__all__ = ["LatentConnector"]
