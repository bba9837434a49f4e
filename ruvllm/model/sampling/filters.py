"""Filters of candidates, each over what the one before has kept. ``K.sample`` has its own of top-k, top-p and min-p."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

import ruvllm.kernels as K
from ruvllm.brief import brief

_FIRST = 1024  # candidates that typical_p sorts before it takes more
_ZIPF_TOKENS = 100  # likeliest tokens from which Mirostat 1 estimates the exponent of Zipf's law


@dataclass(frozen=True)
class Candidates:
    """Tokens that may be drawn: their logits (n,) float32 and ids (n,) int64."""

    logits: np.ndarray
    ids: np.ndarray

    __repr__ = brief

    def keep(self, which: np.ndarray) -> Candidates:
        """Those that a mask or indices say."""
        return Candidates(self.logits[which], self.ids[which])

    @property
    def probabilities(self) -> np.ndarray:
        """Their softmax (n,) float64."""
        wide = self.logits.astype(np.float64)
        weights = np.exp(wide - wide.max())
        return weights / weights.sum()


def candidates(logits: np.ndarray) -> Candidates:
    """All tokens of logits (V,) but those of -inf. Raises ValueError for NaN, +inf, and where there are none."""
    top = logits[K.argmax(logits)]
    if not np.isfinite(top):
        raise ValueError(f"logits: the largest must be finite, found {top}")
    ids = np.flatnonzero(logits > -np.inf)
    return Candidates(logits[ids], ids)


def keep_top_k(found: Candidates, k: int) -> Candidates:
    """The k largest logits, in descending order."""
    if not 0 < k < len(found.ids):
        return found
    values, at = K.top_k(found.logits, k)
    return Candidates(values, found.ids[at])


def keep_typical(found: Candidates, p: float) -> Candidates:
    """The tokens of smallest |-ln p_i - H|, H the entropy, until their probabilities sum to more than p.

    Source: Meister et al. 2023, "Locally Typical Sampling".
    """
    if p >= 1:
        return found
    probability = found.probabilities
    with np.errstate(divide="ignore"):
        surprise = -np.log(probability)
    entropy = np.sum(probability * np.where(probability > 0, surprise, 0.0))
    nearness = (-np.abs(surprise - entropy)).astype(np.float32)
    count = min(_FIRST, len(nearness))
    while True:
        _, order = K.top_k(nearness, count)
        passed = np.flatnonzero(np.cumsum(probability[order]) > p)
        if len(passed) or count == len(nearness):
            return found.keep(order[: passed[0] + 1] if len(passed) else order)
        count = min(8 * count, len(nearness))


def keep_top_p(found: Candidates, p: float) -> Candidates:
    """The fewest likeliest tokens whose probabilities sum to at least p, in descending order."""
    if p >= 1:
        return found
    probability = found.probabilities
    # Tokens of probability < (1 - p) / n sum to less than 1 - p: they are not needed.
    likely = np.flatnonzero(probability >= min((1 - p) / len(probability), probability.max()))
    order = likely[np.argsort(-probability[likely], kind="stable")]
    reached = np.flatnonzero(np.cumsum(probability[order]) >= p)
    return found.keep(order[: reached[0] + 1] if len(reached) else order)


def keep_min_p(found: Candidates, p: float) -> Candidates:
    """The tokens at least p times as likely as the likeliest."""
    return found if p <= 0 else found.keep(found.logits >= found.logits.max() + np.float32(math.log(p)))


def drop_top_choices(found: Candidates, threshold: float) -> Candidates:
    """All tokens but those of probability >= threshold, of which the least likely one stays (XTC)."""
    if threshold > 0.5:  # two tokens cannot both be that likely
        return found
    probability = found.probabilities
    likely = np.flatnonzero(probability >= threshold)
    if len(likely) < 2:
        return found
    least = likely[::-1][np.argmin(probability[likely[::-1]])]  # among equals the last
    dropped = np.zeros(len(probability), bool)
    dropped[likely] = True
    dropped[least] = False
    return found.keep(~dropped)


def keep_surprise(found: Candidates, mu: float) -> Candidates:
    """The tokens of at most mu bits of surprise, at least one (Mirostat 2)."""
    kept = -np.log2(np.maximum(found.probabilities, 1e-300)) <= mu
    if not kept.any():
        kept[np.argmax(found.logits)] = True
    return found.keep(kept)


def keep_zipf(found: Candidates, mu: float, vocab_size: int) -> Candidates:
    """The k likeliest tokens, where a text of surprise mu would by Zipf's law be one of k tokens (Mirostat 1)."""
    n = min(_ZIPF_TOKENS, len(found.ids))
    if n < 2:
        return found
    values, _ = K.top_k(found.logits, n)
    t = np.log(np.arange(2, n + 1) / np.arange(1, n))
    exponent = float(np.sum(t * -np.diff(values.astype(np.float64))) / np.sum(t * t))
    if not exponent > 0:
        return found
    excess = exponent - 1
    # (1 - V^-excess) / excess tends to ln V where Zipf's exponent is 1
    mass = math.log(vocab_size) if abs(excess) < 1e-9 else (1 - vocab_size**-excess) / excess
    log_k = (mu * math.log(2) - math.log(mass)) / exponent
    return keep_top_k(found, max(1, int(math.exp(log_k))) if log_k < math.log(len(found.ids)) else len(found.ids))
