"""What becomes of every causal LM of the installed transformers here, found by running a tiny one of each.

test_every_family.py holds it against docs/models.md. `python tests/models/every_family.py` writes the table there anew.
"""

import copy
import re
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tiny_models
import torch
import transformers
from tiny_families import SKIPPED, VOCAB, tiny
from tiny_models import feed_back, ragged, real
from transformers import DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES

from latentmas_kernels import accelerate, doctor, generate, latent_generate

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
VERSION = re.compile(r"transformers \d[\w.]*\w")
HEAD = "| `model_type` | class | `generate()` | `latent_generate()` | why |\n|---|---|---|---|---|\n"
LENGTHS = [5, 11]  # the second is longer than the windows, which are 7 wide
STEPS, TOKENS = 2, 6
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        family, name: model_type and class.
        generate: who runs generate() of an accelerated one on the CPU: "native" or "transformers"; "skipped".
        latent: who runs latent_generate(): "native", "eager", or nobody: "refused", "skipped".
        why: of what is refused or skipped.
    """

    family: str
    name: str
    generate: str
    latent: str
    why: str

    def __str__(self) -> str:
        return f"| {self.family} | {self.name} | {self.generate} | {self.latent} | {self.why} |"


class WholeLoop(tiny_models.PlainLoop):
    """The plain loop on a cache that keeps all positions; what a layer sees of them is the forward's own matter."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, feed_back(model, "identity"))
        self.cache = DynamicCache()

    def forward(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """With a mask, without which Moshi of older versions lets a second prompt see too little."""
        columns = int(self.cache.get_seq_length()) + next(iter(inputs.values())).shape[1]
        return super().forward(**inputs, attention_mask=torch.ones(1, columns, dtype=torch.int64))


def row_of(family: str, plain: Any) -> Row:
    """Run the family's tiny model (None: skipped), plain and accelerated, and fail where the two differ."""
    if plain is None:
        return Row(family, FAMILIES[family], "skipped", "skipped", SKIPPED[family])
    name = type(plain).__name__
    generate_runs = _generate(plain)
    latent, why = _run_latent(plain)
    assert latent == "refused" or doctor(plain).engines["eager"].on
    assert latent != "refused" or why in str(doctor(plain).engines["eager"])
    why = why.removeprefix(name).strip().partition("; supported")[0].partition(". ")[0]
    return Row(family, name, generate_runs, latent, why.replace("|", "/"))


def _generate(plain: Any) -> str:
    """Hold an accelerated copy against the plain model; who ran it, "native" or "transformers"."""
    ours, left = accelerate(copy.deepcopy(plain)), []
    ids, mask = ragged(LENGTHS, vocab=VOCAB)
    options = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    outputs = {"return_dict_in_generate": True, "output_logits": True}
    calls: list[dict[str, Any]] = [
        {"input_ids": ids[1:]},
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids, "attention_mask": mask, **outputs},
    ]
    for number, call in enumerate(calls, start=1):
        torch.manual_seed(0)  # Reformer draws its hashes
        want = plain.generate(**call, **options)
        with patch("latentmas_kernels.hf.decode.warn_once", left.append):
            torch.manual_seed(0)
            got = ours.generate(**call, **options)
        assert len(left) in (0, number), "some calls run here, some in transformers"
        assert all("runs in transformers' own loop, since " in reason for reason in left)
        if "output_logits" in call:
            for step, (mine, theirs) in enumerate(zip(got.logits, want.logits, strict=True)):
                assert _apart(mine, theirs) < TOLERANCE, f"logits of step {step}"
            got, want = got.sequences, want.sequences
        assert torch.equal(got, want)
    return "transformers" if left else "native"


def _run_latent(plain: Any) -> tuple[str, str]:
    """Hold latent steps and the text behind them, in a ragged batch, against each row alone; or why there are none."""
    ids, mask = ragged(LENGTHS, vocab=VOCAB)
    more = ragged([3, 3], vocab=VOCAB, seed=2)[0]
    ours = accelerate(copy.deepcopy(plain), aligner="identity")
    steps = {"max_new_tokens": TOKENS, "latent_steps": STEPS, "do_sample": False, "pad_token_id": 0}
    with ExitStack() as quiet:
        for module in ("engines.registry", "hf.decode"):
            quiet.enter_context(patch(f"latentmas_kernels.{module}.warn_once"))
        try:
            out = latent_generate(plain, ids, mask, latent_steps=STEPS, aligner="identity")
        except ValueError as error:
            with pytest.raises(ValueError, match="latent_steps=2 cannot be taken in this call, since "):
                ours.generate(ids, attention_mask=mask, **steps)
            return "refused", str(error)
        decoded = generate(plain, more, past_key_values=out.past_key_values, max_new_tokens=TOKENS, eos_token_id=None)
        at_once = ours.generate(ids, attention_mask=mask, **steps)
    for row in range(len(ids)):
        with torch.no_grad():
            loop = WholeLoop(plain)
            latents, hidden = loop.run_latent(real(ids, mask, row), STEPS)
            tokens = loop.decode(more[row : row + 1], TOKENS)
        assert _apart(out.latents[row], latents) < TOLERANCE, f"latents of row {row}"
        assert _apart(out.last_hidden[row], hidden) < TOLERANCE, f"last hidden state of row {row}"
        assert decoded.sequences[row, 3:].tolist() == tokens, f"tokens of row {row}"
    assert at_once.shape == (2, ids.shape[1] + TOKENS)
    return out.metrics.engine, ""


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative to the size of the second."""
    return float((one - other).norm() / other.norm().clamp_min(torch.finfo(torch.float32).tiny))


def table() -> dict[str, Row]:
    """The rows of the page."""
    lines = PAGE.read_text().partition(HEAD)[2].splitlines()
    rows = [Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in lines if line.startswith("|")]
    return {row.family: row for row in rows}


def made_with() -> str:
    """The version of transformers that the table was made with."""
    found = VERSION.search(PAGE.read_text())
    assert found is not None, f"{PAGE} names no version"
    return found[0].removeprefix("transformers ")


if __name__ == "__main__":
    rows = []
    for family in sorted(FAMILIES):
        print(family, file=sys.stderr)
        rows.append(row_of(family, None if family in SKIPPED else tiny(family)))
    before = VERSION.sub(f"transformers {transformers.__version__}", PAGE.read_text().partition(HEAD)[0])
    PAGE.write_text(before + HEAD + "\n".join(map(str, rows)) + "\n")
