"""Ranking of scores: argmax, the k largest, and log-probabilities."""

from typing import Any

import numpy as np

from ruvllm.kernels import check, reference
from ruvllm.kernels.jit.decorators import inline_kernel, kernel
from ruvllm.kernels.simd.sums import exp_sum, maximum
from ruvllm.kernels.simd.vectors import must_be_float32
from ruvllm.kernels.spec import KernelSpec

_BLOCK = 256  # elements whose maximum is compared before single elements
_ONE = np.float32(1)
_MINUS_INFINITY = np.float32(-np.inf)

# --- greedy -------------------------------------------------------------------------------------------------------


@kernel(strict=True)
def argmax_index(x):
    """Index of the first maximum of x (n,), n >= 1, or -1 where x holds NaN."""
    must_be_float32(x)
    best, index = _MINUS_INFINITY, 0
    for block in range(0, x.size, _BLOCK):
        top = maximum(x[block : block + _BLOCK])
        if np.isnan(top):
            return -1
        if top > best:
            best, index = top, block
    while x[index] != best:
        index += 1
    return index


def argmax(x: Any) -> int:
    """The index of the largest element of x (n,) float32; of equal ones the first.

    Raises:
        TypeError: ``x`` is not a float32 array.
        ValueError: ``x`` is empty, not one-dimensional, or holds NaN.
    """
    return largest(vector("x", x), "x")


def vector(name: str, x: Any) -> np.ndarray:
    """``x`` as a checked float32 vector that is not empty."""
    x = check.float32(name, x, ndim=1)
    if not x.size:
        raise ValueError(f"{name}: expected at least one element, found none")
    return x


def largest(x: np.ndarray, name: str) -> int:
    """The index of the largest element of a checked vector. Raises ValueError, with its name, if it holds NaN."""
    index = int(argmax_index(x))
    if index < 0:
        raise ValueError(f"{name}: holds NaN at index {int(np.flatnonzero(np.isnan(x))[0])}")
    return index


# --- the k largest ------------------------------------------------------------------------------------------------


@inline_kernel
def sift_down(values, ids, root, size):
    """Sink the entry at ``root`` of the heap until no child is worse, that is smaller, or equal with a larger id."""
    value, index = values[root], ids[root]
    while 2 * root + 1 < size:
        child = 2 * root + 1
        other = child + 1
        if other < size and (
            values[other] < values[child] or (values[other] == values[child] and ids[other] > ids[child])
        ):
            child = other
        if value < values[child] or (value == values[child] and index > ids[child]):
            break
        values[root], ids[root] = values[child], ids[child]
        root = child
    values[root], ids[root] = value, index


