"""Traces: the table and the document of latent steps, and how tokens are spelled in them."""

import errno
import io
import json
import math

import pytest
import torch
from latentmas.chain.results import AgentTrace
from latentmas.cli.questions import Question
from latentmas.cli.trace_view import trace_document, trace_table, write_trace
from rich.console import Console
from tiny_models import ragged, tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from latentmas_kernels import latent_generate
from latentmas_kernels.trace import LatentTrace, trace_of

NAN = math.nan


def tokenizer_of(vocab, decoder):
    """A tokenizer whose vocabulary is these entries, in this order."""
    backend = Tokenizer(models.BPE({entry: n for n, entry in enumerate(vocab)}, []))
    backend.decoder, backend.normalizer = decoder, normalizers.NFC()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def byte_level(*vocab):
    return tokenizer_of(vocab, decoders.ByteLevel())


def sentence_piece(*vocab):
    return tokenizer_of(
        vocab,
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
    )


WORDS = byte_level("Ġsolve", "it", "Ċ", "Ġthe", ",")


def trace_by_hand(tokens, steps=None, **fields):
    """A trace of tokens [B][n][k]; what is not given is a step like any other."""
    tokens = torch.tensor(tokens)
    batch, longest, top = tokens.shape
    whole = {
        "probabilities": torch.linspace(0.5, 0.125, top).expand(batch, longest, top),
        "norms": torch.full((batch, longest), 47.25),
        "nearest": tokens[:, :, 0],
        "distances": torch.full((batch, longest), 0.25),
        "cosines": torch.full((batch, longest), 0.5),
        "finite": torch.ones(batch, longest, dtype=torch.bool),
    }
    given = {name: torch.tensor(value) for name, value in fields.items()}
    return LatentTrace(steps or [longest] * batch, tokens, **{**whole, **given})


def table(traces, questions=("why?",), tokenizer=WORDS, width=120, **options):
    console = Console(file=io.StringIO(), width=width, **options)
    trace_table(console, traces, questions, tokenizer)
    return console.file.getvalue()


def lines(*args, **options):
    return [line.rstrip() for line in table(*args, **options).splitlines()]


def says(token_id, tokenizer):
    """How a token shows in the table, and its text in the document."""
    traces = [AgentTrace("planner", trace_by_hand([[[token_id]]]))]
    document = trace_document(traces, ["why?"], tokenizer)
    step = document["questions"][0]["agents"][0]["steps"][0]
    assert step["nearest"]["text"] == step["says"][0]["text"]
    _, shown, _, _, _, nearest, _ = lines(traces, tokenizer=tokenizer)[4].split()
    assert shown == nearest
    return shown, step["says"][0]["text"]


# ---- the table -----------------------------------------------------------------------------------------------------


def test_table_of_one_trace():
    trace = trace_by_hand([[[0, 1], [3, 4]]], cosines=[[NAN, -0.5]], nearest=[[1, 2]])
    assert lines([AgentTrace("planner", trace)], [Question(7, "why [b]not[/b]?")]) == [
        "Question 7 why [b]not[/b]?",
        "",
        "planner 2 steps",
        "step  says                  norm  cosine  nearest",
        "   1  ␣solve 0.50  it 0.12  47.2          it 0.25",
        "   2  ␣the 0.50  , 0.12     47.2  -0.500  \\n 0.25",
        "",
    ]


def test_a_question_in_the_table_steers_no_terminal():
    got = lines([AgentTrace("plan\x1b[2Jner", trace_by_hand([[[0]]]))], ["why\x1b[2J?"])
    assert got[:3] == ["Question 1 why\\x1b[2J?", "", "plan\\x1b[2Jner 1 step"]


def test_a_table_per_question_and_agent():
    """Rows show the steps that they took, and no more."""
    planner = trace_by_hand([[[0]] * 3, [[3]] * 3], steps=[3, 1])
    critic = trace_by_hand([[[1]], [[4]]])
    got = lines([AgentTrace("planner", planner), AgentTrace("critic", critic)], ["first", "second"])
    heads = [line for line in got if line and not line.startswith(("step", " "))]
    assert heads == [
        "Question 1 first", "planner 3 steps", "critic 1 step", "Question 2 second", "planner 1 step", "critic 1 step",
    ]  # fmt: skip
    words = [[line.split()[:2] for line in got if line.startswith(" ")]]
    assert words == [[["1", "␣solve"], ["2", "␣solve"], ["3", "␣solve"], ["1", "it"], ["1", "␣the"], ["1", ","]]]


