"""Fixtures: tiny random models of many families, the default model, and the plain loop that everything is held against."""

import os

# One test process per core, and the processes that tests start: more threads than cores spin against each other, which
# made single tests twenty times slower.
os.environ["OMP_NUM_THREADS"] = os.environ["LATENTMAS_NUM_THREADS"] = "1"

import torch

# Before triton is imported anywhere: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import copy
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from latentmas.default_model import default_model_folder
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, DynamicCache, LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from latentmas_kernels import LatentCache, accelerate
from latentmas_kernels.architecture import cache_argument

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


@pytest.fixture(params=FAMILIES)
def family_model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


@pytest.fixture
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="session")
def default_folder() -> Path:
    return default_model_folder()


@pytest.fixture(scope="session")
def default_model(default_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(default_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def default_tokenizer(default_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(default_folder)


@pytest.fixture(autouse=True)
def own_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "default_folder" in request.fixturenames:
        request.getfixturevalue("default_folder")  # looked up in the user's cache, before that is hidden
    monkeypatch.setenv("LATENTMAS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def keys_are_moved_by_torch(monkeypatch):
    """Not in Triton's interpreter, which takes a hundred times as long; the kernel has tests of its own."""
    monkeypatch.setattr(sys.modules["latentmas_kernels.ops.rerotate_keys"], "runs_on", lambda tensor: tensor.is_cuda)


def count_buffers(monkeypatch):
    """Bytes of all KV buffers that were alive together, the most so far, in a list of one."""
    alive, most = [], [0]
    make = LatentCache.__init__

    def counted(cache, **sizes):
        make(cache, **sizes)
        alive.append(weakref.ref(cache.buffer))
        held = {b.data_ptr(): b.nbytes for b in (ref() for ref in alive) if b is not None}
        most[0] = max(most[0], sum(held.values()))

    monkeypatch.setattr(LatentCache, "__init__", counted)
    return most


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

    def think(self, ids: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Latents [steps, D] and the last hidden state [D]."""
        hidden, logits = self.forward(input_ids=ids)
        latents = []
        for _ in range(steps):
            latents.append(self.feed_back(hidden, logits))
            hidden, logits = self.forward(inputs_embeds=latents[-1][:, None])
        return torch.cat(latents) if latents else hidden.new_empty(0, hidden.shape[1]), hidden[0]

    def speak(self, ids: Tensor, new_tokens: int) -> list[int]:
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


# ---- plain and accelerated, for test_accelerate*.py -----------------------------------------------------------------

LENGTHS = [3, 9, 1]


class Pair:
    """A plain model and an accelerated one of the same weights; what the latter left to transformers is in `left`."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch, **overrides: Any) -> None:
        self.plain = tiny_model(name, **overrides)
        self.ours = accelerate(copy.deepcopy(self.plain))
        self.left: list[str] = []
        for module in ("decode", "accelerated"):
            monkeypatch.setattr(f"latentmas_kernels.hf.{module}.warn_once", self.left.append)

    def generate(self, *args: Any, seed: int = 0, **kwargs: Any) -> tuple[Any, Any]:
        outs = []
        for model in (self.plain, self.ours):
            torch.manual_seed(seed)
            outs.append(model.generate(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
        return outs[0], outs[1]

    def assert_same(self, *args: Any, left: str | None = None, **kwargs: Any) -> Tensor:
        """The same tokens, by our engine, or by transformers for a reason that has `left` in it."""
        want, got = self.generate(*args, **kwargs)
        assert torch.equal(got, want)
        assert bool(self.left) == (left is not None), self.left
        assert left is None or left in self.left[-1]
        return got


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Pair:
    return Pair("llama", monkeypatch)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    ids, mask = ragged(LENGTHS)
    return {"input_ids": ids, "attention_mask": mask}


class Recorder(BaseStreamer):
    """Keeps what it gets."""

    def __init__(self) -> None:
        self.pieces: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.tolist())

    def end(self) -> None:
        self.pieces.append("end")


class Forced(LogitsProcessor):
    """A processor that nobody knows: the token is the number of those before it."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, input_ids.shape[1] % VOCAB] = 0
        return forced
