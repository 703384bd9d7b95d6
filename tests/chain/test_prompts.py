"""turn_ids() and padded(): an agent's turn closes the one before it and opens its own, with any template."""

from dataclasses import dataclass

import pytest
import torch
from latentmas.chain.prompts import LATENT_TURN, has_thinking_switch, padded, turn_ids
from tokenizers_offline import character_tokenizer


@dataclass(frozen=True)
class Shape:
    """A chat template, and what it writes where.

    Attributes:
        once: written at the beginning of a conversation only; "" where nothing is.
        closes: written behind an assistant's message.
        opens: the generation prompt.
        gap: written between the generation prompt and an assistant's message.
    """

    template: str
    once: str
    closes: str
    opens: str
    gap: str = ""


SHAPES = {
    # that of the default model
    "chatml": Shape(
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        once="<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n",
        closes="<|im_end|>\n",
        opens="<|im_start|>assistant\n",
    ),
    # Llama 3: a BOS and headers
    "bos": Shape(
        "{% for message in messages %}"
        "{% set content = '<|head|>' + message['role'] + '</head>\n' + message['content'] | trim + eos_token %}"
        "{{ bos_token + content if loop.first else content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|head|>assistant</head>\n' }}{% endif %}",
        once="<bos>",
        closes="<eos>",
        opens="<|head|>assistant</head>\n",
    ),
    # Gemma: no system role, turns must alternate, the assistant has another name
    "no-system": Shape(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        once="<bos>",
        closes="<end_of_turn>\n",
        opens="<start_of_turn>model\n",
    ),
    # SmolLM3: a switch that writes an empty chain of thought, in the history too
    "thinking": Shape(
        "{% set empty = '' if enable_thinking | default(true) else '<think>\n\n</think>\n' %}"
        "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}"
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}{{ empty }}{% endif %}"
        "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + empty }}{% endif %}",
        once="<|im_start|>system\nBe brief.<|im_end|>\n",
        closes="<|im_end|>\n",
        opens="<|im_start|>assistant\n<think>\n\n</think>\n",
    ),
    # Llama 2: no generation prompt beyond the end of the instruction, blanks around the answer
    "inst": Shape(
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}",
        once="<bos>",
        closes=" <eos>",
        opens=" [/INST]",
        gap=" ",
    ),
}
PLAN, ANSWER = "Make a plan: how many?", "Now answer: how many?"


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


def render(tokenizer, *contents, generate=True):
    """The template's own text of a conversation whose messages alternate between user and assistant."""
    messages = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generate, enable_thinking=False
    )


def test_first_turn_is_the_whole_prompt(shape):
    tokenizer = character_tokenizer(shape.template)
    ids = turn_ids(tokenizer, PLAN, first=True)
    assert tokenizer.decode(ids) == render(tokenizer, PLAN)
    assert tokenizer.decode(ids).startswith(shape.once)
    assert ids.count(tokenizer.bos_token_id) == shape.template.count("bos_token"), "a BOS beyond the template's own"


def test_later_turn_closes_the_one_before_and_opens_its_own(shape):
    """It begins with the end of the assistant's message and says nothing of what only the beginning says."""
    tokenizer = character_tokenizer(shape.template)
    text = tokenizer.decode(turn_ids(tokenizer, ANSWER, first=False))
    assert text.startswith(shape.closes)
    assert text.endswith(shape.opens)
    assert text.count(ANSWER) == 1
    assert shape.once not in text
    assert tokenizer.bos_token not in text
    assert LATENT_TURN not in text


def test_turns_and_texts_in_a_row_are_the_conversation(shape):
    """Three turns with what was said between them are, token for token, the template's text of the conversation."""
    tokenizer = character_tokenizer(shape.template)
    turns = [turn_ids(tokenizer, text, first=index == 0) for index, text in enumerate([PLAN, "Improve it.", ANSWER])]
    said = ["First count, then add.", "Count twice."]
    first, second = (tokenizer(shape.gap + text, add_special_tokens=False).input_ids for text in said)
    whole = render(tokenizer, PLAN, said[0], "Improve it.", said[1], ANSWER)
    assert tokenizer.decode(turns[0] + first + turns[1] + second + turns[2]) == whole
    assert turns[0] + first + turns[1] + second + turns[2] == tokenizer(whole, add_special_tokens=False).input_ids


