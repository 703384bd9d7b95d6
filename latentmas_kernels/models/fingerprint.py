"""The fingerprint of a model: decides whether keys and values, or what was measured, belong to the model at hand."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.architecture import Architecture, KVShape

SAMPLES = 64  # elements of each weight that the fingerprint looks at
# Fields of a configuration that do not change keys and values: its origin, how the model is run, what ends a text, names.
VOLATILE = {
    "transformers_version", "architectures", "dtype", "use_cache", "return_dict", "output_attentions",
    "output_hidden_states", "output_router_logits", "bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id",
    "tokenizer_class", "task_specific_params", "problem_type", "finetuning_task",
}  # fmt: skip


@dataclass(frozen=True)
class ModelFingerprint:
    """The model that wrote a cache, as a file of the cache records it.

    Attributes:
        fingerprint: `model_fingerprint`.
        model: shapes and dtype in words.
    """

    fingerprint: str
    model: str

    @classmethod
    def of(cls, model: Any) -> "ModelFingerprint":
        return cls(model_fingerprint(model), describe(Architecture.of(model)))

    def check(self, shape: KVShape) -> None:
        """Raise LatentMASError where a cache does not have the shape and dtype that this model writes."""
        name, _, own = self.model.partition(" of ")
        if str(shape) != own:
            raise LatentMASError(
                f"got a cache of {shape}, {name} writes a cache of {own}; pass the model that wrote this cache, or a cache of "
                "that model"
            )


def describe(architecture: Architecture) -> str:
    """Return the class of a model, and the shape and dtype of its KV cache, in words."""
    return f"{architecture.name} of {architecture.kv_shape}"


@torch.no_grad()
def model_fingerprint(model: Any) -> str:
    """Return the sha256 over what decides what keys and values mean: the configuration and a sample of the weights.

    The sample is up to 64 elements of every parameter and stored buffer, spread over it, as float32: milliseconds where all
    weights would take seconds. Whatever touches whole matrices is seen: a training step, another checkpoint, an adapter, merged
    or not, and which one is active. Not seen are changes of single elements or rows between the samples (one added token,
    say), changes that the dtype rounds away in all of them, weights swapped on purpose, and hooks or a forward() of the
    caller's own.

    The same before and after saving and loading, merging of the weights by the engines, and a subclass set on the model.
    Not the same across dtypes that round differently, nor across versions of transformers that give the configuration
    other fields.

    Raises:
        LatentMASError: where weights are not in memory (offloaded to the meta device), or are no tensors.
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
        sample = weight[torch.unravel_index(_sample_indices(weight.numel()).to(weight.device), weight.shape)]
        digest.update(sample.float().cpu().numpy().tobytes())
    for name, module in model.named_modules():  # adapters that are not merged: their weights are there either way
        state = [
            getattr(module, field, None)
            for field in ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
        ]
        if hasattr(module, "merged_adapters"):
            digest.update(f"{name} {state}".encode())
    return digest.hexdigest()


def _sample_indices(size: int) -> Tensor:
    """Return int64, up to SAMPLES indices below `size`, in steps of the golden ratio: with steps of a fraction of the size all
    samples of many matrices would be in one column."""
    if size <= SAMPLES:
        return torch.arange(size)
    return (torch.arange(SAMPLES, dtype=torch.float64) * 0.6180339887498949 % 1 * size).long()
