"""Chats as text and tokens: every message is in them, a template's faults are named, turns end, text goes on behind text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latentmas.chain.prompts import turn_ids
from tiny_models import tiny_model
from tokenizers import Tokenizer, models
from tokenizers_offline import SENTENCEPIECE, character_tokenizer, sentencepiece_tokenizer, with_tokens
from transformers import PreTrainedTokenizerFast

from latentmas_kernels.hf.chat import (
    ChatTemplateError,
    closing_of,
    end_of_turn,
    ids_behind,
    render,
    text_ends,
    without_end,
)

ASK = [{"role": "user", "content": "How many cats?"}]
TALK = [
    {"role": "system", "content": "Be brief."}, *ASK, {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Why?"},
]  # fmt: skip


def of(template, **options):
    return character_tokenizer(template, **options)


def rendered(template, messages=ASK, *, generate=True, **options):
    return render(of(template), messages, add_generation_prompt=generate, **options)


# ---- messages that a template does not write -----------------------------------------------------------------------

EACH = "{% for message in messages %}"
END = "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
TEXT = EACH + "{{ '<' + message['role'] + '>' + message['content'] + '|' }}" + END
# Those of multimodal models: parts by their type (a text's letters have none), or by their key.
PARTS = {
    "by type": EACH + "{{ '<' + message['role'] + '>' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}|" + END,
    "by selectattr": EACH + "{{ '<' + message['role'] + '>' }}"
    "{% for part in message.content | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}|" + END,
    "by place": EACH + "{{ '<' + message['role'] + '>' + message['content'][0]['text'] + '|' }}" + END,
    "trimmed": EACH + "{{ '<' + message['role'] + '>' }}{% for part in message['content'] %}"
    "{{ part.text | trim }}{% endfor %}|" + END,
}  # fmt: skip


@pytest.mark.parametrize("messages", [ASK, TALK], ids=["a question", "a conversation"])
@pytest.mark.parametrize("template", PARTS)
def test_a_template_of_parts_gets_parts(template, messages):
    """Given as text, the question would be nothing: '<user>|<assistant>'."""
    want = "".join(f"<{m['role']}>{m['content']}|" for m in messages) + "<assistant>"
    assert rendered(PARTS[template], messages) == want
    assert rendered(TEXT, messages) == want
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    assert rendered(PARTS[template], parts) == want
    assert rendered(TEXT, parts) == want, "and a template of texts gets text"
    mixed = [parts[0], *messages[1:]]
    assert rendered(PARTS[template], mixed) == rendered(TEXT, mixed) == want


@pytest.mark.parametrize("template", PARTS)
def test_agents_speak_through_a_template_of_parts(template):
    tokenizer = of(PARTS[template])
    first = tokenizer.decode(turn_ids(tokenizer, "Plan: how?", first=True, system="Be brief."))
    assert first == "<system>Be brief.|<user>Plan: how?|<assistant>"
    assert tokenizer.decode(turn_ids(tokenizer, "Answer.", first=False)) == "|<user>Answer.|<assistant>"


def test_a_short_message_is_not_found_by_chance():
    """The template says 'user' by itself; the message that says so is dropped."""
    with pytest.raises(
        ChatTemplateError, match=r"does not write the user's message as it is \(message 1 of 1: 'user'\)"
    ):
        rendered(EACH + "{{ message['role'] }}:" + END, [{"role": "user", "content": "user"}])


def test_a_message_that_says_the_marks_does_not_stand_for_another():
    """What is rendered to look for the messages has marks that none of them holds."""
    talk = [
        {"role": "user", "content": "Message-Mark-1-begin Message-Mark-1-end"},
        {"role": "assistant", "content": "Two."},
    ]
    with pytest.raises(ChatTemplateError, match="the assistant's message"):
        rendered("{{ messages[0]['content'] }}", talk)


@pytest.mark.parametrize(
    "shown",
    [
        "", "{{ message['text'] }}", "{{ message['value'] }}", "{{ message['content'][:5] }}", "{{ message['content'][2:] }}",
        "{{ message['content'] | upper }}", "{{ message['content'] | lower }}", "{{ message['content'] | length }}",
    ],
)  # fmt: skip
def test_a_message_that_is_not_written_is_refused_by_name(shown):
    tokenizer = of(EACH + "{{ message['role'] }}: " + shown + END)
    tokenizer.name_or_path = "some/model"
    said = (
        r"the chat template of 'some/model' does not write the user's message as it is \(message 1 of 1: 'How many cats\?'\)"
        r".*set tokenizer\.chat_template \(chat_template\.jinja in the model's folder\) to one that writes "
        r"message\['content'\], or to None for plain text"
    )
    with pytest.raises(ChatTemplateError, match=said):
        render(tokenizer, ASK, add_generation_prompt=True)
    with pytest.raises(ValueError, match=said):
        turn_ids(tokenizer, "How many cats?", first=True)


def test_only_the_message_that_is_missing_is_named():
    template = EACH + "{% if loop.index != 3 %}{{ message['content'] }}{% endif %}" + END
    with pytest.raises(ChatTemplateError, match=r"the assistant's message as it is \(message 3 of 4: 'Two\.'\)"):
        rendered(template, TALK)
    long = [{"role": "user", "content": "x" * 400}]
    with pytest.raises(ChatTemplateError) as refusal:
        rendered("{{ 1 }}", long)
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize("shown", ["{{ message['content'] }}", "{{ message['content'] | tojson }}"])
def test_parts_that_are_written_as_a_list_are_not_their_text(shown):
    """The template takes text, and prints Python's notation of a list, or JSON."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "Ünd?"}]}]
    text = rendered(EACH + shown + END, parts)
    assert text.strip('"').startswith(("Ünd?", "\\u00dcnd?"))
    assert "type" not in text


