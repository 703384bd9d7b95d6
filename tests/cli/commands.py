"""A tiny model for the command line, and what the tests of commands ask of what they print."""

import json
import re

import torch
from latentmas.chain.chain import Chain
from tiny_models import tiny_model
from tokenizers_offline import character_tokenizer

QUESTION = "How many rolls are left?"
AGENTS = ["planner", "critic", "refiner", "judger"]
FAST = ["--latent-steps", "2", "--max-new-tokens", "6", "--aligner", "ridge"]


CHAIN = """
latent_steps: 3
max_new_tokens: 4
budget: 900 slots
fields: {tone: calm}
agents:
  - parallel:
      - {name: math, prompt: "{question} As a {tone} mathematician.", output: latent}
      - {name: code, prompt: "{question} As a programmer.", output: latent, latent_steps: 2}
  - {name: judger, prompt: "Answer: {question}", output: text, memory: last}
"""


def model_and_tokenizer():
    with torch.random.fork_rng():  # a seed that was set stays set, as with weights that are read from a file
        model = tiny_model("llama", max_position_embeddings=4096)
    model.generation_config.eos_token_id = None
    return model, character_tokenizer()


def assert_one_line(said, *parts):
    """Exit code 2, nothing but one line on stderr, with all of the parts."""
    code, out, err = said
    assert code == 2, f"{out}{err}"
    assert out == ""
    assert err.startswith("error:")
    assert len(err.strip().splitlines()) == 1, err
    assert all(part in err for part in parts), err


def answer_of(out: str) -> str:
    """What stands between the first question and what comes next: its mark, the next one or the table."""
    text = out.split("Question 1 ", 1)[1].split("\n\n", 1)[1]
    return re.split(r"\n\n(?:\(cut off by|expected: |Question \d|agent )", text)[0]


def table_of(out: str) -> list[list[str]]:
    """The words of each line of the table, the heading included."""
    lines = (line.split() for line in out.splitlines())
    return [words for words in lines if words and words[0] in ["agent", *AGENTS, "solver", "all"]]


def document_of(said):
    code, out, err = said
    assert code == 0, err
    return json.loads(out)


def numbers(path):
    return [json.loads(line)["number"] for line in path.read_text().splitlines()]


def fail_at(monkeypatch, question, error):
    """Chain.run() raises where it comes to this question."""
    real = Chain.run

    def run(self, questions, **options):
        if question in questions:
            raise error
        return real(self, questions, **options)

    monkeypatch.setattr(Chain, "run", run)
