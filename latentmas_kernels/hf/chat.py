"""Conversations as text and tokens: the tokenizer's chat template, where a turn ends, and text that continues other text.

A chat template is a program of the checkpoint's author. It may drop a message, read other keys than `role` and `content`, or
fail; the rendered conversation is therefore checked before a model reads it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from latentmas_kernels.errors import LatentMASError

Message = Mapping[str, Any]
"""{"role": ..., "content": ...}; the content is a text, or a list of parts such as {"type": "text", "text": ...}."""

ANSWER, NEXT = "what-an-assistant-says", "what-is-asked-next"
"""Placeholders of the messages between which a turn ends."""
ANCHORS = ("a", "0", "\n")
"""Texts that a text is tokenised behind, to get its tokens there; the first that keeps its own tokens is used."""
WHERE = "tokenizer.chat_template (chat_template.jinja in the model's folder)"


class ChatTemplateError(LatentMASError):
    """The chat template cannot take a conversation; the message names the template and says what to do."""


def render(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool, **options: Any) -> str:
    """Return a conversation as its chat template writes it, with every message in it.

    Some templates take a content as text, others as a list of parts (those of multimodal models): where a given content is
    missing in the text, it is tried in the other form.

    Args:
        tokenizer: of transformers, with a chat template.
        messages: one conversation, not empty.
        add_generation_prompt: end with what opens the assistant's answer.
        **options: go to the template.

    Raises:
        ChatTemplateError: where the template refuses the conversation, fails on it, or leaves a message out.
    """
    reasons = []
    for form in _forms(messages):
        try:
            text = _apply(tokenizer, form, add_generation_prompt, options)
        except Exception as error:  # whatever the program in the template does
            reasons.append(_failure(tokenizer, messages, error))
            continue
        missing = _missing(tokenizer, form, text, add_generation_prompt, options)
        if missing is None:
            return text
        reasons.append(_loss(tokenizer, messages, missing))
    raise reasons[0]


def end_of_turn(tokenizer: Any) -> tuple[int, ...]:
    """Return the token with which the chat template ends an assistant's message, such as `<|im_end|>` or `<|eot_id|>`.

    Empty where there is no template, or where it ends a message with plain text ("\\n\\nUser:"): such words may be part of an
    answer as well.
    """
    ends = closing_of(tokenizer)
    tokens = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()} if ends else {}
    found = [token for token in tokens if token and ends.startswith(token)]
    return (tokens[max(found, key=len)],) if found else ()


def text_ends(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that end an assistant's text: those of the model's generation_config, then that of the template."""
    ends = model.generation_config.eos_token_id
    eos = [] if ends is None else [ends] if isinstance(ends, int) else ends
    return tuple(dict.fromkeys([*(int(end) for end in eos), *end_of_turn(tokenizer)]))


def closing_of(tokenizer: Any) -> str:
    """Return the chat template's text behind an assistant's message: behind the last one of a conversation, or, where that is
    nothing, before the next user's. Without surrounding blanks; empty where the template fails."""
    if not tokenizer.chat_template:
        return ""
    turn = [{"role": "user", "content": "-"}, {"role": "assistant", "content": ANSWER}]
    for messages in (turn, [*turn, {"role": "user", "content": NEXT}]):
        try:
            text = render(tokenizer, messages, add_generation_prompt=False)
        except ChatTemplateError:
            return ""
        closing = text.partition(ANSWER)[2].partition(NEXT)[0].strip()
        if closing:
            return closing
    return ""


def without_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Return a text's tokens without the one that ended it, which need not be a special token."""
    return list(ids[:-1] if ids and ids[-1] in ends else ids)


