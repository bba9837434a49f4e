"""Perplexity of a text under a model, by llama.cpp's protocol, so that figures can be compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ruvllm.kernels._check import integers
from ruvllm.model.llama import Llama


@dataclass(frozen=True)
class Perplexity:
    """value = e^(mean negative log-likelihood) over ``tokens`` scored tokens; error is one standard error of it."""

    value: float
    error: float
    nll: float  # mean negative log-likelihood of a token, in nats
    tokens: int  # scored
    windows: int
    context: int
    bits_per_byte: float | None  # of the whole text, if its bytes are known

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        per_byte = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        return (
            f"perplexity {self.value:.4f} +/- {self.error:.4f} "
            f"({self.tokens} tokens scored in {self.windows} windows of {self.context}{per_byte})"
        )


def perplexity(
    model: Llama,
    ids: np.ndarray,
    context: int = 512,
    bos: int | None = None,
    nbytes: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Perplexity:
    """Cut ``ids`` into windows of ``context`` tokens and score the second half of each, given what precedes it there.

    Each window starts afresh; with ``bos`` its first token is replaced by that one. Tokens after the last whole
    window are not scored. Position j >= context/2 predicts token j + 1, as in llama.cpp's perplexity tool.
    ``progress(done, windows)`` is called after each window.

    Raises:
        TypeError: ids are no integers.
        ValueError: context < 4 or above the model's, or fewer ids than one window.
    """
    limit = model.config.max_position_embeddings
    if not isinstance(context, int) or not 4 <= context <= limit:
        raise ValueError(f"context: expected 4 to {limit}, found {context!r}")
    ids = integers("ids", ids)
    windows = len(ids) // context
    if not windows:
        raise ValueError(f"text: expected at least {context} tokens, found {len(ids)}")
    cache = model.new_cache(context)
    first = context // 2
    losses = []
    for w in range(windows):
        window = ids[w * context : (w + 1) * context].copy()
        targets = window[first + 1 :].copy()
        if bos is not None:
            window[0] = bos
        cache.clear()
        logits = model.forward(window, cache)[first:-1].astype(np.float64)
        top = logits.max(axis=1)
        total = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
        losses.append(total - logits[np.arange(len(targets)), targets])
        if progress:
            progress(w + 1, windows)
    nll = np.concatenate(losses)
    mean = float(nll.mean())
    value = math.exp(mean)
    error = value * float(nll.std(ddof=1)) / math.sqrt(len(nll)) if len(nll) > 1 else math.inf
    per_byte = None if nbytes is None else mean / math.log(2) * len(ids) / nbytes
    return Perplexity(value, error, mean, len(nll), windows, context, per_byte)
