"""An answer as it is made: its text in whole characters, cut at stop strings, with what it took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ruvllm._brief import brief
from ruvllm.errors import ContextFullError
from ruvllm.model.generate import Token


@dataclass
class Timings:
    """What a generation took, in seconds of wall time.

    prompt_seconds is the time to the first token; tokens_per_second counts the tokens after it.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0  # of the prompt, found in the cache
    prompt_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0  # from the first token to the last

    @property
    def tokens_per_second(self) -> float:
        """Speed of decoding; 0 where fewer than two tokens were made."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds > 0 else 0.0


@dataclass
class Generation:
    """A finished answer.

    finish_reason: "stop" (end-of-text token or a stop string) or "length" (max_tokens or context full).
    logprobs: one entry per id, when asked for: (log-probability, the likeliest alternatives as (id, logprob)).
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    timings: Timings = field(default_factory=Timings)
    logprobs: list[tuple[float, tuple[tuple[int, float], ...]]] | None = None

    __repr__ = brief

    def __str__(self) -> str:
        return self.text


class Stream:
    """Iterate over pieces of the answer as they come; ``result`` is the Generation so far."""

    def __init__(
        self, tokenizer: Any, timings: Timings, tokens: Iterator[Token], stop: tuple[str, ...], continuation: bool
    ) -> None:
        self.result = Generation(timings=timings)
        self._pieces = self._run(tokenizer, tokens, stop, continuation)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def _run(self, tokenizer: Any, tokens: Iterator[Token], stop: tuple[str, ...], continuation: bool) -> Iterator[str]:
        result, timings = self.result, self.result.timings
        decoder = tokenizer.stream_decoder(continuation=continuation)
        ends = set(tokenizer.eos_ids)
        held = ""  # decoded text that may turn out to begin a stop string
        started = time.perf_counter()
        first = started
        result.finish_reason = "length"
        ended = False  # no more text: what the decoder still holds is shown, as `decode` shows it
        try:
            for token in tokens:
                now = time.perf_counter()
                if not timings.tokens:
                    timings.prompt_seconds, first = now - started, now
                timings.tokens += 1
                timings.seconds = now - first
                if token.id in ends:
                    result.finish_reason, ended = "stop", True
                    break
                result.ids.append(token.id)
                if token.logprob is not None:
                    result.logprobs = result.logprobs or []
                    result.logprobs.append((token.logprob, token.top_logprobs))
                held += decoder.push(token.id)
                cut = _first_stop(held, stop)
                if cut >= 0:
                    result.finish_reason = "stop"
                    held = held[:cut]
                    break
                ready = len(held) - _may_begin_stop(held, stop)
                if ready:
                    piece, held = held[:ready], held[ready:]
                    result.text += piece
                    yield piece
            else:
                ended = True
        except ContextFullError:
            if not timings.tokens:
                raise
            ended = True
        if ended:
            held += decoder.finish()
            cut = _first_stop(held, stop)
            if cut >= 0:
                result.finish_reason, held = "stop", held[:cut]
        if held:
            result.text += held
            yield held


def _first_stop(text: str, stop: tuple[str, ...]) -> int:
    """Where the first stop string begins in ``text``, or -1."""
    return min((i for i in map(text.find, stop) if i >= 0), default=-1)


def _may_begin_stop(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of ``text`` that is the beginning of a stop string."""
    longest = max((len(s) for s in stop), default=1) - 1
    for n in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-n:]) for s in stop):
            return n
    return 0
