"""A model, a tokenizer, and what a chain calls."""

import latentmas.chain.planner
import latentmas.chain.setup
import pytest
import torch
from buffers import count_buffers
from example_chains import TEMPLATE, endless
from latentmas.chain import stage_run
from tiny_models import VOCAB
from tokenizers_offline import CHARACTERS, SPECIAL, character_tokenizer
from transformers import LogitsProcessor, LogitsProcessorList

from latentmas_kernels import generate, latent_generate


@pytest.fixture
def model():
    return endless()


@pytest.fixture
def tokenizer():
    tokenizer = character_tokenizer(TEMPLATE)
    assert len(tokenizer) <= VOCAB
    return tokenizer


@pytest.fixture
def calls(monkeypatch):
    """What the chain called, in order: (ids without padding, keyword arguments, result). Nothing is read for several rows."""
    seen = []
    monkeypatch.setattr(latentmas.chain.planner, "SHARE_FROM", 10**9)

    def listen(name, function):
        def call(model, ids, mask, **options):
            out = function(model, ids, mask, **options)
            rows = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
            seen.append((rows, options, out))
            return out

        monkeypatch.setattr(stage_run, name, call)

    listen("latent_generate", latent_generate)
    listen("generate", generate)
    return seen


class Forced(LogitsProcessor):
    """Has each row say the given tokens, and then "x" for ever."""

    def __init__(self, rows):
        self.rows, self.step = rows, 0

    def __call__(self, ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        for row, tokens in enumerate(self.rows):
            forced[row, tokens[self.step] if self.step < len(tokens) else len(SPECIAL) + CHARACTERS.index("x")] = 0
        self.step += 1
        return forced


@pytest.fixture
def script(monkeypatch, model, tokenizer):
    """script([text of row 1, text of row 2], ...) has the writers say these texts, one list per writer; <eos> ends one."""

    def say(*texts):
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        coming, call = iter(texts), stage_run.generate

        def forced(model, ids, mask, **options):
            rows = [
                tokenizer(text, add_special_tokens=False).input_ids if isinstance(text, str) else text
                for text in next(coming)
            ]
            return call(model, ids, mask, **options, logits_processor=LogitsProcessorList([Forced(rows)]))

        monkeypatch.setattr(stage_run, "generate", forced)

    return say


@pytest.fixture
def buffers(monkeypatch):
    return count_buffers(monkeypatch)