def test_an_agent_without_steps():
    empty = torch.zeros(1, 0)
    trace = LatentTrace([0], empty[..., None].long(), empty[..., None], empty, empty.long(), empty, empty, empty.bool())
    assert lines([AgentTrace("planner", trace)]) == ["Question 1 why?", "", "planner 0 steps", ""]


def test_steps_that_broke_are_marked():
    trace = trace_by_hand(
        [[[0], [-1], [-1], [3]]],
        finite=[[True, False, False, False]],
        norms=[[47.25, NAN, NAN, 47.25]],
        nearest=[[0, 1, -1, -1]],
        distances=[[0.25, 0.25, NAN, NAN]],
        cosines=[[NAN, 0.5, NAN, NAN]],
    )
    assert lines([AgentTrace("planner", trace)])[4:8] == [
        "   1  ␣solve 0.50            47.2          ␣solve 0.25",
        "   2  NaN or Inf                    0.500  it 0.25",
        "   3  NaN or Inf",
        "   4  NaN or Inf  ␣the 0.50  47.2",
    ]


def test_logits_that_broke_are_marked():
    trace = trace_by_hand([[[-1, -1]]])
    assert lines([AgentTrace("planner", trace)])[4].startswith("   1  NaN or Inf in the logits")


@pytest.mark.parametrize(
    ("norm", "shown"), [(47.25, "47.2"), (40.0, "40.0"), (0.012345, "0.0123"), (2.0**20, "1.05e+06"), (0.0, "0")]
)
def test_norms_of_any_size(norm, shown):
    assert lines([AgentTrace("planner", trace_by_hand([[[0]]], norms=[[norm]]))])[4].split()[3] == shown


@pytest.mark.parametrize("width", [20, 40, 80])
def test_nothing_is_left_out_of_a_narrow_console(width):
    """Cells are folded over several lines, never cut."""
    tokens = [[list(range(5))] * 12]
    wide = table([AgentTrace("planner", trace_by_hand(tokens))], width=300)
    narrow = table([AgentTrace("planner", trace_by_hand(tokens))], width=width)
    assert max(map(len, narrow.splitlines()[3:])) <= width
    assert "…" not in narrow
    for letter in "sov,␣h":  # of tokens; the headings are folded as well
        assert narrow.count(letter) == wide.count(letter), letter


def test_all_rows_are_printed():
    got = lines([AgentTrace("planner", trace_by_hand([[[0]] * 250]))])
    assert [int(line.split()[0]) for line in got[4:254]] == list(range(1, 251))


def test_none_is_standard_output(capsys):
    trace_table(None, [AgentTrace("planner", trace_by_hand([[[0]]]))], ["why?"], WORDS)
    assert "␣solve 0.50" in capsys.readouterr().out


def test_traces_and_questions_must_belong_together():
    traces = [AgentTrace("planner", trace_by_hand([[[0]], [[1]]]))]
    for call in (lambda: table(traces), lambda: trace_document(traces, ["why?"], WORDS)):
        with pytest.raises(
            ValueError, match="the trace of 'planner' has 2 rows for 1 questions; pass the questions of"
        ):
            call()


# ---- how tokens are spelled ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "shown", "text"),
    [
        ("Ġsolve", "␣solve", " solve"),
        ("ĠĠ", "␣␣", "  "),
        ("Ċ", r"\n", "\n"),
        ("ĉ", r"\t", "\t"),
        ("čĊ", r"\r\n", "\r\n"),
        ("Ã©", "é", "é"),  # two bytes, one letter
        ("Ġæ", r"␣\xe6", r" \xe6"),  # the first of three bytes
        ("ĥ", r"\x83", r"\x83"),
        ("ðŁĺĢ", "😀", "😀"),
        ("Äł", "Ġ", "Ġ"),  # the letter itself
        ("âĢĭ", r"\u200b", "\u200b"),  # a space without width
        ("âĢ®", r"\u202e", "\u202e"),  # turns the line around
        ("Ľ[31m", r"\x9b[31m", r"\x9b[31m"),
        ("ě[31m", r"\x1b[31m", "\x1b[31m"),  # turns a terminal red
        ("[red]", "[red]", "[red]"),
        ("[/]", "[/]", "[/]"),
        (":smile:", ":smile:", ":smile:"),
        ("\\", r"\\", "\\"),
        ("âĲ£", r"\u2423", "␣"),  # the sign for a space is not taken for one
        ("▁", "▁", "▁"),  # not an entry that the alphabet has: shown as it is
    ],
)
def test_tokens_of_a_byte_level_vocabulary(entry, shown, text):
    assert says(1, byte_level("Ġ", entry) if entry != "Ġ" else byte_level("a", entry)) == (shown, text)


