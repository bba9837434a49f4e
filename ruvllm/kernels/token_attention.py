"""Attention of one new token over a KV cache, cut into chunks of positions so that threads can share long contexts.

Each kv head and chunk of 256 positions is a unit: it gives, for every query head of the group, the largest score m,
l = sum e^(score - m) and the sum of values weighted by e^(score - m). ``merge_chunks`` adds the chunks of a head up,
each times e^(m - largest m) ("flash-decoding", Dao et al. 2023). Chunks are cut at fixed positions, so the result
does not depend on the number of threads. The cache's layout is that of cached_attention.py.
"""

from typing import Any

import numpy as np

from ruvllm.kernels._jit import inline_kernel, kernel
from ruvllm.kernels._math import exp
from ruvllm.kernels._simd import (
    f32_load,
    f32_store,
    f32_zero,
    fma,
    fmax,
    hmax,
    hsum,
    lane,
    lanes_between,
    load,
    splat,
    splat_at,
)
from ruvllm.kernels._tile import LANES, put, token_times_panel
from ruvllm.kernels._views import flat

CHUNK = 256
_NEGATIVE_INFINITY = np.float32(-np.inf)


def partial_width(head_dim: int) -> int:
    """Floats of one head's result of one chunk: the weighted sum, padded to whole vectors, then m and l."""
    return (head_dim + LANES - 1) // LANES * LANES + LANES


def chunk_count(positions: int) -> int:
    """Chunks that may hold ``positions`` positions."""
    return (positions + CHUNK - 1) // CHUNK


@kernel(strict=True)
def attend_token_chunks(
    q: Any, keys: Any, values: Any, position: Any, window: Any, scale: Any, partial: Any, scratch: Any, lo: Any, hi: Any
) -> None:
    """Units lo:hi of the token at ``position``: unit = kv head * chunks + chunk, counted from the first chunk it sees.

    q (H, D); keys (KV, B, D, 16); values (KV, S, DV); partial (H, chunks, partial_width(D)); scratch (H / KV * CHUNK,).
    """
    heads, dim = q.shape
    group = heads // keys.shape[0]
    wide = values.shape[2]
    width = partial.shape[2]
    first, end = max(0, position - window + 1), position + 1
    first_chunk = first // CHUNK
    chunks = (end + CHUNK - 1) // CHUNK - first_chunk
    queries, keys_flat, values_flat, parts = flat(q), flat(keys), flat(values), flat(partial)
    for unit in range(lo, hi):
        kv, c = unit // chunks, unit % chunks
        base = (first_chunk + c) * CHUNK
        start = max(first, base) // LANES * LANES
        stop = min(end, base + CHUNK)
        for s in range(start, stop, LANES):
            block = (kv * keys.shape[1] * LANES + s) * dim
            for r in range(group):
                qi = (kv * group + r) * dim
                token_times_panel(
                    keys_flat, block, LANES, queries, qi, dim, scratch, r * CHUNK + s - base, LANES, False
                )
        vi = (kv * values.shape[1] + start) * wide
        for r in range(group):
            at = ((kv * group + r) * partial.shape[1] + c) * width
            row = r * CHUNK
            _weights(scratch, row, start - base, stop - base, first - base, end - base, scale, parts, at + wide)
            d = 0
            while d + 4 * LANES <= wide:
                _weighted_values(values_flat, vi + d, wide, scratch, row + start - base, stop - start, parts, at + d)
                d += 4 * LANES
            while d < wide:
                token_times_panel(
                    values_flat, vi + d, wide, scratch, row + start - base, stop - start, parts, at + d, LANES, False
                )
                d += LANES


@inline_kernel
def _weights(
    scratch: Any, row: Any, start: Any, stop: Any, first: Any, end: Any, scale: Any, parts: Any, state: Any
) -> None:
    """Scores start:stop -> e^(scale score - m), 0 outside first:end; parts[state] = m, parts[state + 1] = their sum."""
    factor = splat(scale)
    largest = splat(_NEGATIVE_INFINITY)
    for i in range(start, stop, LANES):
        scores = f32_load(scratch, row + i) * factor
        largest = fmax(largest, lanes_between(scores, first - i, end - i, _NEGATIVE_INFINITY))
    top = hmax(largest)
    total = f32_zero()
    for i in range(start, stop, LANES):
        weights = exp(f32_load(scratch, row + i) * factor - splat(top))
        weights = lanes_between(weights, first - i, end - i, np.float32(0))
        f32_store(scratch, row + i, weights)
        total = total + weights
    parts[state] = top
    parts[state + 1] = hsum(total)


@inline_kernel
def _weighted_values(
    values: Any, vi: Any, wide: Any, weights: Any, wi: Any, count: Any, out: Any, oi: Any
) -> None:
    """out[oi : oi+64] = sum_s weights[wi + s] values[vi + s wide : +64]: a whole run of each row while it is there."""
    a, b, c, d = f32_zero(), f32_zero(), f32_zero(), f32_zero()
    for s in range(count):
        at, w = vi + s * wide, splat_at(weights, wi + s)
        a = fma(w, load(values, at), a)
        b = fma(w, load(values, at + LANES), b)
        c = fma(w, load(values, at + 2 * LANES), c)
        d = fma(w, load(values, at + 3 * LANES), d)
    f32_store(out, oi, a)
    f32_store(out, oi + LANES, b)
    f32_store(out, oi + 2 * LANES, c)
    f32_store(out, oi + 3 * LANES, d)


@kernel(strict=True)
def merge_chunks(partial: Any, chunks: Any, out: Any, lo: Any, hi: Any) -> None:
    """out (H, D) for heads lo:hi from the first ``chunks`` of partial (H, >= chunks, partial_width(D))."""
    dim, width = out.shape[1], partial.shape[2]
    state = width - LANES
    parts, outs = flat(partial), flat(out)
    for head in range(lo, hi):
        base = head * partial.shape[1] * width
        top = parts[base + state]
        for c in range(1, chunks):
            top = max(top, parts[base + c * width + state])
        total = np.float32(0)
        for c in range(chunks):
            at = base + c * width + state
            parts[at + 2] = lane(exp(splat(parts[at] - top)), 0)
            total += parts[at + 1] * parts[at + 2]
        inverse = splat(np.float32(1) / total)
        for d in range(0, dim, LANES):
            acc = f32_zero()
            for c in range(chunks):
                at = base + c * width
                acc = fma(f32_load(parts, at + d), splat_at(parts, at + state + 2), acc)
            put(outs, head * dim + d, acc * inverse, dim - d, False)
