"""Perplexity of a text under a model, and how far two models' predictions of it differ, by llama.cpp's protocol."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ruvllm.kernels.check import integers
from ruvllm.model.kv_cache import KVCache
from ruvllm.model.llama import Llama
from ruvllm.model.ranks import Ranks


@dataclass(frozen=True)
class Perplexity:
    """value = e^(mean negative log-likelihood) over ``tokens`` scored tokens; error is one standard error of it."""

    value: float
    error: float
    nll: float  # mean negative log-likelihood of a token, in nats
    tokens: int  # scored
    windows: int
    context: int
    bits_per_byte: float | None  # for the whole text, if its bytes are known

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        per_byte = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        return (
            f"perplexity {self.value:.4f} +/- {self.error:.4f} "
            f"({self.tokens} tokens scored in {self.windows} windows of {self.context}{per_byte})"
        )


@dataclass(frozen=True)
class Divergence:
    """How a model's predictions differ from a baseline's, over ``tokens`` positions of a text.

    kl is the mean of sum_v p(v) log(p(v) / q(v)) in nats, p the baseline's and q the model's probabilities of the next
    token; error is one standard error of it; same_top is the share of positions with the same most
    likely token.
    """

    kl: float
    error: float
    median: float
    largest: float
    same_top: float
    perplexity: Perplexity
    baseline: Perplexity

    @property
    def tokens(self) -> int:
        """Positions compared."""
        return self.perplexity.tokens

    def __float__(self) -> float:
        return self.kl

    def __str__(self) -> str:
        change = 100 * (self.perplexity.value / self.baseline.value - 1)
        return (
            f"KL divergence {self.kl:.3e} +/- {self.error:.1e} (median {self.median:.1e}, largest {self.largest:.2g}), "
            f"same top token {100 * self.same_top:.2f} %\n"
            f"{self.perplexity}\n"
            f"baseline {self.baseline}; difference {change:+.3f} %"
        )


def perplexity(
    model: Llama,
    ids: np.ndarray,
    context: int = 512,
    bos: int | None = None,
    nbytes: int | None = None,
    progress: Callable[[int, int], object] | None = None,
    kv: str = "auto",
    ranks: Ranks | None = None,
) -> Perplexity:
    """Cut ``ids`` into windows of ``context`` tokens and score the second half of each, given the tokens before it.

    Each window starts afresh; with ``bos`` its first token is replaced by that one. Tokens after the last whole
    window are not scored. Position j >= context/2 predicts token j + 1, as in llama.cpp's perplexity tool.
    ``progress(done, windows)`` is called after each window; ``kv`` is the precision of the KV cache. With ``ranks``,
    each of which calls this with a whole model, each scores some of the windows, and all return the same.

    Raises:
        TypeError: ids are not integers.
        ValueError: context < 4 or above the model's, fewer ids than one window, or an unknown ``kv``.
        RankError: another rank failed, or has another text.
    """
    ids = _checked(model, ids, context)
    cache = model.new_cache(context, kv)
    losses: list[np.ndarray] = []
    if ranks is not None:
        ranks.compare({"same text": f"{len(ids)} tokens, checksum {zlib.crc32(ids.tobytes()):08x}"})
    first, step = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    with nullcontext() if ranks is None else ranks.together():
        for window, targets in islice(_windows(ids, context, bos), first, None, step):
            losses.append(_losses(_log_probabilities(model, cache, window), targets))
            if progress:
                progress(min(len(losses) * step, len(ids) // context), len(ids) // context)
    if ranks is not None:
        losses = ranks.interleaved(losses)
    return _perplexity(losses, context, len(ids), nbytes)


def divergence(
    model: Llama,
    baseline: Llama,
    ids: np.ndarray,
    context: int = 512,
    bos: int | None = None,
    nbytes: int | None = None,
    progress: Callable[[int, int], object] | None = None,
    kv: str = "auto",
) -> Divergence:
    """How far ``model``, with a cache of precision ``kv``, is from ``baseline``, with a float32 cache.

    Windows, positions and arguments are those of ``perplexity``.

    Raises:
        TypeError, ValueError: as perplexity does; also where the vocabularies differ in size.
    """
    if model.config.vocab_size != baseline.config.vocab_size:
        sizes = f"{model.config.vocab_size} and {baseline.config.vocab_size}"
        raise ValueError(f"baseline: expected a model of the same vocabulary, found sizes {sizes}")
    ids = _checked(model, ids, context)
    caches = model.new_cache(context, kv), baseline.new_cache(context, "f32")
    losses: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    divergences, same = [], []
    for window, targets in _windows(ids, context, bos):
        q = _log_probabilities(model, caches[0], window)
        p = _log_probabilities(baseline, caches[1], window)
        losses[0].append(_losses(q, targets))
        losses[1].append(_losses(p, targets))
        divergences.append((np.exp(p) * (p - q)).sum(axis=1))
        same.append(p.argmax(axis=1) == q.argmax(axis=1))
        if progress:
            progress(len(same), len(ids) // context)
    each = np.concatenate(divergences)
    return Divergence(
        kl=float(each.mean()),
        error=float(each.std(ddof=1)) / math.sqrt(len(each)) if len(each) > 1 else math.inf,
        median=float(np.median(each)),
        largest=float(each.max()),
        same_top=float(np.concatenate(same).mean()),
        perplexity=_perplexity(losses[0], context, len(ids), nbytes),
        baseline=_perplexity(losses[1], context, len(ids), nbytes),
    )


def _checked(model: Llama, ids: np.ndarray, context: int) -> np.ndarray:
    limit = model.config.max_position_embeddings
    if not isinstance(context, int) or not 4 <= context <= limit:
        raise ValueError(f"context: expected 4 to {limit}, found {context!r}")
    ids = integers("ids", ids)
    if len(ids) < context:
        raise ValueError(f"text: expected at least {context} tokens, one window (context), found {len(ids)}")
    return ids


def _windows(ids: np.ndarray, context: int, bos: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each window's tokens, and the targets of its second half."""
    for start in range(0, len(ids) - context + 1, context):
        window = ids[start : start + context].copy()
        targets = window[context // 2 + 1 :].copy()
        if bos is not None:
            window[0] = bos
        yield window, targets


def _log_probabilities(model: Llama, cache: KVCache, window: np.ndarray) -> np.ndarray:
    """Log-probabilities (positions, V) in float64 that the second half of a window gives to its next tokens."""
    cache.clear()
    logits = model.forward(window, cache)[len(window) // 2 : -1].astype(np.float64)
    top = logits.max(axis=1, keepdims=True)
    return logits - (np.log(np.exp(logits - top).sum(axis=1, keepdims=True)) + top)


def _losses(log_probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return -log_probabilities[np.arange(len(targets)), targets]


def _perplexity(losses: list[np.ndarray], context: int, tokens: int, nbytes: int | None) -> Perplexity:
    nll = np.concatenate(losses)
    mean = float(nll.mean())
    value = math.exp(mean)
    error = value * float(nll.std(ddof=1)) / math.sqrt(len(nll)) if len(nll) > 1 else math.inf
    per_byte = None if nbytes is None else mean / math.log(2) * tokens / nbytes
    return Perplexity(value, error, mean, len(nll), len(losses), context, per_byte)