def test_no_chain_of_thought_is_left_open():
    """Qwen3 writes the empty chain of thought in the generation prompt only: each turn ends behind it."""
    template = (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
        "{% endif %}{% endif %}"
    )
    tokenizer = character_tokenizer(template)
    for first in (True, False):
        text = tokenizer.decode(turn_ids(tokenizer, PLAN, first=first))
        assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        assert text.count("<think>") == 1


@pytest.mark.parametrize(
    "shown",
    [
        "",
        "{{ message['content'] | upper }}",
        "{{ message['content'][:5] }}",
        "{{ message['content'] + message['content'] }}",
    ],
    ids=["dropped", "upper", "cut", "twice"],
)
def test_template_that_changes_the_assistant_is_refused(shown):
    """Where the end of the assistant's message cannot be found, a later turn says so; a first one needs no such end."""
    template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'U: ' + message['content'] + '\n' }}"
        "{% else %}A: " + shown + "\n{% endif %}{% endfor %}A:"
    )
    tokenizer = character_tokenizer(template)
    assert tokenizer.decode(turn_ids(tokenizer, PLAN, first=True)) == f"U: {PLAN}\nA:"
    said = (
        "writes an assistant's message twice" if " + " in shown else r"does not write the assistant's message .*2 of 3"
    )
    with pytest.raises(ValueError, match=rf"chat template .*{said}.*set tokenizer\.chat_template"):
        turn_ids(tokenizer, ANSWER, first=False)


def test_question_may_hold_the_mark(shape):
    """A question about the text that stands in for latent steps is a question like any other."""
    tokenizer = character_tokenizer(shape.template)
    text = tokenizer.decode(turn_ids(tokenizer, f"What does {LATENT_TURN} mean?", first=False))
    assert text.startswith(shape.closes)
    assert text.count(f"What does {LATENT_TURN} mean?") == 1


def test_without_template_turns_are_paragraphs():
    tokenizer = character_tokenizer()
    first, later = turn_ids(tokenizer, PLAN, first=True), turn_ids(tokenizer, ANSWER, first=False)
    assert tokenizer.decode(first) == f"<bos>{PLAN}\n\n"
    assert tokenizer.decode(later) == f"\n\n{ANSWER}\n\n"
    assert first[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in [*first[1:], *later]


# ---- system messages -----------------------------------------------------------------------------------------------

SYSTEM = "Answer in rhymes."
DROPS = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ '<' + message['role'] + '>' + message['content'] + '|' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TRIMS = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] | trim + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def test_system_message_goes_where_the_template_puts_it():
    """In place of the template's own."""
    tokenizer = character_tokenizer(SHAPES["chatml"].template)
    assert tokenizer.decode(turn_ids(tokenizer, PLAN, first=True, system=SYSTEM)) == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{PLAN}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_system_message_that_the_template_trims_is_there():
    tokenizer = character_tokenizer(TRIMS)
    text = tokenizer.decode(turn_ids(tokenizer, PLAN, first=True, system=f"\n {SYSTEM}\n"))
    assert text == f"<system>{SYSTEM}|<user>{PLAN}|<assistant>"


@pytest.mark.parametrize("template", [SHAPES["no-system"].template, DROPS], ids=["refused", "dropped"])
def test_system_message_that_the_template_does_not_take_comes_in_front_of_the_text(template):
    tokenizer = character_tokenizer(template)
    ids = turn_ids(tokenizer, PLAN, first=True, system=SYSTEM)
    assert ids == turn_ids(tokenizer, f"{SYSTEM}\n\n{PLAN}", first=True)
    assert tokenizer.decode(ids).count(SYSTEM) == 1


def test_system_message_of_a_later_turn_comes_in_front_of_the_text(shape):
    """No template has a place for one there."""
    tokenizer = character_tokenizer(shape.template)
    ids = turn_ids(tokenizer, ANSWER, first=False, system=SYSTEM)
    assert ids == turn_ids(tokenizer, f"{SYSTEM}\n\n{ANSWER}", first=False)
    assert tokenizer.decode(ids).count(SYSTEM) == 1


def test_without_template_a_system_message_is_a_paragraph():
    tokenizer = character_tokenizer()
    first = turn_ids(tokenizer, PLAN, first=True, system=SYSTEM)
    later = turn_ids(tokenizer, ANSWER, first=False, system=SYSTEM)
    assert tokenizer.decode(first) == f"<bos>{SYSTEM}\n\n{PLAN}\n\n"
    assert tokenizer.decode(later) == f"\n\n{SYSTEM}\n\n{ANSWER}\n\n"


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("system", [None, SYSTEM])
def test_template_that_takes_no_conversation_is_refused_in_its_own_words(first, system):
    tokenizer = character_tokenizer("{{ raise_exception('This model speaks to nobody') }}")
    with pytest.raises(
        ValueError, match=r"refuses a conversation .*: This model speaks to nobody; set tokenizer\.chat_template"
    ):
        turn_ids(tokenizer, PLAN, first=first, system=system)


