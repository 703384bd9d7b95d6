"""Cuts and merges of caches: they go on exactly like one that was built at those positions, or at the old ones with gaps."""

import copy
import inspect

import pytest
import torch
from tiny_models import FAMILIES, OTHERS, feed_back, is_tied, ragged, real, tiny_model
from transformers import DynamicCache

from latentmas_kernels import LatentCache, generate, latent_generate
from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.models.rope import RopeShift

# Relative, over the latents of a row. One slot in 13 that is turned by one position too many makes 1e-3 and more where it is
# seen; rounding makes 2e-6, and 2e-5 in OLMo 2, which normalises what each layer adds.
TOLERANCE = 5e-5
MOVABLE = [name for name in OTHERS if name not in ("cohere2", "gpt2")]
BOTH_ENGINES = [(name, engine) for name in FAMILIES for engine in ("eager", "native")]
ORIGINAL = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {"rope_type": "llama3", **ORIGINAL, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"rope_type": "yarn", **ORIGINAL},
}
CHANGING = {
    "dynamic": {"rope_type": "dynamic", **ORIGINAL},
    "longrope": {"rope_type": "longrope", **ORIGINAL, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
}


# ---- what can be moved ---------------------------------------------------------------------------------------------


def tables_of(model):
    """inv_freq of each layer, by the model's own rotary module."""
    decoder, a = model.get_decoder(), Architecture.of(model)
    named = dict(decoder.rotary_emb.named_buffers())
    return torch.stack([named.get(f"{kind}_inv_freq", named.get("inv_freq")) for kind in a.layer_types])


@pytest.mark.parametrize("name", [*FAMILIES, *MOVABLE])
def test_frequencies_are_those_of_each_layer(name):
    model = tiny_model(name)
    assert torch.equal(RopeShift.probe(model).inv_freq, tables_of(model))
    assert RopeShift.probe(model) is RopeShift.probe(model), "proved once"
    half = RopeShift.probe(model.bfloat16())
    assert torch.equal(half.inv_freq, tables_of(model).float())


def test_layers_of_different_frequencies():
    """Gemma 3 turns its sliding layers faster than the others."""
    frequencies = RopeShift.probe(tiny_model("gemma3")).inv_freq
    assert torch.equal(frequencies[0], frequencies[2])
    assert not torch.equal(frequencies[0], frequencies[1])


def test_a_refusal_is_not_kept():
    model = tiny_model("llama")
    hook = model.model.layers[0].register_forward_hook(lambda module, args, out: out + torch.randn_like(out))
    with pytest.raises(ValueError, match="cannot be moved"):
        RopeShift.probe(model)
    hook.remove()
    assert torch.equal(RopeShift.probe(model).inv_freq, tables_of(model))


def test_it_is_probed_in_the_dtype_of_the_model():
    """Under autocast keys of float32 would be as rough as those of bfloat16."""
    model = tiny_model("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(RopeShift.probe(model).inv_freq, tables_of(model))


@pytest.mark.parametrize("inference", [False, True])
def test_frequencies_that_change_are_seen(inference):
    model = tiny_model("llama")
    with torch.inference_mode(inference):
        first = RopeShift.probe(model)
        model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq / 2
        second = RopeShift.probe(model)
        assert RopeShift.probe(model) is second
        assert torch.equal(second.inv_freq, tables_of(model))
        assert torch.equal(first.inv_freq, 2 * second.inv_freq)
    if not inference:
        model.model.rotary_emb.inv_freq.mul_(0.5)
        assert torch.equal(RopeShift.probe(model).inv_freq, second.inv_freq / 2)


FACTOR_32 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_wrong_low_frequencies_are_seen_in_every_dtype(dtype):
    """The model turns by the scaled frequencies of Llama 3 and shows the unscaled ones."""
    options = {"head_dim": 64, "max_position_embeddings": 131072}
    model = tiny_model("llama", rope_parameters=FACTOR_32, **options).to(dtype)
    rope = model.model.rotary_emb
    right, forward = rope.inv_freq, rope.forward
    unscaled = tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, **options)
    wrong = unscaled.model.rotary_emb.inv_freq.to(right.dtype)
    assert torch.equal(RopeShift.probe(model).inv_freq[0], right.float())

    def turned(x, position_ids):
        rope.inv_freq = right
        try:
            return forward(x, position_ids)
        finally:
            rope.inv_freq = wrong

    rope.inv_freq, rope.forward = wrong, turned
    with pytest.raises(ValueError, match="moved by 1061 positions, keys of layer 0 are 0.[23456]"):
        RopeShift.probe(model)


def test_layers_are_moved_one_by_one_from_the_first_slot_that_moves_on(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "latentmas_kernels.models.rope.rerotate_keys", lambda keys, shifts, table: seen.append((keys, shifts))
    )
    keys = torch.zeros(3, 2, 1, 10, 4)
    shifts = torch.tensor([[0, 0, 0, 2, 0, 2], [0, 0, 0, 0, 1, 1]])
    rotation = RopeShift(torch.tensor([[1.0, 0.5], [0.0, 0.0], [1.0, 0.5]]))
    rotation.move(keys, torch.zeros_like(shifts))
    assert not seen
    rotation.move(keys, shifts)
    assert [k.data_ptr() for k, _ in seen] == [keys[layer, :, :, 3:].data_ptr() for layer in (0, 2)]
    assert all(k.shape[0] == 1 and torch.equal(s, shifts[:, 3:]) for k, s in seen)


@pytest.mark.parametrize("rope", ROPES)
def test_scaled_frequencies_can_be_moved(rope):
    model = tiny_model("llama", rope_parameters=ROPES[rope])
    assert torch.equal(RopeShift.probe(model).inv_freq, tables_of(model))
    plain = tiny_model("llama")
    assert not torch.equal(tables_of(model), tables_of(plain)), "or the test would say nothing"


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("cohere2", {}, "Cohere2ForCausalLM cannot be moved.*moved by 508 positions, keys of layer 0 are 1.* off"),
        ("gpt2", {}, "GPT2LMHeadModel cannot be moved.*moved by 508 positions, keys of layer 0"),
        (
            "llama",
            {"model_type": "glm", "partial_rotary_factor": 0.5},
            "GlmForCausalLM cannot be moved.*keys of layer 0",
        ),
        *(
            ("llama", {"rope_parameters": CHANGING[r]}, f"RoPE is of type {r}, whose freq.* the length")
            for r in CHANGING
        ),
    ],
    ids=["interleaved", "learned", "partial", *CHANGING],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_that_cannot_be_moved_are_refused_with_the_reason(name, overrides, words, dtype):
    """And only where something has to move; the cache stays as it was."""
    model = tiny_model(name, **overrides).to(dtype)
    with pytest.raises(ValueError, match=f"{words}.*Cut without rebase\\(\\), which keeps positions"):
        RopeShift.probe(model)
    cache = latent_generate(model, *ragged([5, 3]), latent_steps=2, aligner="identity", engine="eager").past_key_values
    cache.rebase(model)
    cache.keep(torch.arange(7).expand(2, 7) % 2 == 1)
    before = cache.fork()
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be moved"):
            cache.rebase(model)
        with pytest.raises(ValueError, match="cannot be moved"):
            LatentCache.concat([cache, cache], model)
    assert torch.equal(cache.positions[0, :3], before.positions[0, :3])
    assert torch.equal(cache.keys[:, 0, :, :3], before.keys[:, 0, :, :3])


