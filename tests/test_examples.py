"""The scripts in examples/: clients of transformers' generate() on an accelerated model, against the plain model."""

import argparse
import copy
import importlib.util
import os
import runpy
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from latentmas import Chain
from tiny_models import PlainLoop, feed_back
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from latentmas_kernels import LatentCache, generate
from latentmas_kernels.engines.native import NativeEngine
from latentmas_kernels.hf import ModelWrapper, accelerate

pytestmark = pytest.mark.real_model
EXAMPLES = Path(__file__).parents[1] / "examples"
STEPS, NEW = 4, 10


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def twin(default_model):
    return copy.deepcopy(default_model)


@pytest.fixture
def fast(twin):
    """The default model once more, accelerated."""
    return accelerate(twin, aligner="soft")


@pytest.fixture
def printed(twin, default_tokenizer, monkeypatch, capsys):
    """What an example prints as a script, on a model that is loaded already."""

    def run(name):
        monkeypatch.setattr("latentmas.load_model", lambda: (twin, default_tokenizer))
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@contextmanager
def engine_calls():
    """Collects the native engine's calls; no call may be left to transformers, which would warn."""
    calls = []

    def counted(name):
        method = getattr(NativeEngine, name)
        return lambda self, *args, **kwargs: calls.append(name) or method(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for name in ("extend", "run_latent", "decode"):
            patch.setattr(NativeEngine, name, counted(name))
        yield calls


@pytest.fixture
def native_calls():
    with engine_calls() as calls:
        yield calls


class Recorder(BaseStreamer):
    def __init__(self):
        self.puts, self.ended = [], 0

    def put(self, value):
        self.puts.append(value.tolist())

    def end(self):
        self.ended += 1


def text_of(tokenizer, ids, prompt):
    return tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)


# ---- transformers' pipeline ----------------------------------------------------------------------------------------


def test_pipeline_chat(default_model, default_tokenizer, fast, native_calls, printed):
    module = example("pipeline_chat")
    want = module.answers(default_model, default_tokenizer, module.CHATS)
    assert not native_calls
    assert module.answers(fast, default_tokenizer, module.CHATS) == want
    assert native_calls == ["extend", "decode"], "one batch"
    assert module.answers(fast, default_tokenizer, module.CHATS, batch_size=1) == want
    assert native_calls[2:] == ["extend", "decode"] * 2
    assert all(want)
    assert printed("pipeline_chat") == "".join(f"{text}\n" for text in want)


# ---- LangChain -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def langchain_agents():
    pytest.importorskip("langchain_huggingface")
    return example("langchain_agents")


def test_langchain_agents(langchain_agents, default_model, default_tokenizer, fast, native_calls):
    topics = [{"topic": "a small cat"}, {"topic": "the sea in winter"}]
    _, plain = langchain_agents.agents(default_model, default_tokenizer, NEW)
    _, both = langchain_agents.agents(fast, default_tokenizer, NEW)
    want = [plain.invoke(topics[0])]
    assert not native_calls
    assert both.invoke(topics[0]) == want[0]
    assert native_calls == ["extend", "decode"] * 2
    want.append(both.invoke(topics[1]))
    assert both.batch(topics) == want, "in threads at the same time"
    assert all(said["draft"] and said["review"] for said in want)


def test_langchain_streams(langchain_agents, default_model, default_tokenizer, fast, native_calls, printed):
    topic = {"topic": "the sea"}
    plain, _ = langchain_agents.agents(default_model, default_tokenizer, NEW)
    writer, both = langchain_agents.agents(fast, default_tokenizer, NEW)
    want = list(plain.stream(topic))
    assert not native_calls
    assert list(writer.stream(topic)) == want
    assert "extend" in native_calls
    assert len([piece for piece in want if piece]) > 5
    assert "".join(want) == writer.invoke(topic)
    assert "".join(chunk.get("review", "") for chunk in both.stream(topic)) == both.invoke(topic)["review"]
    lines = printed("langchain_agents").splitlines()
    assert lines[0].startswith("".join(want))
    assert "'draft': " in lines[1]
    assert "'review': " in lines[1]


