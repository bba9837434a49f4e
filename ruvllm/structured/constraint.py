"""FormConstraint: lets an answer have only the tokens that lead to its form."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any

import numpy as np

from ruvllm.checkpoint.tokenizer import Tokenizer
from ruvllm.structured.form import Form, required
from ruvllm.structured.vocabulary import vocabulary_of


def constraint_of(form: Form, tokenizer: Tokenizer, vocab_size: int, begins_after: str | None = None) -> FormConstraint:
    """The constraint of one answer.

    begins_after: text of the answer, such as the end of reasoning, up to which everything may be said.

    Raises:
        ValueError: the form cannot be compiled, or no token of the vocabulary can begin it.
        ImportError: llguidance is not installed.
    """
    vocabulary = vocabulary_of(tokenizer, vocab_size)
    matcher = _matcher(vocabulary, form.compiled(), str(form.name)).deep_copy()
    return FormConstraint(matcher, tokenizer, vocab_size, begins_after)


@lru_cache(maxsize=32)
def _matcher(vocabulary: Any, grammar: str, name: str) -> Any:
    """A matcher at its beginning, which each answer copies."""
    llguidance = required()
    said = llguidance.LLMatcher.validate_grammar(grammar, vocabulary)
    if said and not said.startswith("WARNING"):
        raise ValueError(f"{name}: cannot be compiled: {said}")
    matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0)
    begun = matcher.deep_copy()
    allowed = np.frombuffer(begun.compute_bitmask(), np.uint32)
    _require_tokens(begun, allowed, vocabulary.eos_tokens, f"{name}: no token of the vocabulary can begin it")
    return matcher


_LONG = 3e-4  # seconds of a mask: handing it to a thread takes a tenth of that
# (256, 8): for each byte of a mask the most that the logits of its tokens can be.
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_LIMITS = np.where(_BITS, np.float32(np.inf), np.float32(-np.inf))


@cache
def _worker() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "ruvllm-mask")


class FormConstraint:
    """Follows an answer token by token.

    A mask that takes long is computed while the model computes its logits. Most are computed at once: to hand one to
    another thread takes as long, and where the model uses all processors, it waits for that thread.

    After a token that ends the text, everything may follow.
    """

    def __init__(self, matcher: Any, tokenizer: Tokenizer, vocab_size: int, begins_after: str | None = None) -> None:
        self._matcher, self._tokenizer, self._vocab_size = matcher, tokenizer, vocab_size
        self._awaited = (begins_after or "").encode()
        self._said = b""  # the end of what was said while the beginning is awaited
        self._bits = np.zeros(-(-vocab_size // 32), np.uint32)
        self._limits = np.empty((self._bits.nbytes, 8), np.float32)
        self._mask: Future[None] | None = None
        self._seconds = 0.0  # that the last mask took
        self._ended = False
        self._compute()

    def mask(self, logits: np.ndarray) -> None:
        """Set the logits (V,) of tokens that cannot follow to -inf. Raises ValueError where none can."""
        if self._awaited or self._ended:
            return
        self._wait()
        _require_tokens(
            self._matcher, self._bits, self._tokenizer.eos_ids, "no token of the vocabulary can follow in this form"
        )
        _LIMITS.take(self._bits.view(np.uint8), axis=0, out=self._limits, mode="clip")
        np.minimum(logits, self._limits.ravel()[: self._vocab_size], out=logits)

    def advance(self, token_id: int) -> None:
        """Take the token that was chosen."""
        if self._awaited:
            self._said += self._tokenizer.token_bytes(token_id)
            if self._awaited in self._said:
                self._awaited = b""
            self._said = self._said[-len(self._awaited) :]
        elif not self._ended:
            self._wait()
            if not self._matcher.consume_token(token_id):
                raise ValueError(f"token {token_id} cannot follow in this form{_because(self._matcher)}")
            self._ended = token_id in self._tokenizer.eos_ids
            if not self._ended:
                self._compute()

    def _compute(self) -> None:
        """Compute the mask of the next token, or begin to; kernels and llguidance both let other threads run."""
        if self._seconds < _LONG:
            self._fill()
        else:
            self._mask = _worker().submit(self._fill)  # holds this object, and so the memory that is written to

    def _fill(self) -> None:
        started = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._seconds = time.thread_time() - started

    def _wait(self) -> None:
        if self._mask is not None:
            self._mask.result()
            self._mask = None


def _require_tokens(matcher: Any, bits: np.ndarray, ends: Sequence[int], message: str) -> None:
    """Raise ValueError if no token can follow: llguidance then allows an end of the text that the form does not."""
    only_ends = np.bitwise_count(bits).sum() == sum(int(bits[i // 32]) >> i % 32 & 1 for i in ends)
    if matcher.is_error() or (only_ends and not matcher.is_accepting()):
        raise ValueError(message + _because(matcher))


def _because(matcher: Any) -> str:
    said = matcher.get_error() if matcher.is_error() else ""
    return f": {said.splitlines()[0]}" if said else ""
