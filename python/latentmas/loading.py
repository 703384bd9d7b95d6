"""Load a model and its tokenizer by name: a local folder, a name on the Hugging Face hub, or the default model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from latentmas.characters import first_line
from latentmas.default_model import default_model_folder
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.architecture import SUPPORTED, Architecture, UnsupportedModelError

DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_placement(dtype: str, device: str | None) -> torch.device:
    """Return the device to load to; raise LatentMASError for a dtype or device that is not there. Needs no model.

    Args:
        dtype: one of DTYPES.
        device: "cpu", "cuda", "cuda:1" and the like; None takes the accelerator if there is one.
    """
    if dtype not in DTYPES:
        raise LatentMASError(f"got dtype {dtype!r}; supported are {', '.join(DTYPES)}")
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    there = ["cpu"]
    if accelerator is not None:
        there += [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    if device is None:
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise LatentMASError(f"got device {device!r}; here are {', '.join(there)}") from error
    if asked.type == "cpu" and not asked.index:
        return torch.device("cpu")
    if f"{asked.type}:{asked.index or 0}" not in there:
        raise LatentMASError(f"device {device!r} is not there; here are {', '.join(there)}")
    return asked


def load_model(name: str | None = None, *, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """Load a causal LM for inference.

    Args:
        name: folder or hub name; None is the default model, SmolLM2-135M-Instruct.
        dtype: "auto" takes the checkpoint's; else "float32", "bfloat16" or "float16".
        device: where to put it; None takes the accelerator if there is one.

    Returns:
        (model, tokenizer).

    Raises:
        LatentMASError: where it cannot be found or loaded, or cannot run here.
    """
    place = check_placement(dtype, device)
    source = model_path(name)
    with _one_line(source):
        _config(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(source)
    model.eval()
    Architecture.of(model)
    model.to(place)  # type: ignore[arg-type]
    return model, tokenizer


def model_path(name: str | None) -> str:
    """Return the folder or hub name of a model; for None the default model's folder, which is fetched if it is not there."""
    return str(default_model_folder()) if name is None else name


def load_skeleton(name: str) -> Any:
    """Build a causal LM without its weights, on the meta device: enough to see how it would run.

    Raises:
        LatentMASError: as load_model.
    """
    with _one_line(name), torch.device("meta"):
        return AutoModelForCausalLM.from_config(_config(name)).eval()


def _config(source: str) -> Any:
    config = AutoConfig.from_pretrained(source)
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{source} is an encoder-decoder model ({config.model_type}); {SUPPORTED}")
    return config


@contextmanager
def _one_line(source: str) -> Iterator[None]:
    """Turn what transformers raises for a folder or a name that is no model into a LatentMASError of one line."""
    try:
        yield
    except UnsupportedModelError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        where = "the folder" if Path(source).is_dir() else "it is no local folder, and the hub model"
        raise LatentMASError(
            f"cannot load {source!r}: {where} gave: {first_line(error)} Supported are a folder that save_pretrained() "
            "wrote, and the name of a causal LM on the hub (with a network, or once it is in the hub's cache)"
        ) from error