def ids_behind(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text that continues other text, without special tokens.

    Tokenised alone, a text is treated as the beginning of one: SentencePiece tokenizers (Llama 2, Mistral) put a space before
    it. Here it is tokenised behind an anchor, whose own tokens are then removed.
    """
    alone = tokenizer(text, add_special_tokens=False)["input_ids"]
    for anchor in ANCHORS:
        before = tokenizer(anchor, add_special_tokens=False)["input_ids"]
        # Some tokenizers make one unknown token of everything that they do not know, side by side.
        if not before or not alone or tokenizer.unk_token_id in before:
            continue
        both = tokenizer(anchor + text, add_special_tokens=False)["input_ids"]
        if both[: len(before)] == before:
            return both[len(before) :]
    return alone


def _apply(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool, options: dict[str, Any]) -> str:
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options
    )


def _mark(messages: Sequence[Message]) -> str:
    """Return a word that is in none of the messages; in mixed case, so that a template that changes the case is noticed."""
    texts = [_text_of(content) for content in (m.get("content") for m in messages) if _is_text(content)]
    mark = "Message-Mark"
    while any(mark in text for text in texts):
        mark += "-"
    return mark


def _forms(messages: Sequence[Message]) -> Iterator[list[dict[str, Any]]]:
    """Yield the conversation as given; then with all contents as texts, and as lists of parts."""
    given = [dict(message) for message in messages]
    yield given
    contents = [message.get("content") for message in given]
    if not all(map(_is_text, contents)):
        return
    if not all(isinstance(content, str) for content in contents):
        yield [{**m, "content": _text_of(m["content"])} for m in given]
    if not all(isinstance(content, list) for content in contents):
        yield [{**m, "content": _parts(_text_of(m["content"]))} for m in given]


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _is_text(content: Any) -> bool:
    """Return whether a content is a text, or a list of text parts."""
    return isinstance(content, str) or (
        isinstance(content, list)
        and all(
            isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content
        )
    )


def _text_of(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _missing(
    tokenizer: Any,
    messages: Sequence[Message],
    text: str,
    add_generation_prompt: bool,
    options: dict[str, Any],
) -> int | None:
    """Return the number of the first message whose content the template does not write; None where it writes all of them.

    A short content may be in the text by chance ("User"), and a template may remove words of one on purpose ("/no_think"):
    the conversation is rendered once more, with marks at both ends of every content.
    """
    mark = _mark(messages)
    marked: list[dict[str, Any]] = [dict(message) for message in messages]
    read = []
    for number, message in enumerate(marked):
        content = message.get("content")
        # Beside the calls of tools, templates leave the text out.
        if message.get("tool_calls") or not _is_text(content):
            continue
        # Templates remove the reasoning before an answer.
        reasoning, closing, answer = _text_of(content).rpartition("</think>")
        new = f"{reasoning}{closing}{mark}-{number}-begin{answer}{mark}-{number}-end"
        message["content"] = new if isinstance(content, str) else _parts(new)
        read.append(number)
    try:
        shown = _apply(tokenizer, marked, add_generation_prompt, options)
    except Exception:  # the template depends on the contents; then they must be in the text unchanged
        return next((n for n in read if _bare(_text_of(messages[n]["content"])) not in _bare(text)), None)
    for number in read:
        begin, end = (shown.find(f"{mark}-{number}-{side}") for side in ("begin", "end"))
        content = marked[number]["content"]
        if not 0 <= begin < end or (isinstance(content, list) and _is_dumped(content, shown)):
            return number
    return None


def _is_dumped(parts: list[dict[str, str]], text: str) -> bool:
    """Return whether the text has a list of parts in Python's notation or as JSON."""
    return any(dump in text for dump in (str(parts), json.dumps(parts), json.dumps(parts, ensure_ascii=False)))


def _bare(text: str) -> str:
    return "".join(text.split())


def _name(tokenizer: Any) -> str:
    return repr(tokenizer.name_or_path) if tokenizer.name_or_path else f"the {type(tokenizer).__name__}"


def _failure(tokenizer: Any, messages: Sequence[Message], error: Exception) -> ChatTemplateError:
    roles = " and ".join(dict.fromkeys(str(message.get("role")) for message in messages))
    # raise_exception() in a template raises a TemplateError with the template's own words.
    refused = type(error) is TemplateError
    message = " ".join(str(error).split())
    does, what = ("refuses", message) if refused else ("fails on", f"{type(error).__name__}: {message}")
    failure = ChatTemplateError(
        f"the chat template of {_name(tokenizer)} {does} a conversation of {roles}: {what}; set {WHERE} to one that takes it, "
        "or to None for plain text"
    )
    failure.__cause__ = error
    return failure


def _loss(tokenizer: Any, messages: Sequence[Message], number: int) -> ChatTemplateError:
    text = " ".join(_text_of(messages[number]["content"]).split())
    text = text if len(text) <= 40 else text[:40] + "..."
    return ChatTemplateError(
        f"the chat template of {_name(tokenizer)} does not write the {messages[number]['role']}'s message as it is (message "
        f"{number + 1} of {len(messages)}: {text!r}), given as text or as a list of parts; set {WHERE} to one that writes "
        "message['content'], or to None for plain text"
    )
