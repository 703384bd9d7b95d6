"""Map a hidden state to the next input embedding: W_a, the target norm, and the choice of a kind for a model.

    ridge      e = W_a^T h with W_a = (U^T U + ridge I)^-1 U^T E      (LatentMAS, section 3.1)
    identity   e = h                                                  W_a where input and output embeddings are tied
    soft       e = sum of p_i E_i over the top-k tokens, p = softmax of their logits

and e is always rescaled to the mean row norm of E. U [V, D] is the output embedding, E [V, D] the input embedding as
its module gives it (some modules scale their weight).
"""

import copy
import hashlib
import json
import os
import warnings
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache

from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.feedback_file import stored_or_measured
from latentmas_kernels.models.architecture import Architecture, UnsupportedModelError, cache_argument, decoder_of
from latentmas_kernels.models.module_settings import settings_of
from latentmas_kernels.ops import realign
from latentmas_kernels.storage import atomic_write, cache_folder

KINDS = ("auto", "ridge", "identity", "soft")
TOP_K = 10
"""Tokens that soft feedback averages. On SmolLM2-135M the most likely tokens of 16 latent steps are the same with 10 and with
50; fewer stay closer to real embeddings (mean cosine to the nearest one 0.96 against 0.94)."""
AUTO_NATS = 1.0
"""auto keeps W_a while a step with it stays within this distance, in nats, of a step with the predicted token, and takes soft
beyond it: see `feedback_kl_nats`."""
SAMPLE_ROWS, SAMPLE_TOKENS, SAMPLE_STEPS, SAMPLE_SEED = 4, 16, 3, 0
RESIDUAL = 1e-5
CONDITION = 1e5
CHUNK_ROWS = 8192  # vocabulary rows converted at a time: 128 MB of float32 at a width of 4096
FORMAT = "latentmas-aligner-1"


@dataclass(frozen=True, eq=False)
class Aligner:
    """Maps the hidden state or the logits of the last position to the embedding that is fed in next.

    Attributes:
        kind: "ridge", "identity" or "soft".
        target_norm: the norm of every embedding that comes out.
        weight: float32 [D_out, D_in], W_a transposed; None for identity and soft.
        embedding: input embedding module that soft feedback looks tokens up in, else None.
        reason: why this kind, in one line.
        residual: relative residual of the solve (ridge), else None.
        kl_nats: the result of `feedback_kl_nats` per kind, where auto chose.
    """

    kind: Literal["ridge", "identity", "soft"]
    target_norm: float
    weight: Tensor | None = None
    embedding: nn.Embedding | None = None
    reason: str = "asked for"
    residual: float | None = None
    kl_nats: dict[str, float] = field(default_factory=dict)

    @property
    def needs_logits(self) -> bool:
        """Whether the map starts from logits [B, V] (soft) rather than from hidden states [B, D]."""
        return self.kind == "soft"

    @property
    def width(self) -> int | None:
        """D_out, the width of the embeddings; None where it is that of the states."""
        if self.embedding is not None:
            return self.embedding.embedding_dim
        return None if self.weight is None else self.weight.shape[0]

    def __call__(self, seed: Tensor) -> Tensor:
        """Return embeddings [B, D_out] for hidden states [B, D_in], or for logits [B, V] where `needs_logits`."""
        if self.embedding is None:
            return realign(seed, self.weight, self.target_norm)
        return realign(self.soft_embedding(seed), None, self.target_norm)

    def check_fits(self, architecture: Architecture) -> None:
        """Raise LatentMASError where this was built for a model of another width, or is on another device."""
        width = architecture.hidden_size
        if self.embedding is not None and self.embedding.embedding_dim != width:
            raise LatentMASError(
                f"the aligner gives embeddings of width {self.embedding.embedding_dim}; {architecture.name} needs {width}: "
                "build it for this model with build_aligner(model)"
            )
        if self.weight is not None and (
            tuple(self.weight.shape) != (width, width) or self.weight.device != architecture.device
        ):
            raise LatentMASError(
                f"the aligner maps to and from {list(self.weight.shape)} on {self.weight.device}; {architecture.name} needs "
                f"{[width, width]} on {architecture.device}: build it for this model with build_aligner(model)"
            )

    def soft_embedding(self, logits: Tensor) -> Tensor:
        """Return soft feedback before the rescale: the probability-weighted mean [B, D] of the top-k input embeddings."""
        assert self.embedding is not None
        shared = logits[:, : self.embedding.weight.shape[0]].float()  # another model may have fewer rows
        top, tokens = shared.topk(min(TOP_K, shared.shape[-1]), dim=-1)
        rows = self.embedding(tokens)
        return (top.softmax(-1)[..., None] * rows.float()).sum(-2).to(rows.dtype)


