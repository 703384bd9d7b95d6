"""A LatentCache as a file that vLLM's connector maps, in the format of `LatentCache.save`.

On one host the folder is in shared memory (/dev/shm): nothing is written to a disk, and the reader maps the pages of the
writer. Across hosts it is a folder of a file system that both sides see.
"""

import os
import re
import shutil
import socket
import tempfile
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from latentmas_kernels import LatentCache
from latentmas_kernels.cache.file import read_file, write_cache
from latentmas_kernels.cache.free_memory import InsufficientMemoryError
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.architecture import Architecture, UnsupportedModelError
from latentmas_kernels.models.fingerprint import ModelFingerprint
from latentmas_kernels.models.rope import rope_types

FILE, ROW, SLOTS = "latentmas_file", "latentmas_row", "latentmas_slots"
"""Keys of a request's `kv_transfer_params`."""
SUFFIX = ".latentmas-kv"
SHARED_MEMORY = Path("/dev/shm")


def shared_folder() -> Path:
    """Return the default folder for KV files on one host."""
    return SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())


def check_transferable(model: Any) -> None:
    """Raise UnsupportedModelError where vLLM does not keep keys and values of all positions in every layer, or rotates keys
    differently."""
    architecture = Architecture.of(model)
    moving = rope_types(model.config) & {"longrope", "dynamic"}
    if moving:
        raise UnsupportedModelError(
            f"{architecture.name} has RoPE of type {moving.pop()}, whose angles change with the length; vLLM takes those of "
            "its max_model_len for every position, and the keys here were rotated by others. Take --hand-over embeds, or let "
            "the chain's own engine decode"
        )
    windowed = sum(window is not None for window in architecture.windows)
    if windowed:
        raise UnsupportedModelError(
            f"{architecture.name} has a sliding window in {windowed} of its {architecture.layers} layers, of which vLLM keeps "
            "only the latest blocks; keys and values can be handed over for models whose layers all have full attention. Take "
            "--hand-over embeds, or let the chain's own engine decode"
        )


@dataclass(frozen=True)
class KVFileRow:
    """One row of a KV file, as requests name it.

    Attributes:
        file: name of the file, without its folder.
        row: number of the row.
        slots: length of the row; all of it precedes the request's prompt.
    """

    file: str
    row: int
    slots: int

    @property
    def salt(self) -> str:
        """The request's cache_salt. Without it vLLM's prefix cache would mix rows up, since their placeholder ids are equal."""
        return f"{self.file}:{self.row}"

    @property
    def params(self) -> dict[str, Any]:
        """The request's kv_transfer_params."""
        return {FILE: self.file, ROW: self.row, SLOTS: self.slots}

    @classmethod
    def read(cls, params: Mapping[str, Any] | None) -> "KVFileRow | None":
        """Parse kv_transfer_params from any client; None where they do not name a KV file.

        Raises:
            LatentMASError: where they do, and are wrong.
        """
        if not params or not {FILE, ROW, SLOTS} & params.keys():
            return None
        file, row, slots = (params.get(name) for name in (FILE, ROW, SLOTS))
        plain = isinstance(file, str) and file.endswith(SUFFIX) and Path(file).name == file and "\0" not in file
        if not plain or type(row) is not int or type(slots) is not int or row < 0 or slots < 1:
            raise LatentMASError(
                f"got {FILE}={file!r}, {ROW}={row!r}, {SLOTS}={slots!r}; supported are the name of a file in the folder that "
                "the connector was given, a row of it from 0 on, and its number of slots"
            )
        assert isinstance(file, str)
        return cls(file, row, slots)


