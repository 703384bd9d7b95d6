"""RopeShift: rotate a model's cached keys to other positions, once a trial has shown that the model's keys allow it."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.architecture import Architecture, cache_argument, decoder_of
from latentmas_kernels.models.module_settings import settings_of
from latentmas_kernels.ops.rerotate_keys import rerotate_keys
from latentmas_kernels.ops.rope import rotate

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional")
"""Types whose frequencies do not change with the length of the sequence."""
TOKENS, SHIFT = 4, 1061
"""The shift is long enough that a wrong low frequency shows as well, and a prime: no frequency turns by whole circles."""
TOLERANCE = {torch.float32: 1e-3}
ROUNDED = 0.1
"""Relative distance, over a layer's keys, up to which moved keys are the model's own, in dtypes other than float32.

Measured at the shift of 1061, the worst layer with right frequencies and the best one with wrong ones:

    SmolLM2-135M               right   7.0e-6 float32   0.016  bfloat16   0.0021  float16
      low half of them / 32    wrong   0.36             0.36              0.36
      all of them / 2          wrong   0.51             0.51              0.51
    a tiny Llama 3 (factor 32) right   1.0e-5           0.0065            0.00081
      the unscaled ones        wrong   0.28             0.38              0.28

At 37 the unscaled ones are just 0.010 off in float32 and 0.014 in bfloat16, where right ones are up to 0.013 off."""


@dataclass(frozen=True, eq=False)
class RopeShift:
    """The rotation of cached keys to other positions, layer by layer.

    Attributes:
        inv_freq: float32 [layers, head_dim / 2] on the model's device; zeros for layers without positions.
    """

    inv_freq: Tensor

    @classmethod
    def probe(cls, model: Any) -> "RopeShift":
        """Find the rotation of a model by trying: it reads four tokens at two places, and the keys of the first place, moved,
        must be those of the second.

        Tried once per model, dtype, device and state of its frequencies. A refusal is not kept: its cause (a hook, an adapter)
        may be gone the next time.

        Raises:
            LatentMASError: where the keys of some layer cannot be moved by rotating halves (learned positions, other layouts of
                RoPE, rotation in part, frequencies that change with the length).
        """
        architecture = Architecture.of(model)
        tables = _tables(model)
        # An inference tensor counts no changes in place.
        versions = [(t.data_ptr(), None if t.is_inference() else t._version) for t in tables]
        key = architecture, settings_of(decoder_of(model), leaves=True), versions
        known = _known.get(model)
        if known is not None and known[0] == key:
            return known[2]
        found = _probe(model, architecture, tables)
        if isinstance(found, str):
            raise LatentMASError(
                f"keys of this {type(model).__name__} cannot be moved to other positions: {found}. Cut without rebase(), "
                "which keeps positions and records the gaps, or let agents think one after the other instead of merging "
                "memories"
            )
        _known[model] = key, tables, found  # with the tables, so that no other tensors get their addresses
        return found

    def move(self, keys: Tensor, shifts: Tensor) -> None:
        """Rotate cached keys [layers, B, kv_heads, S, head_dim] by int64 [B, n] positions. This modifies `keys`.

        Goes layer by layer, from the first slot on that moves, so that temporaries are about the size of one layer's keys.
        """
        moved = (shifts != 0).any(0).nonzero()
        if not len(moved):
            return
        first = int(moved[0])
        turns = self.inv_freq.any(1).tolist()
        for layer, frequencies in enumerate(self.inv_freq):
            if turns[layer]:
                rerotate_keys(keys[layer : layer + 1, :, :, first:], shifts[:, first:], frequencies)


_known: "weakref.WeakKeyDictionary[nn.Module, tuple[tuple, list[Tensor], RopeShift]]" = weakref.WeakKeyDictionary()


def _tables(model: Any) -> list[Tensor]:
    """Return the frequencies that the model's rotary modules hold, some of them of other sizes."""
    buffers = decoder_of(model).named_buffers()
    return [buffer for name, buffer in buffers if name.endswith("inv_freq") and "original" not in name]


@torch.no_grad()
def _probe(model: Any, architecture: Architecture, held: list[Tensor]) -> RopeShift | str:
    """Return the rotation, or the reason why there is none, as a clause."""
    decoder = decoder_of(model)
    kinds = rope_types(model.config) | _types_in_use(decoder)
    strange = sorted(kinds - set(ROPE_TYPES))
    if strange:
        return f"its RoPE is of type {', '.join(strange)}, whose frequencies change with the length"
    half = architecture.head_dim // 2
    tables = [table.float() for table in held if tuple(table.shape) == (half,)]
    still = torch.zeros(half, device=architecture.device)
    shift = min(SHIFT, (architecture.max_positions or SHIFT + TOKENS) - TOKENS)
    ids = torch.arange(TOKENS, device=architecture.device)[None] % architecture.vocab_size
    with torch.autocast(
        architecture.device.type, enabled=False
    ):  # the caller's autocast would round what the model does not
        near, far = (_keys(decoder, ids, start) for start in (0, shift))
    chosen = [still] * architecture.layers  # also where no layer runs
    for layer in architecture.slots:
        before, after = near[layer], far[layer]
        distance, best = min(
            ((_distance(before, after, table * shift), index) for index, table in enumerate([still, *tables])),
        )
        if not distance < TOLERANCE.get(architecture.dtype, ROUNDED):
            return f"moved by {shift} positions, keys of layer {layer} are {distance:.2g} off, relative to their size"
        chosen[layer] = [still, *tables][best]
    return RopeShift(torch.stack(chosen))


def rope_types(config: Any) -> set[str]:
    """Return the RoPE types of a configuration: of the whole model, or of each kind of its layers."""
    given = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in given.values() if isinstance(value, dict)]
    return {one.get("rope_type", "default") for one in nested or [given]}


def _types_in_use(decoder: nn.Module) -> set[str]:
    """Return the RoPE types that modules hold: of the whole model, or of each kind of its layers."""
    held = [vars(module).get("rope_type") for module in decoder.modules()]
    return {kind for one in held if one for kind in (one.values() if isinstance(one, dict) else [one])}


def _keys(decoder: Any, ids: Tensor, start: int) -> list[Tensor]:
    """Return each layer's keys of tokens whose positions begin at `start`."""
    cache = DynamicCache()
    positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    mask = torch.ones_like(ids)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        cache_argument(decoder.forward): cache,
    }
    decoder(**inputs, use_cache=True)
    layers: list[Any] = cache.layers
    return [layer.keys for layer in layers]


def _distance(before: Tensor, after: Tensor, angle: Tensor) -> float:
    """Return the distance of keys rotated by `angle` from the keys that they should be, relative to their size."""
    moved, after = rotate(before, angle), after.float()
    return float((moved - after).norm() / after.norm().clamp_min(torch.finfo(torch.float32).tiny))
