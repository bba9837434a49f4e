"""Sequences of an engine: texts to continue, to score, or to read only."""

from __future__ import annotations

from typing import Any

import numpy as np

import ruvllm.kernels as K
from ruvllm.batching.prefixes import Path
from ruvllm.model.generate import Token, choose
from ruvllm.model.sampling.sampler import Sampler


class Sequence:
    """A text of one engine: tokens, how many of them are computed, and the blocks that hold their keys and values.

    Args:
        ids: (T,) token ids to compute.
        capacity: the most tokens that it may have.
    """

    kept = True  # whether what its blocks hold may serve others
    what = "the prompt"  # in messages

    def __init__(self, ids: np.ndarray, capacity: int) -> None:
        self.capacity = max(capacity, len(ids))
        self.length = self.prompt_tokens = len(ids)
        self._ids = np.array(ids, np.int64)
        self.computed = 0
        self.reused_tokens = 0  # of the prompt, found in blocks of others
        self.done = False
        self.error: Exception | None = None  # why it ended before its time
        self.key: Any = None  # with what its blocks are comparable
        self.path = Path([])
        self.shares = True  # whether others may find its new blocks

    @property
    def ids(self) -> np.ndarray:
        """All its tokens, (length,)."""
        return self._ids[: self.length]

    @property
    def pending(self) -> int:
        """Tokens that are still to be computed."""
        return self.length - self.computed

    @property
    def wanted_from(self) -> int:
        """The first position whose logits it needs."""
        return self.length

    @property
    def reusable(self) -> int:
        """Of how many tokens another sequence's keys and values serve; the others must be computed."""
        return min(self.wanted_from, self.length - 1)

    def take(self, logits: np.ndarray) -> Token | None:
        """After a pass: the logits (n, V) of its next positions from ``wanted_from`` on."""
        return None


class Generated(Sequence):
    """A text that is continued by up to ``max_tokens`` tokens, as ``model.generate`` continues it."""

    def __init__(
        self, ids: np.ndarray, sampler: Sampler, max_tokens: int, capacity: int, logprobs: int = 0
    ) -> None:  # fmt: skip
        super().__init__(ids, capacity)
        self.sampler, self.max_tokens, self.logprobs = sampler, max_tokens, logprobs

    @property
    def wanted_from(self) -> int:
        """The last token's position."""
        return self.length - 1

    def take(self, logits: np.ndarray) -> Token | None:
        """Choose the next token."""
        if not len(logits):
            return None
        token = choose(self.sampler, logits[-1], self.ids, self.logprobs)
        made = self.length + 1 - self.prompt_tokens
        # The last token need not be computed, so a text may become one token longer than its capacity.
        self.done = made >= self.max_tokens or self.length >= self.capacity
        if self.length == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros(max(64, self.length), np.int64)])
        self._ids[self.length] = token.id
        self.length += 1
        return token


class Scored(Sequence):
    """A text whose tokens from ``start`` on are scored: ``logprobs`` (n,) of each after those before it.

    greedy: whether each of them is the most likely one.
    """

    what = "the prompt with its continuation, without the last token,"

    def __init__(self, ids: np.ndarray, start: int) -> None:
        super().__init__(ids[:-1], len(ids) - 1)
        self._targets = np.asarray(ids, np.int64)[start:]
        self._first = start - 1
        self.logprobs = np.empty(0, np.float32)
        self.greedy = True

    @property
    def wanted_from(self) -> int:
        """The position before the next target."""
        return self._first + len(self.logprobs)

    def take(self, logits: np.ndarray) -> Token | None:
        """Score the next targets."""
        if len(logits):
            targets = self._targets[len(self.logprobs) : len(self.logprobs) + len(logits)]
            self.greedy = self.greedy and bool((logits.argmax(axis=1) == targets).all())
            found = K.log_softmax(logits)[np.arange(len(targets)), targets]
            self.logprobs = np.concatenate([self.logprobs, found])
        self.done = len(self.logprobs) == len(self._targets)
        return None


class Embedded(Sequence):
    """A text whose hidden states are pooled: their mean, or the last one."""

    kept = False  # texts seldom begin alike, and would displace the prefixes of prompts
    what = "the text"

    def __init__(self, ids: np.ndarray, pooling: str) -> None:
        super().__init__(ids, len(ids))
        self.pooling = pooling
        self._sum = np.empty(0)  # float64 (E,)

    def read(self, states: np.ndarray) -> None:
        """The hidden states (n, E) of its next n tokens."""
        if self.pooling == "last":
            self._sum = states[-1].astype(np.float64)
            return
        # Row by row, so that the sum does not depend on how passes divide a text. It may be computed a second time.
        before = self._sum if self.computed else np.zeros(states.shape[1])
        self._sum = np.concatenate([before[None], states]).sum(axis=0)

    @property
    def pooled(self) -> np.ndarray:
        """(E,) float32, once all is computed."""
        return (self._sum / (self.length if self.pooling == "mean" else 1)).astype(np.float32)

    @property
    def reusable(self) -> int:
        """None of its tokens: all are to be read."""
        return 0

    def take(self, logits: np.ndarray) -> Token | None:
        """Nothing more is needed once all is computed."""
        self.done = not self.pending
        return None