@pytest.mark.parametrize(
    ("template", "messages", "want"),
    [
        # a switch in the text (SmolLM3)
        (EACH + "{{ message['content'] | replace('/no_think', '') }}|" + END,
         [{"role": "user", "content": "Why? /no_think"}], "Why? |<assistant>"),
        # reasoning is removed from an answer (Qwen3, DeepSeek)
        (EACH + "{{ message['content'].split('</think>')[-1].strip() }}|" + END,
         [*ASK, {"role": "assistant", "content": "<think>Hm.</think>\n\nTwo."}], "How many cats?|Two.|<assistant>"),
        # what a tool gave is written as JSON
        (EACH + "{% if message['role'] == 'tool' %}{{ message['content'] | tojson }}{% else %}{{ message['content'] }}"
         "{% endif %}|" + END, [*ASK, {"role": "tool", "content": 'a "b"'}], 'How many cats?|"a \\"b\\""|<assistant>'),
        # beside the call of a tool nothing is written (Llama 3)
        (
            EACH + "{% if message['tool_calls'] %}{{ message['tool_calls'][0]['function']['name'] }}{% else %}"
            "{{ message['content'] }}{% endif %}|" + END,
            [*ASK, {"role": "assistant", "content": "Let me count.",
                    "tool_calls": [{"type": "function", "function": {"name": "count", "arguments": {}}}]}],
            "How many cats?|count|<assistant>",
        ),
        # an answer may be empty
        (EACH + "{{ message['content'] }}|" + END, [*ASK, {"role": "assistant", "content": " "}],
         "How many cats?| |<assistant>"),
        # a template that minds how a message begins
        (EACH + "{% if message['content'][0] != 'H' %}{{ raise_exception('Say H') }}{% endif %}{{ message['content'] }}" + END,
         ASK, "How many cats?<assistant>"),
        # words that stand in for messages here are words like any other
        (TEXT, [{"role": "user", "content": "What is Message-Mark-0-end?"}],
         "<user>What is Message-Mark-0-end?|<assistant>"),
    ],
)  # fmt: skip
def test_what_templates_do_on_purpose_is_left_to_them(template, messages, want):
    assert rendered(template, messages) == want


def test_options_go_to_the_template_in_both_forms():
    template = PARTS["by type"] + "{{ mood | default('') }}"
    assert rendered(template, mood="!") == "<user>How many cats?|<assistant>!"
    assert rendered(template, generate=False) == "<user>How many cats?|"