# Per model and target embedding, by kind and ridge: the state of the weights that the map was built from, and the map. Keyed
# by the modules themselves: an address is used again when a target is freed and the next one is loaded.
_Maps = dict[tuple[str, float], tuple[tuple, Aligner]]
_built: "weakref.WeakKeyDictionary[nn.Module, weakref.WeakKeyDictionary[nn.Module, _Maps]]" = (
    weakref.WeakKeyDictionary()
)


def build_aligner(model: Any, kind: str = "auto", *, ridge: float = 1e-5, target_model: Any = None) -> Aligner:
    """Build the map from a model's hidden states to the input embeddings of `target_model` (default: its own).

    The solve is done once per pair of weight matrices: its result is kept in memory with the model, and on disk under a
    fingerprint of the weights. `auto` measures both W_a and soft feedback on text that the model writes itself and keeps
    W_a where it works; `Aligner.reason` and `Aligner.kl_nats` say what was measured. The measurement is kept on disk, too,
    under a key of weights, settings and versions (`latentmas_kernels.feedback_file`).

    Args:
        model: a causal LM of transformers; its output embedding is U.
        kind: "auto", "ridge", "identity" or "soft".
        ridge: the regulariser of the solve, > 0.
        target_model: model whose input embedding is E. Another one must share the tokenizer (only the vocabulary rows
            that both have are used), and takes "ridge" or "soft".

    Raises:
        LatentMASError: for an unknown kind, NaN or Inf in the embeddings, or a map that cannot be built.
    """
    if kind not in KINDS:
        raise LatentMASError(f"got aligner={kind!r}; supported are {', '.join(map(repr, KINDS))} or an Aligner")
    if not ridge > 0:
        raise LatentMASError(f"ridge must be above 0; got {ridge}")
    architecture = Architecture.of(model)
    target = model if target_model is None else target_model
    if target is not model:
        Architecture.of(target)
        if kind == "identity":
            raise LatentMASError("aligner='identity' maps a model to itself; between two models use 'ridge' or 'soft'")
        kind = "ridge" if kind == "auto" else kind
    unembedding, embedding = model.get_output_embeddings(), target.get_input_embeddings()
    built = _built.setdefault(model, weakref.WeakKeyDictionary()).setdefault(embedding, {})
    state: tuple = (_state(unembedding), _state(embedding))
    if kind == "auto":  # measured on the whole model
        state += (settings_of(model, leaves=True), *_addresses([*model.parameters(), *model.buffers()]))
    known = built.get((kind, ridge))
    if known is None or known[0] != state:
        known = state, _build(model, architecture, kind, ridge, unembedding, embedding, own=target is model)
        built[kind, ridge] = known
    return known[1]


@torch.no_grad()
def _build(
    model: Any,
    architecture: Architecture,
    kind: str,
    ridge: float,
    unembedding: nn.Linear,
    embedding: nn.Embedding,
    *,
    own: bool,
) -> Aligner:
    if kind == "auto":
        return _choose(model, architecture, ridge)
    if kind == "ridge" and unembedding.weight.is_meta:
        raise UnsupportedModelError(
            f"aligner='ridge' reads the lm_head of {architecture.name}, which is offloaded; keep it on a device "
            "(device_map), or use aligner='soft' or 'identity'"
        )
    target_norm = _mean_norm(embedding)
    if kind == "soft":
        return Aligner("soft", target_norm, embedding=embedding)
    if kind == "identity":
        return Aligner("identity", target_norm)
    if own and unembedding.weight is embedding.weight:
        return Aligner(
            "identity", target_norm, reason="input and output embeddings are tied, which makes W_a the identity"
        )
    weight, residual = _stored_or_solved(unembedding, embedding, ridge)
    return Aligner("ridge", target_norm, weight=weight.to(architecture.device), residual=residual)


