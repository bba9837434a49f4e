"""A model's tokens as llguidance takes them, made once for each tokenizer."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary

from ruvllm.checkpoint.tokenizer import Tokenizer
from ruvllm.structured.form import required

_made: WeakKeyDictionary[Tokenizer, dict[int, Any]] = WeakKeyDictionary()
_BEFORE = "\x02"  # a character that no token joins with others
_LONGEST_PREFIX = 3  # tokens before the text: a space, and those of _BEFORE
_LONGEST_TOKEN = 64  # bytes
_lock = threading.Lock()


def vocabulary_of(tokenizer: Tokenizer, vocab_size: int) -> Any:
    """llguidance's LLTokenizer, for logits of ``vocab_size`` tokens. Takes about a second, the first time.

    Raises:
        ValueError: the tokenizer has no text, or no token that ends one.
        ImportError: llguidance is not installed.
    """
    llguidance = required()
    if tokenizer.missing is not None:
        raise ValueError(tokenizer.missing)
    if not tokenizer.eos_ids:
        raise ValueError("answers of a given form need a token that ends a text, and this vocabulary has none")
    with _lock:
        made = _made.setdefault(tokenizer, {})
        if vocab_size not in made:
            wrapper = llguidance.TokenizerWrapper(_Tokens(tokenizer))
            made[vocab_size] = llguidance.LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=list(tokenizer.eos_ids))
        return made[vocab_size]


class _Tokens:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = tokenizer.eos_ids[0]
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self._encode = tokenizer.encode
        self._special = tokenizer.special_ids
        self._ids: dict[bytes, int] = {}

    def __call__(self, text: str) -> list[int]:
        """The ids of a text in the middle of an answer: without the space that some vocabularies put before a text."""
        wanted = text.encode()
        for before in ("", _BEFORE):
            ids: list[int] = self._encode(before + text, add_special=False, parse_special=False)
            for first in range(min(len(ids), _LONGEST_PREFIX) + 1):
                if b"".join(self.tokens[i] for i in ids[first:]) == wanted:
                    return ids[first:]
        return self._longest_first(wanted)

    def _longest_first(self, wanted: bytes) -> list[int]:
        """The longest tokens from left to right, up to the first byte that no token begins with."""
        if not self._ids:
            self._ids = {spelt: i for i, spelt in enumerate(self.tokens) if i not in self._special}
        found, at = list[int](), 0
        while at < len(wanted):
            lengths = range(min(_LONGEST_TOKEN, len(wanted) - at), 0, -1)
            length = next((n for n in lengths if wanted[at : at + n] in self._ids), 0)
            if not length:
                break
            found.append(self._ids[wanted[at : at + length]])
            at += length
        return found
