"""Answers of a given form: whatever the logits, the text has the form; what cannot be compiled or followed is said."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from pydantic import BaseModel, Field

from ruvllm.checkpoint.tokenizer import Kind, Tokenizer, load_tokenizer
from ruvllm.llm import LLM
from ruvllm.structured.constraint import FormConstraint, constraint_of
from ruvllm.structured.form import Form


class Metadata:
    """As much of a GGUF file as a tokenizer needs."""

    path = "model.gguf"

    def __init__(self, metadata: dict[str, Any]) -> None:
        self.metadata = metadata


def spm_tokenizer() -> Tokenizer:
    """A SentencePiece vocabulary: bytes, some pieces with leading spaces, and a few that hold several JSON tokens."""
    pieces = ["▁", "▁a", "▁the", "name", '▁"', '{"', '":', '▁{"', '",▁"', "é", "日本", "12", "▁1"]
    values: dict[str, Any] = {
        "model": "llama", "tokens": ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces],
        "scores": [0.0] * (259 + len(pieces)), "bos_token_id": 1, "eos_token_id": 2,
        "token_type": [Kind.UNKNOWN, *[Kind.CONTROL] * 2, *[Kind.BYTE] * 256, *[Kind.NORMAL] * len(pieces)],
    }  # fmt: skip
    return load_tokenizer(Metadata({f"tokenizer.ggml.{key}": value for key, value in values.items()}))


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, llm: LLM) -> Tokenizer:
    return llm.tokenizer if request.param == "bytes" else spm_tokenizer()


def walk(constraint: FormConstraint, tokenizer: Tokenizer, vocab_size: int, seed: int) -> str:
    """The text of an answer of random tokens among those that the constraint lets through."""
    rng, ids = np.random.default_rng(seed), list[int]()
    while not ids or ids[-1] not in tokenizer.eos_ids:
        assert len(ids) < 400
        logits = rng.standard_normal(vocab_size).astype(np.float32)
        constraint.mask(logits)
        ids.append(int(logits.argmax()))
        constraint.advance(ids[-1])
    return tokenizer.decode(ids[:-1], continuation=True)


class Person(BaseModel):
    name: str = Field(max_length=5)
    age: int = Field(ge=0, le=120)
    kind: Literal["cat", "日本"]
    tags: list[str] = Field(max_length=1)


SCHEMA = {
    "type": "object", "properties": {"a": {"enum": [1, None, "é"]}, "b": {"type": "boolean"}}, "required": ["a", "b"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_json_follows_its_schema(tokenizer: Tokenizer, seed: int) -> None:
    size = tokenizer.vocab_size + 3  # rows of the head without a token
    text = walk(constraint_of(Form(schema=Person), tokenizer, size), tokenizer, size, seed)
    Person.model_validate_json(text)
    for schema in (SCHEMA, json.dumps(SCHEMA)):
        found = json.loads(walk(constraint_of(Form(schema=schema), tokenizer, size), tokenizer, size, seed))
        assert found.keys() == {"a", "b"} and found["a"] in (1, None, "é") and isinstance(found["b"], bool)
    assert Form(schema=True).compiled() == Form(schema={}).compiled()  # everything follows it


def test_masks_that_take_long_are_the_same(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    size = tokenizer.vocab_size
    expected = walk(constraint_of(Form(schema=Person), tokenizer, size), tokenizer, size, 0)
    monkeypatch.setattr("ruvllm.structured.constraint._LONG", 0.0)  # another thread computes them
    assert walk(constraint_of(Form(schema=Person), tokenizer, size), tokenizer, size, 0) == expected


@pytest.mark.parametrize("seed", range(3))
def test_other_forms(tokenizer: Tokenizer, seed: int) -> None:
    size = tokenizer.vocab_size
    for pattern in (r"\d{4}-\d\d-\d\d", "[ab]{3,7}(é|日本)?", " a/b"):
        text = walk(constraint_of(Form(regex=pattern), tokenizer, size), tokenizer, size, seed)
        assert re.fullmatch(pattern, text, re.ASCII), (pattern, text)
    choices = ['say "yes"', "no\n", "é", "none"]
    assert walk(constraint_of(Form(choices=choices), tokenizer, size), tokenizer, size, seed) in choices
    for grammar in (
        'root ::= "a" [0-9] pair\npair ::= "x" | "(" pair ")"',
        'start: "a" /[0-9]/ pair\npair: "x" | "(" pair ")"',
    ):
        text = walk(constraint_of(Form(grammar=grammar), tokenizer, size), tokenizer, size, seed)
        assert re.fullmatch(r"a[0-9]\(*x\)*", text) and text.count("(") == text.count(")")


def test_what_comes_before_the_answer_is_free(tokenizer: Tokenizer) -> None:
    constraint = constraint_of(Form(choices=["yes"]), tokenizer, tokenizer.vocab_size, "</think>")
    for token in tokenizer.encode("Hm, </thin k></think>", add_special=False):
        logits = np.zeros(tokenizer.vocab_size, np.float32)
        constraint.mask(logits)
        assert not logits.any()
        constraint.advance(token)
    assert walk(constraint, tokenizer, tokenizer.vocab_size, 0) == "yes"


def test_answers_of_a_model(llm: LLM) -> None:
    """The likeliest of the tokens that can follow, with and without guesses; and the others are forbidden."""
    for options in ({}, {"temperature": 1.0, "seed": 2}):
        for form in ({"choices": ["abcabcabcabd", "abcabcabcabe"]}, {"regex": "(ab|cd){20}"}, {"schema": SCHEMA}):
            answer = llm.generate("abcabcabc", max_tokens=100, **form, **options)
            assert answer.finish_reason == "stop" and answer.text
            guessed = llm.generate("abcabcabc", max_tokens=100, draft="lookup", **form, **options)
            assert guessed.ids == answer.ids
            assert llm.chat([{"role": "user", "content": "x"}], max_tokens=100, **form).finish_reason == "stop"
    answer = llm.generate("x", choices=["ab", "ac"], logit_bias={ord("b"): -100.0, ord("c"): -90.0})
    assert answer.text == "ac"
    first, second = llm.generate("x", max_tokens=2).ids
    answer = llm.generate("x", grammar=f'root ::= "{chr(33 + first % 90)}" | "{chr(33 + second % 90)}"')
    assert answer.text in (chr(33 + first % 90), chr(33 + second % 90))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"schema": {"type": "objec"}}, "schema: cannot be compiled: Invalid type: objec"),
        ({"schema": "{"}, "schema: expected JSON, found '{'"),
        ({"schema": 5}, "schema: expected a dict, JSON or a pydantic model, found int"),
        ({"schema": False}, "schema: no answer follows the schema false"),
        ({"schema": "false"}, "schema: no answer follows the schema false"),
        ({"schema": {"a": {1, 2}}}, "schema: cannot be written as JSON"),
        ({"regex": "a("}, r"regex: cannot be compiled: (?s:.)*unclosed group"),
        ({"regex": 5}, "regex: expected text, found int"),
        ({"grammar": "start: foo"}, r'grammar: cannot be compiled: (?s:.)*unknown name: "foo"'),
        ({"grammar": 'root ::= "a" ('}, "grammar: cannot be compiled: "),
        ({"choices": []}, r"choices: expected a list of non-empty strings, found \[\]"),
        ({"choices": "ab"}, "choices: expected a list of non-empty strings, found 'ab'"),
        ({"choices": ["a"], "regex": "a"}, "choices: an answer has one form, and regex is given"),
    ],
)
def test_forms_that_cannot_be(llm: LLM, form: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        llm.stream("ab", **form)


def test_vocabularies_that_cannot_follow(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = spm_tokenizer()
    endless.eos_ids = ()
    with pytest.raises(ValueError, match="need a token that ends a text, and this vocabulary has none$"):
        constraint_of(Form(choices=["a"]), endless, endless.vocab_size)
    few = load_tokenizer(
        Metadata({
            "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a", "b"],
            "tokenizer.ggml.scores": [0.0] * 5, "tokenizer.ggml.token_type": [2, 3, 3, 1, 1],
            "tokenizer.ggml.eos_token_id": 2,
        })
    )  # fmt: skip
    with pytest.raises(ValueError, match="^choices: no token of the vocabulary can begin it"):
        constraint_of(Form(choices=["xyz"]), few, 5)
    constraint = constraint_of(Form(choices=["ax"]), few, 5)
    constraint.mask(np.zeros(5, np.float32))
    constraint.advance(3)
    with pytest.raises(ValueError, match="^no token of the vocabulary can follow in this form"):
        constraint.mask(np.zeros(5, np.float32))
    constraint = constraint_of(Form(choices=["a"]), few, 5)
    with pytest.raises(ValueError, match="^token 4 cannot follow in this form"):
        constraint.advance(4)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"need llguidance: pip install 'ruvllm\[structured\]'$"):
        llm.stream("ab", choices=["a"])


def test_an_answer_that_is_given_up_leaves_its_mask_alone(llm: LLM, tmp_path: Path) -> None:
    """The mask of the token that never comes is still being computed when the answer is dropped."""
    for _ in range(50):
        next(iter(llm.stream("ab", regex="[a-z]{5,}", max_tokens=3)))
