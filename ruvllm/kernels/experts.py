"""Mixture of experts: which experts each token goes to, and the weighted sum of what they return."""

import math

import numpy as np

from ruvllm.kernels.jit.decorators import kernel

MAX_EXPERTS = 512  # of one layer


def require_routing(k: int, experts: int) -> None:
    """Raise ValueError unless k of so many experts can be chosen."""
    if not 1 <= k <= experts <= MAX_EXPERTS:
        raise ValueError(f"route: expected 1 <= k <= experts <= {MAX_EXPERTS}, found k = {k} of {experts} experts")


@kernel(strict=True)
def route_tokens(scores, experts, slots, weights, tokens, counts):
    """The k best experts of each token, and the list of tokens of each expert.

    Args:
        scores: (T, X) float32, the router's logits.
        experts: (T, k) int64, written: the k largest of a row, largest first; of equal scores the lower index.
        slots: (T, k) int64, written: the token's index in its expert's list.
        weights: (T, k) float32, written: softmax over the k chosen scores.
        tokens: (X, >= T) int64, written: each expert's tokens in order.
        counts: (X,) int64, written: how many tokens each expert has.
    """
    count, k = scores.shape[1], experts.shape[1]
    for x in range(count):
        counts[x] = 0
    for t in range(scores.shape[0]):
        for j in range(k):
            best = -1
            for x in range(count):
                taken = False
                for i in range(j):
                    taken |= experts[t, i] == x
                if not taken and (best < 0 or scores[t, x] > scores[t, best]):
                    best = x
            experts[t, j] = best
            slots[t, j] = counts[best]
            tokens[best, counts[best]] = t
            counts[best] += 1
        top, total = np.float64(scores[t, experts[t, 0]]), 0.0
        for j in range(k):
            total += math.exp(scores[t, experts[t, j]] - top)
        for j in range(k):
            weights[t, j] = np.float32(math.exp(scores[t, experts[t, j]] - top) / total)


@kernel(strict=True)
def add_weighted(part, slot, weight, out, row, first):
    """out[row] += weight part[slot]; with ``first``, out[row] = weight part[slot]."""
    for i in range(out.shape[1]):
        value = weight * part[slot, i]
        out[row, i] = value if first else out[row, i] + value
