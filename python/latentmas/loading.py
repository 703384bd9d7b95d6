"""A model and its tokenizer by name: a local folder, a name on the Hugging Face hub, or the default model."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from latentmas.default_model import default_model_folder
from latentmas_kernels.architecture import SUPPORTED, Architecture, UnsupportedModelError


def load_model(name: str | None = None, *, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """Load a causal LM for inference.

    Args:
        name: folder or hub name; None is the default model, SmolLM2-135M-Instruct.
        dtype: "auto" takes the checkpoint's; else "float32", "bfloat16" or "float16".
        device: where to put it; None takes the GPU if there is one.

    Returns:
        (model, tokenizer).

    Raises:
        ValueError: where it cannot be found or loaded, or cannot run here.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = str(default_model_folder()) if name is None else name
    try:
        config = AutoConfig.from_pretrained(source)
        if config.is_encoder_decoder:
            raise UnsupportedModelError(f"{source} is an encoder-decoder model ({config.model_type}); {SUPPORTED}")
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except UnsupportedModelError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        where = "the folder" if Path(source).is_dir() else "it is no local folder, and the hub model"
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"cannot load {source!r}: {where} gave: {said[0]} Supported are a folder that save_pretrained() wrote, and the "
            "name of a causal LM on the hub (with a network, or once it is in the hub's cache)"
        ) from error
    model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    Architecture.of(model)
    return model, tokenizer
