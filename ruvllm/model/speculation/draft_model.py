"""DraftModel: guesses what a smaller model would say."""

from __future__ import annotations

import time

import numpy as np

import ruvllm.kernels as K
from ruvllm.model.kv_cache import KVCache
from ruvllm.model.llama import Llama


class DraftModel:
    """Lets a smaller model of the same vocabulary go on with its likeliest tokens.

    The level of a guess is the number of guesses before it. Its KV cache follows the text: what turned out wrong is
    dropped, and what the large model said instead is computed with the next guess.
    """

    expected = 0.6, 0.6

    def __init__(self, model: Llama, vocab_size: int, max_tokens: int) -> None:
        self._model, self._vocab_size = model, vocab_size  # the large model's: the small one may be padded differently
        self._cache: KVCache = model.new_cache(min(max_tokens, model.config.max_position_embeddings))
        self._ids = np.empty(0, np.int64)
        self.guess_seconds = 0.0  # seconds of one guess, as measured

    def levels(self, ids: np.ndarray, most: int) -> list[int]:
        """The levels of up to ``most`` guesses after ids (n,)."""
        self._ids = ids
        if ids.max() >= self._model.config.vocab_size:
            return []
        return list(range(min(most, self._cache.max_tokens - len(ids))))

    def guesses(self, count: int) -> list[int]:
        """The first ``count`` guesses after the ids of the last call of ``levels``."""
        started = time.perf_counter()
        held = self._cache.keep_common_prefix(self._ids, self._model.filling)
        new = self._ids[held:]
        found: list[int] = []
        for _ in range(count):
            guess = K.argmax(self._model.forward(new, self._cache, last_only=True))
            if guess >= self._vocab_size:
                break
            found.append(guess)
            new = np.array([guess])
        seconds = (time.perf_counter() - started) / max(1, count)
        if len(self._ids) - held <= count + 2:  # not the whole prompt
            self.guess_seconds += 0.2 * (seconds - self.guess_seconds) if self.guess_seconds else seconds
        return found
