"""Turns as tokens: each agent's text closes the turn before it and opens its own."""

from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

THOUGHT = "thought-in-hidden-states"
"""Stands in for the turn that was thought rather than written, so that the template shows what follows such a turn."""


def turn_ids(tokenizer: Any, text: str, *, first: bool, system: str | None = None, think: bool = False) -> list[int]:
    """Token ids that open an agent's turn behind the memory of those before it.

    With a chat template the first turn is a whole prompt; a later one is what the template writes behind an
    assistant's message: its end, the next user message and the opening of the next answer. So every turn is closed
    before the next begins, and the beginning of the sequence occurs once. Without a template turns are paragraphs.

    Args:
        tokenizer: of transformers, with or without a chat template and a padding token.
        text: what the agent is told.
        first: whether the memory is empty.
        system: system message of a first turn. In later turns, and where the template refuses or drops it, it is
            put in front of the text.
        think: turns the template's thinking switch on, where it has one; otherwise it is turned off.

    Raises:
        ValueError: where the template refuses a user's message, or does not show an assistant's as it is.
    """
    if not tokenizer.chat_template:
        text = _joined(system, text)
        return (
            tokenizer(text + "\n\n").input_ids
            if first
            else tokenizer("\n\n" + text + "\n\n", add_special_tokens=False).input_ids
        )
    rendered = (
        _first_turn(tokenizer, text, system, think) if first else _later_turn(tokenizer, _joined(system, text), think)
    )
    return tokenizer(rendered, add_special_tokens=False).input_ids


def has_thinking_switch(tokenizer: Any) -> bool:
    """Whether the chat template writes something else when thinking is turned on."""
    if not tokenizer.chat_template:
        return False
    return _first_turn(tokenizer, "-", None, True) != _first_turn(tokenizer, "-", None, False)


def padded(rows: list[list[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask [B, T] from ragged rows, left-padded."""
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _joined(system: str | None, text: str) -> str:
    return f"{system}\n\n{text}" if system else text


def _first_turn(tokenizer: Any, text: str, system: str | None, think: bool) -> str:
    if system:
        try:
            rendered = _render(
                tokenizer, [{"role": "system", "content": system}, {"role": "user", "content": text}], think
            )
            if system.strip() in rendered:  # some templates drop it in silence
                return rendered
        except TemplateError:  # some refuse it (Gemma 2, Mistral 7B)
            pass
    try:
        return _render(tokenizer, [{"role": "user", "content": _joined(system, text)}], think)
    except TemplateError as error:
        raise _refusal(error) from error


def _later_turn(tokenizer: Any, text: str, think: bool) -> str:
    mark = THOUGHT
    while mark in text:  # what the user writes must not be taken for the end of a thought
        mark += "-"
    messages = [
        {"role": "user", "content": "-"},
        {"role": "assistant", "content": mark},
        {"role": "user", "content": text},
    ]
    try:
        _, found, rendered = _render(tokenizer, messages, think).partition(mark)
    except TemplateError as error:
        raise _refusal(error) from error
    if not found or mark in rendered:
        raise ValueError(
            "the tokenizer's chat template does not render an assistant message as it is, so the end of a turn cannot "
            "be found; set tokenizer.chat_template to one that does, or to None for plain text"
        )
    return rendered


def _render(tokenizer: Any, messages: list[dict[str, str]], think: bool) -> str:
    # The switch has two names: enable_thinking (Qwen3, GLM, SmolLM3) and thinking (DeepSeek, Granite). Templates without it
    # ignore both.
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=think, thinking=think
    )


def _refusal(error: TemplateError) -> ValueError:
    return ValueError(
        f"the tokenizer's chat template refuses a conversation of user and assistant: {error}; set "
        "tokenizer.chat_template to one that takes it, or to None for plain text"
    )