def test_langchain_model_without_chat(langchain_agents, default_model, default_tokenizer, fast):
    """HuggingFacePipeline itself: a batch as one call of the pipeline, and `stop` where langchain heeds it (streams)."""
    plain = langchain_agents.chat_model(default_model, default_tokenizer, NEW).llm
    llm = langchain_agents.chat_model(fast, default_tokenizer, NEW).llm
    prompts = ["The sea is", "Once upon a time there was a small cat that"]
    want = plain.batch(prompts)
    with engine_calls() as calls:
        assert llm.batch(prompts) == want
    assert set(calls) == {"extend", "decode"}
    stop = [default_tokenizer.tokenize(want[0])[6]]
    short = list(plain.stream(prompts[0], stop=stop))
    assert list(llm.stream(prompts[0], stop=stop)) == short
    assert want[0].startswith("".join(short))
    assert len("".join(short)) < len(want[0])


# ---- streaming -----------------------------------------------------------------------------------------------------


def test_streaming(default_model, default_tokenizer, fast, native_calls, printed):
    module, prompt = example("streaming"), "Tell me a story."
    inputs = example("custom_generate").read(default_model, default_tokenizer, prompt)
    want = default_model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert not native_calls
    pieces = list(module.stream(fast, default_tokenizer, prompt, max_new_tokens=NEW, do_sample=False))
    assert "".join(pieces) == text_of(default_tokenizer, want, inputs.input_ids)
    assert len([piece for piece in pieces if piece]) > 5
    assert native_calls.count("extend") == NEW
    said = printed("streaming")
    assert said.startswith("".join(pieces))
    assert said.count(".") == 3


class Waiting(StoppingCriteria):
    """Counts tokens, and lets a reader have the first before the tenth is written."""

    def __init__(self):
        self.tokens, self.seen = 0, threading.Event()

    def __call__(self, input_ids, scores, **kwargs):
        self.tokens += 1
        assert self.tokens < 10 or self.seen.wait(30)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_pieces_arrive_before_the_end_and_closing_stops_the_model(default_tokenizer, fast, monkeypatch):
    module, waiting, threads = example("streaming"), Waiting(), threading.active_count()
    monkeypatch.setattr(module, "StoppingCriteriaList", lambda own: StoppingCriteriaList([waiting, *own]))
    pieces = module.stream(fast, default_tokenizer, "Tell me a story.", max_new_tokens=1000, do_sample=False)
    assert next(piece for piece in pieces if piece)
    waiting.seen.set()
    pieces.close()
    assert 0 < waiting.tokens < 1000
    assert threading.active_count() == threads, "its thread has ended"


def test_an_error_in_the_thread_reaches_the_reader(default_tokenizer, fast):
    stream = example("streaming").stream
    with pytest.raises(ValueError, match="latent_steps must be"):
        list(stream(fast, default_tokenizer, "Hello", max_new_tokens=8, latent_steps=-1))


# ---- latent steps --------------------------------------------------------------------------------------------------


def decoded(model, tokenizer, prompts, max_new_tokens):
    """Return the text of the published loop: latent steps behind all prompts but the last."""
    loop = PlainLoop(model, feed_back(model, "soft"))
    for ids in prompts[:-1]:
        loop.run_latent(ids, STEPS)
    tokens = loop.decode(prompts[-1], max_new_tokens)
    end = model.generation_config.eos_token_id
    return tokenizer.decode(tokens[: tokens.index(end)] if end in tokens else tokens, skip_special_tokens=True)


