"""A LatentCache in a file: what is saved, which model it belongs to, and how a file of unknown origin is read.

The file is safetensors, so it holds numbers and text and nothing that is executed:

    kv             [2, layers, B, kv_heads, S, head_dim]   keys and values of the first S slots, S the longest row's length
    lengths        int64 [B]
    next_position  int64 [B]
    positions      int64 [B, S]
    metadata       "latentmas": JSON with the format, the model's fingerprint and description, the segments, and, where it
                   is not 0 in all rows, `complete_from`

What lies behind a row's length is zero in `kv` and `positions`.
"""

import hashlib
import json
import os
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentmas_kernels.cache.latent_cache import LatentCache, Segment
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.storage import atomic_write

FORMAT = "latentmas-cache-1"
TENSORS = ("kv", "lengths", "next_position", "positions")
FACTS = {"format", "fingerprint", "model", "segments"}
OPTIONAL_METADATA = {"complete_from"}
KINDS = get_args(get_type_hints(Segment)["kind"])
# Bytes; JSON becomes objects twenty times its size, which a hostile file could exhaust memory with.
HEADER_LIMIT = 16 * 2**20
POSITION_LIMIT = 2**31 - 1
SAMPLES = 64  # elements of each weight that the fingerprint looks at
# Fields of a configuration that say nothing about keys and values: where it came from, how it is run, what ends a text, names.
VOLATILE = {
    "transformers_version", "architectures", "dtype", "use_cache", "return_dict", "output_attentions",
    "output_hidden_states", "output_router_logits", "bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id",
    "tokenizer_class", "task_specific_params", "problem_type", "finetuning_task",
}  # fmt: skip


@dataclass(frozen=True)
class ModelFingerprint:
    """Whose cache it is: what a file of one says of its model.

    Attributes:
        fingerprint: `model_fingerprint`.
        model: shapes and dtype in words.
    """

    fingerprint: str
    model: str

    @classmethod
    def of(cls, model: Any) -> "ModelFingerprint":
        return cls(model_fingerprint(model), _describe(Architecture.of(model)))

    def check(self, cache: LatentCache) -> None:
        """Raise ValueError where a cache has not the shape and dtype that this model writes."""
        _, layers, _, heads, _, width = cache.buffer.shape
        got = _description("cache", layers, heads, width, cache.buffer.dtype)
        name, _, shape = self.model.partition(" of ")
        if got != f"cache of {shape}":
            raise LatentMASError(
                f"got a {got}, {name} writes a cache of {shape}; pass the model that wrote this cache, or a cache of that model"
            )


def save_cache(cache: LatentCache, path: str | os.PathLike[str], model: Any) -> None:
    """`LatentCache.save`."""
    stamp = ModelFingerprint.of(model)
    stamp.check(cache)
    write_cache(cache, Path(path), stamp)


def write_cache(cache: LatentCache, path: Path, stamp: ModelFingerprint) -> None:
    """As `save_cache`, for a cache that is known to be of that model and borrows nothing."""
    _, layers, batch, heads, _, width = cache.buffer.shape
    told: dict[str, Any] = {
        "format": FORMAT,
        "fingerprint": stamp.fingerprint,
        "model": stamp.model,
        "segments": [vars(segment) for segment in cache.segments],
    }
    if bool(cache.complete_from.any()):
        told["complete_from"] = cache.complete_from.tolist()
    facts = json.dumps(told)
    if len(facts) > HEADER_LIMIT // 2:  # its quotes are escaped once more in the header
        raise LatentMASError(
            f"this cache has {len(cache.segments)} segments of {batch} rows; their list may take up to "
            f"{HEADER_LIMIT // 2**21} MB in a file and takes {len(facts) / 2**20:.0f}: save fewer rows at a time (select)"
        )
    slots = max(1, int(cache.lengths.max()))
    own = LatentCache(
        layers=layers, batch=batch, kv_heads=heads, capacity=slots, head_dim=width, dtype=cache.buffer.dtype
    )
    for layer in range(layers):  # one at a time: a device makes a temporary of what leaves it
        own.keys[layer].copy_(cache.keys[layer, :, :, :slots])
        own.values[layer].copy_(cache.values[layer, :, :, :slots])
    positions = cache.positions[:, :slots].to("cpu", copy=True)
    for row, length in enumerate(cache.lengths.tolist()):  # what lies behind is whatever the memory held before
        own.buffer[:, :, row, :, length:] = 0
        positions[row, length:] = 0
    tensors = {
        "kv": own.buffer,
        "lengths": cache.lengths,
        "next_position": cache.next_position.clone(),  # the format takes no two tensors of one memory
        "positions": positions,
    }
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"latentmas": facts})
        except SafetensorError as error:  # a full disk, say
            raise OSError(f"{path} could not be written: {error}") from error