def test_a_cache_of_another_model_is_not_rotated(model):
    cache = latent_generate(model, *ragged([5, 3]), latent_steps=0, engine="eager").past_key_values
    cache.keep(torch.arange(5).expand(2, 5) > 1)
    for other in (tiny_model("llama", num_hidden_layers=2), tiny_model("llama").bfloat16()):
        with pytest.raises(ValueError, match="cache of another model"):
            cache.rebase(other)


# ---- against a cache that the model built at those positions -------------------------------------------------------


class PlainCache:
    """One row on transformers' own forward and cache, with the position of each slot and masks written out."""

    def __init__(self, model):
        self.model, self.architecture = model, Architecture.of(model)
        self.cache, self.positions, self.next = DynamicCache(), torch.zeros(0, dtype=torch.int64), 0
        kind = "identity" if is_tied(model) else "ridge"
        self.aligner, self.feed_back = kind, feed_back(model, kind)

    def mask(self, window, queries):
        distance = queries[:, None] - self.positions[None]
        seen = (distance >= 0) & (distance < (window or 10**9))
        if self.model.config._attn_implementation != "sdpa":
            lowest = torch.finfo(self.model.dtype).min
            seen = torch.zeros(seen.shape, dtype=self.model.dtype).masked_fill(~seen, lowest)
        return seen[None, None]

    @torch.no_grad()
    def forward(self, **inputs):
        count = next(iter(inputs.values())).shape[1]
        queries = torch.arange(self.next, self.next + count)
        self.positions, self.next = torch.cat([self.positions, queries]), self.next + count
        a = self.architecture
        masks = {k: self.mask(w, queries) for k, w in zip(a.layer_types, a.windows, strict=True)}
        out = self.model(
            **inputs, attention_mask=masks if len(masks) > 1 else next(iter(masks.values())), position_ids=queries[None],
            past_key_values=self.cache, use_cache=True, output_hidden_states=True,
        )  # fmt: skip
        return out.hidden_states[-1][:, -1], out.logits[:, -1]

    def run_latent(self, ids, steps):
        hidden, logits = self.forward(input_ids=ids)
        latents = []
        for _ in range(steps):
            latents.append(self.feed_back(hidden, logits))
            hidden, logits = self.forward(inputs_embeds=latents[-1][:, None])
        return torch.cat(latents), hidden[0]

    def decode(self, ids, count):
        _, logits = self.forward(input_ids=ids)
        tokens = [int(logits.argmax())]
        while len(tokens) < count:
            _, logits = self.forward(input_ids=torch.tensor([[tokens[-1]]]))
            tokens.append(int(logits.argmax()))
        return tokens

    def cut(self, slots):
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, slots], layer.values[:, :, slots]
        self.positions = self.positions[slots]
        self.next = int(self.positions[-1]) + 1

    def turns(self, positions, kind):
        """Cosine and sine of the model's own rotary module, [1, 1, n, width / 2] in float64."""
        rotary = self.model.get_decoder().rotary_emb
        more = {"layer_type": kind} if "layer_type" in inspect.signature(rotary.forward).parameters else {}
        half = self.architecture.head_dim // 2
        return (t[:, None, :, :half].double() for t in rotary(torch.zeros(1), positions[None], **more))

    def rebase(self):
        """Turn back by the model's own angles and on to the new ones by its own again, in float64."""
        new = torch.arange(len(self.positions))
        for layer, kind in zip(self.cache.layers, self.architecture.layer_types, strict=True):
            (cos, sin), (new_cos, new_sin) = self.turns(self.positions, kind), self.turns(new, kind)
            low, high = layer.keys.double().chunk(2, dim=-1)
            size = cos**2 + sin**2
            low, high = (low * cos + high * sin) / size, (high * cos - low * sin) / size
            turned = torch.cat([low * new_cos - high * new_sin, high * new_cos + low * new_sin], dim=-1)
            layer.keys = turned.to(layer.keys.dtype)
        self.positions, self.next = new, len(new)

    def append(self, other):
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.keys = torch.cat([mine.keys, theirs.keys], dim=2)
            mine.values = torch.cat([mine.values, theirs.values], dim=2)
        self.positions = torch.cat([self.positions, other.positions])


