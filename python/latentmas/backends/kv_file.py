"""Keys and values on their way to vLLM: a file that `LatentCache.save` could have written, in memory that both sides see.

On one host the folder is one in shared memory (/dev/shm), so nothing is written to a disk and the reader maps what the writer
left; across hosts it is one of a file system that they share.
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
"""What a request says of its memory, in `kv_transfer_params`."""
SUFFIX = ".latentmas-kv"
SHARED_MEMORY = Path("/dev/shm")


def shared_folder() -> Path:
    """Where parcels of one host lie."""
    return SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())


def check_transferable(model: Any) -> None:
    """Raise UnsupportedModelError where vLLM keeps something else for a layer than keys and values of all positions, or rotates
    keys otherwise."""
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
    """One row of a parcel, as a request names it.

    Attributes:
        file: its name in the folder.
        row: of the file.
        slots: of that row, all of which come before the prompt.
    """

    file: str
    row: int
    slots: int

    @property
    def salt(self) -> str:
        """Keeps vLLM's prefix cache from taking one memory for another: their placeholders are alike."""
        return f"{self.file}:{self.row}"

    @property
    def params(self) -> dict[str, Any]:
        """kv_transfer_params of a request."""
        return {FILE: self.file, ROW: self.row, SLOTS: self.slots}

    @classmethod
    def read(cls, params: Mapping[str, Any] | None) -> "KVFileRow | None":
        """From kv_transfer_params of anyone; None where they do not speak of a parcel.

        Raises:
            ValueError: where they do, and are wrong.
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
    """The rows of a memory in a file. A context manager: the file is gone behind it.

    Attributes:
        rows: as requests name them.
    """

    def __init__(self, memory: LatentCache, stamp: ModelFingerprint, folder: Path) -> None:
        """Write the file.

        Args:
            memory: of the model that the stamp is of; it is not changed.
            stamp: of that model.
            folder: that the connector reads from.

        Raises:
            ValueError: where vLLM could not go on from a row as it is: it holds nothing, NaN or Inf, or its positions are not
                0, 1, 2, ...
            OSError: where the file cannot be written.
        """
        lengths = memory.lengths.tolist()
        for row, length in enumerate(lengths):
            if not length:
                raise LatentMASError(f"row {row} of the memory holds nothing; send its prompt as tokens")
        if bool((memory.next_position != memory.lengths).any()):
            raise LatentMASError(
                f"the slots of this memory do not have the positions 0, 1, 2, ... (lengths {lengths}, next positions "
                f"{memory.next_position.tolist()}), which vLLM assumes; rebase(model) it first"
            )
        stamp.check(memory.kv_shape)
        if bool(memory.prefix_len.any()):
            memory = memory.select(range(memory.batch_size))
        for row, length in enumerate(lengths):
            check_finite(memory.buffer[:, :, row, :, :length], f"row {row} of the memory")
        need, free = int(memory.lengths.max()) * memory.batch_size * memory.slot_bytes, shutil.disk_usage(folder).free
        if need > free:
            raise InsufficientMemoryError(
                f"a memory of {need / 2**20:,.0f} MB does not fit {folder}, where {free / 2**20:,.0f} MB are free: make room "
                "there (a container's /dev/shm: --shm-size), name another folder (--folder), or take fewer questions at a time"
            )
        name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}{SUFFIX}"
        self.path = folder / name
        write_cache(memory, self.path, stamp)
        self.rows = [KVFileRow(name, row, length) for row, length in enumerate(lengths)]

    def __enter__(self) -> "KVFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


def read_kv_rows(folder: Path, handed: KVFileRow, fingerprint: str) -> Tensor:
    """[2, layers, kv_heads, slots, head_dim], the keys and values of a row, mapped: pages are read as they are used.

    Raises:
        OSError: where the file cannot be read.
        ValueError: where it is damaged, of another model, or not what the request said.
    """
    path = folder / handed.file
    saved = read_file(path)
    if saved.writer.fingerprint != fingerprint:
        raise LatentMASError(
            f"{path} is the memory of another model: {saved.writer.model} wrote it (fingerprint "
            f"{saved.writer.fingerprint[:12]}), this engine was started for {fingerprint[:12]}; send it to that model's engine"
        )
    lengths = saved.lengths.tolist()
    if handed.row >= len(lengths) or lengths[handed.row] != handed.slots:
        raise LatentMASError(f"{path} holds rows of {lengths} slots; got row {handed.row} of {handed.slots}")
    if not torch.equal(saved.positions[handed.row, : handed.slots], torch.arange(handed.slots)):
        raise LatentMASError(f"{path} has gaps in its positions; rebase(model) the memory before it is handed over")
    return saved.kv[:, :, handed.row, :, : handed.slots]


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise ValueError where some value is NaN or Inf: vLLM would answer every later request with nonsense.

    Both ends carry NaN along. 7 ms for 33 MB in bfloat16 on one core; a sum in float32 takes 37, `isfinite` on all 81.
    """
    if not bool(tensor.amax().isfinite() & tensor.amin().isfinite()):
        raise LatentMASError(
            f"{what} holds NaN or Inf, which would spoil the engine for every later request; nothing was sent. Look for the "
            "agent that thought it (--trace), or take another aligner or dtype"
        )


def kv_heads_of_rank(rank: int, ranks: int, heads: int) -> slice:
    """KV heads of a tensor-parallel rank: as many for each, or, with more ranks than heads, one for several ranks each."""
    if max(ranks, heads) % min(ranks, heads):
        raise LatentMASError(f"got {heads} KV heads and tensor_parallel_size {ranks}; one must divide the other")
    if ranks <= heads:
        own = heads // ranks
        return slice(rank * own, (rank + 1) * own)
    head = rank * heads // ranks
    return slice(head, head + 1)


def sweep(folder: Path) -> None:
    """Remove what processes of this host left in a folder when they were killed, half-written files among it."""
    left = re.compile(rf"\.?{re.escape(socket.gethostname())}-([0-9]{{1,9}})-[0-9a-f]+{re.escape(SUFFIX)}(\..*)?")
    for path in folder.glob("*"):
        found = left.fullmatch(path.name)
        if found and not psutil.pid_exists(int(found[1])):
            with suppress(OSError):  # gone by now, or another user's
                path.unlink()
