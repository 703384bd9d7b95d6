"""The command line: what the user can mend is one line and exit code 2, before a model is loaded."""

import json
import subprocess
import warnings
from typing import get_args

import pytest
from commands import FAST, QUESTION, assert_one_line, fail_at, model_and_tokenizer
from latentmas import options
from latentmas.backends import DECODERS
from latentmas.backends.base import KV_TRANSFERS, EngineError
from latentmas.chain.chain import Chain
from latentmas.loading import DTYPES

from latentmas_kernels.alignment import KINDS
from latentmas_kernels.engines import engine_names, weight_names
from latentmas_kernels.errors import LatentMASError

pytestmark = pytest.mark.usefixtures("keys_are_moved_by_torch")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["", *FAST], ["every question needs some text"]),
        ([" \n ", *FAST], ["every question needs some text"]),
        ([QUESTION, "--latent-steps", "-1"], ["latent_steps must be an integer of 0 or more", "-1"]),
        ([QUESTION, "--max-new-tokens", "0"], ["max_new_tokens must be an integer of 1 or more", "got 0"]),
        ([QUESTION, *FAST, "--temperature", "-1"], ["temperature must be 0 (greedy) or more", "-1"]),
        ([QUESTION, *FAST, "--temperature", "nan"], ["temperature must be 0 (greedy) or more", "nan"]),
        ([QUESTION, *FAST, "--top-p", "0"], ["top_p must be more than 0 and at most 1 (off)", "0"]),
        (
            [QUESTION, "--method", "magic"],
            ["--method magic", "debate, hierarchical, mix, sequential, single, text, latent"],
        ),
        ([QUESTION, "--method", "text", "--chain", "debate"], ["--chain debate and --method text", "one of them"]),
        ([QUESTION, "--chain", "debat"], ["debat", "did you mean debate", "sequential"]),
        ([QUESTION, "--hierarchical", "serial", "--method", "text"], ["no agents of text work side by side"]),
        ([QUESTION, "--memory", "0"], ["--memory 0", "all, last, latent and a number of slots"]),
        ([QUESTION, "--budget", "many"], ["'many'", "64 MB", "512 slots"]),
        (
            [QUESTION, *FAST, "--budget", "20 slots"],
            ["question 1: planner takes", "the budget leaves 20 to a question"],
        ),
        ([QUESTION, "--trace", "x", "--output", "y", "--resume"], ["got --resume and --trace"]),
        ([QUESTION, "--trace", "x", "--method", "text"], ["got --trace", "no agent of this chain thinks"]),
        ([QUESTION, "--trace", "no/such/folder/x"], ["cannot write the trace to no/such/folder/x"]),
        ([QUESTION, "--hand-over", "kv"], ["--hand-over, --vllm and --folder are for --decoder vllm", "own"]),
        ([QUESTION, "--vllm", "{}"], ["--hand-over, --vllm and --folder are for --decoder vllm", "own"]),
        ([QUESTION, "--folder", "."], ["--hand-over, --vllm and --folder are for --decoder vllm", "own"]),
        ([QUESTION, "--device", "gpu"], ["device 'gpu'", "here are cpu"]),
        ([QUESTION, "--questions", "sample"], ["got a question and --questions; give one of them"]),
        (["--questions", "no/such/file"], ["no/such/file", "No such file"]),
        (["--questions", "tests"], ["tests", "Is a directory"]),
        ([QUESTION, "--resume"], ["--resume and --overwrite", "got no --output"]),
        ([QUESTION, "--output", "no/such/folder/x"], ["no/such/folder/x", "No such file"]),
        (
            [QUESTION, "--latent-steps", "2000", "--aligner", "ridge"],
            ["question 1: ", "positions", "4096", "shorten the question or lower latent_steps"],
        ),
    ],
    ids=lambda it: " ".join(it[:3]) if it and it[0] in (QUESTION, "", "--questions") else "",
)
def test_user_errors_are_one_line(command, tiny, arguments, parts):
    assert_one_line(command("run", *arguments), *parts)


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--aligner", "magic", KINDS),
        ("--hierarchical", "both", ("parallel", "serial")),
        ("--engine", "magic", engine_names()),
        ("--weights", "int4", weight_names()),
        ("--decoder", "magic", ("own", "vllm")),
        ("--hand-over", "magic", KV_TRANSFERS),
        ("--dtype", "int8", DTYPES),
        ("--batch-size", "0", ["greater than or equal to 1"]),
        ("--handover-tokens", "0", ["greater than or equal to 1"]),
    ],
)
def test_typer_refuses_a_value_that_is_none_of_an_option(command, tiny, monkeypatch, option, value, allowed):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = command("run", QUESTION, option, value)
    assert (code, out, tiny) == (2, "", [])
    assert f"Invalid value for '{option}'" in err
    assert all(choice in err for choice in allowed), err


