"""SentencePiece from pieces and scores: held against its definition, and against the library itself."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Iterator
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from ruvllm.checkpoint.tokenizer import Kind, Tokenizer, load_tokenizer
from ruvllm.checkpoint.tokenizer.spm import ScoredPieces
from ruvllm.errors import ModelFormatError

Scores = dict[str, float]


class Metadata:
    """As much of a GGUF file as a tokenizer needs."""

    path = "model.gguf"

    def __init__(self, metadata: dict[str, Any]) -> None:
        self.metadata = metadata


def tokenizer_of(scores: Scores, kinds: list[int] | None = None, prefix: bool = False) -> Tokenizer:
    values: dict[str, Any] = {
        "model": "llama", "tokens": list(scores), "scores": list(scores.values()), "add_space_prefix": prefix,
    }  # fmt: skip
    if kinds is not None:
        values["token_type"] = kinds
    return load_tokenizer(Metadata({f"tokenizer.ggml.{key}": value for key, value in values.items()}))


def pieces_of(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.id_to_piece(i) for i in tokenizer.encode(text, add_special=False, parse_special=False)]


def joined_by_score(text: str, scores: Scores) -> list[str]:
    """SentencePiece BPE as its definition has it: the highest score first, of equal ones the leftmost."""
    parts = list(text)
    while True:
        pairs = [
            (scores[parts[i] + parts[i + 1]], -i) for i in range(len(parts) - 1) if parts[i] + parts[i + 1] in scores
        ]
        if not pairs:
            return parts
        i = -max(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def joined_pieces(data: Any) -> list[str]:
    """ "a", "b", and some that are made of others."""
    pieces = ["a", "b"]
    for _ in range(data.draw(st.integers(1, 12))):
        piece = "".join(data.draw(st.sampled_from(pieces)) for _ in range(2))
        if piece not in pieces:
            pieces.append(piece)
    return pieces


texts_of_two_letters = st.lists(st.text("ab", min_size=1, max_size=40), min_size=1, max_size=10)


@given(data=st.data(), texts=texts_of_two_letters)
def test_any_vocabulary_of_different_scores(data: Any, texts: list[str]) -> None:
    pieces = joined_pieces(data)
    scores = dict(zip(pieces, map(float, data.draw(st.permutations(range(len(pieces))))), strict=True))
    tokenizer = tokenizer_of(scores)
    for text in texts:
        assert pieces_of(tokenizer, text) == joined_by_score(text, scores)


@given(data=st.data(), texts=texts_of_two_letters)
def test_any_vocabulary_of_equal_scores(data: Any, texts: list[str]) -> None:
    """Baichuan's has such: pieces of one score that overlap."""
    pieces = joined_pieces(data)
    scores = {piece: float(data.draw(st.integers(0, 2))) for piece in pieces}
    tokenizer, alone = tokenizer_of(scores), ScoredPieces(scores, ())
    for text in texts:
        assert pieces_of(tokenizer, text) == alone.words(text) == joined_by_score(text, scores)


@given(lengths=st.sets(st.integers(3, 16)), runs=st.lists(st.integers(1, 60), min_size=1, max_size=4))
def test_any_vocabulary_of_runs_of_one_score(lengths: set[int], runs: list[int]) -> None:
    scores = {"a": -1.0, "b": -2.0} | {"a" * n: -9.0 for n in (2, *sorted(lengths))}
    text = "b".join("a" * n for n in runs)
    assert pieces_of(tokenizer_of(scores), text) == joined_by_score(text, scores)


@pytest.mark.parametrize(
    ("last", "pieces"),
    [(-9.0, ["ab", "c"]), (-8.0, ["a", "bc"])],
)
def test_of_equal_pieces_that_compete_the_leftmost_is_joined(last: float, pieces: list[str]) -> None:
    scores = {"a": -1.0, "b": -2.0, "c": -3.0, "ab": -9.0, "bc": last}
    assert pieces_of(tokenizer_of(scores), "abc") == pieces


