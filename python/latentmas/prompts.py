"""Turns as tokens: each agent's text closes the turn before it and opens its own."""

from typing import Any

import torch
from torch import Tensor

THOUGHT = "thought-in-hidden-states"
"""Stands in for the turn that was thought rather than written, so that the template shows what follows such a turn."""


def turn_ids(tokenizer: Any, text: str, *, first: bool) -> list[int]:
    """Token ids that open an agent's turn behind the memory of those before it.

    With a chat template the first turn is a whole prompt; a later one is what the template writes behind an
    assistant's message: its end, the next user message and the opening of the next answer. So every turn is closed
    before the next begins, and the beginning of the sequence occurs once. Without a template turns are paragraphs.

    Raises:
        ValueError: where the template does not show an assistant's message as it is.
    """
    if not tokenizer.chat_template:
        return (
            tokenizer(text + "\n\n").input_ids
            if first
            else tokenizer("\n\n" + text + "\n\n", add_special_tokens=False).input_ids
        )
    mark = THOUGHT
    while mark in text:  # what the user writes must not be taken for the end of a thought
        mark += "-"
    messages = [{"role": "user", "content": text}]
    if not first:
        messages = [{"role": "user", "content": "-"}, {"role": "assistant", "content": mark}, *messages]
    # enable_thinking: templates with a thinking switch must not open a visible chain of thought; others ignore it.
    rendered = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    if not first:
        _, found, rendered = rendered.partition(mark)
        if not found or mark in rendered:
            raise ValueError(
                "the tokenizer's chat template does not render an assistant message as it is, so the end of a turn cannot "
                "be found; set tokenizer.chat_template to one that does, or to None for plain text"
            )
    return tokenizer(rendered, add_special_tokens=False).input_ids


def padded(rows: list[list[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask [B, T] from ragged rows, left-padded."""
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
