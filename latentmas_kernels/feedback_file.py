"""Keep the measurement of `auto` on disk: a file for each state of model, versions and settings of the measurement.

A file is JSON: {"format", "key", "nats": {kind: nats}}. Its name is the key, so that after any change of what the measurement
depends on another file is looked for; a file that does not fit is not used, and the model is measured again.
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
LIMIT = 2**16  # bytes of a file; those written here have a hundred
PLAIN = (Tensor, nn.Parameter)
# Attributes of modules that only record the origin of a model, or how it is trained.
IGNORED_ATTRIBUTES = {"name_or_path", "training", "gradient_checkpointing", "loss_type"}


def stored_or_measured(
    model: Any, settings: Mapping[str, Any], kinds: Collection[str], measure: Callable[[], dict[str, float]]
) -> dict[str, float]:
    """Return nats per kind, from the file or from `measure`, whose result is then stored. One warning where a file cannot be
    used or written.

    Args:
        model: the model that is measured.
        settings: of the measurement, for JSON; with other settings the model is measured again.
        kinds: the kinds that the file must have.
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
    kl_nats = measure()
    if not all(map(math.isfinite, kl_nats.values())):
        return kl_nats
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps({"format": FORMAT, "key": key, "nats": kl_nats}))
    except OSError as error:
        warnings.warn(
            f"what was measured could not be stored in {path.parent} ({error}) and will be measured again next time; set "
            "LATENTMAS_CACHE to a folder that can be written",
            stacklevel=2,
        )
    return kl_nats


def _load(path: Path, key: str, kinds: Collection[str]) -> dict[str, float]:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > LIMIT:
        raise LatentMASError("it is no file, or a large one")
    content = json.loads(path.read_text())
    if content["format"] != FORMAT or content["key"] != key:
        raise LatentMASError("it is of another format or model")
    kl_nats = content["nats"]
    if set(kl_nats) != set(kinds) or not all(
        type(value) is float and math.isfinite(value) for value in kl_nats.values()
    ):
        raise LatentMASError(f"it holds no nats of {' and '.join(kinds)}")
    return dict(kl_nats)


# ---- the key -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measurement_key(model: Any, settings: Mapping[str, Any]) -> str | None:
    """Return a sha256 over all that the measurement depends on, as far as it can be read off the model.

    It covers the configuration; every element of all parameters and buffers; classes and settings of all modules (scaling,
    eps, windows, activations); dtypes, the kind of device, the attention that is used, the first token; versions of torch and
    transformers; and the settings of the measurement. It takes one pass over the weights, where measuring takes dozens.

    Returns:
        The key; None where code runs that cannot be compared (hooks, a module's own forward) or weights are not in memory. Code
        of the caller's own classes enters by name only.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if any(GLOBAL_HOOKS) or any(type(tensor) not in PLAIN or tensor.is_meta for _, tensor in tensors):
        return None
    digest = hashlib.sha256(model_fingerprint(model).encode())

    def add(*values: Any) -> None:
        digest.update(json.dumps(values, sort_keys=True, default=_name).encode())

    start = getattr(model.generation_config, "bos_token_id", None)
    attention = getattr(model.config, "_attn_implementation", None)
    add(FORMAT, torch.__version__, transformers.__version__, attention, start, dict(settings))
    for path, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if "forward" in vars(module) or any(getattr(hook, "__module__", None) != PASSIVE_HOOKS for hook in hooks):
            return None
        forward = type(module).forward
        # The name of the class alone: accelerate() sets a subclass of the same name.
        add(path, type(module).__name__, forward.__module__, forward.__qualname__)
        for name, value in sorted(vars(module).items()):
            if not (name.startswith("_") or name in IGNORED_ATTRIBUTES or isinstance(value, nn.Module)):
                add(name, _plain(value))
    for path, tensor in tensors:
        add(path, str(tensor.dtype), list(tensor.shape), tensor.device.type, _checksum(tensor))
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """Return a value as it goes into the key: the checksum of a tensor, a value that JSON takes, else a name."""
    if type(value) is Tensor:
        return None if value.is_meta else _checksum(value)
    try:
        json.dumps(value, sort_keys=True, default=_name)
    except (TypeError, ValueError):  # keys of other types, or a container that holds itself
        return _name(value)
    return value


def _name(value: Any) -> str:
    """Return the name of a function or of a value's type, in place of a value that JSON does not take; addresses would differ
    between processes."""
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def _checksum(tensor: Tensor) -> list[int]:
    """Return a checksum of all bytes of a tensor."""
    flat = tensor.detach().reshape(1, -1) if tensor.dim() < 2 else tensor.detach().flatten(0, -2)
    return [zlib.crc32(flat.contiguous().view(torch.uint8).numpy().data)] if tensor.is_cpu else _sums(flat)


def _sums(matrix: Tensor) -> list[int]:
    """Return checksums of rows and columns, computed on the matrix's device: a copy to the CPU would take longer than the
    measurement."""
    bits = matrix.contiguous().view(_BITS.get(matrix.element_size(), torch.uint8))
    return [_weighted(bits.sum(dim, dtype=torch.int64)) for dim in (0, 1)]


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _weighted(sums: Tensor) -> int:
    """Return a sum with odd factors, modulo 2**64, so that one sum that differs changes it, and so does the order."""
    draw = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (len(sums),), generator=draw, dtype=torch.int64) * 2 + 1
    return int((sums * factors.to(sums.device)).sum())