@pytest.mark.parametrize(
    ("option", "supported"),
    [
        (options.AlignerKind, KINDS),
        (options.DType, DTYPES),
        (options.EngineName, engine_names()),
        (options.Weights, weight_names()),
        (options.Decoder, DECODERS),
        (options.KVTransfer, KV_TRANSFERS),
    ],
)
def test_choices_are_what_the_library_supports(option, supported):
    """They are written down twice: the help must not wait for torch."""
    literal = get_args(option)[0]
    choices = get_args(get_args(literal)[0]) or get_args(literal)
    assert sorted(choices) == sorted(supported)


@pytest.mark.parametrize(
    ("there", "arguments", "parts"),
    [
        (False, [], ["vLLM is not installed here", "docs/vllm.md"]),
        (True, ["--vllm", "{'a': 1}"], ["got --vllm {'a': 1}", "no JSON", "an object of vLLM's settings"]),
        (True, ["--vllm", "[1]"], ["got --vllm [1]", "an object of vLLM's settings"]),
        (True, ["--folder", "no/such"], ["got --folder no/such", "no folder that can be written to"]),
        (
            True,
            ["--method", "debate", "--hand-over", "embeds"],
            ["first 1 + second 1 work side by side", "another memory", "(kv)"],
        ),
        (True, ["--hand-over", "embeds", "--memory", "latent"], ["the memory is cut before critic", "another memory"]),
    ],
)
def test_what_vllm_needs_is_seen_before_a_model_is_loaded(command, tiny, monkeypatch, there, arguments, parts):
    monkeypatch.setattr("latentmas.backends.vllm.launch.find_spec", lambda name: object() if there else None)
    assert_one_line(command("run", QUESTION, "--decoder", "vllm", *arguments), *parts)
    assert tiny == []


@pytest.mark.parametrize("arguments", [["--aligner", "magic"], ["--latent-steps", "-1"], ["--max-new-tokens", "0"]])
def test_wrong_options_are_seen_before_a_model_is_loaded(command, tiny, arguments):
    code, _, _ = command("run", QUESTION, *arguments)
    assert code == 2
    assert tiny == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run", QUESTION, "--nonsense"], "--nonsense"),
        (["run", QUESTION, "--latent-steps", "many"], "--latent-steps"),
        (["run", QUESTION, "--seed", str(2**63)], "--seed"),
        (["run", "How", "many?"], "many?"),
        (["think"], "think"),
    ],
    ids=["option", "number", "seed", "argument", "command"],
)
def test_wrong_usage_names_what_is_wrong(command, tiny, arguments, named):
    """Exit code 2 with the culprit's name and no traceback; nothing is loaded."""
    code, out, err = command(*arguments)
    assert code == 2
    assert out == ""
    assert named in err
    assert "Traceback" not in err
    assert tiny == []


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "nobody/nothing", "no [/such] name"])
def test_model_that_does_not_exist(command, offline, name):
    """A path or a hub name that leads nowhere is named, with what is supported."""
    assert_one_line(command("run", QUESTION, "--model", name), f"cannot load '{name}'", "Supported are a folder")


def test_folder_that_is_no_model(command, offline, tmp_path):
    assert_one_line(command("run", QUESTION, "--model", str(tmp_path)), f"cannot load '{tmp_path}'", "the folder gave")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages[0]['content'] + 1 }}", "fails on a conversation of user: TypeError: "),
        ("{{ 1 // 0 }}", "fails on a conversation of user: ZeroDivisionError: "),
        ("{% for message in messages %}\n", "fails on a conversation of user: TemplateSyntaxError: "),
        ("{{ raise_exception('Not\\nnow') }}", "refuses a conversation of user: Not now; set tokenizer.chat_template"),
        ("User:{{ messages[0]['text'] }}", "does not write the user's message as it is (message 1 of 1: "),
    ],
)
@pytest.mark.parametrize("method", ["single", "latent"])
def test_a_chat_template_that_does_not_work_is_one_line(command, monkeypatch, template, words, method):
    model, tokenizer = model_and_tokenizer()
    tokenizer.chat_template, tokenizer.name_or_path = template, "some/model"
    monkeypatch.setattr("latentmas.cli.execute.load_model", lambda *_, **__: (model, tokenizer))
    said = command("run", QUESTION, *FAST, "--method", method)
    assert_one_line(said, f"the chat template of 'some/model' {words}")


