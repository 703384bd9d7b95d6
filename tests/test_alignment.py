"""alignment: W_a against its formula, the kinds, maps between two models, and the copy kept on disk."""

import copy
import gc
import os
import resource
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, feed_back, tiny_model
from torch import nn

from latentmas_kernels import alignment, build_aligner

WIDTH = 48


def rows_of(model):
    """E as the module gives it, float64 [V, D]."""
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        return embedding(torch.arange(embedding.weight.shape[0])).double()


def exact_weight(model, ridge, target=None):
    """W_a transposed in float64: the formula over the rows that both vocabularies have, by QR instead of U^T U."""
    u, e = model.get_output_embeddings().weight.detach().double(), rows_of(target or model)
    rows, width = min(len(u), len(e)), u.shape[1]
    left = torch.cat([u[:rows], ridge**0.5 * torch.eye(width, dtype=torch.float64)])
    right = torch.cat([e[:rows], torch.zeros(width, e.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(left, right).solution.T


def error(weight, want):
    return ((weight.double() - want).norm() / want.norm()).item()


def residual(weight, model, ridge):
    """How far the map is from solving (U^T U + ridge I) W = U^T E, relative, in float64."""
    u, w = model.get_output_embeddings().weight.detach().double(), weight.double().T
    right = u.T @ rows_of(model)
    return ((u.T @ (u @ w) + ridge * w - right).norm() / right.norm()).item()


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(dtype)


@torch.no_grad()
def ill_conditioned(model, smallest=-4.0):
    """Output embeddings whose directions shrink from 1 to 10^smallest, turned out of the axes."""
    turn, _ = torch.linalg.qr(draw(WIDTH, WIDTH).double())
    u = draw(VOCAB, WIDTH).double() * torch.logspace(0, smallest, WIDTH, dtype=torch.float64)
    model.lm_head.weight.copy_(u @ turn)
    return model


def forget():
    """What a new process starts with: nothing in memory."""
    alignment._built.clear()


def stored(tmp_path):
    """All that lies in the folder of stored alignments, hidden files too."""
    return sorted((tmp_path / "cache" / "aligners").iterdir())


@pytest.fixture
def no_solve(monkeypatch):
    """A function that makes every solve after it fail the test."""

    def refuse(*_, **__):
        raise AssertionError("solved again")

    return lambda: monkeypatch.setattr(alignment, "solve_ridge", refuse)


# ---- the map -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [1e-5, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "granite", "cohere2"])
def test_ridge_weight_is_the_formula_in_float64(name, dtype, ridge):
    """W_a of untied models, scaled embeddings among them, float32 [D_out, D_in] whatever the model's dtype."""
    model = tiny_model(name).to(dtype)
    aligner = build_aligner(model, "ridge", ridge=ridge)
    assert aligner.kind == "ridge"
    assert aligner.weight.dtype == torch.float32
    assert aligner.weight.shape == (WIDTH, WIDTH)
    assert error(aligner.weight, exact_weight(model, ridge)) < 1e-5
    assert residual(aligner.weight, model, ridge) < 1e-5
    assert aligner.residual < alignment.RESIDUAL


def test_vocabulary_is_read_in_chunks_to_the_last_row(monkeypatch):
    """Rows behind the last whole chunk count like all others, in W_a, in the target norm and in the residual."""
    model = tiny_model()
    whole = build_aligner(model, "ridge")
    forget()
    monkeypatch.setattr(alignment, "CHUNK_ROWS", 32)  # 97 = 3 * 32 + 1
    with torch.no_grad():
        model.lm_head.weight[-1].add_(1.0)
        model.model.embed_tokens.weight[-1].add_(2.0)
    chunked = build_aligner(model, "ridge")
    assert error(chunked.weight, exact_weight(model, 1e-5)) < 1e-5
    assert error(chunked.weight, whole.weight.double()) > 1e-2
    assert chunked.target_norm == pytest.approx(rows_of(model).norm(dim=1).mean().item(), rel=1e-6)


@pytest.mark.parametrize(("name", "options"), [("llama-tied", {}), ("gemma3", {"tie_word_embeddings": True})])
def test_tied_weights_make_ridge_the_identity(name, options, no_solve):
    """W_a of tied weights is known to be a multiple of the identity: nothing is solved, nothing is stored."""
    no_solve()
    aligner = build_aligner(tiny_model(name, **options), "ridge")
    assert (aligner.kind, aligner.weight) == ("identity", None)
    assert "tied" in aligner.reason


def test_equal_weights_in_two_places_are_solved():
    """Only shared memory counts as tied; a copy gives the near-identity that the formula gives."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    aligner = build_aligner(model, "ridge")
    assert aligner.kind == "ridge"
    assert error(aligner.weight, torch.eye(WIDTH, dtype=torch.float64)) < 1e-3


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "granite", "llama"])
@pytest.mark.parametrize("kind", ["ridge", "identity", "soft"])
def test_target_norm_is_the_mean_norm_of_rows_as_the_module_gives_them(name, kind):
    model = tiny_model(name)
    want = rows_of(model).norm(dim=1).mean().item()
    assert build_aligner(model, kind).target_norm == pytest.approx(want, rel=1e-6)


def test_scale_inside_the_embedding_module_counts():
    """gemma3 multiplies its embeddings by the square root of the width inside the module."""
    model = tiny_model("gemma3")
    raw = model.get_input_embeddings().weight.norm(dim=1).mean().item()
    assert build_aligner(model, "identity").target_norm == pytest.approx(WIDTH**0.5 * raw, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ridge", "identity", "soft"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma3"])
@torch.no_grad()
def test_every_row_comes_out_with_the_target_norm(name, kind, dtype):
    """However small or large the rows that go in; in the dtype that went in."""
    model = tiny_model(name).to(dtype)
    aligner = build_aligner(model, kind)
    sizes = torch.tensor([[1e-3], [0.1], [1], [30], [1e3]])
    seed = (draw(5, VOCAB if aligner.needs_logits else WIDTH) * sizes).to(dtype)
    embeddings = aligner(seed)
    assert embeddings.dtype == dtype
    assert embeddings.shape == (5, WIDTH)
    bits = 1e-5 if dtype == torch.float32 else 4e-3
    assert embeddings.double().norm(dim=1).tolist() == pytest.approx([aligner.target_norm] * 5, rel=bits)


@pytest.mark.parametrize("kind", ["ridge", "identity", "soft"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_what_comes_out_is_the_formula(name, kind):
    """Ridge and identity of hidden states, and for soft the mean of the 10 likeliest embeddings by probability."""
    model = tiny_model(name)
    aligner, hidden, logits = build_aligner(model, kind), draw(7, WIDTH), 3 * draw(7, VOCAB)
    got = aligner(logits if aligner.needs_logits else hidden)
    torch.testing.assert_close(got, feed_back(model, kind)(hidden, logits), rtol=0, atol=1e-5 * aligner.target_norm)


@torch.no_grad()
def test_soft_mixes_the_ten_likeliest_tokens_and_no_other():
    model = tiny_model()
    aligner, logits = build_aligner(model, "soft"), draw(1, VOCAB)
    assert aligner.needs_logits
    assert aligner.weight is None
    order = logits[0].argsort(descending=True)
    others, tenth = logits.clone(), logits.clone()
    others[0, order[10:]] -= 5
    tenth[0, order[9]] += 1e-2
    assert torch.equal(aligner(others), aligner(logits))
    assert not torch.equal(aligner(tenth), aligner(logits))
    certain = torch.full((1, VOCAB), -1e4)
    certain[0, 23] = 1e4
    row = rows_of(model)[23]
    torch.testing.assert_close(
        aligner(certain)[0].double(), row * aligner.target_norm / row.norm(), rtol=1e-5, atol=1e-6
    )


@torch.no_grad()
def test_soft_of_a_vocabulary_below_ten_mixes_all_of_it():
    model = tiny_model(vocab_size=6)
    logits = draw(3, 6)
    got = build_aligner(model, "soft")(logits)
    rows, p = rows_of(model), logits.double().softmax(-1)
    torch.testing.assert_close(
        nn.functional.normalize(got.double()), nn.functional.normalize(p @ rows), rtol=0, atol=1e-6
    )


# ---- the solve -----------------------------------------------------------------------------------------------------


def dtypes_tried(monkeypatch):
    tried, build = [], alignment._normal_equations

    def watch(unembedding, embedding, dtype, device):
        tried.append(dtype)
        return build(unembedding, embedding, dtype, device)

    monkeypatch.setattr(alignment, "_normal_equations", watch)
    return tried


def test_float32_is_enough_for_well_conditioned_embeddings(monkeypatch):
    tried = dtypes_tried(monkeypatch)
    build_aligner(tiny_model(), "ridge")
    assert tried == [torch.float32]


@pytest.mark.parametrize("smallest", [-3.0, -4.0, -6.0])
def test_ill_conditioned_embeddings_are_solved_in_float64(monkeypatch, smallest):
    """The map is right there, too: against a solve by QR that never forms U^T U, and by the residual."""
    tried = dtypes_tried(monkeypatch)
    model = ill_conditioned(tiny_model(), smallest)
    aligner = build_aligner(model, "ridge")
    assert tried == [torch.float32, torch.float64]
    assert error(aligner.weight, exact_weight(model, 1e-5)) < 1e-6
    assert residual(aligner.weight, model, 1e-5) < 3e-5  # 1e-5 is what rounding the map to float32 makes here


def test_a_large_condition_alone_leads_to_float64(monkeypatch):
    """The residual hardly shows it: what is lost are directions of U that hold little of the right-hand side."""
    monkeypatch.setattr(alignment, "RESIDUAL", float("inf"))
    tried = dtypes_tried(monkeypatch)
    model = ill_conditioned(tiny_model())
    assert error(build_aligner(model, "ridge").weight, exact_weight(model, 1e-5)) < 1e-6
    assert tried == [torch.float32, torch.float64]


def test_a_bad_residual_alone_leads_to_float64(monkeypatch):
    """A float32 Gram matrix that is off (TF32, say) is seen, though its factor looks fine."""
    tried, build = [], alignment._normal_equations

    def rough(unembedding, embedding, dtype, device):
        tried.append(dtype)
        gram, cross = build(unembedding, embedding, dtype, device)
        return (gram, cross) if dtype == torch.float64 else (gram.bfloat16().float(), cross.bfloat16().float())

    monkeypatch.setattr(alignment, "_normal_equations", rough)
    model = tiny_model()
    aligner = build_aligner(model, "ridge")
    assert tried == [torch.float32, torch.float64]
    assert error(aligner.weight, exact_weight(model, 1e-5)) < 1e-6


def test_output_rows_that_are_all_alike_are_solved_as_the_ridge_says():
    """Rank one: float32 has no Cholesky factor; the ridge keeps the solution defined, and float64 finds it."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.copy_(draw(1, WIDTH).expand(VOCAB, WIDTH))
    assert error(build_aligner(model, "ridge").weight, exact_weight(model, 1e-5)) < 1e-5


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["ridge", "identity", "soft"])
def test_input_embeddings_without_a_norm_are_refused(kind, value):
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(value) if value == 0 else model.model.embed_tokens.weight[96, 47].fill_(
            value
        )
    with pytest.raises(ValueError, match="input embedding holds NaN or Inf, or nothing but zeros"):
        build_aligner(model, kind)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_output_embeddings_that_cannot_be_solved_are_refused(value, tmp_path):
    """And nothing is stored for them."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(value) if value == 0 else model.lm_head.weight[96, 47].fill_(value)
    with pytest.raises(ValueError, match=r"W_a cannot be solved .* use aligner='soft' or 'identity'"):
        build_aligner(model, "ridge")
    assert not (tmp_path / "cache" / "aligners").exists()
    assert build_aligner(model, "soft").kind == "soft"


def test_quantized_output_embedding_is_refused():
    model = tiny_model()
    model.lm_head.weight = nn.Parameter(torch.ones(VOCAB, WIDTH, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"stored as torch.int8 \[97, 48\]; W_a needs a floating point matrix"):
        build_aligner(model, "ridge")


@pytest.mark.parametrize("kind", ["", "Ridge", "linear"])
def test_unknown_kind_is_refused(kind):
    with pytest.raises(ValueError, match=f"got aligner='{kind}'; supported are 'auto', 'ridge', 'identity', 'soft'"):
        build_aligner(tiny_model(), kind)


@pytest.mark.parametrize("ridge", [0.0, -1e-5, float("nan")])
def test_ridge_must_be_above_zero(ridge):
    with pytest.raises(ValueError, match="ridge must be above 0; got"):
        build_aligner(tiny_model(), "ridge", ridge=ridge)


# ---- between two models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target_vocab", [VOCAB, VOCAB - 7, VOCAB + 7])
@pytest.mark.parametrize("kind", ["ridge", "auto"])
@torch.no_grad()
def test_map_to_a_model_of_another_width_and_vocabulary(kind, target_vocab):
    """[D_out, D_in] over the rows that both vocabularies have; rows come out with the norm of the target."""
    model, target = tiny_model(), tiny_model("gemma3", hidden_size=32, vocab_size=target_vocab)
    aligner = build_aligner(model, kind, target_model=target)
    assert aligner.kind == "ridge"
    assert aligner.weight.shape == (32, WIDTH)
    assert error(aligner.weight, exact_weight(model, 1e-5, target)) < 1e-5
    assert aligner.target_norm == pytest.approx(rows_of(target).norm(dim=1).mean().item(), rel=1e-6)
    assert aligner(draw(3, WIDTH)).norm(dim=1).tolist() == pytest.approx([aligner.target_norm] * 3, rel=1e-5)


@pytest.mark.parametrize("target_vocab", [VOCAB, VOCAB + 7, VOCAB - 7])
@torch.no_grad()
def test_soft_between_models_mixes_the_likeliest_tokens_that_both_have(target_vocab):
    model, target = tiny_model(), tiny_model(hidden_size=32, vocab_size=target_vocab)
    logits = draw(4, VOCAB)
    logits[:, VOCAB - 7 :] += 2.0  # likely ones among those that the smaller vocabulary lacks
    aligner = build_aligner(model, "soft", target_model=target)
    assert aligner.needs_logits
    top, tokens = logits[:, :target_vocab].double().topk(10)
    mean = (top.softmax(-1)[..., None] * rows_of(target)[tokens]).sum(-2)
    want = nn.functional.normalize(mean) * rows_of(target).norm(dim=1).mean()
    torch.testing.assert_close(aligner(logits).double(), want, rtol=1e-5, atol=1e-6)


def test_identity_between_two_models_is_refused():
    with pytest.raises(ValueError, match="'identity' maps a model to itself; between two models use 'ridge' or 'soft'"):
        build_aligner(tiny_model(), "identity", target_model=tiny_model())


def test_the_model_itself_as_target_is_no_other_model():
    model = tiny_model("llama-tied")
    assert build_aligner(model, "ridge", target_model=model) is build_aligner(model, "ridge")
    assert build_aligner(model, "identity", target_model=model).kind == "identity"


def test_a_target_that_cannot_run_is_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM is in training mode"):
        build_aligner(tiny_model(), "ridge", target_model=tiny_model().train())


def test_targets_loaded_one_after_another_get_their_own_maps():
    """A target that is gone leaves its memory to the next one; the map of the first must not be taken for it."""
    model = tiny_model()
    for turn in range(4):
        target = tiny_model(hidden_size=32)
        with torch.no_grad():
            target.model.embed_tokens.weight.copy_((turn + 1) * draw(VOCAB, 32).roll(turn, 0))
        aligner = build_aligner(model, "ridge", target_model=target)
        assert error(aligner.weight, exact_weight(model, 1e-5, target)) < 1e-5, f"target {turn}"
        assert aligner.target_norm == pytest.approx(rows_of(target).norm(dim=1).mean().item(), rel=1e-6)
        del target
        gc.collect()


# ---- kept in memory and on disk ------------------------------------------------------------------------------------


def test_in_memory_the_same_object_comes_back(no_solve):
    model = tiny_model()
    aligner = build_aligner(model, "ridge")
    no_solve()
    assert build_aligner(model, "ridge") is aligner
    assert build_aligner(model, "soft") is build_aligner(model, "soft")
    with pytest.raises(AssertionError, match="solved again"):
        build_aligner(model, "ridge", ridge=1e-3)


@pytest.mark.parametrize("which", ["lm_head", "embed_tokens"])
def test_a_changed_weight_gives_a_new_map(which):
    """Changed in place, behind the same address."""
    model = tiny_model()
    before = build_aligner(model, "ridge")
    weight = model.lm_head.weight if which == "lm_head" else model.model.embed_tokens.weight
    with torch.no_grad():
        weight.add_(draw(VOCAB, WIDTH), alpha=0.05)
    after = build_aligner(model, "ridge")
    assert after is not before
    assert error(after.weight, exact_weight(model, 1e-5)) < 1e-5
    assert error(after.weight, before.weight.double()) > 1e-2


def test_memory_does_not_keep_models_alive():
    model = tiny_model()
    for kind in ("ridge", "soft", "auto"):
        build_aligner(model, kind)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_process_reads_the_file_and_does_not_solve(tmp_path, no_solve, dtype):
    solved = build_aligner(tiny_model().to(dtype), "ridge")
    assert [path.suffix for path in stored(tmp_path)] == [".safetensors"]
    forget()
    no_solve()
    read = build_aligner(tiny_model().to(dtype), "ridge")
    assert read is not solved
    assert torch.equal(read.weight, solved.weight)
    assert (read.kind, read.target_norm, read.residual) == (solved.kind, solved.target_norm, solved.residual)


def test_other_weights_other_ridge_and_other_scale_get_files_of_their_own(tmp_path):
    model = tiny_model("gemma3")
    build_aligner(model, "ridge")
    build_aligner(model, "ridge", ridge=1e-4)
    model.get_input_embeddings().embed_scale.mul_(2)  # the same weights, but the module gives other rows
    forget()
    doubled = build_aligner(model, "ridge")
    assert error(doubled.weight, exact_weight(model, 1e-5)) < 1e-5
    with torch.no_grad():
        model.lm_head.weight[96, 47] += 0.5
    build_aligner(model, "ridge")
    assert len(stored(tmp_path)) == 4


@pytest.mark.parametrize("row", [0, 40, VOCAB - 1])
@pytest.mark.parametrize("which", ["get_output_embeddings", "get_input_embeddings"])
def test_the_fingerprint_sees_every_row(monkeypatch, which, row):
    monkeypatch.setattr(alignment, "CHUNK_ROWS", 32)
    model = tiny_model()
    modules = model.get_output_embeddings(), model.get_input_embeddings()
    before = alignment.fingerprint(*modules, 1e-5)
    assert alignment.fingerprint(*modules, 1e-5) == before
    with torch.no_grad():
        getattr(model, which)().weight[row, WIDTH - 1] += 1e-3
    assert alignment.fingerprint(*modules, 1e-5) != before


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def random_bytes(path):
    path.write_bytes(bytes(range(256)) * 40)


def of_another_fingerprint(path):
    alignment._save(path, "0" * 64, load_file(path)["weight"], 0.0)


def without_metadata(path):
    save_file(load_file(path), path)


def metadata_of_another_program(path):
    save_file(load_file(path), path, metadata={"latentmas": "[1, 2]"})


def without_weight(path):
    save_file({"other": torch.ones(2)}, path, metadata={"latentmas": "{}"})


def flipped_byte(path):
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def of_another_shape(path):
    alignment._save(path, path.stem, torch.ones(WIDTH, WIDTH - 1), 0.0)


def of_another_dtype(path):
    alignment._save(path, path.stem, load_file(path)["weight"].double(), 0.0)


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        empty,
        random_bytes,
        of_another_fingerprint,
        without_metadata,
        metadata_of_another_program,
        without_weight,
        flipped_byte,
        of_another_shape,
        of_another_dtype,
    ],
)
def test_a_damaged_file_is_built_again_with_one_warning(tmp_path, no_solve, damage):
    """After that the file is good again, and nothing else lies beside it."""
    want = build_aligner(tiny_model(), "ridge").weight
    (path,) = stored(tmp_path)
    good = path.read_bytes()
    damage(path)
    assert path.read_bytes() != good
    forget()
    with pytest.warns(UserWarning, match="is not used .* it is built again") as caught:
        aligner = build_aligner(tiny_model(), "ridge")
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)
    assert torch.equal(aligner.weight, want)
    assert stored(tmp_path) == [path]
    assert path.read_bytes() == good
    forget()
    no_solve()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(build_aligner(tiny_model(), "ridge").weight, want)


def test_the_file_of_another_model_under_this_name_is_not_believed(tmp_path):
    """A whole, valid file of the same shape, renamed."""
    model, other = tiny_model(), ill_conditioned(tiny_model())
    build_aligner(other, "ridge")
    (foreign,) = stored(tmp_path)
    name = alignment.fingerprint(model.get_output_embeddings(), model.get_input_embeddings(), 1e-5)
    foreign.rename(foreign.with_name(f"{name}.safetensors"))
    with pytest.warns(UserWarning, match="another format or model") as caught:
        aligner = build_aligner(model, "ridge")
    assert len(caught) == 1
    assert error(aligner.weight, exact_weight(model, 1e-5)) < 1e-5


def assert_works_with_one_warning_that_it_is_not_stored(model):
    words = "could not be stored in .* set LATENTMAS_CACHE to a folder that can be written"
    with pytest.warns(UserWarning, match=words) as caught:
        aligner = build_aligner(model, "ridge")
    assert len(caught) == 1
    assert error(aligner.weight, exact_weight(model, 1e-5)) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build_aligner(model, "ridge") is aligner


def test_a_cache_folder_that_cannot_be_made_warns_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LATENTMAS_CACHE", str(tmp_path / "file" / "cache"))
    assert_works_with_one_warning_that_it_is_not_stored(tiny_model())
    assert (tmp_path / "file").read_text() == "no folder"


def test_a_full_disk_warns_once_and_leaves_nothing(tmp_path):
    """Played by the limit on file sizes: the file cannot be written to its end."""
    model = tiny_model()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256, hard))
    try:
        assert_works_with_one_warning_that_it_is_not_stored(model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stored(tmp_path) == []


def test_a_cache_folder_that_cannot_be_read_warns_once(tmp_path, monkeypatch):
    """Played by the system call, since root may read all folders: another user's folder, say."""
    folder, stat = tmp_path / "cache", os.stat

    def denied(path, *arguments, **options):
        if isinstance(path, str | Path) and str(path).startswith(str(folder)):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *arguments, **options)

    folder.write_text("not even a folder")  # nothing can be made in it
    monkeypatch.setattr(os, "stat", denied)
    assert_works_with_one_warning_that_it_is_not_stored(tiny_model())


# ---- auto ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "linear"), [("llama", "ridge"), ("llama-tied", "identity")])
@pytest.mark.parametrize(
    ("measured", "keeps"), [(0.0, True), (alignment.AUTO_NATS, True), (alignment.AUTO_NATS + 0.01, False)]
)
def test_auto_keeps_the_linear_map_up_to_the_threshold(monkeypatch, name, linear, measured, keeps):
    """And takes soft beyond it, even where soft measures worse; reason and nats say what was seen."""
    asked = []

    def measure(model, aligners):
        asked.append([aligner.kind for aligner in aligners])
        return {linear: measured, "soft": 4.25}

    monkeypatch.setattr(alignment, "feedback_kl_nats", measure)
    model = tiny_model(name)
    aligner = build_aligner(model)
    assert aligner.kind == (linear if keeps else "soft")
    assert aligner.kl_nats == {linear: measured, "soft": 4.25}
    assert aligner.reason.startswith("chosen by auto")
    assert f"{linear} {measured:.2f}, soft 4.25" in aligner.reason
    assert build_aligner(model, "auto") is aligner
    assert asked == [[linear, "soft"]]
    assert build_aligner(model, "soft").kl_nats == {}


@torch.no_grad()
@pytest.mark.parametrize("edit", ["weight", "eps", "module"])
def test_auto_measures_anew_what_changed_between_the_embeddings(edit):
    model = tiny_model()
    before = build_aligner(model).kl_nats
    mlp = model.model.layers[1].mlp
    if edit == "weight":
        mlp.down_proj.weight.mul_(8)
    elif edit == "eps":
        model.model.norm.variance_epsilon = 3.0
    else:
        mlp.act_fn = nn.Tanh()
    after = build_aligner(model).kl_nats
    assert after != before
    fresh = copy.deepcopy(model)
    assert build_aligner(fresh).kl_nats == after


@torch.no_grad()
def test_feedback_that_is_the_predicted_token_measures_zero(monkeypatch):
    """Soft of one token, where all embeddings have one norm, feeds back the token itself; a raw state does not."""
    model = tiny_model()
    model.model.embed_tokens.weight.copy_(nn.functional.normalize(model.model.embed_tokens.weight))
    monkeypatch.setattr(alignment, "TOP_K", 1)
    nats = alignment.feedback_kl_nats(model, [build_aligner(model, "soft"), build_aligner(model, "identity")])
    assert nats["soft"] == pytest.approx(0.0, abs=1e-5)
    assert nats["identity"] > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mistral-window"])
def test_feedback_kl_nats_is_the_same_every_time_and_draws_from_no_global_generator(name):
    model = tiny_model(name)
    aligners = [build_aligner(model, "identity"), build_aligner(model, "soft")]
    state = torch.get_rng_state()
    first = alignment.feedback_kl_nats(model, aligners)
    assert torch.equal(torch.get_rng_state(), state)
    assert alignment.feedback_kl_nats(model, aligners[::-1]) == first
    assert all(0 < value < 20 for value in first.values())


def test_auto_fits_into_a_model_of_few_positions():
    """Learned positions end at 8: the sample is shortened, so that the steps have room behind it."""
    model = tiny_model("gpt2", max_position_embeddings=8)
    assert set(build_aligner(model).kl_nats) == {"ridge", "soft"}


@pytest.mark.real_model
def test_auto_chooses_soft_on_the_default_model(default_model):
    """SmolLM2-135M is tied, and its raw states are foreign to it: far above 1 nat, where soft is below."""
    aligner = build_aligner(default_model)
    assert aligner.kind == "soft"
    assert aligner.kl_nats["identity"] > 2
    assert aligner.kl_nats["soft"] < 1
    assert "identity" in aligner.reason