# ---- the choice of a kind --------------------------------------------------------------------------------------


def _choose(model: Any, architecture: Architecture, ridge: float) -> Aligner:
    linear, soft = build_aligner(model, "ridge", ridge=ridge), build_aligner(model, "soft")
    settings = {
        "rows": SAMPLE_ROWS, "tokens": SAMPLE_TOKENS, "steps": SAMPLE_STEPS, "seed": SAMPLE_SEED, "top_k": TOP_K,
        "kinds": [linear.kind, soft.kind], "ridge": ridge,
    }  # fmt: skip
    kl_nats = stored_or_measured(
        model, settings, (linear.kind, soft.kind), lambda: feedback_kl_nats(model, [linear, soft])
    )
    best = linear if kl_nats[linear.kind] <= AUTO_NATS else soft
    measured = ", ".join(f"{kind} {value:.2f}" for kind, value in kl_nats.items())
    distance = f"nats between a step with the feedback and one with the predicted token: {measured}"
    reason = f"chosen by auto: {distance}; W_a up to {AUTO_NATS:g}"
    return replace(best, reason=reason, kl_nats=kl_nats)


@torch.no_grad()
def feedback_kl_nats(
    model: Any,
    aligners: list[Aligner],
    *,
    rows: int = SAMPLE_ROWS,
    tokens: int = SAMPLE_TOKENS,
    steps: int = SAMPLE_STEPS,
) -> dict[str, float]:
    """Measure how differently the model continues behind a fed-back state and behind the token that the state predicts.

    The model writes `rows` samples of `tokens` tokens (temperature 1, fixed seed). From their ends it takes latent
    steps; at each, the next-token distribution p behind the fed-back embedding is compared with the distribution q
    behind the embedding of the most likely token at the same position. Near 0 the model reads the fed-back state like a token;
    a model that cannot read raw states is several nats off and repeats itself (SmolLM2-135M: "-----"), while perplexity of
    later text hardly shows it.

    Returns:
        Per kind of aligner the mean of KL(q || p) in nats, over rows and steps.
    """
    architecture = Architecture.of(model)
    decoder, rows_of_tokens = decoder_of(model), architecture.vocab_size

    def logits_of(cache: DynamicCache, **inputs: Tensor) -> Tensor:
        taken: dict[str, Any] = {**inputs, cache_argument(model.forward): cache}
        # A padded lm_head has rows for which there is nothing to feed in.
        return model(**taken, use_cache=True, logits_to_keep=1).logits[:, -1, :rows_of_tokens]

    start = getattr(model.generation_config, "bos_token_id", None)
    start = start[0] if isinstance(start, list) else start or 0
    start = start if start < rows_of_tokens else 0
    ids = torch.full((rows, 1), start, device=architecture.device)
    draw = torch.Generator().manual_seed(SAMPLE_SEED)
    sample = DynamicCache()  # with a configuration it would drop positions that the layers may attend to
    # Tiny models are made for few positions; the steps need room behind the sample.
    tokens = max(1, min(tokens, (architecture.max_positions or tokens + steps) - steps))
    for _ in range(tokens - 1):
        probabilities = logits_of(sample, input_ids=ids).float().softmax(-1).cpu()
        ids = torch.multinomial(probabilities, 1, generator=draw).to(ids)

    kl_nats: dict[str, float] = {}
    for aligner in aligners:
        cache, inputs, total = copy.deepcopy(sample), {"input_ids": ids}, 0.0
        for _ in range(steps):
            before = cache if aligner.needs_logits else copy.deepcopy(cache)
            logits = logits_of(cache, **inputs)
            if aligner.needs_logits:
                seed = logits
            else:
                taken = {**inputs, cache_argument(decoder.forward): before}
                seed = decoder(**taken, use_cache=True).last_hidden_state[:, -1]
            with_token = (
                logits_of(copy.deepcopy(cache), input_ids=logits.argmax(-1, keepdim=True)).float().log_softmax(-1)
            )
            inputs = {"inputs_embeds": aligner(seed)[:, None]}
            with_feedback = logits_of(copy.deepcopy(cache), **inputs).float().log_softmax(-1)
            total += (with_token.exp() * (with_token - with_feedback)).sum(-1).mean().item()
        kl_nats[aligner.kind] = total / steps
    return kl_nats


