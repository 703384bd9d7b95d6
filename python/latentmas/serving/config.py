"""Configuration of `latentmas serve`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from latentmas.backends.base import KV_TRANSFERS
from latentmas.backends.vllm.http_errors import server_address
from latentmas.default_model import default_model_folder
from latentmas_kernels.errors import LatentMASError


@dataclass(frozen=True)
class ServeConfig:
    """Options of the command line.

    Attributes:
        model: folder or hub name; None is the default model.
        chains: files or names; empty for all that come with the package.
        latent_steps, max_new_tokens: as in `read_chain`.
        aligner, engine, weights: as in `Chain`.
        dtype, device: as in `load_model`.
        kv_transfer, folder, timeout: as in `VllmServer`.
        host, port: to listen at.
        vllm_url: of a running server; None starts one.
        max_waiting: as in `Gateway`.
        vllm_options: of the server that is started.
    """

    model: str | None = None
    chains: Sequence[str] = ()
    latent_steps: int | None = None
    max_new_tokens: int | None = None
    aligner: str = "auto"
    dtype: str = "auto"
    device: str | None = None
    engine: str = "auto"
    weights: str = "model"
    kv_transfer: str = "kv"
    host: str = "127.0.0.1"
    port: int = 8000
    vllm_url: str | None = None
    folder: Path | None = None
    timeout: float = 300.0
    max_waiting: int = 256
    vllm_options: Sequence[str] = ()

    @property
    def model_path(self) -> str:
        """Folder or hub name of the model."""
        return str(default_model_folder()) if self.model is None else self.model

    def check(self) -> None:
        """Raise LatentMASError for options that are not supported, or not together."""
        if self.vllm_url is not None and self.vllm_options:
            raise LatentMASError(
                f"got --vllm-url and options for vLLM ({' '.join(self.vllm_options)}); give those to the server that runs"
            )
        if self.vllm_url is not None:
            server_address(self.vllm_url)
        if self.vllm_options and not self.vllm_options[0].startswith("-"):
            raise LatentMASError(
                f"got {self.vllm_options[0]!r}; supported are options, and behind -- options of `vllm serve`, like -- "
                "--max-model-len 4096"
            )
        if self.max_waiting < 1:
            raise LatentMASError(f"--max-waiting must be 1 or more; got {self.max_waiting}")
        if self.kv_transfer not in KV_TRANSFERS:
            raise LatentMASError(f"got --hand-over {self.kv_transfer}; supported are {', '.join(KV_TRANSFERS)}")
        if not self.timeout > 0:
            raise LatentMASError(f"got --timeout {self.timeout}; supported are seconds, more than 0")