class KVFile:
    """The rows of a cache in a file, which `close` removes.

    Attributes:
        path: of the file.
        rows: as requests name them.
    """

    def __init__(self, cache: LatentCache, stamp: ModelFingerprint, folder: Path) -> None:
        """Write the file. This does not modify the cache.

        Args:
            cache: of the model that `stamp` is of.
            stamp: fingerprint of that model.
            folder: that the connector reads from.

        Raises:
            LatentMASError: where vLLM could not continue a row: it is empty, holds NaN or Inf, or its positions are not
                0, 1, 2, ...
            OSError: where the file cannot be written.
        """
        lengths = cache.lengths.tolist()
        for row, length in enumerate(lengths):
            if not length:
                raise LatentMASError(f"row {row} of the memory holds nothing; send its prompt as tokens")
        if bool((cache.next_position != cache.lengths).any()):
            raise LatentMASError(
                f"the slots of this memory do not have the positions 0, 1, 2, ... (lengths {lengths}, next positions "
                f"{cache.next_position.tolist()}), which vLLM assumes; rebase(model) it first"
            )
        stamp.check(cache.kv_shape)
        if bool(cache.prefix_len.any()):
            cache = cache.select(range(cache.batch_size))
        for row, length in enumerate(lengths):
            check_finite(cache.buffer[:, :, row, :, :length], f"row {row} of the memory")
        need, free = int(cache.lengths.max()) * cache.batch_size * cache.slot_bytes, shutil.disk_usage(folder).free
        if need > free:
            raise InsufficientMemoryError(
                f"a memory of {need / 2**20:,.0f} MB does not fit {folder}, where {free / 2**20:,.0f} MB are free: make room "
                "there (a container's /dev/shm: --shm-size), name another folder (--folder), or take fewer questions at a time"
            )
        name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}{SUFFIX}"
        self.path = folder / name
        write_cache(cache, self.path, stamp)
        self.rows = [KVFileRow(name, row, length) for row, length in enumerate(lengths)]

    def close(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


def read_kv_rows(folder: Path, source: KVFileRow, fingerprint: str) -> Tensor:
    """Return [2, layers, kv_heads, slots, head_dim], the keys and values of a row, mapped: pages are read when they are used.

    Raises:
        OSError: where the file cannot be read.
        LatentMASError: where it is damaged, of another model, or does not have the row that the request names.
    """
    path = folder / source.file
    saved = read_file(path)
    if saved.writer.fingerprint != fingerprint:
        raise LatentMASError(
            f"{path} is the memory of another model: {saved.writer.model} wrote it (fingerprint "
            f"{saved.writer.fingerprint[:12]}), this engine was started for {fingerprint[:12]}; send it to that model's engine"
        )
    lengths = saved.lengths.tolist()
    if source.row >= len(lengths) or lengths[source.row] != source.slots:
        raise LatentMASError(f"{path} holds rows of {lengths} slots; got row {source.row} of {source.slots}")
    if not torch.equal(saved.positions[source.row, : source.slots], torch.arange(source.slots)):
        raise LatentMASError(f"{path} has gaps in its positions; rebase(model) the memory before it is handed over")
    return saved.kv[:, :, source.row, :, : source.slots]


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise LatentMASError where a value is NaN or Inf: vLLM would answer every later request with nonsense.

    Both extremes propagate NaN. 7 ms for 33 MB in bfloat16 on one core; a sum in float32 takes 37, `isfinite` on all 81.
    """
    if not bool(tensor.amax().isfinite() & tensor.amin().isfinite()):
        raise LatentMASError(
            f"{what} holds NaN or Inf, which would spoil the engine for every later request; nothing was sent. Look for the "
            "agent that thought it (--trace), or take another aligner or dtype"
        )


def kv_heads_of_rank(rank: int, ranks: int, heads: int) -> slice:
    """Return the KV heads of a tensor-parallel rank: heads / ranks for each or, with more ranks than heads, one head for
    ranks / heads ranks."""
    if max(ranks, heads) % min(ranks, heads):
        raise LatentMASError(f"got {heads} KV heads and tensor_parallel_size {ranks}; one must divide the other")
    if ranks <= heads:
        per_rank = heads // ranks
        return slice(rank * per_rank, (rank + 1) * per_rank)
    head = rank * heads // ranks
    return slice(head, head + 1)


def remove_stale(folder: Path) -> None:
    """Remove files that killed processes of this host left in a folder, half-written ones included."""
    stale = re.compile(rf"\.?{re.escape(socket.gethostname())}-([0-9]{{1,9}})-[0-9a-f]+{re.escape(SUFFIX)}(\..*)?")
    for path in folder.glob("*"):
        found = stale.fullmatch(path.name)
        if found and not psutil.pid_exists(int(found[1])):
            with suppress(OSError):  # already removed, or another user's
                path.unlink()