# ---- the solve -----------------------------------------------------------------------------------------------------


def solve_ridge(unembedding: nn.Linear, embedding: nn.Embedding, ridge: float) -> tuple[Tensor, float]:
    """Return W_a transposed, float32 [D_out, D_in], and the relative residual of the normal equations.

    Solved in float32; again in float64 where the Cholesky factor shows a condition above 1e5, where it does not exist,
    or where the residual is above 1e-5. The residual is computed in float64 against the weights themselves, on random
    directions, so that it sees errors of the Gram matrix too (TF32 in the product, say).

    Raises:
        LatentMASError: where the float64 solve fails as well, which means NaN, Inf or weights of no rank.
    """
    device = embedding.weight.device
    if device.type not in ("cpu", "cuda"):  # other devices have no float64
        device = torch.device("cpu")
    for dtype in (torch.float32, torch.float64):
        gram, cross = _normal_equations(unembedding, embedding, dtype, device)
        gram.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            continue
        spread = factor.diagonal()
        if dtype == torch.float32 and (spread.max() / spread.min()).square() > CONDITION:
            continue
        solution = torch.cholesky_solve(cross, factor)
        residual = _residual(unembedding, embedding, ridge, solution)
        if residual <= RESIDUAL:
            return solution.T.float().contiguous(), residual
    raise LatentMASError(
        "the alignment W_a cannot be solved from these embeddings even in float64 (NaN, Inf, or nothing but zeros); "
        "check the weights, or use aligner='soft' or 'identity'"
    )


