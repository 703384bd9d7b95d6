"""Tiny random models of many families, ragged batches, and the plain loop that everything is held against."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

from latentmas_kernels.models.architecture import cache_argument

VOCAB = 97


TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


MIXED = {
    "use_sliding_window": True,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


# The four families that faster engines pack, windows of 8 and mixed layer types among them.


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-mixed": {"model_type": "qwen2", **MIXED},
    "qwen3": {"model_type": "qwen3"},
    "qwen3-mixed": {"model_type": "qwen3", **MIXED},
    "mistral-window": {"model_type": "mistral", "sliding_window": 8},
}


# More of what "any decoder-only model" means: scaled embeddings, capped and scaled logits, learned positions, experts.


OTHERS: dict[str, dict[str, Any]] = {
    "gemma2": {"model_type": "gemma2", "sliding_window": 8, "attn_implementation": "eager"},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 8, **{"layer_types": MIXED["layer_types"]}},
    "granite": {"model_type": "granite", "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "hyperclovax": {"model_type": "hyperclovax", "logits_scaling": 3.0},
    "cohere2": {"model_type": "cohere2", "sliding_window": 8},
    "gpt2": {"model_type": "gpt2", "num_key_value_heads": 4, "head_dim": 12},
    "gpt-oss": {"model_type": "gpt_oss", "sliding_window": 8, "num_local_experts": 4, "attn_implementation": "eager"},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4},
    "olmo2": {"model_type": "olmo2"},
    "phi3": {"model_type": "phi3", "head_dim": 12},
}


def tiny_config(name: str = "llama", **overrides: Any) -> Any:
    options = {**TINY, **{**FAMILIES, **OTHERS}[name], **overrides}
    return CONFIG_MAPPING[options.pop("model_type")](**options)


def tiny_model(name: str = "llama", **overrides: Any) -> Any:
    """A random float32 model of a family, the same one every time."""
    config = tiny_config(name, **overrides)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    # Fresh weights (0.02) make every layer nearly the identity, which hides errors; at 0.15 the loop is chaotic and two
    # correct float32 computations part by 2e-4 within six steps.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.08)
    return model


def ragged(lengths: list[int], *, side: str = "left", vocab: int = VOCAB, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random ids [B, T] of the given lengths with their mask, padded on one side with an id that would matter."""
    draw = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids, mask = torch.full((len(lengths), width), 7), torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        where = slice(width - length, None) if side == "left" else slice(0, length)
        ids[row, where] = torch.randint(3, vocab, (length,), generator=draw)
        mask[row, where] = 1
    return ids, mask


def real(ids: Tensor, mask: Tensor, row: int) -> Tensor:
    """One row without its padding, [1, T]."""
    return ids[row : row + 1, mask[row].bool()]


def is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


class PlainLoop:
    """The published loop for one sequence, written out on the model's own forward with transformers' own cache."""

    def __init__(self, model: Any, feed_back: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.model, self.feed_back = model, feed_back
        self.cache = DynamicCache(config=model.config)

    def forward(self, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden state after the final norm and logits of the last position, [1, D] and [1, V]."""
        cache = {cache_argument(self.model.forward): self.cache}
        out = self.model(**inputs, **cache, use_cache=True, output_hidden_states=True)
        return out.hidden_states[-1][:, -1], out.logits[:, -1]

    def run_latent(self, ids: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Latents [steps, D] and the last hidden state [D]."""
        hidden, logits = self.forward(input_ids=ids)
        latents = []
        for _ in range(steps):
            latents.append(self.feed_back(hidden, logits))
            hidden, logits = self.forward(inputs_embeds=latents[-1][:, None])
        return torch.cat(latents) if latents else hidden.new_empty(0, hidden.shape[1]), hidden[0]

    def decode(self, ids: Tensor, new_tokens: int) -> list[int]:
        """Greedy tokens, never stopping."""
        _, logits = self.forward(input_ids=ids)
        tokens = [int(logits.argmax())]
        while len(tokens) < new_tokens:
            _, logits = self.forward(input_ids=torch.tensor([[tokens[-1]]]))
            tokens.append(int(logits.argmax()))
        return tokens


def feed_back(model: Any, kind: str, ridge: float = 1e-5) -> Callable[[Tensor, Tensor], Tensor]:
    """The three maps, written out in float64 from the formulas."""
    embedding = model.get_input_embeddings()
    rows = embedding(torch.arange(embedding.weight.shape[0])).double()
    target = rows.norm(dim=1).mean()
    if kind == "ridge":
        u = model.get_output_embeddings().weight.double()
        w_a = torch.linalg.solve(u.T @ u + ridge * torch.eye(u.shape[1], dtype=torch.float64), u.T @ rows)

    @torch.no_grad()
    def apply(hidden: Tensor, logits: Tensor) -> Tensor:
        if kind == "ridge":
            y = hidden.double() @ w_a
        elif kind == "identity":
            y = hidden.double()
        else:
            top, tokens = logits.double().topk(10)
            y = (top.softmax(-1)[..., None] * rows[tokens]).sum(-2)
        return (y * target / y.norm(dim=-1, keepdim=True)).to(hidden.dtype)

    return apply