@pytest.mark.parametrize(
    ("entry", "shown", "text"),
    [
        ("▁solve", "␣solve", " solve"),
        ("▁▁", "␣␣", "  "),
        ("é", "é", "é"),  # a letter of the alphabet of bytes, but no byte here
        ("Ġ", "Ġ", "Ġ"),
        ("<0x0A>", r"\n", "\n"),
        ("<0xE6>", r"\xe6", r"\xe6"),
        ("<0x0a>", "<0x0a>", "<0x0a>"),
    ],
)
def test_tokens_of_a_sentence_piece_vocabulary(entry, shown, text):
    assert says(1, sentence_piece("a", entry)) == (shown, text)


def test_added_tokens_are_what_they_say():
    """Spaces and all, in either kind of vocabulary."""
    for tokenizer in (byte_level("a"), sentence_piece("a")):
        tokenizer.add_tokens([AddedToken("<|im_end|>", special=True), AddedToken("a\té▁")])
        assert says(1, tokenizer) == ("<|im_end|>", "<|im_end|>")
        assert says(2, tokenizer) == (r"a\té▁", "a\té▁")


def test_a_vocabulary_that_the_model_pads():
    traces = [AgentTrace("planner", trace_by_hand([[[99]]]))]
    assert "<no␣token␣99> 0.50" in table(traces)
    step = trace_document(traces, ["why?"], WORDS)["questions"][0]["agents"][0]["steps"][0]
    assert step["says"][0]["text"] == "<no token 99>"


class _Bytes:
    """A tokenizer with no more than the method that is needed, whose entries are bytes."""

    def convert_ids_to_tokens(self, token_id):
        return [b" solve", b"\xe6", b""][token_id]


def test_entries_that_are_bytes():
    assert says(0, _Bytes()) == ("␣solve", " solve")
    assert says(1, _Bytes()) == (r"\xe6", r"\xe6")
    assert says(2, _Bytes()) == ("''", "")
    assert says(3, _Bytes()) == ("<no␣token␣3>", "<no token 3>")


@pytest.mark.real_model
def test_every_token_of_the_default_model(default_tokenizer):
    """All of them print, and what they say together is what the tokenizer decodes."""
    ids = list(range(len(default_tokenizer)))
    steps = [ids[n : n + 64] for n in range(0, len(ids), 64)]
    assert len(steps[-1]) == 64
    traces = [AgentTrace("planner", trace_by_hand([steps]))]
    document = trace_document(traces, ["why?"], default_tokenizer)
    texts = [token["text"] for step in document["questions"][0]["agents"][0]["steps"] for token in step["says"]]
    alone = [default_tokenizer.decode([token_id], clean_up_tokenization_spaces=False) for token_id in ids]
    whole = [n for n in ids if "\ufffd" not in alone[n]]
    assert len(whole) > 48_000
    assert [texts[n] for n in whole] == [alone[n] for n in whole]
    assert all("\\x" in texts[n] or texts[n] == "\ufffd" for n in set(ids) - set(whole))
    printed = table(traces, tokenizer=default_tokenizer, width=200)
    assert [c for c in printed if not c.isprintable() and c != "\n"] == []


@pytest.mark.real_model
def test_a_sentence_of_the_default_model(default_tokenizer):
    ids = default_tokenizer("Solve\n  naïve [b]problems[/b] 世").input_ids
    traces = [AgentTrace("planner", trace_by_hand([[ids]]))]
    words = lines(traces, tokenizer=default_tokenizer, width=250)[4].split()[1::2]
    assert "".join(words[: len(ids)]).startswith(r"Solve\n␣␣naïve␣[b]problems[/b]␣")


# ---- the document --------------------------------------------------------------------------------------------------


