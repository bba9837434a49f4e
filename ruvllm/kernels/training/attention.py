"""Gradients of causal attention (training): scores are computed again, so that nothing of T x T is kept.

For one query head, with S = scale q k^T masked and P = softmax(S):

    dv = P^T do;   dP = do v^T;   dS = P (dP - sum(P dP));   dq = scale dS k;   dk = scale dS^T q

Queries are taken 64 at a time and lie in the lanes of vectors: scores are stored key by key, a query's softmax runs
down the rows, and each of the five products is the same tile as everywhere (see matmul/micro_kernels.py).
"""

from typing import Any

import numpy as np
from numba import prange

from ruvllm.kernels import check, reference
from ruvllm.kernels.attention.prefill import NO_WINDOW
from ruvllm.kernels.jit.decorators import inline_kernel, kernel, parallel_kernel
from ruvllm.kernels.matmul.micro_kernels import LANES, TILE, tile_times_panel
from ruvllm.kernels.memory import aligned_empty
from ruvllm.kernels.simd.math import exp
from ruvllm.kernels.simd.vectors import f32_load, f32_store, f32_zero, fma, fmax, lanes_between, splat
from ruvllm.kernels.spec import KernelSpec
from ruvllm.kernels.threads.pool import PARALLEL_MACS, launch, threads_for

QUERIES = 64  # at a time
_MINUS_INFINITY = np.float32(-np.inf)
_ZERO, _ONE = np.float32(0), np.float32(1)


@inline_kernel
def _up(n: Any, step: Any) -> Any:
    return (n + step - 1) // step * step