def load_cache(path: str | os.PathLike[str], model: Any) -> LatentCache:
    """`LatentCache.load`."""
    path = Path(path)
    architecture = Architecture.of(model)
    saved = read_file(path)
    _check_model(path, saved, model, architecture)
    lengths = saved.lengths.tolist()
    segments = _segments(path, saved.facts["segments"], lengths)
    complete_from = _whole_from(path, saved.facts.get("complete_from", [0] * len(lengths)), lengths)

    if architecture.device.type == "cpu":
        cache = LatentCache.from_buffer(saved.kv, architecture.gaps)
    else:
        cache = LatentCache.for_model(architecture, len(lengths), saved.kv.shape[4])
        cache.buffer.copy_(saved.kv)
    cache.lengths, cache.next_position, cache.segments = saved.lengths, saved.next_position, segments
    cache.positions, cache.complete_from = saved.positions.to(architecture.device), torch.tensor(complete_from)
    return cache


@dataclass(frozen=True)
class CacheFile:
    """What a file holds. Tensors as in the file; `kv` is mapped, copy-on-write.

    Attributes:
        stamp: of the model that wrote it.
        facts: of the metadata; segments and complete_from may still be anything.
    """

    stamp: ModelFingerprint
    facts: dict[str, Any]
    kv: Tensor
    lengths: Tensor
    next_position: Tensor
    positions: Tensor


def read_file(path: Path) -> CacheFile:
    """A file for a reader that has no model of transformers; everything is checked but that keys and values are of the reader's
    model, and finite.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for a file that is damaged or not of this format.
    """
    facts, tensors = _read(path)
    kv = tensors.pop("kv")
    stamp = _stamp(path, facts)
    if kv.dim() != 6 or kv.shape[0] != 2 or min(kv.shape) < 1 or not kv.is_floating_point():
        raise _refusal(
            path,
            f"keys and values {list(kv.shape)} in {kv.dtype}",
            "[2, layers, B, kv_heads, slots, head_dim], none of them 0, in a floating point dtype",
        )
    # Copies: what was checked stays so, whatever happens to the file.
    lengths, next_position, positions = (tensors[name].clone() for name in TENSORS[1:])
    _check_rows(path, kv.shape[2], kv.shape[4], lengths, next_position, positions)
    return CacheFile(stamp, facts, kv, lengths, next_position, positions)


# ---- the model -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def model_fingerprint(model: Any) -> str:
    """sha256 over what decides what keys and values mean: the configuration and a sample of the weights.

    The sample is up to 64 elements of every parameter and stored buffer, spread over it, as float32: milliseconds where all
    weights would take seconds. Whatever touches whole matrices is seen: a training step, another checkpoint, an adapter, merged
    or not, and which one is active. Not seen are changes of single elements or rows between the samples (one added token,
    say), changes that the dtype rounds away in all of them, weights swapped on purpose, and hooks or a forward() of the
    caller's own.

    The same before and after saving and loading, merging of the weights by the engines, and a subclass set on the model.
    Not the same across dtypes that round differently, nor across versions of transformers that give the configuration
    other fields.

    Raises:
        ValueError: where weights are not in memory (offloaded to the meta device), or are no tensors.
    """
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in VOLATILE}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    for name, weight in sorted(model.state_dict().items()):
        if name in tied:
            continue
        if not isinstance(weight, Tensor) or weight.is_meta:
            raise LatentMASError(
                f"the weight {name} of {type(model).__name__} is no tensor in memory (offloaded, or packed by a quantizer); a "
                "fingerprint needs all of them: load the model without that"
            )
        digest.update(f"{name} {list(weight.shape)}".encode())
        sample = weight[torch.unravel_index(_places(weight.numel()).to(weight.device), weight.shape)]
        digest.update(sample.float().cpu().numpy().tobytes())
    for name, module in model.named_modules():  # adapters that are not merged: their weights are there either way
        state = [
            getattr(module, field, None)
            for field in ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
        ]
        if hasattr(module, "merged_adapters"):
            digest.update(f"{name} {state}".encode())
    return digest.hexdigest()


def _places(size: int) -> Tensor:
    """int64, up to SAMPLES places below `size`, in steps of the golden ratio: steps of a fraction of the size stay in one
    column of many matrices."""
    if size <= SAMPLES:
        return torch.arange(size)
    return (torch.arange(SAMPLES, dtype=torch.float64) * 0.6180339887498949 % 1 * size).long()