@kernel(strict=True)
def select_largest(x, values, ids):
    """The k largest of x (n,), descending, of equal ones the first. values (k,) float32, ids (k,) int64; k <= n.

    The k best so far are a heap with the worst at its root; blocks whose maximum does not exceed it are skipped.
    """
    n, k = x.size, values.size
    for i in range(k):
        values[i] = x[i]
        ids[i] = i
    for root in range(k // 2 - 1, -1, -1):
        sift_down(values, ids, root, k)
    for block in range(k, n, _BLOCK):
        count = min(_BLOCK, n - block)
        if maximum(x[block : block + count]) > values[0]:
            for i in range(block, block + count):
                if x[i] > values[0]:
                    values[0], ids[0] = x[i], i
                    sift_down(values, ids, 0, k)
    for size in range(k - 1, 0, -1):  # the worst of the rest moves to the end
        values[0], values[size] = values[size], values[0]
        ids[0], ids[size] = ids[size], ids[0]
        sift_down(values, ids, 0, size)


def top_k(x: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest elements of x (n,) float32 in descending order, of equal ones the first.

    Returns:
        (values (k,) float32, indices (k,) int64).

    Raises:
        TypeError: ``x`` is not a float32 array.
        ValueError: ``x`` holds NaN, or k is not in 1..n.
    """
    x = vector("x", x)
    k = check.integer("k", k)
    if not 1 <= k <= x.size:
        raise ValueError(f"k: expected 1 to {x.size}, found {k}")
    largest(x, "x")
    return select(x, k)


def select(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """top_k of a checked vector."""
    values, ids = np.empty(k, np.float32), np.empty(k, np.int64)
    select_largest(x, values, ids)
    return values, ids


# --- log-probabilities --------------------------------------------------------------------------------------------


@kernel(independent=True)
def log_softmax_rows(x, out, lo, hi):
    """Rows lo:hi of log_softmax. x, out (rows, n)."""
    for row in range(lo, hi):
        v, y = x[row], out[row]
        top = maximum(v)
        log_sum = np.float32(np.log(exp_sum(v, top, _ONE)))
        for i in range(y.size):
            y[i] = v[i] - top - log_sum


def log_softmax(x: Any, out: np.ndarray | None = None) -> np.ndarray:
    """y = x - max(x) - log(sum(exp(x - max(x)))), over the last axis: the logarithm of softmax(x).

    Args:
        x: (..., n) float32; -inf stays -inf.
        out: (..., n) float32 to write into; may be ``x`` itself.

    Returns:
        (..., n) float32. A row of nothing but -inf, or with NaN or +inf in it, becomes NaN.

    Raises:
        TypeError: an argument is not a float32 array.
        ValueError: ``x`` is zero-dimensional, or ``out`` does not match.
    """
    x = check.float32("x", x, min_ndim=1)
    out = check.output("out", out, x.shape, x)
    if x.size:
        rows = check.rows(x)
        log_softmax_rows(rows, check.rows(out), 0, rows.shape[0])
    return out


@kernel(strict=True)
def log_sum_exp(x):
    """log(sum(exp(x))) of x (n,), n >= 1, as float64."""
    top = maximum(x)
    return np.float64(top) + np.log(exp_sum(x, top, _ONE))


def top_logprobs(logits: Any, n: int) -> list[tuple[int, float]]:
    """The n likeliest tokens (all, if there are fewer) and the logarithms of their probabilities, likeliest first.

    Args:
        logits: (V,) float32.
        n: how many, >= 0.

    Raises:
        TypeError: ``logits`` is not a float32 array.
        ValueError: ``logits`` is empty or holds NaN, or n is negative.
    """
    logits = vector("logits", logits)
    n = check.integer("n", n)
    if n < 0:
        raise ValueError(f"n: expected a number >= 0, found {n}")
    largest(logits, "logits")
    if not n:
        return []
    values, ids = select(logits, min(n, logits.size))
    logprobs = values - log_sum_exp(logits)
    return [(int(i), float(p)) for i, p in zip(ids, logprobs, strict=True)]


_SIZES = ({"n": 32000}, {"n": 49152}, {"n": 128256})

SPECS = [
    KernelSpec(
        name="argmax",
        function=argmax,
        compiled=(argmax_index,),
        reference=reference.argmax,
        formula="first i with x[i] = max(x)",
        example=lambda rng, n: {"x": rng.standard_normal(n, np.float32)},
        flops=lambda n: float(n),
        bytes=lambda n: 4.0 * n,
        sizes=_SIZES,
        tolerance=0.0,
    ),
    KernelSpec(
        name="top_k",
        function=top_k,
        compiled=(argmax_index, select_largest),
        reference=reference.top_k,
        formula="the k largest of x, descending, and their indices",
        example=lambda rng, n, k: {"x": rng.standard_normal(n, np.float32), "k": min(k, n)},
        flops=lambda n, k: float(n),
        bytes=lambda n, k: 4.0 * n + 12.0 * k,
        sizes=tuple({**size, "k": 40} for size in _SIZES),
        tolerance=0.0,
    ),
    KernelSpec(
        name="log_softmax",
        function=log_softmax,
        compiled=(log_softmax_rows,),
        reference=reference.log_softmax,
        formula="x - max(x) - log(sum(exp(x - max(x))))",
        example=lambda rng, rows, n: {"x": 4 * rng.standard_normal((rows, n), np.float32)},
        flops=lambda rows, n: 5.0 * rows * n,
        bytes=lambda rows, n: 8.0 * rows * n,
        sizes=({"rows": 1, "n": 49152}, {"rows": 4, "n": 32000}),
    ),
]
