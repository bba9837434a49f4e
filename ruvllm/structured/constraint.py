"""FormConstraint: lets an answer have only the tokens that lead to its form."""

from __future__ import annotations

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
    allowed = np.unpackbits(np.frombuffer(begun.compute_bitmask(), np.uint8), bitorder="little")
    _require_tokens(begun, allowed, vocabulary.eos_tokens, f"{name}: no token of the vocabulary can begin it")
    return matcher


@cache
def _worker() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "ruvllm-mask")


class FormConstraint:
    """Follows an answer token by token; the mask of the next token is computed while the model computes its logits.

    After a token that ends the text, everything may follow.
    """

    def __init__(self, matcher: Any, tokenizer: Tokenizer, vocab_size: int, begins_after: str | None = None) -> None:
        self._matcher, self._tokenizer, self._vocab_size = matcher, tokenizer, vocab_size
        self._awaited = (begins_after or "").encode()
        self._said = b""  # the end of what was said while the beginning is awaited
        self._bits = np.zeros(-(-vocab_size // 32), np.int32)
        self._mask: Future[None] | None = None
        self._ended = False
        self._compute()

    def mask(self, logits: np.ndarray) -> None:
        """Set the logits (V,) of tokens that cannot follow to -inf. Raises ValueError where none can."""
        if self._awaited or self._ended:
            return
        if self._mask is not None:
            self._mask.result()
        allowed = np.unpackbits(self._bits.view(np.uint8), count=self._vocab_size, bitorder="little")
        _require_tokens(
            self._matcher, allowed, self._tokenizer.eos_ids, "no token of the vocabulary can follow in this form"
        )
        np.copyto(logits, -np.inf, where=allowed == 0)

    def advance(self, token_id: int) -> None:
        """Take the token that was chosen."""
        if self._awaited:
            self._said += self._tokenizer.token_bytes(token_id)
            if self._awaited in self._said:
                self._awaited = b""
            self._said = self._said[-len(self._awaited) :]
        elif not self._ended:
            if self._mask is not None:
                self._mask.result()
            if not self._matcher.consume_token(token_id):
                raise ValueError(f"token {token_id} cannot follow in this form{_because(self._matcher)}")
            self._ended = token_id in self._tokenizer.eos_ids
            if not self._ended:
                self._compute()

    def _compute(self) -> None:
        """Begin to compute the mask of the next token; kernels and llguidance both let other threads run."""
        self._mask = _worker().submit(self._fill)  # holds this object, and so the memory that is written to

    def _fill(self) -> None:
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)


def _require_tokens(matcher: Any, allowed: np.ndarray, ends: Sequence[int], message: str) -> None:
    """Raise ValueError if no token can follow: llguidance then allows an end of the text that the form does not."""
    only_ends = np.count_nonzero(allowed) == np.count_nonzero(allowed[list(ends)])
    if matcher.is_error() or (only_ends and not matcher.is_accepting()):
        raise ValueError(message + _because(matcher))


def _because(matcher: Any) -> str:
    said = matcher.get_error() if matcher.is_error() else ""
    return f": {said.splitlines()[0]}" if said else ""