def _describe(architecture: Architecture) -> str:
    return _description(
        architecture.name, architecture.layers, architecture.kv_heads, architecture.head_dim, architecture.dtype
    )


def _description(name: str, layers: int, heads: int, width: int, dtype: torch.dtype) -> str:
    return f"{name} of {layers} layers, {heads} KV heads of {width}, {dtype}"


def _stamp(path: Path, facts: dict[str, Any]) -> ModelFingerprint:
    fingerprint, writer = facts["fingerprint"], facts["model"]
    if not (isinstance(fingerprint, str) and len(fingerprint) == 64 and set(fingerprint) <= set("0123456789abcdef")):
        raise _refusal(path, f"the fingerprint {reprlib.repr(fingerprint)}", "a sha256 in hexadecimal")
    if not (isinstance(writer, str) and writer.isprintable() and len(writer) <= 200):
        raise _refusal(path, f"the model {reprlib.repr(writer)}", "a description of up to 200 characters")
    return ModelFingerprint(fingerprint, writer)


def _check_model(path: Path, saved: CacheFile, model: Any, architecture: Architecture) -> None:
    """Raise ValueError where these are not keys and values of this model."""
    fingerprint, writer, kv = saved.stamp.fingerprint, saved.stamp.model, saved.kv
    another = (
        f"{path} is the cache of another model: {writer} wrote it (fingerprint {fingerprint[:12]}), got "
        f"{_describe(architecture)} (fingerprint {{}}). Load it with the model that wrote it, with the same weights, or let "
        "this one read the texts itself."
    )
    _, layers, _, heads, _, width = kv.shape
    if (layers, heads, width) != (architecture.layers, architecture.kv_heads, architecture.head_dim):
        raise LatentMASError(another.format("not taken, the shapes differ"))
    if kv.dtype != architecture.dtype:
        raise LatentMASError(
            f"{path} holds keys and values in {kv.dtype}, {architecture.name} computes in {architecture.dtype}; supported "
            f"is the dtype that the model runs in: load the model with dtype={kv.dtype}"
        )
    own = model_fingerprint(model)
    if fingerprint != own:
        raise LatentMASError(another.format(own[:12]))


# ---- reading what may be anything ----------------------------------------------------------------------------------


def _refusal(path: Path, found: str, supported: str) -> ValueError:
    return LatentMASError(
        f"{path} cannot be read as a LatentCache: found {found}; supported is {supported}. "
        "Save the cache again with LatentCache.save()."
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The facts of the metadata, whose values may still be anything, and the tensors, mapped copy-on-write."""
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
            metadata, names = file.metadata() or {}, sorted(file.keys())
            if names != list(TENSORS):
                raise _refusal(path, f"tensors named {reprlib.repr(names)}", f"just {', '.join(TENSORS)}")
            tensors = {name: file.get_tensor(name) for name in TENSORS}
    except (SafetensorError, RuntimeError) as error:  # the latter where it is too large to be mapped
        raise _refusal(path, f"no whole safetensors file ({error})", "a whole one") from error
    if any(tensor.data_ptr() % tensor.element_size() for tensor in tensors.values()):
        raise _refusal(path, "tensors at odd addresses", "a header padded to a multiple of 8 bytes")

    try:
        facts = json.loads(metadata.get("latentmas", "null"))
    except (ValueError, RecursionError) as error:
        raise _refusal(path, f"metadata that is no JSON ({type(error).__name__})", "what save() writes") from error
    if not isinstance(facts, dict) or "format" not in facts:
        raise _refusal(path, "a safetensors file without the metadata of a LatentCache", f"the format {FORMAT}")
    if facts["format"] != FORMAT:
        raise _refusal(path, f"the format {reprlib.repr(facts['format'])}", FORMAT)
    if set(facts) - OPTIONAL_METADATA != FACTS:
        raise _refusal(path, f"the fields {reprlib.repr(sorted(facts))}", f"{', '.join(sorted(FACTS))}")
    return facts, tensors


def _check_rows(path: Path, batch: int, slots: int, lengths: Tensor, next_position: Tensor, positions: Tensor) -> None:
    """Raise ValueError where a call that goes on from these rows would leave the buffer or the positions of a model."""
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


def _whole_from(path: Path, entries: Any, lengths: list[int]) -> list[int]:
    fits = isinstance(entries, list) and len(entries) == len(lengths) and all(type(n) is int for n in entries)
    if not (fits and all(0 <= n <= length for n, length in zip(entries, lengths, strict=True))):
        raise _refusal(
            path, f"complete_from {reprlib.repr(entries)}", f"0 to the length, for each of {len(lengths)} rows"
        )
    return entries