TURNS = [ragged([9, 4, 17], seed=1), ragged([5, 12, 2], seed=2), ragged([3, 1, 6], seed=3), ragged([2, 4, 3], seed=4)]
STEPS = [3, 4]


def agents(model, engine, turns=TURNS, **options):
    """The cache of two agents, planner and critic, the second behind the first."""
    cache = None
    for name, (ids, mask), steps in zip(("planner", "critic"), turns, STEPS, strict=False):
        out = latent_generate(
            model, ids, mask, latent_steps=steps, past_key_values=cache, aligner="ridge", engine=engine, **options
        )
        cache = out.past_key_values
        cache.name_segments(name)
    return cache


def plain_agents(model, turns=TURNS):
    plain = [PlainCache(model) for _ in turns[0][0]]
    for (ids, mask), steps in zip(turns, STEPS, strict=False):
        for row, alone in enumerate(plain):
            alone.run_latent(real(ids, mask, row), steps)
    return plain


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def assert_goes_on_like(model, engine, cache, plain, tolerance, turns=TURNS):
    """Three latent steps and six greedy tokens behind the cache."""
    latent_output = latent_generate(
        model, *turns[2], latent_steps=3, past_key_values=cache, aligner="ridge", engine=engine, output_states=True
    )
    decoded = generate(
        model,
        *turns[3],
        past_key_values=latent_output.past_key_values,
        max_new_tokens=6,
        eos_token_id=None,
        engine=engine,
    )
    for row, alone in enumerate(plain):
        latents, last = alone.run_latent(real(*turns[2], row), 3)
        assert relative(latent_output.latents[row], latents) < tolerance
        assert relative(latent_output.last_hidden[row], last) < tolerance
        assert decoded.sequences[row, -6:].tolist() == alone.decode(real(*turns[3], row), 6)


