"""How a model's cached keys depend on their positions, found by trying: what cuts and merges of a cache rely on."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from latentmas_kernels.architecture import Architecture, decoder_of
from latentmas_kernels.ops.rerotate_keys import rerotate_keys
from latentmas_kernels.ops.rope_append import rotate

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional")
"""Those whose frequencies do not change with the length of the sequence."""
TOKENS, SHIFT = 4, 37
TOLERANCE = {torch.float32: 1e-3}
ROUNDED = 0.1
"""Relative distance, over a layer's keys, up to which moved keys are the model's own. Wrong frequencies give 0.3 or more; of
right ones, SmolLM2-135M is 5e-6 off in float32 and 0.01 in bfloat16, where the two runs round apart."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """RoPE of cached keys, layer by layer.

    Attributes:
        inv_freq: float32 [layers, head_dim / 2] on the model's device; zeros for layers without positions.
    """

    inv_freq: Tensor

    @classmethod
    def of(cls, model: Any) -> "Rotation":
        """Find and prove it: the model reads four tokens at two places, and the first keys, moved, must be the second.

        Proved once per model, dtype and device.

        Raises:
            ValueError: where the keys of some layer cannot be moved by rotating halves (learned positions, other layouts of
                RoPE, rotation in part, frequencies that change with the length).
        """
        architecture = Architecture.of(model)
        known = _known.setdefault(model, {}).get((architecture.dtype, architecture.device))
        if known is None:
            known = _known[model][architecture.dtype, architecture.device] = _prove(model, architecture)
        if isinstance(known, str):
            raise ValueError(
                f"keys of this {type(model).__name__} cannot be moved to other positions: {known}. Cut without rebase(), which "
                "keeps positions and records the gaps, or let agents think one after the other instead of merging memories"
            )
        return known

    def move(self, keys: Tensor, shifts: Tensor) -> None:
        """Rotate cached keys [layers, B, kv_heads, S, head_dim] on by int64 [B, n] positions, in place."""
        if bool((self.inv_freq == self.inv_freq[0]).all()):
            rerotate_keys(keys, shifts, self.inv_freq[0])
            return
        for layer, frequencies in enumerate(self.inv_freq):
            if bool(frequencies.any()):
                rerotate_keys(keys[layer : layer + 1], shifts, frequencies)


_known: "weakref.WeakKeyDictionary[nn.Module, dict[tuple, Rotation | str]]" = weakref.WeakKeyDictionary()


@torch.no_grad()
def _prove(model: Any, architecture: Architecture) -> Rotation | str:
    """The rotation, or why there is none, as a clause."""
    decoder = decoder_of(model)
    kinds = _rope_types(model.config)
    strange = sorted(kinds - set(ROPE_TYPES))
    if strange:
        return f"its RoPE is of type {', '.join(strange)}, whose frequencies change with the length"
    half = architecture.head_dim // 2
    tables = [
        buffer.float()
        for name, buffer in decoder.named_buffers()
        if name.endswith("inv_freq") and "original" not in name and tuple(buffer.shape) == (half,)
    ]
    still = torch.zeros(half, device=architecture.device)
    shift = min(SHIFT, (architecture.max_positions or SHIFT + TOKENS) - TOKENS)
    ids = torch.arange(TOKENS, device=architecture.device)[None] % architecture.vocab_size
    near, far = (_keys(decoder, model.config, ids, start) for start in (0, shift))
    chosen = []
    for layer, (before, after) in enumerate(zip(near, far, strict=True)):
        distance, best = min(
            ((_distance(before, after, table * shift), index) for index, table in enumerate([still, *tables])),
        )
        if not distance < TOLERANCE.get(architecture.dtype, ROUNDED):
            return f"moved by {shift} positions, keys of layer {layer} are {distance:.2g} off, relative to their size"
        chosen.append([still, *tables][best])
    return Rotation(torch.stack(chosen))


def _rope_types(config: Any) -> set[str]:
    """Of the whole model, or of each kind of its layers."""
    given = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in given.values() if isinstance(value, dict)]
    return {one.get("rope_type", "default") for one in nested or [given]}


def _keys(decoder: Any, config: Any, ids: Tensor, start: int) -> list[Tensor]:
    """Keys of each layer for tokens whose positions begin at start."""
    cache = DynamicCache()
    positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    mask = torch.ones_like(ids)
    decoder(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    return [layer.keys for layer in layers]


def _distance(before: Tensor, after: Tensor, angle: Tensor) -> float:
    moved, after = rotate(before, angle), after.float()
    return float((moved - after).norm() / after.norm().clamp_min(torch.finfo(torch.float32).tiny))
