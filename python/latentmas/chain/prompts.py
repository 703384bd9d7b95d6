"""Token ids of agents' prompts: each closes the turn before it and opens its own."""

from typing import Any

import torch
from torch import Tensor

from latentmas_kernels.hf.chat import ChatTemplateError, ids_behind, render

LATENT_TURN = "thought-in-hidden-states"
"""Stands in for the assistant's turn before, which may be no text, so that the template shows what follows such a turn."""


def turn_ids(tokenizer: Any, text: str, *, first: bool, system: str | None = None, think: bool = False) -> list[int]:
    """Return the token ids that open an agent's turn behind the cache of the agents before it.

    With a chat template the first turn is a whole prompt; a later one is what the template writes behind an
    assistant's message: its end, the next user message and the opening of the next answer. So every turn is closed
    before the next begins, and the beginning of the sequence occurs once. Without a template turns are paragraphs.

    Args:
        tokenizer: of transformers, with or without a chat template and a padding token.
        text: the agent's prompt.
        first: whether the cache is empty.
        system: system message of a first turn. In later turns, and where the template refuses or drops it, it is
            put in front of the text.
        think: turns the template's thinking switch on, where it has one; otherwise it is turned off.

    Raises:
        ChatTemplateError: where the template refuses a user's message, fails on it or does not show it, and where it does
            not show an assistant's.
    """
    if not tokenizer.chat_template:
        text = _joined(system, text)
        return tokenizer(text + "\n\n").input_ids if first else ids_behind(tokenizer, "\n\n" + text + "\n\n")
    if first:
        return tokenizer(_first_turn(tokenizer, text, system, think), add_special_tokens=False).input_ids
    return ids_behind(tokenizer, _later_turn(tokenizer, _joined(system, text), think))


def has_thinking_switch(tokenizer: Any) -> bool:
    """Return whether the chat template writes something else when thinking is turned on."""
    if not tokenizer.chat_template:
        return False
    return _first_turn(tokenizer, "-", None, True) != _first_turn(tokenizer, "-", None, False)


def padded(rows: list[list[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return input_ids and attention_mask [B, T] of ragged rows, left-padded."""
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _joined(system: str | None, text: str) -> str:
    return f"{system}\n\n{text}" if system else text


def _first_turn(tokenizer: Any, text: str, system: str | None, think: bool) -> str:
    if system:
        try:
            return _render(tokenizer, [{"role": "system", "content": system}, {"role": "user", "content": text}], think)
        except ChatTemplateError:  # some refuse it (Gemma 2, Mistral 7B), some drop it in silence
            pass
    return _render(tokenizer, [{"role": "user", "content": _joined(system, text)}], think)


def _later_turn(tokenizer: Any, text: str, think: bool) -> str:
    mark = LATENT_TURN
    while mark in text:  # the user's text must not be taken for the end of the turn before
        mark += "-"
    messages = [
        {"role": "user", "content": "-"},
        {"role": "assistant", "content": mark},
        {"role": "user", "content": text},
    ]
    _, _, rendered = _render(tokenizer, messages, think).partition(mark)
    if mark in rendered:
        raise ChatTemplateError(
            "the tokenizer's chat template writes an assistant's message twice, so the end of a turn cannot be found; set "
            "tokenizer.chat_template to one that does not, or to None for plain text"
        )
    return rendered


def _render(tokenizer: Any, messages: list[dict[str, str]], think: bool) -> str:
    # The switch has two names: enable_thinking (Qwen3, GLM, SmolLM3) and thinking (DeepSeek, Granite). Templates without it
    # ignore both.
    return render(tokenizer, messages, add_generation_prompt=True, enable_thinking=think, thinking=think)