@torch.no_grad()
def test_latent_generate(default_model, default_tokenizer, fast, native_calls, printed):
    module = example("latent_generate")
    roles = [*module.LATENT_AGENTS, module.JUDGER]
    ids = [module.read(default_model, default_tokenizer, r.format(module.QUESTION)).input_ids for r in roles]

    text, caches = module.discuss(fast, default_tokenizer, module.QUESTION, STEPS, max_new_tokens=NEW)

    assert native_calls.count("run_latent") == 2
    assert text == decoded(default_model, default_tokenizer, ids, NEW)
    assert text
    assert all(isinstance(cache, LatentCache) for cache in caches)
    lengths = [ids[0].shape[1] + STEPS, ids[0].shape[1] + ids[1].shape[1] + 2 * STEPS]
    assert [int(cache.lengths) for cache in caches[:2]] == lengths
    assert caches[2].lengths > lengths[1] + ids[2].shape[1]
    *shown, answer = printed("latent_generate").splitlines()
    assert [line.split()[-1] for line in shown] == ["latent", "latent", "text"]
    assert answer


@torch.no_grad()
def test_model_wrapper(default_model, default_tokenizer, native_calls, printed):
    module = example("model_wrapper")
    wrapper = ModelWrapper(default_model, default_tokenizer, aligner="soft")
    texts, cache = module.discuss(wrapper, module.QUESTIONS, STEPS, max_new_tokens=NEW)
    assert native_calls.count("run_latent") == 2
    for row, question in enumerate(module.QUESTIONS):
        turns = [
            [{"role": "user", "content": role.format(question)}] for role in (*module.LATENT_AGENTS, module.JUDGER)
        ]
        prompts = [wrapper.prepare_chat_input(turn)[1] for turn in turns]
        assert texts[row] == decoded(default_model, default_tokenizer, prompts, NEW).strip()
        assert cache.lengths[row] > sum(ids.shape[1] for ids in prompts) + 2 * STEPS
    assert printed("model_wrapper").splitlines()[::2] == module.QUESTIONS


