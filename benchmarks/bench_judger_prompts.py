"""What the prompts of the sequential chain say of latent information: which of them answer better.

    python benchmarks/bench_judger_prompts.py gsm8k_test.jsonl --questions 100 [--model MODEL] [--chain other.yaml ...]

Each variant is the shipped chain with some sentences replaced; chain files of your own are run beside them. Questions need an
answer that is a number. Right is the last number of an answer (or of its last box). An answer loops where three or more of its
sentences of over 20 characters are repeated.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import latentmas

SHIPPED = (Path(latentmas.__file__).parent / "chain_files" / "sequential.yaml").read_text()
JUDGER = "The notes so far may not help. Give the complete answer in your own words."
# A line of the file, and the indented one behind it.
LATENT = (
    "What you hold of the earlier agents is latent information: a plan for this question, and thoughts about it. Use what "
    "helps and leave\n      out the rest."
)
STEPS = "Reason step by step, and end with the answer."
CRITIC = "You are the critic. Say what is missing in the plan."
REFINER = "You are the refiner. Write a better plan."
VARIANTS: dict[str, dict[str, str]] = {
    "as shipped": {},
    "step by step": {JUDGER: f"The notes so far may not help. {STEPS}"},
    "latent information": {JUDGER: f"{LATENT} Give the complete answer in your own words."},
    "latent information, step by step": {JUDGER: f"{LATENT} {STEPS}"},
    "all agents are told": {
        JUDGER: f"{LATENT} {STEPS}",
        CRITIC: "You are the critic. The latent information before this is a plan for the question. Say what is missing in it.",
        REFINER: "You are the refiner. The latent information before this is a plan and what a critic thinks of it. Write a "
        "better plan.",
    },
}


def numbers(text: str) -> list[float]:
    return [float(found.replace(",", "").rstrip(".")) for found in re.findall(r"-?\d[\d,]*\.?\d*", text)]


def is_right(answer: str, expected: str) -> bool:
    boxes = re.findall(r"boxed\{([^}]*)\}", answer)
    found = numbers(boxes[-1] if boxes else answer)
    return bool(found) and found[-1] == numbers(expected)[-1]


def loops(answer: str) -> bool:
    sentences = [part.strip() for part in re.split(r"[\n.]", answer) if len(part.strip()) > 20]
    return len(sentences) - len(set(sentences)) >= 3


def run(chain: str, questions: Path, model: list[str], folder: Path) -> list[dict]:
    (folder / "chain.yaml").write_text(chain)
    output = folder / "answers.jsonl"
    command = ["run", "--questions", str(questions), "--chain", str(folder / "chain.yaml"), *model]
    command += ["--batch-size", "8", "--output", str(output), "--overwrite"]
    code = "from latentmas.cli.app import main; main()"
    subprocess.run([sys.executable, "-c", code, *command], check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in output.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--model")
    parser.add_argument("--chain", type=Path, action="append", default=[])
    options = parser.parse_args()
    chains = {}
    for name, replaced in VARIANTS.items():
        chains[name] = SHIPPED
        for old, new in replaced.items():
            assert old in chains[name], f"the shipped chain does not say {old!r}"
            chains[name] = chains[name].replace(old, new)
    chains |= {str(path): path.read_text() for path in options.chain}
    with tempfile.TemporaryDirectory() as made, options.file.open() as lines:
        folder = Path(made)
        (folder / "questions.jsonl").write_text("".join(itertools.islice(lines, options.questions)))
        print(f"{'prompts':34} {'right':>6} {'loop':>6} {'limit':>6} {'tokens':>8}")
        for name, chain in chains.items():
            model = ["--model", options.model] if options.model else []
            rows = run(chain, folder / "questions.jsonl", model, folder)
            right = sum(is_right(row["answer"], row["expected"]) for row in rows)
            limit = sum(row["finish_reason"] == "length" for row in rows)
            tokens = sum(turn["new_tokens"] for row in rows for turn in row["turns"])
            print(f"{name:34} {right:6} {sum(loops(r['answer']) for r in rows):6} {limit:6} {tokens:8}", flush=True)


if __name__ == "__main__":
    main()
