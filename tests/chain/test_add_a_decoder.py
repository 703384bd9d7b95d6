"""A decoder of one's own: a class with `stamp`, `kv_transfer`, `max_model_len` and `write`, and nothing else to register."""

import torch
from example_chains import AGENTS, QUESTIONS, READERS
from latentmas import Chain
from latentmas.backends.base import Completion

from latentmas_kernels import generate
from latentmas_kernels.models.fingerprint import ModelFingerprint


class OneByOne:
    """Writes each text by itself, on the model that the chain's last agent runs on."""

    kv_transfer, max_model_len = "kv", 4096

    def __init__(self, model):
        self.model, self.stamp = model, ModelFingerprint.of(model)

    def write(self, memory, requests, on_tokens=None):
        return [self._complete(memory, request) for request in requests]

    def _complete(self, memory, request):
        past = None if request.row is None else memory.select([request.row])
        ids, most = torch.tensor([request.prompt]), request.max_new_tokens
        text = generate(self.model, ids, past_key_values=past, max_new_tokens=most, eos_token_id=request.end_ids)
        return Completion(text.sequences[0, ids.shape[1] :].tolist(), text.finish_reasons[0], ids.shape[1])


def test_a_decoder_writes_what_the_chain_would(model, tokenizer):
    for agents in (AGENTS, READERS):
        own = Chain(model, tokenizer, agents, aligner="ridge").run(QUESTIONS)
        decoded = Chain(model, tokenizer, agents, aligner="ridge", decoder=OneByOne(model)).run(QUESTIONS)
        assert decoded.answers == own.answers
        assert [metrics.new_tokens for metrics in decoded.agents] == [metrics.new_tokens for metrics in own.agents]