class Vendored:
    """The class that such a program carries along, on plain transformers: padding is none of its business."""

    def __init__(self, model_name, device, use_vllm=False, args=None):
        self.model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32).eval()
        self.tokenizer, self.device = AutoTokenizer.from_pretrained(model_name), device
        kind = "ridge" if args.latent_space_realign else "identity"
        self.feed_back = feed_back(self.model, kind)

    def prepare_chat_batch(self, batch, add_generation_prompt=True):
        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        return [self.tokenizer.apply_chat_template(messages, **options) for messages in batch], None, None, None

    def generate_latent_batch(self, input_ids, attention_mask=None, *, latent_steps, past_key_values=None):
        loop = PlainLoop(self.model, self.feed_back)
        loop.cache = DynamicCache(ddp_cache_data=past_key_values)
        loop.run_latent(input_ids, latent_steps)
        return tuple((layer.keys, layer.values) for layer in loop.cache.layers)

    def generate_text_batch(
        self, input_ids, attention_mask=None, *, max_new_tokens, temperature, top_p, past_key_values=None
    ):
        cache = DynamicCache(ddp_cache_data=past_key_values)
        ones = torch.ones(len(input_ids), cache.get_seq_length() + input_ids.shape[1], dtype=torch.int64)
        sequences = self.model.generate(
            input_ids, attention_mask=ones, past_key_values=cache, do_sample=True, max_new_tokens=max_new_tokens,
            temperature=temperature, top_p=top_p,
        )  # fmt: skip
        texts = self.tokenizer.batch_decode(sequences[:, input_ids.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts], tuple((layer.keys, layer.values) for layer in cache.layers)


@pytest.mark.parametrize("latent_only", [False, True], ids=["whole", "latent-only"])
@torch.no_grad()
def test_latentmas_program(default_folder, latent_only):
    """The same texts with the class that it carries along (one question at a time, which is all that one gets right) and with
    ModelWrapper in its place, one at a time and in a ragged batch of four."""
    module = example("latentmas_program")
    given = (str(default_folder), torch.device("cpu"))
    args = argparse.Namespace(latent_space_realign=False)
    options = {"latent_steps": STEPS, "max_new_tokens": NEW, "latent_only": latent_only}
    theirs, ours = Vendored(*given, use_vllm=False, args=args), ModelWrapper(*given, use_vllm=False, args=args)
    want = [module.answers(theirs, [question], **options)[0] for question in module.QUESTIONS]
    assert [module.answers(ours, [question], **options)[0] for question in module.QUESTIONS] == want
    assert len({len(ids) for ids in ours.tokenizer(module.QUESTIONS)["input_ids"]}) == 4, "ragged"
    assert module.answers(ours, module.QUESTIONS, **options) == want
    assert len(set(want)) > 2


def test_latentmas_program_as_a_script(default_folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["latentmas_program.py", "--device", "cpu"])
    runpy.run_path(str(EXAMPLES / "latentmas_program.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :], "one by one and in a batch"
    assert len(lines) >= 8


# ---- custom_generate -----------------------------------------------------------------------------------------------


@pytest.fixture
def by(tmp_path, monkeypatch):
    """The example's two ways; transformers copies the folder's code to a cache of the test's own."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return example("custom_generate")


@pytest.mark.parametrize("latent_steps", [0, STEPS])
@pytest.mark.parametrize("way", ["by_function", "by_folder"])
def test_custom_generate(way, latent_steps, default_model, default_tokenizer, fast, by, native_calls):
    inputs = by.read(default_model, default_tokenizer, by.PROMPT)
    options = {"latent_steps": latent_steps, "max_new_tokens": NEW, "do_sample": False}
    want, got = Recorder(), Recorder()
    ids = fast.generate(**inputs, streamer=want, **options)
    seen = len(native_calls)
    assert torch.equal(getattr(by, way)(default_model, inputs, streamer=got, aligner="soft", **options), ids)
    assert native_calls[seen:] == native_calls[:seen]
    assert got.puts == want.puts == [inputs.input_ids.tolist(), *([token] for token in ids[0, -NEW:].tolist())]
    assert got.ended == want.ended == 1
    if not latent_steps:
        assert torch.equal(default_model.generate(**inputs, max_new_tokens=NEW, do_sample=False), ids)


@pytest.mark.parametrize("way", ["by_function", "by_folder"])
def test_custom_generate_samples_repeatably(way, default_model, default_tokenizer, fast, by):
    inputs = by.read(default_model, default_tokenizer, by.PROMPT)
    options = {"latent_steps": STEPS, "max_new_tokens": 8, "do_sample": True, "temperature": 1.5}

    def seeded(seed, generate, *args, **own):
        torch.manual_seed(seed)
        return generate(*args, **options, **own)

    first = seeded(1, getattr(by, way), default_model, inputs, aligner="soft")
    assert torch.equal(seeded(1, getattr(by, way), default_model, inputs, aligner="soft"), first)
    assert torch.equal(seeded(1, fast.generate, **inputs), first)
    assert not torch.equal(seeded(2, getattr(by, way), default_model, inputs, aligner="soft"), first)


@pytest.mark.parametrize("where", ["argument", "configuration", "model"])
def test_folder_stops_at_strings(where, default_model, default_tokenizer, fast, by, monkeypatch):
    inputs = by.read(default_model, default_tokenizer, by.PROMPT)
    options = {"max_new_tokens": NEW, "do_sample": False}
    stop = {"stop_strings": ["fundamental"]}
    ids = fast.generate(**inputs, tokenizer=default_tokenizer, **options, **stop)
    said = default_tokenizer.decode(ids[0, inputs.input_ids.shape[1] :])
    assert said.endswith("fundamental")

    given = dict(options)
    if where == "argument":
        given |= stop
    elif where == "configuration":
        given = {"generation_config": GenerationConfig(**options, **stop)}
    else:
        monkeypatch.setattr(default_model.generation_config, "stop_strings", stop["stop_strings"])
    assert torch.equal(by.by_folder(default_model, inputs, tokenizer=default_tokenizer, **given), ids)
    with pytest.raises(ValueError, match="you must pass the model's tokenizer"):
        by.by_folder(default_model, inputs, **given)


def test_folder_hands_on_processors_criteria_and_a_cache(default_model, default_tokenizer, by):
    inputs = by.read(default_model, default_tokenizer, by.PROMPT)
    options = {"max_new_tokens": 8, "do_sample": False, "repetition_penalty": 1.3, "return_dict_in_generate": True}
    lengths = []

    class Count(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            lengths.append(input_ids.shape[1])
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def least_likely_next(input_ids, scores):
        return -scores

    more = {"logits_processor": [least_likely_next], "stopping_criteria": StoppingCriteriaList([Count()])}
    want = default_model.generate(**inputs, **options, **more)
    assert len(lengths) == 8
    got = by.by_folder(default_model, inputs, **options, **more)
    assert lengths[8:] == lengths[:8]
    assert torch.equal(got.sequences, want.sequences)
    follow = default_model.generate(
        want.sequences, past_key_values=want.past_key_values, max_new_tokens=4, do_sample=False
    )
    inputs = {"inputs": got.sequences, "past_key_values": got.past_key_values}
    assert torch.equal(by.by_folder(default_model, inputs, max_new_tokens=4, do_sample=False), follow)


@pytest.mark.parametrize("way", ["by_function", "by_folder"])
def test_beams_are_refused(way, default_model, default_tokenizer, by):
    inputs = by.read(default_model, default_tokenizer, by.PROMPT)
    with pytest.raises(ValueError, match="got options of beam search; latent_decode is greedy or samples"):
        getattr(by, way)(default_model, inputs, max_new_tokens=4, latent_steps=2, num_beams=2)


def test_folder_refuses_an_assistant_model(default_model, default_tokenizer, by):
    inputs = by.read(default_model, default_tokenizer, by.PROMPT)
    with pytest.raises(ValueError, match="got an assistant_model"):
        by.by_folder(default_model, inputs, max_new_tokens=4, assistant_model=default_model)


def test_custom_generate_prints(printed, by):
    streamed, whole = printed("custom_generate").splitlines()
    assert streamed == whole != ""


# ---- as scripts ----------------------------------------------------------------------------------------------------


def test_runs_as_a_script(default_folder):
    environment = {**os.environ, "LATENTMAS_CACHE": str(default_folder.parents[1]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / "pipeline_chat.py"], capture_output=True, text=True, env=environment
    )
    assert not done.returncode, done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_side_by_side(default_model, default_tokenizer, printed):
    """The second answer is that of a chain whose cache holds the scientist's part alone; the first cache is not changed."""
    script = example("side_by_side")
    chain = Chain(default_model, default_tokenizer, script.agents(3, 8), aligner="soft")
    cache = chain.run([script.QUESTION]).memory
    before = cache.keys.clone(), [*cache.segments], cache.lengths.clone()
    names = [segment.name for segment in cache.segments]
    assert names[:7] == [
        "math + science + code:prompt", *(f"{agent}:{kind}" for agent in script.SPECIALISTS for kind in ("prompt", "latent"))
    ]  # fmt: skip
    said = script.answer_from(default_model, default_tokenizer, cache, ["science"], 8)
    assert torch.equal(cache.keys, before[0])
    assert cache.segments == before[1]
    assert torch.equal(cache.lengths, before[2])
    alone = Chain(
        default_model, default_tokenizer, [[script.agents(3, 8)[0][1]], script.agents(3, 8)[1]], aligner="soft"
    )
    first = alone.run([script.QUESTION]).memory
    first.rewind("science")
    text = "<|im_end|>\n<|im_start|>user\nAnswer in one sentence.<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([default_tokenizer(text, add_special_tokens=False).input_ids])
    want = generate(default_model, ids, past_key_values=first, max_new_tokens=8).sequences[0, ids.shape[1] :]
    assert said == default_tokenizer.decode(want, skip_special_tokens=True)
    out = printed("side_by_side")
    assert "all three: " in out
    assert out.count("science") >= 3