def cut(cache, plain, *, close, model):
    """Drop an agent's latent steps by name, then every third slot of what is left and the first of the second row."""
    cache.drop("planner:latent")
    kept = torch.arange(int(cache.lengths.max())).expand(len(plain), -1) % 3 != 1
    kept = kept.clone()
    kept[-1, 0] = False
    cache.keep(kept)
    for row, alone in enumerate(plain):
        first = int(TURNS[0][1][row].sum())
        slots = [i for i in range(len(alone.positions)) if not first <= i < first + STEPS[0]]
        slots = [slot for i, slot in enumerate(slots) if kept[row, i]]
        alone.cut(torch.tensor(slots))
        if close:
            alone.rebase()
    if close:
        cache.rebase(model)
    for row, alone in enumerate(plain):
        assert cache.positions[row, : cache.lengths[row]].tolist() == alone.positions.tolist()
        assert int(cache.next_position[row]) == alone.next


@pytest.mark.parametrize("close", [True, False], ids=["rebased", "gaps"])
@pytest.mark.parametrize(("name", "engine"), [*BOTH_ENGINES, *((name, "eager") for name in MOVABLE)])
def test_a_cut_cache_goes_on_like_one_built_at_those_positions(name, engine, close):
    model = tiny_model(name)
    cache, plain = agents(model, engine), plain_agents(model)
    cut(cache, plain, close=close, model=model)
    assert_goes_on_like(model, engine, cache, plain, TOLERANCE)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("engine", ["eager", "native"])
def test_a_cut_cache_of_scaled_frequencies(rope, engine):
    """yarn scales the keys as well."""
    model = tiny_model("qwen3-mixed", rope_parameters=ROPES[rope])
    cache, plain = agents(model, engine), plain_agents(model)
    cut(cache, plain, close=True, model=model)
    assert_goes_on_like(model, engine, cache, plain, TOLERANCE)


@pytest.mark.parametrize("name", ["cohere2", "gpt2"])
def test_gaps_of_models_whose_keys_cannot_be_moved(name):
    model = tiny_model(name)
    cache, plain = agents(model, "eager"), plain_agents(model)
    cut(cache, plain, close=False, model=model)
    assert_goes_on_like(model, "eager", cache, plain, TOLERANCE)


@pytest.mark.parametrize("close", [True, False], ids=["rebased", "gaps"])
@pytest.mark.parametrize("name", ["llama", "qwen3-mixed"])
def test_far_positions(name, close):
    """float32 rounds the angles of position 3900 by up to half of 2^-12, the model's own and those of a move alike."""
    model = tiny_model(name, max_position_embeddings=4096)
    turns = [ragged([3880, 1200]), *TURNS[1:]]
    turns = [(ids[:2], mask[:2]) for ids, mask in turns]
    cache, plain = agents(model, "native", turns[:1]), plain_agents(model, turns[:1])
    width = int(cache.lengths.max())
    kept = (torch.arange(width) < 20) | (torch.arange(width) >= cache.lengths[:, None] - 30)
    cache.keep(kept & (torch.arange(width) < cache.lengths[:, None]))
    for row, alone in enumerate(plain):
        alone.cut(kept[row, : len(alone.positions)].nonzero()[:, 0])
        if close:
            alone.rebase()
    if close:
        cache.rebase(model)
    assert cache.next_position.tolist() == ([50, 50] if close else [3883, 1203])
    for engine in ("native", "eager"):
        assert_goes_on_like(model, engine, cache, copy.deepcopy(plain), 4 * TOLERANCE if close else TOLERANCE, turns)


@pytest.mark.parametrize("engine", ["eager", "native"])
@pytest.mark.parametrize("name", ["llama", "qwen3-mixed", "mistral-window"])
def test_bfloat16_error_is_that_of_plain_bfloat16(name, engine):
    """Against float32 on the same rounded weights, the errors of three rows together."""
    half = tiny_model(name).bfloat16()
    full = copy.deepcopy(half).float()
    cache = agents(half, engine)
    plain, exact = plain_agents(half), plain_agents(full)
    cut(cache.fork(), exact, close=True, model=half)
    cut(cache, plain, close=True, model=half)
    ours = latent_generate(half, *TURNS[2], latent_steps=1, past_key_values=cache, aligner="ridge", engine=engine)
    theirs, want = (
        torch.stack([alone.run_latent(real(*TURNS[2], row), 1)[1] for row, alone in enumerate(each)]).double()
        for each in (plain, exact)
    )
    assert (ours.last_hidden.double() - want).norm() <= 2 * (theirs - want).norm()