def scratch_size(length: int, dim: int) -> int:
    """Floats of scratch that one thread needs for sequences of up to ``length`` tokens."""
    wide, tall, keys = -(-dim // LANES) * LANES, -(-dim // TILE) * TILE, -(-length // TILE) * TILE
    return QUERIES * (2 * dim + 2 * wide + tall + 2 * keys) + keys * (4 * wide + tall)


@kernel(strict=True)
def attention_backward_units(
    q: Any, k: Any, v: Any, do: Any, starts: Any, window: Any, scale: Any, dq: Any, dk: Any, dv: Any, scratch: Any,
    lo: Any, hi: Any,
) -> None:  # fmt: skip
    """Units lo:hi of attention_backward; a unit is a sequence and a kv head. scratch: this thread's own."""
    heads, dim = q.shape[1], q.shape[2]
    kv_heads = k.shape[1]
    group = heads // kv_heads
    wide, tall = _up(dim, LANES), _up(dim, TILE)
    for unit in range(lo, hi):
        a, b = starts[unit // kv_heads], starts[unit // kv_heads + 1]
        kv, n = unit % kv_heads, b - a
        keys = _up(n, TILE)
        # Where things stand in the scratch: q and do turned over (D, 64) and by rows (64, wide); scores, then P, and
        # dP, then dS, (keys, 64); k, v, dk, dv by rows (keys, wide); k turned over (tall, keys); dq so, (tall, 64).
        q_t = 0
        do_t = q_t + dim * QUERIES
        q_r = do_t + dim * QUERIES
        do_r = q_r + QUERIES * wide
        p = do_r + QUERIES * wide
        ds = p + keys * QUERIES
        dq_t = ds + keys * QUERIES
        k_r = dq_t + tall * QUERIES
        v_r = k_r + keys * wide
        dk_r = v_r + keys * wide
        dv_r = dk_r + keys * wide
        k_t = dv_r + keys * wide
        for i in range(k_r, k_t + tall * keys):
            scratch[i] = _ZERO
        for s in range(n):
            for d in range(dim):
                scratch[k_r + s * wide + d] = k[a + s, kv, d]
                scratch[v_r + s * wide + d] = v[a + s, kv, d]
                scratch[k_t + d * keys + s] = k[a + s, kv, d]
        for head in range(kv * group, (kv + 1) * group):
            for first in range(0, n, QUERIES):
                count = min(QUERIES, n - first)
                for i in range(p):
                    scratch[i] = _ZERO
                for t in range(count):
                    for d in range(dim):
                        x, g = q[a + first + t, head, d], do[a + first + t, head, d]
                        scratch[q_t + d * QUERIES + t] = x
                        scratch[q_r + t * wide + d] = x
                        scratch[do_t + d * QUERIES + t] = g
                        scratch[do_r + t * wide + d] = g
                begin = max(0, first - window + 1) // TILE * TILE
                end = min(keys, _up(first + count, TILE))
                for s in range(begin, end, TILE):
                    for j in range(0, QUERIES, LANES):
                        to = s * QUERIES + j
                        tile_times_panel(
                            scratch, q_t + j, QUERIES, scratch, k_r + s * wide, wide, dim, scratch, p + to, QUERIES,
                            LANES, False,
                        )  # fmt: skip
                        tile_times_panel(
                            scratch, do_t + j, QUERIES, scratch, v_r + s * wide, wide, dim, scratch, ds + to, QUERIES,
                            LANES, False,
                        )  # fmt: skip
                for j in range(0, QUERIES, LANES):
                    _softmax_and_back(scratch, p + j, ds + j, begin, end, first + j, n, window, scale)
                for s in range(begin, end, TILE):
                    for d in range(0, wide, LANES):
                        tile_times_panel(
                            scratch, do_r + d, wide, scratch, p + s * QUERIES, QUERIES, QUERIES,
                            scratch, dv_r + s * wide + d, wide, LANES, True,
                        )  # fmt: skip
                        tile_times_panel(
                            scratch, q_r + d, wide, scratch, ds + s * QUERIES, QUERIES, QUERIES,
                            scratch, dk_r + s * wide + d, wide, LANES, True,
                        )  # fmt: skip
                for d in range(0, tall, TILE):
                    for j in range(0, QUERIES, LANES):
                        tile_times_panel(
                            scratch, ds + begin * QUERIES + j, QUERIES, scratch, k_t + d * keys + begin, keys,
                            end - begin, scratch, dq_t + d * QUERIES + j, QUERIES, LANES, False,
                        )  # fmt: skip
                for t in range(count):
                    for d in range(dim):
                        dq[a + first + t, head, d] = scratch[dq_t + d * QUERIES + t]
        for s in range(n):
            for d in range(dim):
                dk[a + s, kv, d] = scratch[dk_r + s * wide + d]
                dv[a + s, kv, d] = scratch[dv_r + s * wide + d]


@inline_kernel
def _softmax_and_back(
    x: Any, p: Any, ds: Any, begin: Any, end: Any, first: Any, n: Any, window: Any, scale: Any
) -> None:
    """Scores at p (row s, 16 queries first ..) become P; dP at ds becomes scale P (dP - sum(P dP))."""
    factor, queries = splat(scale), min(n - first, LANES)
    top = splat(_MINUS_INFINITY)
    for s in range(begin, end):
        at = p + s * QUERIES
        # Query first + j sees key s if s <= first + j < s + window; queries past the end see nothing.
        seen = lanes_between(f32_load(x, at) * factor, s - first, min(s + window - first, queries), _MINUS_INFINITY)
        top = fmax(top, seen)
    top = fmax(top, splat(np.float32(-1e30)))  # where every score is -inf
    total, delta = f32_zero(), f32_zero()
    for s in range(begin, end):
        at = s * QUERIES
        e = lanes_between(exp(f32_load(x, p + at) * factor - top), s - first, min(s + window - first, queries), _ZERO)
        f32_store(x, p + at, e)
        total = total + e
        delta = fma(e, f32_load(x, ds + at), delta)
    inverse = splat(_ONE) / lanes_between(total, 0, queries, _ONE)
    delta = delta * inverse
    for s in range(begin, end):
        at = s * QUERIES
        weights = f32_load(x, p + at) * inverse
        f32_store(x, p + at, weights)
        f32_store(x, ds + at, weights * (f32_load(x, ds + at) - delta) * factor)


@parallel_kernel
def attention_backward_parallel(
    q: Any, k: Any, v: Any, do: Any, starts: Any, window: Any, scale: Any, dq: Any, dk: Any, dv: Any, scratch: Any,
    threads: Any,
) -> None:  # fmt: skip
    """attention_backward_units with the units split over threads; scratch (threads, ...)."""
    units = (len(starts) - 1) * k.shape[1]
    for t in prange(threads):
        lo, hi = units * t // threads, units * (t + 1) // threads
        attention_backward_units(q, k, v, do, starts, window, scale, dq, dk, dv, scratch[t], lo, hi)


def attention_backward(
    q: Any, k: Any, v: Any, do: Any, starts: Any = None, window: int | None = None, scale: float | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of q, k and v of causal attention softmax(scale q k^T) v, from ``do``, that of its output.

    Args:
        q, do: (T, H, D) float32.
        k, v: (T, KV, D) float32, H a multiple of KV: head h uses kv head h // (H / KV).
        starts: (n + 1,) integers: sequence i is the tokens starts[i] : starts[i + 1], and sees no other; from 0 to
            T, ascending. None: one sequence.
        window: a query sees only the ``window`` latest positions up to its own.
        scale: 1 / sqrt(D) if None.

    Returns:
        dq (T, H, D), dk and dv (T, KV, D), float32.

    Raises:
        TypeError: not float32, or starts that are no integers.
        ValueError: shapes do not match, starts out of order, or a window < 1.

    Source: Dao et al. 2022, "FlashAttention", appendix B.
    """
    q = check.float32("q", q, ndim=3)
    tokens, heads, dim = q.shape
    k = check.float32("k", k, shape=(tokens, None, dim))
    v = check.float32("v", v, shape=k.shape)
    do = check.float32("do", do, shape=q.shape)
    kv_heads = k.shape[1]
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"k: {kv_heads} kv heads do not fit {heads} query heads")
    starts = np.array([0, tokens]) if starts is None else check.integers("starts", starts)
    lengths = np.diff(starts)
    if len(starts) < 2 or starts[0] != 0 or starts[-1] != tokens or lengths.min() < 0:
        raise ValueError(f"starts: expected ascending numbers from 0 to {tokens}, found {starts.tolist()}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected a positive integer, found {window!r}")
    reach, scale32 = NO_WINDOW if window is None else window, np.float32(check.attention_scale(scale, dim))
    dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
    if q.size:
        units = len(lengths) * kv_heads
        threads = threads_for(int(heads * dim * np.sum(lengths * lengths)), PARALLEL_MACS, units)
        scratch = aligned_empty((threads, scratch_size(int(lengths.max()), dim)))
        arguments = (q, k, v, do, starts, reach, scale32, dq, dk, dv)
        if threads == 1:
            attention_backward_units(*arguments, scratch[0], 0, units)
        else:
            launch(attention_backward_parallel, *arguments, scratch, threads)
    return dq, dk, dv


def _example(rng: np.random.Generator, tokens: int, heads: int, kv_heads: int, dim: int) -> dict[str, Any]:
    return {
        "q": rng.standard_normal((tokens, heads, dim), np.float32),
        "k": rng.standard_normal((tokens, kv_heads, dim), np.float32),
        "v": rng.standard_normal((tokens, kv_heads, dim), np.float32),
        "do": rng.standard_normal((tokens, heads, dim), np.float32),
        "starts": np.array([0, tokens // 3, tokens]),
    }


SPECS = [
    KernelSpec(
        name="attention_backward",
        function=attention_backward,
        compiled=(attention_backward_units, attention_backward_parallel),
        reference=reference.attention_backward,
        formula="dq, dk, dv of softmax(q k^T / sqrt(D), causal) v",
        example=_example,
        flops=lambda tokens, heads, kv_heads, dim: 5.0 * tokens * (tokens + 1) * heads * dim * 5 / 9,
        bytes=lambda tokens, heads, kv_heads, dim: 4.0 * tokens * (3 * heads + 4 * kv_heads) * dim,
        sizes=(
            {"tokens": 64, "heads": 9, "kv_heads": 3, "dim": 64},
            {"tokens": 300, "heads": 9, "kv_heads": 3, "dim": 64},
        ),
    ),
]
