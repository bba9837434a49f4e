"""What a model thinks and what it answers, told apart however the text falls into tokens."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ruvllm.checkpoint.reasoning import may_begin, separator
from tests.checkpoint.tokenizer_cases import TOKENIZERS, from_metadata, metadata_of

TAGS = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}<think>"
PLAIN = "{{ messages[0].content }}"


QWEN, HARMONY = TOKENIZERS["qwen2"], TOKENIZERS["o200k"]


def separated(pieces, opened=False, template=TAGS, tokenizer=QWEN):
    """(reasoning, answer, whether all reasoning came first) of texts or (id, text) pairs pushed one by one."""
    prompt = tokenizer.encode("question\n<think>\n" if opened else "question\n")
    by = separator(tokenizer, template, prompt)
    pairs = [piece if isinstance(piece, tuple) else (0, piece) for piece in pieces]
    said = [part for pair in pairs for part in by.push(*pair)] + list(by.finish(""))
    assert all(part.text for part in said if part.reasoning)
    texts = ["".join(part.text for part in said if part.reasoning is kind) for kind in (True, False)]
    order = [kind for kind, _ in itertools.groupby(part.reasoning for part in said if part.text)]
    return (*texts, order in ([], [True], [False], [True, False]))


WHOLE = [
    ("<think>\nhm\n\nso\n</think>\n\nAnswer.\n", False, "hm\n\nso", "Answer.\n"),
    ("\n <think>hm</think>Answer </think> <think>", False, "hm", "Answer </think> <think>"),
    ("hm\n</think>\n\n  Answer", True, "hm", "  Answer"),
    ("<think>\n\n</think>\n\nAnswer", False, "", "Answer"),
    ("\n\n</think>Answer", True, "", "Answer"),
    ("<think>a < b, </thin, </think", False, "a < b, </thin, </think", ""),  # cut off
    ("<think>\n", False, "", ""),
    ("The tag <think> is a tag</think>.", False, "", "The tag <think> is a tag</think>."),
    ("<thinking is hard>", False, "", "<thinking is hard>"),
    ("<thi", False, "", "<thi"),
    ("\n  code", False, "", "\n  code"),
    (" ", False, "", " "),
    ("", False, "", ""),
    ("é日本</think>\n👩‍👩‍👧", True, "é日本", "👩‍👩‍👧"),
]


@pytest.mark.parametrize(("text", "opened", "reasoning", "answer"), WHOLE)
def test_tags_separate_reasoning_from_the_answer(text, opened, reasoning, answer):
    for size in (1, 2, 3, 7, 100):
        pieces = [text[n : n + size] for n in range(0, len(text), size)]
        assert separated(pieces, opened) == (reasoning, answer, True), size


@given(
    parts=st.lists(st.sampled_from(["<", "think", ">", "/", "<think>", "</think>", "\n", " ", "a", "</", "thi"])),
    opened=st.booleans(),
)
def test_however_a_text_falls_into_tokens_it_is_separated_alike(parts, opened):
    text = "".join(parts)
    found = separated([text], opened)
    assert separated(list(text), opened) == separated(parts, opened) == found
    reasoning, answer, _ = found
    if not opened and not text.lstrip().startswith("<think>"):
        assert (reasoning, answer) == ("", text)
    else:
        inner, _, rest = text.lstrip().removeprefix("<think>" if not opened else "").partition("</think>")
        inner = text.partition("</think>")[0] if opened else inner
        assert (reasoning, answer) == (inner.strip("\n"), rest.lstrip("\n"))


def test_reasoning_is_shown_as_soon_as_it_is_certain():
    by = separator(QWEN, TAGS, QWEN.encode("question"))
    shown = [[part.text for part in by.push(0, text)] for text in ("<think>", "\n", "a", "\n", "b <", "/", "c")]
    assert shown == [[], [], ["a"], [], ["\nb "], [], ["</c"]]
    assert list(by.push(0, "</think>")) == []
    assert list(by.push(0, "\n")) == []
    assert list(by.push(0, "x")) == [("x", False)]


def test_only_models_that_think_are_listened_to_for_it():
    text = "<think>hm</think>Answer"
    assert separated([text], template=PLAIN) == ("", text, True)
    assert separated([text], opened=True, template=PLAIN) == ("", text, True)
    metadata = metadata_of("qwen2")
    metadata["tokenizer.ggml.tokens"] += ["<think>", "</think>"]
    metadata["tokenizer.ggml.token_type"] += [4, 4]
    thinking = from_metadata(metadata)
    assert separated([text], template=PLAIN, tokenizer=thinking) == ("hm", "Answer", True)
    # What a user writes at the end of a prompt opens nothing: the template has to.
    closing = "{{ messages[0].content }}</think>"
    assert separated([text], opened=True, template=closing, tokenizer=thinking) == ("hm", "Answer", True)
    assert separated(["Answer"], opened=True, template=closing, tokenizer=thinking) == ("", "Answer", True)


def harmony(text):
    """(id, text) of a text in GPT-OSS' form, as a decoder gives them."""
    ids = HARMONY.encode(text, add_special=False)
    decoder = HARMONY.stream_decoder(continuation=True)
    return [(i, decoder.push(i)) for i in ids]


FINAL = "<|start|>assistant<|channel|>final<|message|>"
CALL = " to=functions.f<|channel|>commentary json<|message|>"


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        (f"<|channel|>analysis<|message|>Hm. é日本<|end|>{FINAL}2", "Hm. é日本", "2"),
        ("<|channel|>final<|message|>2", "", "2"),
        (
            f"<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>{FINAL}c",
            "a\n\nb", "c",
        ),
        (
            f"<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>b<|end|>{FINAL}c",
            "a", "b\n\nc",
        ),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant" + CALL + '{"x": 1}',
            "a", CALL.lstrip() + '{"x": 1}',
        ),
        (CALL + "{}", "", CALL.lstrip() + "{}"),
        ("<|channel|>analysis<|message|>cut o", "cut o", ""),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|chan", "a", ""),
        ("<|channel|>ana", "", ""),
        ("no form at all", "", "no form at all"),
    ],
)  # fmt: skip
def test_channels_separate_reasoning_from_the_answer(text, reasoning, answer):
    assert separated(harmony(text), template=PLAIN, tokenizer=HARMONY)[:2] == (reasoning, answer)


def test_a_channel_that_is_only_spelt_is_text():
    spelt = "say <|end|> and <|channel|>final"
    ids = HARMONY.encode(spelt, parse_special=False)
    decoder = HARMONY.stream_decoder(continuation=True)
    quoted = [(i, decoder.push(i)) for i in ids]
    said = [*harmony("<|channel|>analysis<|message|>"), *quoted, *harmony(f"<|end|>{FINAL}"), *quoted]
    assert separated(said, template=PLAIN, tokenizer=HARMONY) == (spelt, spelt, True)


def test_bytes_that_never_became_a_character_stay_in_their_message():
    said = harmony("<|channel|>analysis<|message|>")
    end = harmony("<|end|>")[0][0]
    assert separated([*said, (end, "\ufffd<|end|>"), *harmony(f"{FINAL}a")], template=PLAIN, tokenizer=HARMONY) == (
        "\ufffd", "a", True,
    )  # fmt: skip


@pytest.mark.parametrize(("text", "held"), [("ab</th", 4), ("</think>", 0), ("<", 1), ("", 0), ("a<</", 2)])
def test_what_may_begin_a_mark_is_measured(text, held):
    assert may_begin(text, ("</think>",)) == held