def test_document_of_a_trace():
    trace = trace_by_hand([[[0, 1], [-1, -1]]], cosines=[[NAN, 0.5]], finite=[[True, False]], nearest=[[2, -1]],
                          norms=[[47.25, NAN]], distances=[[0.25, NAN]])  # fmt: skip
    document = trace_document([AgentTrace("planner", trace)], [Question(7, "why?", "because")], WORDS)
    assert document == {
        "questions": [
            {
                "number": 7,
                "question": "why?",
                "agents": [
                    {
                        "agent": "planner",
                        "steps": [
                            {
                                "step": 1,
                                "says": [
                                    {"token_id": 0, "text": " solve", "probability": 0.5},
                                    {"token_id": 1, "text": "it", "probability": 0.125},
                                ],
                                "norm": 47.25,
                                "cosine": None,
                                "nearest": {"token_id": 2, "text": "\n", "distance": 0.25},
                                "finite": True,
                            },
                            {"step": 2, "says": [], "norm": None, "cosine": 0.5, "nearest": None, "finite": False},
                        ],
                    }
                ],
            }
        ]
    }


def test_document_has_a_row_per_question():
    planner, critic = trace_by_hand([[[0]] * 3, [[3]] * 3], steps=[3, 1]), trace_by_hand([[[1]], [[4]]])
    document = trace_document([AgentTrace("planner", planner), AgentTrace("critic", critic)], ["a", "b"], WORDS)
    seen = [
        (q["number"], q["question"], a["agent"], [step["says"][0]["token_id"] for step in a["steps"]])
        for q in document["questions"]
        for a in q["agents"]
    ]
    assert seen == [
        (1, "a", "planner", [0, 0, 0]),
        (1, "a", "critic", [1]),
        (2, "b", "planner", [3]),
        (2, "b", "critic", [4]),
    ]


def test_real_latent_steps_that_break_is_strict_json(tmp_path):
    """Rows that ended, NaN in a state and Inf in an embedding: a parser that takes no NaN reads it."""
    model, (ids, mask) = tiny_model("llama"), ragged([3, 5])
    output = latent_generate(
        model, ids, mask, latent_steps=[4, 2], output_states=True, engine="eager", aligner="identity"
    )
    output.states[0, 1, 3] = torch.nan
    output.latents[0, 2, 3] = torch.inf
    trace = trace_of(model, output, top_k=3)
    traces = [AgentTrace("planner", trace)]
    write_trace(tmp_path / "trace.json", trace_document(traces, ["a", "b"], WORDS))

    def refuse(name):
        raise AssertionError(f"{name} in the document")

    document = json.loads((tmp_path / "trace.json").read_bytes(), parse_constant=refuse)
    first, second = (question["agents"][0]["steps"] for question in document["questions"])
    assert [step["finite"] for step in first] == [True, False, False, True]
    assert [len(step["says"]) for step in first] == [3, 0, 3, 3]
    assert [step["cosine"] is None for step in first] == [True, False, True, True]
    assert [step["nearest"] is None for step in first] == [False, False, True, False]
    assert [step["norm"] is None for step in first] == [False, True, False, False]
    assert [step["step"] for step in second] == [1, 2]
    assert first[3]["says"][0]["probability"] == float(trace.probabilities[0, 3, 0])
    assert "NaN or Inf" in table(traces, ["a", "b"])


def test_text_is_plain_unicode(tmp_path):
    """Half a character is no lone surrogate, which strict parsers refuse."""
    traces = [AgentTrace("planner", trace_by_hand([[[1]]]))]
    write_trace(tmp_path / "trace.json", trace_document(traces, ["ä 世"], byte_level("Ġ", "Ġæ")))
    document = json.loads((tmp_path / "trace.json").read_text())
    assert document["questions"][0]["question"] == "ä 世"
    assert document["questions"][0]["agents"][0]["steps"][0]["says"][0]["text"] == " \\xe6"
    json.dumps(document, ensure_ascii=False).encode()  # a lone surrogate cannot be encoded


# ---- the file ------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_and_ends_with_a_newline(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text("old")
    write_trace(str(path), {"questions": []})
    assert path.read_text().endswith("}\n")
    assert json.loads(path.read_text()) == {"questions": []}
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "trace.json"
    path.write_text("old")

    def full(self, *args, **options):
        with self.open("w") as file:
            file.write("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(
        OSError, match=r"cannot write the trace to .*trace\.json: No space left on device; make room, or"
    ):
        write_trace(path, {"questions": []})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "trace.json").mkdir()
    with pytest.raises(
        OSError, match=r"cannot write the trace to .*trace\.json: Is a directory; make room, or name ano"
    ):
        write_trace(tmp_path / "trace.json", {"questions": []})
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


@pytest.mark.parametrize("value", [NAN, math.inf])
def test_a_document_with_nan_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_trace(tmp_path / "trace.json", {"questions": [value]})
    assert list(tmp_path.iterdir()) == []
