"""What `auto` measured of a model, kept on disk: a file for each state of model, versions and settings of the measurement.

A file is JSON: {"format", "key", "nats": {kind: nats}}. Its name is the key, so that any change of what the measurement depends
on looks for another file; what does not fit is measured again.
"""

import hashlib
import json
import math
import os
import stat
import warnings
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.fingerprint import model_fingerprint
from latentmas_kernels.models.module_settings import GLOBAL_HOOKS, PASSIVE_HOOKS
from latentmas_kernels.storage import atomic_write, cache_folder

FORMAT = "latentmas-feedback-1"
LIMIT = 2**16  # bytes of a file; ours are a hundred
PLAIN = (Tensor, nn.Parameter)
# Attributes of modules that say where a model came from, or how it is trained.
IGNORED_ATTRIBUTES = {"name_or_path", "training", "gradient_checkpointing", "loss_type"}


def stored_or_measured(
    model: Any, settings: Mapping[str, Any], kinds: Collection[str], measure: Callable[[], dict[str, float]]
) -> dict[str, float]:
    """Nats per kind, from the file or from `measure`, which is then stored. One warning where a file cannot be used or made.

    Args:
        model: that is measured.
        settings: of the measurement, for JSON; with others it is measured again.
        kinds: of which there must be nats.
    """
    key = measurement_key(model, settings)
    if key is None:
        return measure()
    path = cache_folder() / "feedback" / f"{key}.json"
    if os.path.exists(path):  # noqa: PTH110 (Path.exists() raises where the folder cannot be read)
        try:
            return _load(path, key, kinds)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            warnings.warn(f"the stored measurement {path} is not used ({error}); it is measured again", stacklevel=2)
    nats = measure()
    if not all(map(math.isfinite, nats.values())):
        return nats
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps({"format": FORMAT, "key": key, "nats": nats}))
    except OSError as error:
        warnings.warn(
            f"what was measured could not be stored in {path.parent} ({error}) and will be measured again next time; set "
            "LATENTMAS_CACHE to a folder that can be written",
            stacklevel=2,
        )
    return nats


def _load(path: Path, key: str, kinds: Collection[str]) -> dict[str, float]:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > LIMIT:
        raise LatentMASError("it is no file, or a large one")
    facts = json.loads(path.read_text())
    if facts["format"] != FORMAT or facts["key"] != key:
        raise LatentMASError("it is of another format or model")
    nats = facts["nats"]
    if set(nats) != set(kinds) or not all(type(value) is float and math.isfinite(value) for value in nats.values()):
        raise LatentMASError(f"it holds no nats of {' and '.join(kinds)}")
    return dict(nats)


# ---- the key -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measurement_key(model: Any, settings: Mapping[str, Any]) -> str | None:
    """sha256 over all that the measurement depends on, as far as it can be seen.

    That is: the configuration; every element of all parameters and buffers; classes and settings of all modules (scaling,
    eps, windows, activations); dtypes, the kind of device, the attention that is used, the first token; versions of torch and
    transformers; and the settings of the measurement. A pass over the weights, where measuring takes dozens.

    Returns:
        The key; None where code runs that cannot be seen (hooks, a module's own forward) or weights are not in memory. Code
        of the caller's own classes is known by name only.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if any(GLOBAL_HOOKS) or any(type(tensor) not in PLAIN or tensor.is_meta for _, tensor in tensors):
        return None
    digest = hashlib.sha256(model_fingerprint(model).encode())

    def take(*facts: Any) -> None:
        digest.update(json.dumps(facts, sort_keys=True, default=_name).encode())

    start = getattr(model.generation_config, "bos_token_id", None)
    attention = getattr(model.config, "_attn_implementation", None)
    take(FORMAT, torch.__version__, transformers.__version__, attention, start, dict(settings))
    for path, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if "forward" in vars(module) or any(getattr(hook, "__module__", None) != PASSIVE_HOOKS for hook in hooks):
            return None
        forward = type(module).forward
        # The class's name alone: accelerate() sets a subclass of the same name.
        take(path, type(module).__name__, forward.__module__, forward.__qualname__)
        for name, value in sorted(vars(module).items()):
            if not (name.startswith("_") or name in IGNORED_ATTRIBUTES or isinstance(value, nn.Module)):
                take(name, _plain(value))
    for path, tensor in tensors:
        take(path, str(tensor.dtype), list(tensor.shape), tensor.device.type, _checksum(tensor))
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """A value as it goes into the key: a tensor's checksum, what JSON takes, else a name."""
    if type(value) is Tensor:
        return None if value.is_meta else _checksum(value)
    try:
        json.dumps(value, sort_keys=True, default=_name)
    except (TypeError, ValueError):  # keys of other types, or what holds itself
        return _name(value)
    return value


def _name(value: Any) -> str:
    """What stands for a value that is no JSON: a function's name, or a type's; addresses would differ between processes."""
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def _checksum(tensor: Tensor) -> list[int]:
    """Of all bytes."""
    flat = tensor.detach().reshape(1, -1) if tensor.dim() < 2 else tensor.detach().flatten(0, -2)
    return [zlib.crc32(flat.contiguous().view(torch.uint8).numpy().data)] if tensor.is_cpu else _sums(flat)


def _sums(matrix: Tensor) -> list[int]:
    """Checksums of rows and columns on the device that they lie on: to copy them would take longer than to measure."""
    bits = matrix.contiguous().view(_BITS.get(matrix.element_size(), torch.uint8))
    return [_weighted(bits.sum(dim, dtype=torch.int64)) for dim in (0, 1)]


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _weighted(sums: Tensor) -> int:
    """Odd factors, which wrap around: one sum that differs always shows, and so does their order."""
    draw = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (len(sums),), generator=draw, dtype=torch.int64) * 2 + 1
    return int((sums * factors.to(sums.device)).sum())