def _chunks(
    unembedding: nn.Linear, embedding: nn.Embedding, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield U and E by blocks of vocabulary rows; of two vocabularies, the rows that both have."""
    weight = unembedding.weight
    if not weight.is_floating_point() or weight.dim() != 2:
        raise LatentMASError(
            f"the output embedding is stored as {weight.dtype} {list(weight.shape)}; W_a needs a floating point matrix. "
            "Load the lm_head unquantized, or use aligner='soft'"
        )
    rows = min(weight.shape[0], embedding.weight.shape[0])
    for start in range(0, rows, CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, rows)
        yield weight[start:stop].to(device, dtype), _rows(embedding, start, stop).to(device, dtype)


def _rows(embedding: nn.Embedding, start: int, stop: int) -> Tensor:
    return embedding(torch.arange(start, stop, device=embedding.weight.device))


def _normal_equations(
    unembedding: nn.Linear, embedding: nn.Embedding, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    widths = unembedding.weight.shape[1], embedding.weight.shape[1]
    gram = torch.zeros(widths[0], widths[0], dtype=dtype, device=device)
    cross = torch.zeros(widths, dtype=dtype, device=device)
    for u, e in _chunks(unembedding, embedding, dtype, device):
        gram.addmm_(u.T, u)
        cross.addmm_(u.T, e)
    return gram, cross


def _residual(unembedding: nn.Linear, embedding: nn.Embedding, ridge: float, solution: Tensor) -> float:
    draw = torch.Generator().manual_seed(0)
    probes = torch.randn(solution.shape[1], 4, generator=draw, dtype=torch.float64).to(solution.device)
    w = solution.double() @ probes
    left, right = ridge * w, torch.zeros_like(w)
    for u, e in _chunks(unembedding, embedding, torch.float64, solution.device):
        left += u.T @ (u @ w)
        right += u.T @ (e @ probes)
    return float((left - right).norm() / right.norm())


def _mean_norm(embedding: nn.Embedding) -> float:
    """Return the mean row norm of E as the module gives it."""
    # In small pieces, which the allocator keeps: at CHUNK_ROWS they were 28 MB beside the 269 MB of a 135M model.
    rows, piece = embedding.weight.shape[0], CHUNK_ROWS // 16
    total = sum(
        _rows(embedding, start, min(start + piece, rows)).float().norm(dim=1).sum(dtype=torch.float64).item()
        for start in range(0, rows, piece)
    )
    if not 0 < total < float("inf"):
        raise LatentMASError("the input embedding holds NaN or Inf, or nothing but zeros; load the checkpoint again")
    return total / rows


# ---- kept on disk --------------------------------------------------------------------------------------------------


def _addresses(tensors: Iterable[Tensor]) -> list[tuple[int, int | None]]:
    """Return address and version of each tensor; a tensor of inference mode counts no changes in place."""
    return [(t.data_ptr(), None if t.is_inference() else t._version) for t in tensors]


def _state(module: nn.Linear | nn.Embedding) -> tuple:
    """Return what the map depends on, to compare: the weight, and what else an embedding computes its rows from (a scale, a
    limit)."""
    weight = module.weight
    others = tuple(_addresses(module.buffers()))
    return (
        *_addresses([weight]), weight.dtype, weight.device, tuple(weight.shape),
        settings_of(module, leaves=True), others,
    )  # fmt: skip


def fingerprint(unembedding: nn.Linear, embedding: nn.Embedding, ridge: float) -> str:
    """Return the sha256 over both weights, the first rows as the embedding module gives them, and the ridge."""
    digest = hashlib.sha256(f"{FORMAT} {ridge!r}".encode())
    for tensor in (unembedding.weight, embedding.weight, _rows(embedding, 0, min(8, embedding.weight.shape[0]))):
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        for start in range(0, tensor.shape[0], CHUNK_ROWS):
            digest.update(_bytes(tensor[start : start + CHUNK_ROWS]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    """Return the bytes of a tensor, for hashlib."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy()


def _stored_or_solved(unembedding: nn.Linear, embedding: nn.Embedding, ridge: float) -> tuple[Tensor, float]:
    name = fingerprint(unembedding, embedding, ridge)
    path = cache_folder() / "aligners" / f"{name}.safetensors"
    shape = (embedding.weight.shape[1], unembedding.weight.shape[1])
    if os.path.exists(path):  # noqa: PTH110 (Path.exists() raises where the folder cannot be read)
        try:
            return _load(path, name, shape)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            warnings.warn(f"the stored alignment {path} is not used ({error}); it is built again", stacklevel=2)
    weight, residual = solve_ridge(unembedding, embedding, ridge)
    weight = weight.cpu()
    try:
        _save(path, name, weight, residual)
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"the alignment could not be stored in {path.parent} ({error}) and will be solved again next time; "
            "set LATENTMAS_CACHE to a folder that can be written",
            stacklevel=2,
        )
    return weight, residual


def _save(path: Path, name: str, weight: Tensor, residual: float) -> None:
    metadata = {
        "format": FORMAT,
        "fingerprint": name,
        "residual": residual,
        "sha256": hashlib.sha256(_bytes(weight)).hexdigest(),
    }
    with atomic_write(path) as temporary:
        save_file({"weight": weight}, temporary, metadata={"latentmas": json.dumps(metadata)})


def _load(path: Path, name: str, shape: tuple[int, int]) -> tuple[Tensor, float]:
    with safe_open(path, framework="pt") as file:
        metadata = json.loads((file.metadata() or {})["latentmas"])
        weight = file.get_tensor("weight")
    if metadata["format"] != FORMAT or metadata["fingerprint"] != name:
        raise LatentMASError("it is of another format or model")
    if weight.dtype != torch.float32 or tuple(weight.shape) != shape:
        raise LatentMASError(f"it holds {weight.dtype} {list(weight.shape)} instead of float32 {list(shape)}")
    if hashlib.sha256(_bytes(weight)).hexdigest() != metadata["sha256"]:
        raise LatentMASError("its content does not match its checksum")
    return weight, float(metadata["residual"])
