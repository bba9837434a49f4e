"""The generation loop: prompt ids in, sampled ids out, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

import ruvllm.kernels as K
from ruvllm.brief import brief
from ruvllm.model.kv_cache import KVCache
from ruvllm.model.llama import Llama
from ruvllm.model.sampling.options import Sampling
from ruvllm.model.sampling.sampler import Sampler


@dataclass(frozen=True)
class Token:
    """One generated token: its id, its log-probability and the most likely alternatives, if requested."""

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()

    __repr__ = brief


def generate(
    model: Llama, cache: KVCache, ids: np.ndarray, sampling: Sampling | Sampler, max_tokens: int, logprobs: int = 0
) -> Iterator[Token]:
    """Append ``ids`` to the cache and yield up to ``max_tokens`` tokens after them.

    A yielded token is not yet in the cache: it is computed when the next one is requested, so stopping early
    costs nothing. Log-probabilities are those of the model, before temperature and filters.

    Raises:
        ContextFullError: ids, or the text as it grows, do not fit into the cache.
        ValueError: the logits hold NaN.
    """
    sampler = sampling if isinstance(sampling, Sampler) else Sampler(sampling)
    logits = np.empty(model.config.vocab_size, np.float32)
    pending = ids
    for _ in range(max_tokens):
        model.forward(pending, cache, last_only=True, out=logits)
        token = choose(sampler, logits, cache.ids[: cache.length], logprobs)
        yield token
        pending = np.array([token.id])


def undisturbed(tokens: Iterator[Token], cache: KVCache, most: int) -> Iterator[Token]:
    """Up to ``most`` of the tokens, which are computed in the cache, while nothing else appends or drops there.

    Raises:
        RuntimeError: something else has, since the call or the last token.
    """

    def checked(changes: int) -> Iterator[Token]:
        for _ in range(most):
            if cache.changes != changes:
                raise RuntimeError(
                    "cache: something else has used it since this stream's last token: give each stream a cache of its "
                    "own, such as a fork()"
                )
            token = next(tokens, None)
            if token is None:
                return
            changes = cache.changes
            yield token

    return checked(cache.changes)


def choose(sampler: Sampler, logits: np.ndarray, ids: np.ndarray, logprobs: int) -> Token:
    """The token that a sampler chooses after ids (n,), with what was asked of its log-probabilities."""
    if not logprobs:
        return Token(sampler.choose(logits, ids))
    top, before = K.top_logprobs(logits, logprobs), K.log_softmax(logits)
    chosen = sampler.choose(logits, ids)
    return Token(chosen, float(before[chosen]), tuple(top))