# ---- templates that fail -------------------------------------------------------------------------------------------

FAULTS = {
    "{{ messages[0]['content'] + 1 }}": "TypeError",
    "{{ 1 // 0 }}": "ZeroDivisionError",
    "{{ messages[7]['content'].x.y }}": "UndefinedError",
    "{{ messages | no_such_filter }}": "Template.*Error",
    "{% for message in messages %}": "TemplateSyntaxError",
    "{{ messages[0].content.__class__.__mro__ }}": "SecurityError",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "RecursionError",
}


@pytest.mark.parametrize("template", FAULTS)
def test_a_template_that_fails_is_named_with_its_error(template):
    tokenizer = of(template)
    tokenizer.name_or_path = "some/model"
    said = (
        rf"the chat template of 'some/model' fails on a conversation of user: {FAULTS[template]}: .*; set tokenizer\."
    )
    with pytest.raises(ChatTemplateError, match=said) as failure:
        render(tokenizer, ASK, add_generation_prompt=True)
    assert failure.value.__cause__ is not None
    for first in (True, False):
        with pytest.raises(ValueError, match=r"the chat template of 'some/model' fails on a conversation of user"):
            turn_ids(tokenizer, "Why?", first=first)
    assert end_of_turn(tokenizer) == ()


def test_a_template_that_refuses_says_why_in_its_own_words():
    with pytest.raises(
        ChatTemplateError, match=r"of the \w+ refuses a conversation of system and user and assistant: Not so;"
    ):
        rendered("{{ raise_exception('Not so') }}", TALK)


def test_several_templates_of_which_none_is_the_default():
    with pytest.raises(ChatTemplateError, match="fails on a conversation of user: ValueError"):
        render(of({"rag": TEXT}), ASK, add_generation_prompt=True)
    assert (
        render(of({"rag": "", "default": TEXT}), ASK, add_generation_prompt=True) == "<user>How many cats?|<assistant>"
    )


# ---- where a turn ends ---------------------------------------------------------------------------------------------


CHATML = EACH + "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
ENDS = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama 3": (
        "{{ bos_token }}" + EACH + "{{ '<|head|>' + message['role'] + '</head>' + message['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}", "<|eot_id|>",
    ),
    "gemma": (EACH + "{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] + '<end_of_turn>\n' }}{% endfor %}",
              "<end_of_turn>"),
    "llama 2": (
        "{{ bos_token }}" + EACH + "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}", "<eos>",
    ),
    # the whole text ends with another token
    "phi 3": (EACH + "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
              "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}", "<|end|>"),
    # a message in the middle ends as a part of an answer does
    "harmony": (EACH + "{{ '<|start|>' + message['role'] + '<|message|>' + message['content'] }}"
                "{{ '<|return|>' if loop.last and message['role'] == 'assistant' else '<|end|>' }}{% endfor %}", "<|return|>"),
    # a turn ends where the next begins
    "glm": (EACH + "{{ '<|' + message['role'] + '|>\n' + message['content'] }}{% endfor %}", "<|user|>"),
    "parts": (EACH + "{{ '<|im_start|>' + message['role'] }}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}"
              "{{ '<|im_end|>' }}{% endfor %}", "<|im_end|>"),
}  # fmt: skip
TOKENS = [
    "<|im_end|>",
    "<|im_start|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|return|>",
    "<|user|>",
    "<|",
    "<|im",
]


@pytest.mark.parametrize("special", [True, False], ids=["special", "not special"])
@pytest.mark.parametrize("name", ENDS)
def test_the_token_that_ends_a_turn(name, special):
    template, end = ENDS[name]
    tokenizer = with_tokens(of(template), *TOKENS, special=special)
    assert tokenizer.convert_ids_to_tokens(list(end_of_turn(tokenizer))) == [end]