def test_a_temperature_at_which_logits_overflow_is_a_line_and_no_traceback(command, tiny):
    """What C++ refuses in the middle of a run, as what Python refuses before."""
    code, _, err = command("run", QUESTION, *FAST, "--engine", "native", "--temperature", "1e-44")
    assert code == 2
    last = err.splitlines()[-1]
    assert last.startswith("error: "), err
    assert "0 of 1 questions are answered" in last
    assert "the temperature is so small that logits divided by it overflow" in last
    assert "Traceback" not in err


@pytest.mark.parametrize("method", ["single", "latent", "text"])
def test_a_chat_template_of_parts_is_given_the_question(command, monkeypatch, method):
    model, tokenizer = model_and_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}>{% for part in message['content'] %}{{ part['text'] }}"
        "{% endfor %}|{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    monkeypatch.setattr("latentmas.cli.execute.load_model", lambda *_, **__: (model, tokenizer))
    code, out, _ = command("run", QUESTION, *FAST, "--method", method, "--json")
    assert code == 0
    (result,) = json.loads(out)["answers"]
    assert all(turn["prompt_tokens"] > len(QUESTION) for turn in result["turns"])


def test_encoder_decoder_is_refused_by_name(command, offline, tmp_path):
    """The configuration alone is enough to say so: there are no weights in the folder."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]})
    )
    assert_one_line(command("run", QUESTION, "--model", str(tmp_path)), "encoder-decoder model (t5)", "decoder-only")


def test_default_model_that_cannot_be_fetched(command, monkeypatch):
    def pip(command, **options):
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="ERROR: no [network] here\n")

    monkeypatch.setattr("latentmas.default_model.subprocess.run", pip)
    assert_one_line(command("run", QUESTION), "could not be fetched", "ERROR: no [network] here", "--model")


def test_warnings_are_one_line(command, tiny, monkeypatch):
    """A warning is a line on stderr without the place in the code, and keeps its brackets."""
    real = Chain.run

    def run(self, questions, **options):
        warnings.warn("the file [/tmp/x] is not used", stacklevel=2)
        return real(self, questions, **options)

    monkeypatch.setattr(Chain, "run", run)
    with warnings.catch_warnings():  # without pytest's recording
        warnings.simplefilter("always")
        code, out, err = command("run", QUESTION, *FAST)
    assert code == 0, err
    assert "warning: the file [/tmp/x] is not used" in err.splitlines()
    assert QUESTION in out


def test_a_run_that_shares_its_cores_is_told_once(command, tiny, monkeypatch):
    from latentmas.cli.free_cores import OtherProcesses

    asked = []
    monkeypatch.setattr(OtherProcesses, "warning", lambda self, threads: asked.append(threads) or "others are at work")
    code, _, err = command("run", QUESTION, *FAST)
    assert code == 0, err
    assert err.splitlines().count("warning: others are at work") == 1
    assert asked == [1], "the threads of the engine, of which conftest.py asks for one"


def test_ctrl_c_exits_130(command, tiny, monkeypatch):
    def run(self, questions, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Chain, "run", run)
    code, out, err = command("run", QUESTION, *FAST)
    assert code == 130
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), TypeError("a bug"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "a bug")]
)
def test_what_nobody_made_an_error_of_the_user_keeps_its_traceback(command, tiny, monkeypatch, error):
    """Even one that is a ValueError, as LatentMASError is."""
    fail_at(monkeypatch, QUESTION, error)
    with pytest.raises(type(error), match="a bug"):
        command("run", QUESTION, *FAST)
    monkeypatch.setattr("latentmas.cli.execute.load_model", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(type(error), match="a bug"):
        command("run", QUESTION, *FAST)


@pytest.mark.parametrize(
    "error", [LatentMASError("take another"), EngineError("take another"), OSError(28, "take another")]
)
def test_what_the_user_can_mend_is_one_line(command, tiny, monkeypatch, error):
    fail_at(monkeypatch, QUESTION, error)
    code, _, err = command("run", QUESTION, *FAST)
    assert code == 2
    assert "error: " in err.splitlines()[-1]
    assert "take another" in err.splitlines()[-1]
    assert "Traceback" not in err