def test_a_piece_may_be_joined_from_a_character_that_is_no_piece() -> None:
    """Byte pieces spell the characters that are left; what spells a control token in text is not that token."""
    scores = {"<unk>": 0.0, "<日本>": 0.0, "日本": 0.0, "a": -1.0, "ab": -2.0, "xyz": -3.0}
    scores |= {f"<0x{byte:02X}>": 0.0 for byte in range(256)}
    kinds = [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL, 1, 1, 1, *[Kind.BYTE] * 256]
    tokenizer = tokenizer_of(scores, [int(kind) for kind in kinds])
    assert pieces_of(tokenizer, "aabb") == ["a", "ab", "<0x62>"]
    assert pieces_of(tokenizer, "xyz") == ["<0x78>", "<0x79>", "<0x7A>"]  # no two of its parts are pieces
    spelt = pieces_of(tokenizer, "日本")
    assert spelt == [f"<0x{byte:02X}>" for byte in "日本".encode()]
    assert tokenizer.encode("日本", add_special=False) == [2]
    assert tokenizer.decode(tokenizer.encode("a日本ab<日本>é", add_special=False)) == "a日本ab<日本>é"


def test_unknown_characters_in_a_row_are_one_unknown_token() -> None:
    tokenizer = tokenizer_of({"<unk>": 0.0, "a": -1.0, "ab": -2.0, "ba": -2.0}, [2, 1, 1, 1])
    assert tokenizer.encode("xya b", add_special=False) == [0, 1, 0]


# --- the library itself, with scores that tie -------------------------------------------------------------------------


def _fields(message: bytes) -> Iterator[tuple[int, int, int]]:
    """(number, start, end) of the fields of a protobuf message; end is that of the value."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind, start = key & 7, at
        if kind == 0:
            _, at = _varint(message, at)
        elif kind == 2:
            length, start = _varint(message, at)
            at = start + length
        else:
            at += {1: 8, 5: 4}[kind]
        yield key >> 3, start, at


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (message[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if message[at - 1] < 128:
            return value, at


def _with_ties(model: bytes, step: int) -> bytes:
    """A model whose scores are rounded to multiples of ``step``: field 1 is a piece, whose field 2 is its score."""
    changed = bytearray(model)
    for number, start, end in _fields(model):
        for inner, first, last in _fields(model[start:end]) if number == 1 else ():
            if inner == 2:
                (score,) = struct.unpack("<f", model[start + first : start + last])
                changed[start + first : start + last] = struct.pack("<f", score // step * step)
    return bytes(changed)


WORDS = [
    "the", "then", "he", "hen", "ten", "nth", "été", "日本", "==", "=", "1", "22", "def", "  ", "x_y", "😀", "aaaa",
]  # fmt: skip


@pytest.fixture(scope="module", params=[3, 40, 10_000])
def tied(request: pytest.FixtureRequest) -> tuple[Any, Tokenizer]:
    """SentencePiece with a vocabulary in which few, many, or all pieces share a score, and ours of the same pieces."""
    draw = random.Random(4)
    lines = [" ".join(draw.choices(WORDS, k=9)) + "".join(draw.choices(WORDS, k=4)) for _ in range(600)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=420, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        split_by_whitespace=False, split_by_unicode_script=False, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    library = sentencepiece.SentencePieceProcessor(model_proto=_with_ties(model.getvalue(), request.param))
    ids = range(library.vocab_size())
    kinds = [
        2 if library.is_unknown(i) else 3 if library.is_control(i) else 6 if library.is_byte(i) else 1 for i in ids
    ]
    scores = {library.id_to_piece(i): library.get_score(i) for i in ids}
    normal = [score for score, kind in zip(scores.values(), kinds, strict=True) if kind == 1]
    assert len(set(normal)) < len(normal)
    return library, tokenizer_of(scores, kinds, prefix=True)


@given(text=st.lists(st.sampled_from([*WORDS, " ", "t", "h", "e", "n", "é", "\n", "語"]), max_size=30).map("".join))
def test_the_library_s_own_ids(tied: tuple[Any, Tokenizer], text: str) -> None:
    library, tokenizer = tied
    ids = library.encode(text)
    assert tokenizer.encode(text, add_special=False, parse_special=False) == ids
    assert tokenizer.decode(ids) == library.decode(ids) == text


def test_a_long_text_of_ties(tied: tuple[Any, Tokenizer]) -> None:
    """Also where no boundary cuts it."""
    library, tokenizer = tied
    for text in ("the then he hen " * 2000, "then" * 5000, "a" * 20_000, "日本" * 5000):
        assert tokenizer.encode(text, add_special=False) == library.encode(text)


def test_pieces_too_long_to_be_cut_are_refused() -> None:
    """Cutting them everywhere would take minutes."""
    with pytest.raises(ModelFormatError, match=r"tokens: found pieces of up to 400000 characters"):
        tokenizer_of({"a": 0.0, "ab" * 200_000: 0.0})
