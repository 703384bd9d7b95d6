"""A KVBuffer in a file: how it is written, and how a file of unknown origin is read and checked.

The file is safetensors, so it holds numbers and text and nothing that is executed:

    kv             [2, layers, B, kv_heads, S, head_dim]   keys and values of the first S slots, S the longest row's length
    lengths        int64 [B]
    next_position  int64 [B]
    positions      int64 [B, S]
    metadata       "latentmas": JSON with the format, the model's fingerprint and description, the segments, and, where it
                   is not 0 in all rows, `complete_from` under the name "whole_from"

Slots behind a row's length are zero in `kv` and `positions`. Nothing here modifies a cache that is given.
"""

import json
import os
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentmas_kernels.cache.buffer import KVBuffer
from latentmas_kernels.cache.segments import Segment
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.architecture import Architecture, KVShape
from latentmas_kernels.models.fingerprint import ModelFingerprint, describe, model_fingerprint
from latentmas_kernels.storage import atomic_write

FORMAT = "latentmas-cache-1"
TENSORS = ("kv", "lengths", "next_position", "positions")
REQUIRED_METADATA = {"format", "fingerprint", "model", "segments"}
COMPLETE_FROM = "whole_from"  # the field had this name before the attribute was renamed; files keep it
OPTIONAL_METADATA = {COMPLETE_FROM}
KINDS = get_args(get_type_hints(Segment)["kind"])
# Bytes; the objects of JSON take twenty times its size, with which a hostile file could exhaust the memory.
HEADER_LIMIT = 16 * 2**20
POSITION_LIMIT = 2**31 - 1

BufferT = TypeVar("BufferT", bound=KVBuffer)


def save_cache(cache: KVBuffer, path: str | os.PathLike[str], model: Any) -> None:
    """See `LatentCache.save`; for a cache without shared prefixes."""
    fingerprint = ModelFingerprint.of(model)
    fingerprint.check(cache.kv_shape)
    write_cache(cache, Path(path), fingerprint)


def write_cache(cache: KVBuffer, path: Path, fingerprint: ModelFingerprint) -> None:
    """Write a cache without shared prefixes that is known to be of that model."""
    metadata: dict[str, Any] = {
        "format": FORMAT,
        "fingerprint": fingerprint.fingerprint,
        "model": fingerprint.model,
        "segments": [vars(segment) for segment in cache.segments],
    }
    if bool(cache.complete_from.any()):
        metadata[COMPLETE_FROM] = cache.complete_from.tolist()
    text = json.dumps(metadata)
    if len(text) > HEADER_LIMIT // 2:  # its quotes are escaped once more in the header
        raise LatentMASError(
            f"this cache has {len(cache.segments)} segments of {cache.batch_size} rows; their list may take up to "
            f"{HEADER_LIMIT // 2**21} MB in a file and takes {len(text) / 2**20:.0f}: save fewer rows at a time (select)"
        )
    slots = max(1, int(cache.lengths.max()))
    copy = cache.new_empty(cache.batch_size, slots, torch.device("cpu"))
    for layer in range(cache.kv_shape.layers):  # one at a time: a device makes a temporary of what leaves it
        copy.keys[layer].copy_(cache.keys[layer, :, :, :slots])
        copy.values[layer].copy_(cache.values[layer, :, :, :slots])
    positions = cache.positions[:, :slots].to("cpu", copy=True)
    for row, length in enumerate(cache.lengths.tolist()):  # slots behind it hold whatever was there before
        copy.buffer[:, :, row, :, length:] = 0
        positions[row, length:] = 0
    tensors = {
        "kv": copy.buffer,
        "lengths": cache.lengths,
        "next_position": cache.next_position.clone(),  # safetensors takes no two tensors of one storage
        "positions": positions,
    }
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"latentmas": text})
        except SafetensorError as error:  # a full disk, say
            raise OSError(f"{path} could not be written: {error}") from error


def load_cache(cls: type[BufferT], path: str | os.PathLike[str], model: Any) -> BufferT:
    """Return the `cls` of a file; see `LatentCache.load`."""
    path = Path(path)
    architecture = Architecture.of(model)
    saved = read_file(path)
    _check_model(path, saved, model, architecture)
    lengths = saved.lengths.tolist()
    segments = _segments(path, saved.metadata["segments"], lengths)
    complete_from = _complete_from(path, saved.metadata.get(COMPLETE_FROM, [0] * len(lengths)), lengths)

    if architecture.device.type == "cpu":
        cache = cls.from_buffer(saved.kv, architecture.gaps)
    else:
        cache = cls.for_model(architecture, len(lengths), saved.kv.shape[4])
        cache.buffer.copy_(saved.kv)
    cache.lengths, cache.next_position, cache.segments = saved.lengths, saved.next_position, segments
    cache.positions, cache.complete_from = saved.positions.to(architecture.device), torch.tensor(complete_from)
    return cache