@pytest.mark.parametrize(
    ("template", "closing"),
    [
        (EACH + "{{ message['role'].upper() + ': ' + message['content'] + '\n\n' }}{% endfor %}", "USER:"),
        (CHATML, "<|im_end|>"),
        (EACH + "{{ message['content'] }}{% endfor %}", ""),
        ("{% if messages | length > 1 %}{{ raise_exception('One') }}{% endif %}{{ messages[0]['content'] }}", ""),
        (None, ""),
    ],
    ids=["vicuna", "chatml in a vocabulary without its tokens", "nothing", "one message only", "no template"],
)
def test_plain_text_is_no_end(template, closing):
    """It may be part of an answer, and engines end texts at tokens."""
    tokenizer = of(template)
    assert closing_of(tokenizer) == closing
    assert end_of_turn(tokenizer) == ()


def test_ends_are_the_models_and_the_templates():
    model, tokenizer = tiny_model(), with_tokens(of(CHATML), "<|im_end|>")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for named, want in [(None, (end,)), (2, (2, end)), ([2, 5], (2, 5, end)), ([end, 2], (end, 2))]:
        model.generation_config.eos_token_id = named
        assert text_ends(model, tokenizer) == want
    assert text_ends(model, of(None)) == (end, 2)


def test_a_text_goes_without_its_end_alone():
    assert without_end([5, 6, 7], (7, 8)) == [5, 6]
    assert without_end([5, 7, 7], (7, 8)) == [5, 7]
    assert without_end([7, 6], (7, 8)) == [7, 6]
    assert without_end([], (7,)) == []


# ---- text behind text ----------------------------------------------------------------------------------------------

ALPACA = (
    EACH + "{% if message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}" + EACH + "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)  # fmt: skip


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_alone_a_text_gets_a_space(kind):
    """The tokenizers of the tests below are what they are meant to be."""
    tokenizer = sentencepiece_tokenizer(kind)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("\nHi", add_special_tokens=False).input_ids)
    assert tokens == (["▁"] if kind != "no space in front" else []) + ["<0x0A>", "H", "i"]


@pytest.mark.parametrize("kind", SENTENCEPIECE)
@settings(max_examples=60, deadline=None)
@given(
    before=st.sampled_from(["x", "Say it.", "7", "One\n", "a b"]),
    text=st.lists(st.sampled_from([*" \nabZ09.:<>é", "<eos>"]), min_size=1, max_size=8).map("".join),
)
def test_behind_others_a_text_is_what_it_is_in_place(kind, before, text):
    tokenizer = sentencepiece_tokenizer(kind)
    first = tokenizer(before, add_special_tokens=False).input_ids
    assert first + ids_behind(tokenizer, text) == tokenizer(before + text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("template", [ALPACA, MISTRAL, CHATML + "{{ '<|im_start|>assistant\n' }}", None])
@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_turns_and_texts_in_a_row_are_the_conversation(kind, template):
    """Token for token; what is written between the turns is tokenised in place as well."""
    tokenizer = sentencepiece_tokenizer(kind, template)
    first, later = turn_ids(tokenizer, "Why so?", first=True), turn_ids(tokenizer, "Go on.", first=False)
    said = ids_behind(tokenizer, " Because." if template is MISTRAL else "Because.")
    if template is None:
        whole = "Why so?\n\nBecause.\n\nGo on.\n\n"
    else:
        talk = [{"role": role, "content": text} for role, text in
                [("user", "Why so?"), ("assistant", "Because."), ("user", "Go on.")]]  # fmt: skip
        whole = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert first + said + later == tokenizer(whole, add_special_tokens=False).input_ids
    assert not tokenizer.convert_ids_to_tokens(later)[0].startswith("▁")


def test_behind_others_what_is_unknown_stays_there():
    """A vocabulary without the anchors' letters, which makes one token of all that it does not know."""
    vocab = {"<unk>": 0, "b": 1, "c": 2}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert ids_behind(tokenizer, "xyb") == [0, 1]
    assert ids_behind(tokenizer, "cb") == [2, 1]
    assert ids_behind(tokenizer, "") == []


@pytest.mark.real_model
def test_the_default_tokenizer_has_no_such_space(default_tokenizer):
    for text in ("\n\nHello", " you", "Hi", "<|im_end|>\n<|im_start|>user\nHi"):
        assert ids_behind(default_tokenizer, text) == default_tokenizer(text).input_ids
    assert torch.tensor(end_of_turn(default_tokenizer)).tolist() == [default_tokenizer.eos_token_id]
