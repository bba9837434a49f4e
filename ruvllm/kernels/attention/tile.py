"""Attention of one tile: a few rows (queries that share a kv head) against blocks of keys and values.

The queries of a tile are transposed, so that one load serves all rows. Sums run position by position and dimension
by dimension: a row's result depends neither on the tile's size nor on its other rows.
"""

from typing import Any, NamedTuple

import numpy as np

from ruvllm.kernels.jit.decorators import inline_kernel
from ruvllm.kernels.jit.views import array_at, flat
from ruvllm.kernels.matmul.micro_kernels import LANES, WIDE
from ruvllm.kernels.memory import CACHE_LINE
from ruvllm.kernels.simd.math import exp2_of_negative, tanh_by_exp
from ruvllm.kernels.simd.vectors import (
    f32_load,
    f32_load_first,
    f32_store,
    f32_zero,
    fma,
    fma_rows,
    fma_two,
    hmax,
    lanes_between,
    load,
    load_rows,
    max_or_second,
    prefetch_stream,
    read_scales,
    scaled,
    scaled_rows,
    splat,
    store_rows,
    zip_rows,
)

# Rows of a tile, and whether it takes two panels at a time, by the target's registers: 12 x 2 accumulators of
# AVX-512's 32 registers (14 loads serve 24 multiply-adds), 6 x 1 of two registers each of AVX2's 16, 6 x 1 of four
# each of NEON's 32.
ROWS, PAIRS = (12, True) if WIDE else (6, False)
Q_STEP = 16 if WIDE else 8  # stride of a tile's transposed queries: at least ROWS, a power of two
CHUNK = 256  # positions per step of the softmax: scores, keys and values of a chunk stay in the caches
_AHEAD = 4 * LANES  # prefetch distance of keys, in positions: two steps of a token's scores
LOG2_E = np.float32(1.4426950408889634)
NEGATIVE_INFINITY = np.float32(-np.inf)
_ONE = np.float32(1)


class Cache(NamedTuple):
    """The KV cache of one layer: its arrays as attention/kv.py lays them out, and a block table.

    Without a table, an empty array, keys and values hold all positions: position p is row p. With a table, position p
    is row p % CHUNK of the block at address table[p // CHUNK], and ``keys`` and ``values`` only give the shapes of a
    block. The layer's keys and values begin ``offset`` bytes into it; each head's keys are followed by its values.
    """

    keys: Any
    values: Any
    table: Any
    offset: Any


_NO_TABLE = np.empty(0, np.int64)


def plain_cache(keys: np.ndarray, values: np.ndarray) -> Cache:
    """A cache whose arrays hold all positions."""
    return Cache(keys, values, _NO_TABLE, 0)


class Chunk(NamedTuple):
    """CHUNK positions of a head: rows of flat keys and values, from ``row`` on."""

    keys: Any
    values: Any
    row: Any


