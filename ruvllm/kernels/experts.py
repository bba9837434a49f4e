"""Mixture of experts: which experts each token goes to, their rows side by side, and the weighted sum of the results.

T tokens that go to k experts each make T k *routed rows*: sorted by expert, and of one expert in the order of the
tokens. A *run* is the rows of one expert; experts without tokens have none.
"""

import math
from typing import NamedTuple

import numpy as np

from ruvllm.kernels.jit.decorators import inline_kernel, kernel
from ruvllm.kernels.quant.layout import token_blocks
from ruvllm.kernels.simd.vectors import stack_i64

MAX_EXPERTS = 512  # in one layer
RUN = 4  # fields of a run: its expert, first row, number of rows, and offset in rows of the rows in 8 bits (``PADDED``)
PADDED = 2  # rows in 8 bits are in token blocks, those of each expert in blocks of its own: at most twice the memory

_token_blocks = inline_kernel(token_blocks)


class Routing(NamedTuple):
    """tokens (T k,): the token of each routed row; slots (T, k): the routed row of each choice, and its weight.

    runs (n, RUN): for each expert that has rows.
    """

    tokens: np.ndarray
    slots: np.ndarray
    weights: np.ndarray
    runs: np.ndarray

    @property
    def parts(self) -> list[tuple[int, slice]]:
        """Each expert that has rows, and which."""
        return [(int(expert), slice(int(first), int(first + count))) for expert, first, count, _ in self.runs]


def require_routing(k: int, experts: int) -> None:
    """Raise ValueError unless k of ``experts`` experts can be chosen."""
    if not 1 <= k <= experts <= MAX_EXPERTS:
        raise ValueError(f"route: expected 1 <= k <= experts <= {MAX_EXPERTS}, found k = {k} of {experts} experts")


@kernel(strict=True)
def route_tokens(scores, normalised, routing):
    """The k best experts of each token, largest first and of equal scores the lower index, and the runs they make.

    Args:
        scores: (T, X) float32, the router's logits.
        normalised: weights are the softmax over the k chosen scores; else over all.
        routing: written, see ``Routing``; of runs, as many as make T k rows.
    """
    tokens, slots, weights, runs = routing
    count, k = scores.shape[1], slots.shape[1]
    counts = stack_i64(MAX_EXPERTS)
    for x in range(count):
        counts[x] = 0
    for t in range(scores.shape[0]):
        for x in range(count):
            at = min(x, k)
            while at > 0 and scores[t, x] > scores[t, slots[t, at - 1]]:
                if at < k:
                    slots[t, at] = slots[t, at - 1]
                at -= 1
            if at < k:
                slots[t, at] = x  # the expert, until the runs are known
        top, total = np.float64(scores[t, slots[t, 0]]), 0.0
        for x in range(k if normalised else count):
            total += math.exp(scores[t, slots[t, x] if normalised else x] - top)
        for j in range(k):
            counts[slots[t, j]] += 1
            weights[t, j] = np.float32(math.exp(scores[t, slots[t, j]] - top) / total)
    run, first, padded = 0, 0, 0
    for x in range(count):
        rows = counts[x]
        counts[x] = first  # from here on, the expert's next row
        if rows > 0:
            runs[run, 0], runs[run, 1], runs[run, 2], runs[run, 3] = x, first, rows, padded
            blocks, block_tokens = _token_blocks(rows)
            run, first, padded = run + 1, first + rows, padded + blocks * block_tokens
    for t in range(scores.shape[0]):
        for j in range(k):
            x = slots[t, j]
            slots[t, j] = counts[x]
            tokens[counts[x]] = t
            counts[x] += 1


def route(scores: np.ndarray, k: int, normalised: bool) -> Routing:
    """The routing of scores (T, X) float32; see ``route_tokens``. Raises ValueError for an impossible k."""
    T, count = scores.shape
    require_routing(k, count)
    runs, slots = np.empty((min(T * k, count), RUN), np.int64), np.empty((T, k), np.int64)
    routing = Routing(np.empty(T * k, np.int64), slots, np.empty((T, k), np.float32), runs)
    route_tokens(scores, normalised, routing)
    ends = np.flatnonzero(runs[:, 1] + runs[:, 2] == T * k)
    return routing._replace(runs=runs[: ends[0] + 1])


@inline_kernel(independent=True)
def _scale_row(x, weight, out):
    for i in range(out.size):
        out[i] = weight * x[i]


@inline_kernel(independent=True)
def _add_row(x, weight, out):
    for i in range(out.size):
        out[i] += weight * x[i]


@kernel(strict=True)
def combine_rows(y, slots, weights, out, lo, hi):
    """out[t] = sum over j of weights[t, j] y[slots[t, j]], in the order of j, for tokens lo:hi.

    y (T k, N); slots, weights (T, k); out (T, N).
    """
    for t in range(lo, hi):
        _scale_row(y[slots[t, 0]], weights[t, 0], out[t])
        for j in range(1, slots.shape[1]):
            _add_row(y[slots[t, j]], weights[t, j], out[t])


@kernel(strict=True)
def sigmoid_scale_rows(x, gate, out, lo, hi):
    """out[t] = x[t] / (1 + exp(-gate[t])) for rows lo:hi. x, out (T, N); gate (T, 1)."""
    for t in range(lo, hi):
        weight = np.float32(1.0 / (1.0 + math.exp(-np.float64(gate[t, 0]))))
        _scale_row(x[t], weight, out[t])