def test_template_that_takes_one_message_only_is_refused_in_later_turns():
    tokenizer = character_tokenizer(
        "{% if messages | length > 1 %}{{ raise_exception('One message only') }}{% endif %}"
        "{{ messages[0]['content'] + ' A:' }}"
    )
    assert tokenizer.decode(turn_ids(tokenizer, PLAN, first=True, system=SYSTEM)) == f"{SYSTEM}\n\n{PLAN} A:"
    with pytest.raises(ValueError, match="refuses a conversation of user and assistant: One message only"):
        turn_ids(tokenizer, ANSWER, first=False)


# ---- thinking switches ---------------------------------------------------------------------------------------------

BARE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}assistant:"
SWITCHES = {
    "enable_thinking": "{% if not enable_thinking | default(true) %} <think></think>{% endif %}",
    "thinking": "{% if thinking is defined and thinking %} <think>{% else %} </think>{% endif %}",
}
ON_OFF = {"enable_thinking": ("", " <think></think>"), "thinking": (" <think>", " </think>")}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", SWITCHES)
def test_thinking_is_off_unless_it_is_turned_on(name, first):
    """Under both names that templates give the switch, and whatever their own default is."""
    tokenizer = character_tokenizer(BARE + SWITCHES[name])
    on, off = ON_OFF[name]
    assert tokenizer.decode(turn_ids(tokenizer, PLAN, first=first)).endswith(f"{PLAN}\nassistant:{off}")
    assert tokenizer.decode(turn_ids(tokenizer, PLAN, first=first, think=False)).endswith(f"\nassistant:{off}")
    assert tokenizer.decode(turn_ids(tokenizer, PLAN, first=first, think=True)).endswith(f"{PLAN}\nassistant:{on}")


def test_switch_and_system_message_go_together():
    tokenizer = character_tokenizer(BARE + SWITCHES["thinking"])
    text = tokenizer.decode(turn_ids(tokenizer, PLAN, first=True, system=SYSTEM, think=True))
    assert text == f"system: {SYSTEM}\nuser: {PLAN}\nassistant: <think>"


@pytest.mark.parametrize(
    ("template", "has"),
    [
        (BARE + SWITCHES["enable_thinking"], True),
        (BARE + SWITCHES["thinking"], True),
        (SHAPES["thinking"].template, True),
        (BARE, False),
        (SHAPES["no-system"].template, False),
        (None, False),
    ],
    ids=["enable_thinking", "thinking", "empty thought", "none", "no-system", "no template"],
)
def test_a_switch_is_known_by_what_it_changes(template, has):
    assert has_thinking_switch(character_tokenizer(template)) is has


# ---- batches -------------------------------------------------------------------------------------------------------


def test_padded_is_left_padded():
    ids, mask = padded([[5, 6, 7], [8], [9, 10]], "cpu")
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8], [0, 9, 10]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert ids.shape == mask.shape == (3, 3)
    assert ids.dtype == mask.dtype == torch.int64


def test_padded_leaves_rows_of_one_length_alone():
    ids, mask = padded([[0, 4], [3, 0]], "cpu")
    assert ids.tolist() == [[0, 4], [3, 0]]
    assert mask.tolist() == [[1, 1], [1, 1]], "an id of 0 is a token, not padding"


@pytest.mark.real_model
def test_default_models_own_template(default_tokenizer):
    """The real template and the real tokenizer: turns in a row are the conversation, and the system text comes once."""
    first, later = turn_ids(default_tokenizer, PLAN, first=True), turn_ids(default_tokenizer, ANSWER, first=False)
    said = default_tokenizer("Count them.", add_special_tokens=False).input_ids
    whole = render(default_tokenizer, PLAN, "Count them.", ANSWER)
    assert first + said + later == default_tokenizer(whole, add_special_tokens=False).input_ids
    assert default_tokenizer.decode(later).startswith("<|im_end|>\n<|im_start|>user\n")
    assert "SmolLM" in default_tokenizer.decode(first)
    assert "SmolLM" not in default_tokenizer.decode(later)
