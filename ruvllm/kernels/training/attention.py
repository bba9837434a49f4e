"""Gradients of causal attention (training). Scores are recomputed, so that nothing of size T x T is kept.

For one query head, with S = scale q k^T masked and P = softmax(S):

    dv = P^T do;   dP = do v^T;   dS = P (dP - sum(P dP));   dq = scale dS k;   dk = scale dS^T q

Blocks of 64 queries fill the lanes of four vectors: scores are stored key by key, and the softmax of a query runs down
the rows. Each of the five products is the tile of matmul/micro_kernels.py.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import prange

from ruvllm.kernels import check, reference
from ruvllm.kernels.attention.prefill import scoring_of
from ruvllm.kernels.attention.tile import Scoring
from ruvllm.kernels.jit.decorators import inline_kernel, kernel, parallel_kernel
from ruvllm.kernels.matmul.micro_kernels import LANES, TILE, Rows, tile_times_panel
from ruvllm.kernels.memory import aligned_empty
from ruvllm.kernels.simd.math import exp, tanh_by_exp
from ruvllm.kernels.simd.vectors import f32_load, f32_store, f32_zero, fma, fmax, lanes_between, splat
from ruvllm.kernels.spec import KernelSpec
from ruvllm.kernels.threads.pool import PARALLEL_MACS, launch, threads_for

QUERIES = 64  # queries of a block: the lanes of four vectors
_MINUS_INFINITY = np.float32(-np.inf)
_ZERO, _ONE = np.float32(0), np.float32(1)


@inline_kernel
def _round_up(n, step):
    return (n + step - 1) // step * step


def backward_scratch_size(length: int, dim: int) -> int:
    """Floats of scratch that one thread needs for sequences of up to ``length`` tokens."""
    wide, tall, keys = -(-dim // LANES) * LANES, -(-dim // TILE) * TILE, -(-length // TILE) * TILE
    return QUERIES * (2 * dim + 2 * wide + tall + 3 * keys) + keys * (4 * wide + tall)


class Batch(NamedTuple):
    """Sequences one after the other, as attention_backward takes them."""

    q: Any
    k: Any
    v: Any
    do: Any
    starts: Any


class Gradients(NamedTuple):
    """The output arrays for the gradients of q, k and v."""

    dq: Any
    dk: Any
    dv: Any


class Lanes(NamedTuple):
    """The queries of one head in the lanes of a vector: 16 from ``first`` on, of ``count``.

    slopes: the offset in the scratch of the scores' derivatives, where there is a softcap.
    """

    first: Any
    count: Any
    head: Any
    slopes: Any
    scoring: Any


@kernel(strict=True)
def attention_backward_units(batch, scoring, to, scratch, lo, hi):
    """Units lo:hi of attention_backward: unit = sequence * kv heads + kv head.

    batch: a ``Batch``; scoring: a ``Scoring``; to: ``Gradients``; scratch: this thread's own.
    """
    q, k, v, do, starts = batch
    heads, dim = q.shape[1], q.shape[2]
    kv_heads = k.shape[1]
    group = heads // kv_heads
    wide, tall = _round_up(dim, LANES), _round_up(dim, TILE)  # D as columns and as rows of a tile
    for unit in range(lo, hi):
        a, b = starts[unit // kv_heads], starts[unit // kv_heads + 1]
        kv, n = unit % kv_heads, b - a
        keys = _round_up(n, TILE)
        # Offsets in the scratch: q and do transposed (D, 64) and by rows (64, wide); scores, then P, and dP, then dS,
        # (keys, 64); k, v, dk, dv by rows (keys, wide); k transposed (tall, keys); dq transposed (tall, 64); slopes of
        # the softcap (keys, 64).
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
        slopes = k_t + tall * keys
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
                begin = max(0, first - scoring.window + 1) // TILE * TILE
                end = min(keys, _round_up(first + count, TILE))
                for s in range(begin, end, TILE):
                    for j in range(0, QUERIES, LANES):
                        at = s * QUERIES + j
                        _product(scratch, (q_t + j, QUERIES), (k_r + s * wide, wide), dim, (p + at, QUERIES), False)
                        _product(scratch, (do_t + j, QUERIES), (v_r + s * wide, wide), dim, (ds + at, QUERIES), False)
                for j in range(0, QUERIES, LANES):
                    lanes = Lanes(first + j, n, head, slopes + j, scoring)
                    _softmax_backward(scratch, p + j, ds + j, begin, end, lanes)
                for s in range(begin, end, TILE):
                    weights, scores = (p + s * QUERIES, QUERIES), (ds + s * QUERIES, QUERIES)
                    for d in range(0, wide, LANES):
                        _product(scratch, (do_r + d, wide), weights, QUERIES, (dv_r + s * wide + d, wide), True)
                        _product(scratch, (q_r + d, wide), scores, QUERIES, (dk_r + s * wide + d, wide), True)
                for d in range(0, tall, TILE):
                    for j in range(0, QUERIES, LANES):
                        scores, rows = (ds + begin * QUERIES + j, QUERIES), (k_t + d * keys + begin, keys)
                        _product(scratch, scores, rows, end - begin, (dq_t + d * QUERIES + j, QUERIES), False)
                for t in range(count):
                    for d in range(dim):
                        to.dq[a + first + t, head, d] = scratch[dq_t + d * QUERIES + t]
        for s in range(n):
            for d in range(dim):
                to.dk[a + s, kv, d] = scratch[dk_r + s * wide + d]
                to.dv[a + s, kv, d] = scratch[dv_r + s * wide + d]


@inline_kernel
def _product(scratch, panel, rows, count, out, add):
    """tile_times_panel on the scratch buffer, by (offset, stride): out (+)= rows panel."""
    tile_times_panel(
        Rows(scratch, panel[0], panel[1]), Rows(scratch, rows[0], rows[1]), count, Rows(scratch, out[0], out[1]), LANES,
        add,
    )  # fmt: skip


@inline_kernel
def _softmax_backward(x, p, ds, begin, end, lanes):
    """Scores at p (row s, 16 queries first ..) become P; dP at ds becomes scale P (dP - sum(P dP))."""
    first, window, cap, sinks = lanes.first, lanes.scoring.window, lanes.scoring.softcap, lanes.scoring.sinks
    scale, queries = splat(lanes.scoring.scale), min(lanes.count - first, LANES)
    factor = scale if cap == 0 else splat(_ONE)
    if cap > 0:
        for s in range(begin, end):
            at = s * QUERIES
            tanh = tanh_by_exp(f32_load(x, p + at) * splat(lanes.scoring.scale / cap))
            f32_store(x, p + at, tanh * splat(cap))
            f32_store(x, lanes.slopes + at, scale - scale * tanh * tanh)
    top = splat(_MINUS_INFINITY if sinks.size == 0 else sinks[lanes.head])
    for s in range(begin, end):
        at = p + s * QUERIES
        # Query first + j sees key s if s <= first + j < s + window; queries past the end see nothing.
        seen = lanes_between(f32_load(x, at) * factor, s - first, min(s + window - first, queries), _MINUS_INFINITY)
        top = fmax(top, seen)
    top = fmax(top, splat(np.float32(-1e30)))  # where every score is -inf
    total, delta = f32_zero(), f32_zero()
    if sinks.size > 0:
        total = exp(splat(sinks[lanes.head]) - top)
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
        slope = scale if cap == 0 else f32_load(x, lanes.slopes + at)
        f32_store(x, ds + at, weights * (f32_load(x, ds + at) - delta) * slope)


@parallel_kernel
def attention_backward_parallel(batch, scoring, to, scratch, threads):
    """attention_backward_units with the units split over threads; scratch (threads, ...)."""
    units = (len(batch.starts) - 1) * batch.k.shape[1]
    for t in prange(threads):
        attention_backward_units(batch, scoring, to, scratch[t], units * t // threads, units * (t + 1) // threads)


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
        TypeError: not float32, or starts that are not integers.
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
    return attention_gradients(Batch(q, k, v, do, starts), scoring_of(window, check.attention_scale(scale, dim)))


def attention_gradients(batch: Batch, scoring: Scoring) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """attention_backward of checked arrays, with any ``Scoring``; there is no gradient for its sinks."""
    q, k, v = batch.q, batch.k, batch.v
    heads, dim = q.shape[1:]
    to = Gradients(np.empty_like(q), np.empty_like(k), np.empty_like(v))
    if q.size:
        lengths = np.diff(batch.starts)
        units = len(lengths) * k.shape[1]
        threads = threads_for(int(heads * dim * np.sum(lengths * lengths)), PARALLEL_MACS, units)
        scratch = aligned_empty((threads, backward_scratch_size(int(lengths.max()), dim)))
        if threads == 1:
            attention_backward_units(batch, scoring, to, scratch[0], 0, units)
        else:
            launch(attention_backward_parallel, batch, scoring, to, scratch, threads)
    return tuple(to)


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
