"""Separates a model's reasoning from its answer, token by token as they are generated.

Two formats are known. Most models (Qwen3, SmolLM3, DeepSeek's, Granite) think first, between ``<think>`` and
``</think>``; some templates write the first tag into the prompt. GPT-OSS writes messages, each in a channel
that its header names: it thinks in "analysis" and answers in "final". Its control tokens differ from the same
characters in an answer, so the ids decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from ruvllm.checkpoint.tokenizer import Tokenizer

_OPEN, _CLOSE = "<think>", "</think>"
_CHANNEL, _MESSAGE, _START, _END = "<|channel|>", "<|message|>", "<|start|>", "<|end|>"
_TAIL = 16  # tokens at the end of a prompt that are searched for an open tag


class Piece(NamedTuple):
    """A piece of a model's answer, or of its reasoning."""

    text: str
    reasoning: bool = False


class Separator(Protocol):
    """Takes each token with the text that it completed, and yields the pieces that are certain by then."""

    @property
    def end_of_reasoning(self) -> str | None:
        """The text, control tokens spelt, after which the answer begins; None: with the first token."""
        ...

    def push(self, token_id: int, text: str) -> Iterator[Piece]: ...

    def finish(self, text: str) -> Iterator[Piece]:
        """The remaining pieces; ``text`` is the decoder's remaining text."""
        ...


def separator(tokenizer: Tokenizer, template: str, prompt: Sequence[int]) -> Separator:
    """The separator for the answer to a chat of these ids, made by ``template``."""
    controls = {text: _control(tokenizer, text) for text in (_CHANNEL, _MESSAGE, _START, _END)}
    if None not in controls.values():
        return _Channels({i: text for text, i in controls.items() if i is not None})
    if _CLOSE in template or len(tokenizer.encode(_OPEN, add_special=False)) == 1:
        opened = _OPEN in template and tokenizer.decode(prompt[-_TAIL:]).rstrip().endswith(_OPEN)
        return _Tags(opened)
    return Whole()


def _control(tokenizer: Tokenizer, text: str) -> int | None:
    ids = tokenizer.encode(text, add_special=False)
    return ids[0] if len(ids) == 1 and ids[0] in tokenizer.special_ids else None


class Whole:
    """No separation: everything is the answer."""

    end_of_reasoning = None

    def push(self, token_id: int, text: str) -> Iterator[Piece]:
        yield Piece(text)

    def finish(self, text: str) -> Iterator[Piece]:
        yield Piece(text)


class _Tags:
    """Reasoning between two tags, before anything else. Line ends at its edges belong to neither."""

    def __init__(self, opened: bool) -> None:
        self.end_of_reasoning = _CLOSE if opened else None
        self._step = self._thinking if opened else self._before
        self._held = ""
        self._begun = False  # whether there was text since the last tag

    def push(self, token_id: int, text: str) -> Iterator[Piece]:
        return self._run(text, last=False)

    def finish(self, text: str) -> Iterator[Piece]:
        return self._run(text, last=True)

    def _run(self, text: str, last: bool) -> Iterator[Piece]:
        self._held += text
        step = None
        while step != self._step:  # until a step leads to no other
            step = self._step
            piece = step(last)
            if piece.text:
                yield piece

    def _before(self, last: bool) -> Piece:
        begun = self._held.lstrip()
        if begun.startswith(_OPEN):
            self._held, self._step = begun.removeprefix(_OPEN), self._thinking
        elif last or not _OPEN.startswith(begun):
            self._begun, self._step = True, self._answer
        return Piece("")

    def _thinking(self, last: bool) -> Piece:
        before, close, after = self._held.partition(_CLOSE)
        before = before if self._begun else before.lstrip("\n")
        certain = len(before) if close or last else len(before) - may_begin(before, (_CLOSE,))
        said = before[:certain].rstrip("\n")
        self._held, self._begun = before[len(said) :], self._begun or said != ""
        if close:
            self._held, self._begun, self._step = after, False, self._answer
        return Piece(said, reasoning=True)

    def _answer(self, last: bool) -> Piece:
        text = self._held if self._begun else self._held.lstrip("\n")
        self._held, self._begun = "", self._begun or text != ""
        return Piece(text)


class _Channels:
    """Messages with headers. A message to a tool is part of the answer, with its header: it is for the caller."""

    end_of_reasoning = f"{_CHANNEL}final{_MESSAGE}"

    def __init__(self, controls: dict[int, str]) -> None:
        self._controls = controls
        self._header: str | None = ""  # None: within a message
        self._marked = False  # whether there was a control token: without any, everything is the answer
        self._reasoning = False
        self._spoken = {True: False, False: False}  # whether there was reasoning, an answer, in an earlier message
        self._gap = ""

    def push(self, token_id: int, text: str) -> Iterator[Piece]:
        control = self._controls.get(token_id)
        text = text.removesuffix(control or "")
        self._marked = self._marked or control is not None
        if self._header is None:
            yield from self._said(text)
        else:
            self._header += text
        if control == _MESSAGE and self._header is not None:
            called = "to=" in self._header
            self._reasoning = not called and self._header.partition(_CHANNEL)[2].split()[:1] == ["analysis"]
            opening = self._header.removeprefix("assistant").lstrip() + _MESSAGE if called else ""
            self._gap = "\n\n" if self._spoken[self._reasoning] else ""
            self._header = None
            yield from self._said(opening)
        elif control in (_START, _END):
            self._header = ""
        elif control is not None and self._header is not None:
            self._header += control

    def finish(self, text: str) -> Iterator[Piece]:
        if self._header is None:
            yield from self._said(text)
        elif not self._marked:
            yield Piece(self._header + text)

    def _said(self, text: str) -> Iterator[Piece]:
        if text:
            text, self._gap = self._gap + text, ""
            self._spoken[self._reasoning] = True
            yield Piece(text, self._reasoning)


def may_begin(text: str, marks: Sequence[str]) -> int:
    """Length of the longest suffix of ``text`` that is a proper prefix of one of ``marks``."""
    longest = max(map(len, marks), default=1) - 1
    for n in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-n:]) for mark in marks):
            return n
    return 0
