"""What generate() asks of an engine that decodes by itself."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop; the parameters of generate(), checked.

    Attributes:
        top_k: 0 is off.
        eos_token_ids: end-of-sequence tokens; none: rows end at max_new_tokens.
        pad_token_id: fills behind ended rows.
        min_p: least share of the most likely token's probability, after top-k and top-p; 0 is off.
        repetition_penalty: divides positive logits of the tokens in `penalty_mask` and multiplies negative ones, before all
            else; 1 is off.
        penalty_mask: bool [B, V], the tokens of each row that the penalty meets; the engine marks those that it chooses. None
            without a penalty.
    """

    max_new_tokens: int
    min_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    eos_token_ids: list[int]
    pad_token_id: int
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    penalty_mask: Tensor | None = None

    def lengths(self, tokens: Tensor) -> Tensor:
        """int64 [B] on the CPU: a row's tokens up to its first end token, that one included, or all of them."""
        ended = torch.isin(tokens.cpu(), torch.tensor(self.eos_token_ids, dtype=torch.int64))
        first = ended.int().argmax(dim=1) + 1
        return torch.where(ended.any(dim=1), first, tokens.shape[1])