# ---- merged --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["eager", "native"])
@pytest.mark.parametrize("name", [*FAMILIES, "gemma3"])
def test_a_merged_cache_goes_on_like_one_built_at_those_positions(name, engine):
    """Agents that ran apart; in the middle one that was cut, its gaps are closed as well."""
    if name == "gemma3" and engine == "native":
        pytest.skip("the native engine does not cover it")
    model = tiny_model(name)
    alone = [agents(model, engine, TURNS[n : n + 1]) for n in range(2)]
    plain = [plain_agents(model, TURNS[n : n + 1]) for n in range(2)]
    kept = torch.arange(int(alone[1].lengths.max())).expand(3, -1) > 0
    alone[1].keep(kept)
    merged = LatentCache.concat(alone, model, capacity=60)
    want = []
    for first, second in zip(*plain, strict=True):
        second.cut(torch.arange(1, len(second.positions)))
        first.append(second)
        first.rebase()
        want.append(first)
    assert merged.capacity == 60
    assert merged.lengths.tolist() == merged.next_position.tolist() == [len(m.positions) for m in want]
    for row, alone in enumerate(want):
        length = len(alone.positions)
        assert merged.positions[row, :length].tolist() == alone.positions.tolist()
        keys = torch.stack([layer.keys[0] for layer in alone.cache.layers])
        values = torch.stack([layer.values[0] for layer in alone.cache.layers])
        assert relative(merged.keys[:, row, :, :length], keys) < 1e-5
        assert relative(merged.values[:, row, :, :length], values) < 1e-5
    assert_goes_on_like(model, engine, merged, want, TOLERANCE)


@pytest.mark.parametrize("engine", ["eager", "native"])
def test_slices_of_rows_with_a_shared_prefix_merge_to_what_each_row_holds(engine):
    """A common beginning once, and what two ways to go on from it added; the parts stay as they are."""
    model = tiny_model("qwen3-mixed")
    ids, mask = ragged([70, 66])
    options = {"aligner": "ridge", "engine": engine}
    common = latent_generate(model, ids, mask, latent_steps=2, **options).past_key_values
    wide = common.fork_rows(2, 90)
    wide = latent_generate(
        model, *ragged([3, 5, 2, 4]), latent_steps=2, past_key_values=wide, **options
    ).past_key_values
    assert wide.prefix_len.tolist() == [0, 64, 0, 64]
    before = wide.buffer.clone()
    ends = [72, 68]
    merged = LatentCache.concat([wide.part([0, 2]), wide.part([1, 3], torch.tensor(ends))], model)
    assert torch.equal(wide.buffer.nan_to_num(), before.nan_to_num())
    for row, end in enumerate(ends):
        one = wide.select([2 * row, 2 * row + 1])
        first, second = one.lengths.tolist()
        assert int(merged.lengths[row]) == first + second - end
        assert torch.equal(merged.buffer[:, :, row, :, :first], one.buffer[:, :, 0, :, :first])
        assert torch.equal(merged.values[:, row, :, first : first + second - end], one.values[:, 1, :, end:second])
        tail = PlainCache(model)
        states = [one.buffer[:, layer, 1, :, end:second] for layer in range(3)]
        tail.cache = DynamicCache(ddp_cache_data=[(keys[None], values[None]) for keys, values in states])
        moved = torch.arange(first, first + second - end)
        for layer, kind in zip(tail.cache.layers, tail.architecture.layer_types, strict=True):
            (cos, sin), (new_cos, new_sin) = tail.turns(torch.arange(end, second), kind), tail.turns(moved, kind)
            low, high = layer.keys.double().chunk(2, dim=-1)
            low, high = low * cos + high * sin, high * cos - low * sin
            layer.keys = torch.cat([low * new_cos - high * new_sin, high * new_cos + low * new_sin], dim=-1)
        keys = torch.stack([layer.keys[0] for layer in tail.cache.layers])
        assert relative(merged.keys[:, row, :, first : first + second - end], keys) < 1e-5