@dataclass(frozen=True)
class CacheFile:
    """The content of a file. Tensors are as in the file; `kv` is mapped, copy-on-write.

    Attributes:
        writer: the model that wrote it.
        metadata: its fields; the values of segments and whole_from are not checked yet.
    """

    writer: ModelFingerprint
    metadata: dict[str, Any]
    kv: Tensor
    lengths: Tensor
    next_position: Tensor
    positions: Tensor


def read_file(path: Path) -> CacheFile:
    """Read a file without a model of transformers. Everything is checked but whether the reader's model wrote it, and whether
    keys and values are finite.

    Raises:
        FileNotFoundError: where there is no such file.
        LatentMASError: for a file that is damaged or not of this format.
    """
    metadata, tensors = _read(path)
    kv = tensors.pop("kv")
    writer = _writer(path, metadata)
    if kv.dim() != 6 or kv.shape[0] != 2 or min(kv.shape) < 1 or not kv.is_floating_point():
        raise _refusal(
            path,
            f"keys and values {list(kv.shape)} in {kv.dtype}",
            "[2, layers, B, kv_heads, slots, head_dim], none of them 0, in a floating point dtype",
        )
    # Copies: what was checked stays as it is, whatever happens to the file.
    lengths, next_position, positions = (tensors[name].clone() for name in TENSORS[1:])
    _check_rows(path, kv.shape[2], kv.shape[4], lengths, next_position, positions)
    return CacheFile(writer, metadata, kv, lengths, next_position, positions)


# ---- the model -----------------------------------------------------------------------------------------------------


def _writer(path: Path, metadata: dict[str, Any]) -> ModelFingerprint:
    fingerprint, model = metadata["fingerprint"], metadata["model"]
    if not (isinstance(fingerprint, str) and len(fingerprint) == 64 and set(fingerprint) <= set("0123456789abcdef")):
        raise _refusal(path, f"the fingerprint {reprlib.repr(fingerprint)}", "a sha256 in hexadecimal")
    if not (isinstance(model, str) and model.isprintable() and len(model) <= 200):
        raise _refusal(path, f"the model {reprlib.repr(model)}", "a description of up to 200 characters")
    return ModelFingerprint(fingerprint, model)


def _check_model(path: Path, saved: CacheFile, model: Any, architecture: Architecture) -> None:
    """Raise LatentMASError where another model wrote the file."""
    fingerprint, shape = saved.writer.fingerprint, architecture.kv_shape
    another = (
        f"{path} is the cache of another model: {saved.writer.model} wrote it (fingerprint {fingerprint[:12]}), got "
        f"{describe(architecture)} (fingerprint {{}}). Load it with the model that wrote it, with the same weights, or let "
        "this one read the texts itself."
    )
    _, layers, _, heads, _, width = saved.kv.shape
    if KVShape(layers, heads, width, shape.dtype) != shape:
        raise LatentMASError(another.format("not taken, the shapes differ"))
    if saved.kv.dtype != shape.dtype:
        raise LatentMASError(
            f"{path} holds keys and values in {saved.kv.dtype}, {architecture.name} computes in {shape.dtype}; supported "
            f"is the dtype that the model runs in: load the model with dtype={saved.kv.dtype}"
        )
    own = model_fingerprint(model)
    if fingerprint != own:
        raise LatentMASError(another.format(own[:12]))


# ---- reading content that is not trusted ----------------------------------------------------------------------------------


