"""The generation loop with guesses: the tokens are those of ``generate``, in fewer passes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from ruvllm.model.generate import Token, choose
from ruvllm.model.hooks import active
from ruvllm.model.kv_cache import KVCache
from ruvllm.model.llama import Llama
from ruvllm.model.sampling.sampler import Sampler
from ruvllm.model.speculation.costs import Acceptance, PassCosts, best_length

MOST = 15  # guesses in one pass


class Drafter(Protocol):
    """Guesses the next tokens of one text."""

    expected: tuple[float, float]  # chances of guesses of the lowest and the highest level, before any is tried
    guess_seconds: float  # what one guess takes

    def levels(self, ids: np.ndarray, most: int) -> list[int]:
        """How sure it is of each of its guesses after ids (n,), at most ``most``; none if it has no guess."""
        ...

    def guesses(self, count: int) -> list[int]:
        """The first ``count`` of them."""
        ...


class Counts(Protocol):
    """Where it is counted how many guesses there were, and how many were right."""

    drafted: int
    accepted: int


class Speculation:
    """What speculation in one answer needs: who guesses, what passes cost, and where it is counted."""

    def __init__(self, drafter: Drafter, costs: PassCosts, counts: Counts) -> None:
        self.drafter, self.costs, self.counts = drafter, costs, counts
        self.acceptance = Acceptance(*drafter.expected)

    def guesses(self, ids: np.ndarray, most: int) -> tuple[list[int], list[int]]:
        """Guesses after ids (n,), as many as are worth it and at most ``most``, and their levels."""
        self.acceptance.fade()
        levels = self.drafter.levels(ids, most) if most > 0 else []
        if not levels:
            return [], []
        count = best_length(levels, self.acceptance, self.costs, self.drafter.guess_seconds)
        found = self.drafter.guesses(count) if count else []
        self.counts.drafted += len(found)
        return found, levels[: len(found)]


def speculate(
    model: Llama, cache: KVCache, ids: np.ndarray, sampler: Sampler, max_tokens: int, logprobs: int,
    speculation: Speculation,
) -> Iterator[Token]:  # fmt: skip
    """``generate``, with guesses that one pass checks.

    Each token is chosen from the model's logits after the tokens before it, by the same sampler with the same random
    numbers as without guesses: a guess that was chosen too saves a pass, and the first that was not ends the pass. So
    the text is the same, at any temperature. As there, a yielded token is not yet in the cache, which nothing else may
    use meanwhile: see ``undisturbed``.

    Raises:
        ContextFullError: ids, or the text as it grows, do not fit into the cache.
        ValueError: the logits hold NaN; the thread is recording what the model computes.
    """
    hooks = active(model)
    if hooks is not None and hooks.records:
        raise ValueError("draft: rejected tokens would be recorded too: generate without it inside of a trace")
    rows = np.empty((1 + MOST, model.config.vocab_size), np.float32)
    pending, guesses, levels = ids, list[int](), list[int]()
    made = 0
    while made < max_tokens:
        started = time.perf_counter()
        count = 1 + len(guesses)
        model.forward(pending, cache, last_only=count == 1, out=rows[:count] if guesses else rows[0])
        if made:
            speculation.costs.measured(count, time.perf_counter() - started)
        length = cache.length - len(guesses)
        cache.truncate(length)
        for i in range(count):
            if i:
                cache.restore(length + i)
                speculation.counts.accepted += 1
            token = choose(sampler, rows[i], cache.ids[: length + i], logprobs)
            made += 1
            right = i < len(guesses) and token.id == guesses[i]
            if guesses and not right:
                speculation.acceptance.learn(levels, i)
            yield token
            if not right:
                break
        text = np.append(cache.ids[: cache.length], token.id)
        guesses, levels = speculation.guesses(text, min(MOST, max_tokens - made - 1, cache.free_positions - 1))
        pending = np.array([token.id, *guesses])
