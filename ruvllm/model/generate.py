"""The generation loop: prompt ids in, sampled ids out, one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

import ruvllm.kernels as K
from ruvllm.brief import brief
from ruvllm.model.checks import is_integer, is_number, require
from ruvllm.model.kv_cache import KVCache
from ruvllm.model.llama import Llama


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature: 0 takes the most likely token; higher is more varied.
    top_k: keep the k most likely tokens (0: all). top_p: keep the smallest set whose probabilities reach p.
    min_p: drop tokens less likely than min_p times the most likely one.
    repetition_penalty: > 1 makes tokens that already occurred less likely (1: off).
    seed: of the random numbers; None draws a fresh one.

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = 0

    def __post_init__(self) -> None:
        t, penalty, seed = self.temperature, self.repetition_penalty, self.seed
        require("temperature", t, is_number(t) and 0 <= t < math.inf, "a finite number >= 0")
        require("top_k", self.top_k, is_integer(self.top_k) and self.top_k >= 0, "an integer >= 0")
        require("top_p", self.top_p, is_number(self.top_p) and 0 < self.top_p <= 1, "a number above 0 and at most 1")
        require("min_p", self.min_p, is_number(self.min_p) and 0 <= self.min_p <= 1, "a number from 0 to 1")
        ok = is_number(penalty) and 0 < penalty < math.inf
        require("repetition_penalty", penalty, ok, "a finite number above 0")
        require("seed", seed, seed is None or (is_integer(seed) and seed >= 0), "an integer >= 0 or None")


@dataclass(frozen=True)
class Token:
    """One generated token: its id, its log-probability and the most likely alternatives, if requested."""

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()

    __repr__ = brief


def generate(
    model: Llama, cache: KVCache, ids: np.ndarray, sampling: Sampling, max_tokens: int, logprobs: int = 0
) -> Iterator[Token]:
    """Append ``ids`` to the cache and yield up to ``max_tokens`` tokens after them.

    A yielded token is not yet in the cache: it is computed when the next one is requested, so stopping early
    costs nothing. Log-probabilities are those of the model, before temperature and filters.

    Raises:
        ContextFullError: ids, or the text as it grows, do not fit into the cache.
        ValueError: the logits hold NaN.
    """
    random = np.random.default_rng(sampling.seed)
    logits = np.empty(model.config.vocab_size, np.float32)
    pending = ids
    for _ in range(max_tokens):
        model.forward(pending, cache, last_only=True, out=logits)
        top = K.top_logprobs(logits, logprobs) if logprobs else []
        before = K.log_softmax(logits) if logprobs else None
        if sampling.repetition_penalty != 1.0:
            K.apply_repetition_penalty(logits, cache.ids[: cache.length], sampling.repetition_penalty)
        chosen = K.sample(
            logits, random.random(), temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p,
            min_p=sampling.min_p,
        )  # fmt: skip
        yield Token(chosen, None if before is None else float(before[chosen]), tuple(top))
        pending = np.array([chosen])