def _refusal(path: Path, found: str, supported: str) -> LatentMASError:
    return LatentMASError(
        f"{path} cannot be read as a LatentCache: found {found}; supported is {supported}. "
        "Save the cache again with LatentCache.save()."
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the metadata, whose values are not checked yet, and the tensors, mapped copy-on-write."""
    size = path.stat().st_size
    if not path.is_file():
        raise _refusal(path, "a folder or a device", "a safetensors file")
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > size - 8:
        raise _refusal(path, f"{size} bytes that are no safetensors file, or the first part of one", "a whole one")
    if header > HEADER_LIMIT:
        raise _refusal(path, f"a header of {header:,} bytes", f"up to {HEADER_LIMIT:,}")
    try:
        with safe_open(path, framework="pt") as file:
            header_metadata, names = file.metadata() or {}, sorted(file.keys())
            if names != list(TENSORS):
                raise _refusal(path, f"tensors named {reprlib.repr(names)}", f"just {', '.join(TENSORS)}")
            tensors = {name: file.get_tensor(name) for name in TENSORS}
    except (SafetensorError, RuntimeError) as error:  # the latter where it is too large to be mapped
        raise _refusal(path, f"no whole safetensors file ({error})", "a whole one") from error
    if any(tensor.data_ptr() % tensor.element_size() for tensor in tensors.values()):
        raise _refusal(path, "tensors at odd addresses", "a header padded to a multiple of 8 bytes")

    try:
        metadata = json.loads(header_metadata.get("latentmas", "null"))
    except (ValueError, RecursionError) as error:
        raise _refusal(path, f"metadata that is no JSON ({type(error).__name__})", "what save() writes") from error
    if not isinstance(metadata, dict) or "format" not in metadata:
        raise _refusal(path, "a safetensors file without the metadata of a LatentCache", f"the format {FORMAT}")
    if metadata["format"] != FORMAT:
        raise _refusal(path, f"the format {reprlib.repr(metadata['format'])}", FORMAT)
    if set(metadata) - OPTIONAL_METADATA != REQUIRED_METADATA:
        raise _refusal(path, f"the fields {reprlib.repr(sorted(metadata))}", f"{', '.join(sorted(REQUIRED_METADATA))}")
    return metadata, tensors


def _check_rows(path: Path, batch: int, slots: int, lengths: Tensor, next_position: Tensor, positions: Tensor) -> None:
    """Raise LatentMASError where a call that continues these rows would leave the buffer or the positions of a model."""
    for name, tensor, shape in (
        ("lengths", lengths, [batch]),
        ("next_position", next_position, [batch]),
        ("positions", positions, [batch, slots]),
    ):
        if tensor.dtype != torch.int64 or list(tensor.shape) != shape:
            raise _refusal(path, f"{name} {list(tensor.shape)} in {tensor.dtype}", f"{shape} in torch.int64")

    def check(wrong: Tensor, name: str, tensor: Tensor, supported: str) -> None:
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise _refusal(path, f"{name} {reprlib.repr(tensor[row].tolist())} in row {row}", supported)

    check((lengths < 0) | (lengths > slots), "the length", lengths, f"0 to the {slots} slots that there are")
    limits = f"0 to {POSITION_LIMIT}"
    check((next_position < 0) | (next_position > POSITION_LIMIT), "the next position", next_position, limits)
    used = torch.arange(slots) < lengths[:, None]
    rising = torch.cat([positions[:, :1] >= 0, positions[:, 1:] > positions[:, :-1]], dim=1)
    check((used & ~rising).any(1), "positions", positions, "positions of at least 0 that rise from slot to slot")
    beyond = (used & (positions >= next_position[:, None])).any(1)
    check(beyond, "positions", positions, "positions below the row's next position")


def _segments(path: Path, entries: Any, lengths: list[int]) -> list[Segment]:
    if not isinstance(entries, list):
        raise _refusal(path, f"segments {reprlib.repr(entries)}", "a list")
    segments = []
    for entry in entries:
        if not isinstance(entry, dict) or set(entry) != {"agent", "kind", "start", "stop"}:
            raise _refusal(path, f"the segment {reprlib.repr(entry)}", "an object of agent, kind, start and stop")
        agent, kind, start, stop = entry["agent"], entry["kind"], entry["start"], entry["stop"]
        if not isinstance(agent, str | None) or kind not in KINDS:
            raise _refusal(
                path,
                f"a segment of kind {reprlib.repr(kind)} by {reprlib.repr(agent)}",
                f"{', '.join(KINDS)}, by a name or null",
            )
        for ends in (start, stop):
            if not isinstance(ends, list) or len(ends) != len(lengths) or any(type(end) is not int for end in ends):
                raise _refusal(
                    path, f"the ends {reprlib.repr(ends)} of a segment", f"{len(lengths)} integers, one per row"
                )
        if not all(0 <= a <= b <= length for a, b, length in zip(start, stop, lengths, strict=True)):
            raise _refusal(
                path,
                f"a segment from {reprlib.repr(start)} to {reprlib.repr(stop)}",
                f"slots within the lengths {reprlib.repr(lengths)}",
            )
        segments.append(Segment(agent, kind, tuple(start), tuple(stop)))
    return segments


def _complete_from(path: Path, entries: Any, lengths: list[int]) -> list[int]:
    fits = isinstance(entries, list) and len(entries) == len(lengths) and all(type(n) is int for n in entries)
    if not (fits and all(0 <= n <= length for n, length in zip(entries, lengths, strict=True))):
        raise _refusal(
            path, f"{COMPLETE_FROM} {reprlib.repr(entries)}", f"0 to the length, for each of {len(lengths)} rows"
        )
    return entries
