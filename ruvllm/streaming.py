"""An answer as it is generated: text in whole characters, without the reasoning, cut at stop strings, timed."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from ruvllm.brief import brief
from ruvllm.checkpoint.reasoning import Piece, Separator, Whole, may_begin
from ruvllm.checkpoint.tool_calls import ToolCall, tool_calls
from ruvllm.errors import ContextFullError
from ruvllm.model.generate import Token


@dataclass
class Timings:
    """The times of a generation, in seconds of wall time.

    prompt_seconds is the time to the first token; tokens_per_second counts the tokens after it.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0  # of the prompt, found in the cache
    prompt_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0  # from the first token to the last
    drafted: int = 0  # tokens that were guessed (speculative decoding)
    accepted: int = 0  # of them, those that saved a pass

    @property
    def passes(self) -> int:
        """Passes of the model that the tokens took."""
        return self.tokens - self.accepted

    @property
    def tokens_per_second(self) -> float:
        """Speed of decoding; 0 where fewer than two tokens were made."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds > 0 else 0.0


@dataclass
class Generation:
    """A finished answer.

    text: without the ``reasoning`` before it ("" for a model that does not reason, and for prompts that are not a
    chat). ids: of both, with the tokens that mark them.
    finish_reason: "stop" (end-of-text token or a stop string), "length" (max_tokens or context full), or "cancelled"
        (``Stream.close``, ``Answering.cancel``).
    tool_calls: what the answer calls of the ``tools`` that were given, as messages take them; the text has them, too.
    logprobs: one entry per id, if requested: (log-probability, the most likely alternatives as (id, logprob)).
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    timings: Timings = field(default_factory=Timings)
    logprobs: list[tuple[float, tuple[tuple[int, float], ...]]] | None = None
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    __repr__ = brief

    def __str__(self) -> str:
        return self.text


class Answer:
    """An answer that grows token by token; ``result`` is the Generation so far, ``done`` whether it has ended.

    started: when its prompt was begun, for the timings.
    """

    def __init__(
        self, tokenizer: Any, timings: Timings, stop: tuple[str, ...], separator: Separator | None = None,
        with_tools: bool = False,
    ) -> None:  # fmt: skip
        self.result = Generation(timings=timings)
        self.done, self._with_tools = False, with_tools
        self.started = self._first = time.perf_counter()
        # A SentencePiece text loses its leading space; an answer should, a continuation should not.
        self._decoder = tokenizer.stream_decoder(continuation=separator is None)
        self._ends, self._separator, self._stops = set(tokenizer.eos_ids), separator or Whole(), _Stops(stop)

    def push(self, token: Token) -> Iterator[Piece]:
        """The text that a new token completes."""
        now, result, timings = time.perf_counter(), self.result, self.result.timings
        if not timings.tokens:
            timings.prompt_seconds, self._first = now - self.started, now
        timings.tokens += 1
        timings.seconds = now - self._first
        if token.id in self._ends:
            result.finish_reason, self.done = "stop", True
            return
        result.ids.append(token.id)
        if token.logprob is not None:
            result.logprobs = result.logprobs or []
            result.logprobs.append((token.logprob, token.top_logprobs))
        yield from self._shown(self._separator.push(token.id, self._decoder.push(token.id)))
        self.done = self._stops.reached

    def finish(self, reason: str = "length") -> list[Piece]:
        """No more tokens, for this reason unless it has ended: what the decoder still holds, as ``decode`` shows it."""
        self.done, pieces = True, list[Piece]()
        self.result.finish_reason = self.result.finish_reason or reason
        if not self._stops.reached:
            pieces += self._shown(self._separator.finish(self._decoder.finish()))
        if self._stops.reached:
            self.result.finish_reason = "stop"
        elif rest := self._stops.held:
            self.result.text += rest
            pieces.append(Piece(rest))
        if self._with_tools:
            self.result.tool_calls = tool_calls(self.result.text)
        return pieces

    def _shown(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        for text, reasoning in pieces:
            if reasoning:
                self.result.reasoning += text
                yield Piece(text, reasoning)
            elif ready := self._stops.push(text):
                self.result.text += ready
                yield Piece(ready)
            if self._stops.reached:
                return


class Stream:
    """Iterate over pieces of the answer as they come; ``result`` is the Generation so far.

    ``parts()`` iterates over the reasoning too, where a model thinks before it answers: each is a Piece, with its
    ``text`` and whether it is ``reasoning``. ``close()``, or the end of a ``with`` block, gives the answer up.
    """

    def __init__(self, answer: Answer, tokens: Iterator[Token]) -> None:
        self.result, self._answer = answer.result, answer
        self._parts = _pieces(answer, tokens)
        self._text = (part.text for part in self._parts if not part.reasoning)

    def __iter__(self) -> Iterator[str]:
        return self._text

    def __next__(self) -> str:
        return next(self._text)

    def parts(self) -> Iterator[Piece]:
        """The remaining pieces, including those of the reasoning."""
        return self._parts

    def close(self) -> None:
        """Give the answer up: it keeps the text that it has, and the caches of its own are freed.

        Its ``finish_reason`` is "cancelled". One that has ended already stays as it is.
        """
        self._parts.close()
        if not self.result.finish_reason:
            self._answer.finish("cancelled")

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pieces(answer: Answer, tokens: Iterator[Token]) -> Generator[Piece, None, None]:
    answer.started = time.perf_counter()
    try:
        for token in tokens:
            yield from answer.push(token)
            if answer.done:
                break
    except ContextFullError:
        if not answer.result.timings.tokens:
            raise
    yield from answer.finish()


class _Stops:
    """Strings that end an answer. Text that may be the start of one is ``held``."""

    def __init__(self, strings: tuple[str, ...]) -> None:
        self._strings = strings
        self.held = ""
        self.reached = False

    def push(self, text: str) -> str:
        """The text that is certain to be shown."""
        self.held += text
        cut = min((i for i in map(self.held.find, self._strings) if i >= 0), default=-1)
        self.reached = cut >= 0
        ready = cut if self.reached else len(self.held) - may_begin(self.held, self._strings)
        shown, self.held = self.held[:ready], self.held[ready:]
        return shown