@inline_kernel
def chunk_at(cache, kv, position):
    """The chunk of a kv head that begins at a position, a multiple of CHUNK."""
    keys, values = cache.keys, cache.values
    if cache.table.size == 0:
        return Chunk(flat(keys), flat(values), kv * values.shape[1] + position)
    k, v = keys.size // keys.shape[0], values.size // keys.shape[0]
    at = cache.table[position // CHUNK] + cache.offset + kv * (k + v) * keys.itemsize
    head_values = array_at(at + k * keys.itemsize, v, values.dtype)
    return Chunk(array_at(at, k, keys.dtype), head_values, np.int64(0))


@inline_kernel
def ahead_of(cache, kv, position, next_kv, other):
    """Where another chunk's keys and values begin, as indices into the chunk of ``kv`` at ``position``, to prefetch."""
    keys, values = cache.keys, cache.values
    if cache.table.size == 0:
        row = next_kv * values.shape[1] + other
        return row // LANES * keys.shape[2] * LANES, row * values.shape[2]
    head = (keys.size + values.size) // keys.shape[0]
    distance = (cache.table[other // CHUNK] - cache.table[position // CHUNK]) // keys.itemsize + (next_kv - kv) * head
    return distance, distance


class Scoring(NamedTuple):
    """How attention scores a position: ``scale`` times q k^T; a query sees the ``window`` latest positions.

    softcap c: a score s becomes c tanh(s / c); 0: no cap. sinks (H,) or (0,): a score of each head that takes its
    share of the softmax and has no value.
    """

    window: Any
    scale: Any
    softcap: Any
    sinks: Any


class Heads(NamedTuple):
    """The query heads of one kv head in q (T, heads, dim), flat; ``group`` heads share it.

    Their rows are numbered token by token: row i is head i % group of token i // group.
    """

    q: Any
    kv: Any
    group: Any
    heads: Any
    dim: Any


class Queries(NamedTuple):
    """The rows of a tile, transposed: dimension d of row r is scratch[start + d step + r]."""

    scratch: Any
    start: Any
    step: Any


class Keys(NamedTuple):
    """Cached keys, flat: ``block`` elements for each 16 positions, of which the first 16 dim are keys."""

    elements: Any
    block: Any
    dim: Any


class Span(NamedTuple):
    """The positions start:stop of a chunk, in whole blocks of 16, of which a row sees first:end."""

    start: Any
    stop: Any
    first: Any
    end: Any


@inline_kernel
def query_factor(scoring):
    """The factor of queries: ``scale``, times log2(e) for a softmax in base 2, which ``cap_scores`` applies itself."""
    return scoring.scale * LOG2_E if scoring.softcap == 0 else scoring.scale


@inline_kernel
def cap_scores(scratch, base, start, stop, softcap):
    """A row's scores start:stop become log2(e) softcap tanh(score / softcap)."""
    inverse, factor = splat(np.float32(1) / softcap), splat(softcap * LOG2_E)
    for i in range(start, stop, LANES):
        f32_store(scratch, base + i, tanh_by_exp(f32_load(scratch, base + i) * inverse) * factor)


@inline_kernel
def normaliser(sinks, head, top, total):
    """The factor of a head's weighted sum of values: 1 / (total + 2^(sink - top)), or 1 / total without sinks."""
    if sinks.size == 0:
        return _ONE / total
    sink = sinks[head] * LOG2_E
    larger = max(top, sink)
    kept = exp2_of_negative(top - larger)
    return kept / (total * kept + exp2_of_negative(sink - larger))


@inline_kernel
def update_softmax(top, total, chunk_top, chunk_total):
    """Add a chunk to a softmax: (the new m, the new l, the factor of the sums so far, that of the chunk's sums).

    m is the largest score so far, l the sum of 2^(score - m). Chunks are always added one by one, from the first
    position on, so that a token's result does not depend on how many tokens share a call.
    """
    new_top = max(top, chunk_top)
    shift = new_top if new_top > NEGATIVE_INFINITY else np.float32(0)  # no score seen so far: all sums are 0
    keep, add = exp2_of_negative(top - shift), exp2_of_negative(chunk_top - shift)
    return new_top, fma(total, keep, chunk_total * add), keep, add


@inline_kernel
def query_index(heads, row):
    """The index of a row among the heads of all tokens."""
    return row // heads.group * heads.heads + heads.kv * heads.group + row % heads.group


@inline_kernel
def query_at(heads, row):
    """The offset in q of a row."""
    return query_index(heads, row) * heads.dim


@inline_kernel
def transpose_4(scratch, at):
    """Four rows of scratch, transposed."""
    return zip_rows(zip_rows(load_rows(scratch, at, LANES, 4)))


@inline_kernel
def _transpose_8(scratch, at):
    return zip_rows(zip_rows(zip_rows(load_rows(scratch, at, LANES, 8))))


@inline_kernel
def _transpose_16(scratch, at):
    return zip_rows(zip_rows(zip_rows(zip_rows(load_rows(scratch, at, LANES, 16)))))


transpose = _transpose_16 if WIDE else _transpose_8


@inline_kernel
def copy_queries(heads, first, rows, factor, to, stage, transpose):
    """Write ``rows`` rows from ``first`` on, times ``factor``, transposed to the ``Queries`` ``to``.

    transpose: transpose_4 or ``transpose``, for 4 or Q_STEP rows. scratch[stage:]: 16 to.step floats for it.
    """
    scratch, dim = to.scratch, heads.dim
    for d in range(0, dim, LANES):
        for r in range(rows):
            at = query_at(heads, first + r) + d
            x = f32_load(heads.q, at) if d + LANES <= dim else f32_load_first(heads.q, at, dim - d)
            f32_store(scratch, stage + r * LANES, x * splat(factor))
        store_rows(scratch, to.start + d * to.step, LANES, transpose(scratch, stage))


@inline_kernel
def prefetch_elements(x, start, count):
    """Prefetch the cache lines of ``count`` elements."""
    for i in range(0, count, CACHE_LINE // x.itemsize):
        prefetch_stream(x, start + i)


@inline_kernel
def scores(zeros, keys, ki, queries, base, start, stop, following):
    """scratch[base + r CHUNK + s] = query r times the key at s, for s in start:stop and the rest of the last block.

    zeros: a tuple of one zero vector for each row of the tile. keys.elements[ki]: the block of ``start``.
    keys.elements[following]: the keys that are read next, to prefetch.
    """
    k, block, dim, scratch = keys.elements, keys.block, keys.dim, queries.scratch
    s = start
    while PAIRS and s + LANES < stop:
        left = right = zeros
        other, over = ki + block, s + _AHEAD - stop
        ahead = ki + _AHEAD // LANES * block if over < 0 else following + over // LANES * block
        for d in range(dim):
            prefetch_elements(k, ahead + 2 * d * LANES, 2 * LANES)
            left, right = fma_two(
                load(k, ki + d * LANES), load(k, other + d * LANES),
                scratch, queries.start + d * queries.step, 1, left, right,
            )  # fmt: skip
        store_rows(scratch, base + s, CHUNK, scaled_rows(k, left, read_scales(k, ki + dim * LANES)))
        store_rows(scratch, base + s + LANES, CHUNK, scaled_rows(k, right, read_scales(k, other + dim * LANES)))
        s += 2 * LANES
        ki += 2 * block
    while s < stop:
        left = zeros
        for d in range(dim):
            left = fma_rows(load(k, ki + d * LANES), scratch, queries.start + d * queries.step, 1, left)
        store_rows(scratch, base + s, CHUNK, scaled_rows(k, left, read_scales(k, ki + dim * LANES)))
        s += LANES
        ki += block


@inline_kernel
def largest_score(scratch, base, span):
    """The largest of the scores scratch[base:] that a row sees in a span; -inf if it sees none."""
    top = splat(NEGATIVE_INFINITY)
    for i in range(span.start, span.stop, LANES):
        found = f32_load(scratch, base + i)
        if i < span.first or i + LANES > span.end:
            found = lanes_between(found, span.first - i, span.end - i, NEGATIVE_INFINITY)
        top = max_or_second(found, top)
    return hmax(top)


@inline_kernel
def to_weights(scratch, base, span, top, k, scales, block):
    """Turn the scores scratch[base:] of a span into weights 2^(score - top), 0 where a row sees nothing.

    Returns 16 partial sums of the weights. For int8 caches, each stored weight is multiplied by the scale of its
    value: k[scales] is the first of 16 scales, those of the next 16 positions are ``block`` elements on.
    """
    shift = splat(top if top > NEGATIVE_INFINITY else np.float32(0))  # no score seen so far: all weights become 0
    total = f32_zero()
    for i in range(span.start, span.stop, LANES):
        weights = exp2_of_negative(f32_load(scratch, base + i) - shift)
        to = scaled(k, weights, read_scales(k, scales + (i - span.start) // LANES * block))
        if i < span.first or i + LANES > span.end:
            weights = lanes_between(weights, span.first - i, span.end - i, np.float32(0))
            to = lanes_between(to, span.first - i, span.end - i, np.float32(0))
        f32_store(scratch, base + i, to)
        total = total + weights
    return total


@inline_kernel
def sum_weighted_values(zeros, values, vi, wide, scratch, weights, count, sums):
    """scratch[sums + r wide + d] = sum_s scratch[weights + r CHUNK + s] values[vi + s wide + d], d < wide."""
    d = 0
    while PAIRS and d + LANES < wide:
        left = right = zeros
        for s in range(count):
            at = vi + s * wide + d
            left, right = fma_two(load(values, at), load(values, at + LANES), scratch, weights + s, CHUNK, left, right)
        store_rows(scratch, sums + d, wide, left)
        store_rows(scratch, sums + d + LANES, wide, right)
        d += 2 * LANES
    while d < wide:
        left = zeros
        for s in range(count):
            left = fma_rows(load(values, vi + s * wide + d), scratch, weights + s, CHUNK, left)
        store_rows(scratch, sums + d, wide, left)
        d += LANES
