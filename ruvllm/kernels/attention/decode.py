"""Attention of one new token over a KV cache ("flash-decoding", Dao et al. 2023).

For each query head, out = sum_s softmax(scale q k_s) v_s over the cached positions s. Positions are cut into chunks of
256, so that a long context keeps all threads busy. A unit of work is one chunk of one kv head: ``attend_token``
computes for every query head of the kv head's group

    m = max score,   l = sum 2^(score - m),   o = sum 2^(score - m) v

with scores scaled by log2(e), so that 2^x serves for e^x. ``merge_chunks`` then adds the chunks of a head, one by one,
each rescaled to the largest m so far: out = sum o 2^(m - top) / sum l 2^(m - top). Chunks begin at fixed positions and
are added in their order, so the result depends neither on the number of threads nor on how many tokens are computed
together (attention/prefill.py). The layout of the cache is described in attention/kv.py.
"""

from typing import Any, NamedTuple

import numpy as np

from ruvllm.kernels.attention.kv import VALUE_SCALE_ROW
from ruvllm.kernels.attention.tile import (
    CHUNK,
    NEGATIVE_INFINITY,
    PAIRS,
    Heads,
    Keys,
    Queries,
    Span,
    ahead_of,
    cap_scores,
    chunk_at,
    copy_queries,
    largest_score,
    normaliser,
    prefetch_elements,
    query_factor,
    scores,
    to_weights,
    transpose_4,
    update_softmax,
)
from ruvllm.kernels.jit.decorators import inline_kernel, kernel
from ruvllm.kernels.jit.views import flat
from ruvllm.kernels.matmul.micro_kernels import LANES
from ruvllm.kernels.simd.vectors import (
    f32_load,
    f32_store,
    f32_zero,
    f32_zeros,
    fma,
    fma_rows,
    hsum,
    load,
    load_rows,
    store_rows,
)

HEAD_TILE = 4  # query heads that share each load of keys and values


def partial_width(head_dim: int) -> int:
    """Floats of one head's result of one chunk: o, padded to whole vectors, then m and l."""
    return (head_dim + LANES - 1) // LANES * LANES + LANES


def token_scratch_size(head_dim: int, group: int) -> int:
    """Floats of scratch per thread: a group's scores; rows to be transposed, queries and sums of HEAD_TILE heads."""
    wide = (head_dim + LANES - 1) // LANES * LANES
    return (group + HEAD_TILE - 1) // HEAD_TILE * HEAD_TILE * CHUNK + HEAD_TILE * LANES + 2 * HEAD_TILE * wide


def chunk_count(positions: int) -> int:
    """How many chunks so many positions are cut into."""
    return (positions + CHUNK - 1) // CHUNK


class ValueRows(NamedTuple):
    """Rows of values, flat: row s begins at elements[start + s stride]."""

    elements: Any
    start: Any
    stride: Any
    count: Any


class Unit(NamedTuple):
    """A unit of work: one kv head, and its chunk number ``c``; chunk 0 is the first that the token sees.

    keys.elements[ki]: the first block of keys. next_keys, next_values: where the next unit's keys and values begin, as
    indices into this one's arrays, to prefetch.
    """

    kv: Any
    c: Any
    span: Any
    keys: Any
    ki: Any
    values: Any
    next_keys: Any
    next_values: Any


@kernel(strict=True)
def attend_token(q, cache, position, scoring, partial, scratch, lo, hi):
    """Units lo:hi of the token at ``position``: unit = kv head * chunks + c; c = 0 is the first chunk it sees.

    q (H, D); cache: a ``Cache``; scoring: a ``Scoring``; partial (H, >= chunks, partial_width(D));
    scratch (token_scratch_size(D, H / KV),): scores, then rows to be transposed, queries and sums of HEAD_TILE heads.
    """
    heads, dim = q.shape
    group = heads // cache.keys.shape[0]
    wide = cache.values.shape[2]
    width = partial.shape[2]
    head_step = partial.shape[1] * width
    q_flat, parts = flat(q), flat(partial)
    stage = (group + HEAD_TILE - 1) // HEAD_TILE * HEAD_TILE * CHUNK
    queries = Queries(scratch, stage + HEAD_TILE * LANES, HEAD_TILE)
    sums = queries.start + HEAD_TILE * wide
    for i in range(stage, queries.start, LANES):  # a group smaller than a tile leaves rows of it unwritten
        f32_store(scratch, i, f32_zero())
    for number in range(lo, hi):
        unit = _unit_at(cache, dim, max(0, position - scoring.window + 1), position + 1, number)
        part = unit.kv * group * head_step + unit.c * width
        _score(unit, Heads(q_flat, unit.kv, group, heads, dim), query_factor(scoring), queries, stage)
        for r in range(0, group, HEAD_TILE):
            end = min(r + HEAD_TILE, group)
            for head in range(r, end):
                _weigh(unit, scratch, head * CHUNK, scoring.softcap, parts, part + head * head_step + wide)
            for i in range(sums, sums + HEAD_TILE * wide, LANES):
                f32_store(scratch, i, f32_zero())
            weights = r * CHUNK + unit.span.start
            if group == 1:
                add_weighted_rows(f32_zeros(1), unit.values, unit.next_values, wide, scratch, weights, sums)
            else:
                add_weighted_rows(f32_zeros(HEAD_TILE), unit.values, unit.next_values, wide, scratch, weights, sums)
            for head in range(r, end):
                for d in range(0, wide, LANES):
                    f32_store(parts, part + head * head_step + d, f32_load(scratch, sums + (head - r) * wide + d))


@inline_kernel
def _unit_at(cache, dim, first, end, number):
    """Unit ``number`` of a token that sees the positions first:end."""
    first_chunk = first // CHUNK
    chunks = (end + CHUNK - 1) // CHUNK - first_chunk
    kv, c = number // chunks, number % chunks
    base = (first_chunk + c) * CHUNK
    begin = max(first, base) // LANES * LANES
    span = Span(begin - base, min(end - base, CHUNK), first - base, end - base)
    chunk = chunk_at(cache, kv, base)
    row, block, wide = chunk.row + span.start, cache.keys.shape[2] * LANES, cache.values.shape[2]
    next_head, next_base = (kv + 1, first_chunk * CHUNK) if c + 1 == chunks else (kv, base + CHUNK)
    next_keys, next_values = ahead_of(cache, kv, base, next_head, next_base)
    keys, values = Keys(chunk.keys, block, dim), ValueRows(chunk.values, row * wide, wide, span.stop - span.start)
    return Unit(kv, c, span, keys, row // LANES * block, values, next_keys, next_values)


@inline_kernel
def _score(unit, heads, factor, queries, stage):
    """The scores of all heads of the group, queries times ``factor``: those of its head h at scratch[h CHUNK:]."""
    start, stop = unit.span.start, unit.span.stop
    for r in range(0, heads.group, HEAD_TILE):
        copy_queries(heads, r, min(HEAD_TILE, heads.group - r), factor, queries, stage, transpose_4)
        if heads.group == 1:
            scores(f32_zeros(1), unit.keys, unit.ki, queries, 0, start, stop, unit.next_keys)
        else:
            scores(f32_zeros(HEAD_TILE), unit.keys, unit.ki, queries, r * CHUNK, start, stop, unit.next_keys)


@inline_kernel
def _weigh(unit, scratch, base, softcap, parts, at):
    """Turn a head's scores at scratch[base:] into weights; parts[at] = m and parts[at + 1] = l, as above."""
    if softcap > 0:
        cap_scores(scratch, base, unit.span.start, unit.span.stop, softcap)
    top = largest_score(scratch, base, unit.span)
    scales = unit.ki + (unit.keys.dim + VALUE_SCALE_ROW) * LANES
    total = to_weights(scratch, base, unit.span, top, unit.keys.elements, scales, unit.keys.block)
    parts[at] = top
    parts[at + 1] = hsum(total)


@inline_kernel
def add_weighted_rows(zeros, rows, ahead, wide, scratch, weights, sums):
    """scratch[sums + r wide + d] += sum_s scratch[weights + r CHUNK + s] rows[s, d], for d < wide.

    Four vectors of each row at a time, so that memory is read in long runs. The next unit's rows, at
    elements[ahead:], are prefetched in memory order, which the hardware prefetcher then recognises.
    """
    values, vi, step = rows.elements, rows.start, rows.stride
    d = 0
    while (PAIRS or len(zeros) == 1) and d + 4 * LANES <= wide:
        s0 = load_rows(scratch, sums + d, wide, len(zeros))
        s1 = load_rows(scratch, sums + d + LANES, wide, len(zeros))
        s2 = load_rows(scratch, sums + d + 2 * LANES, wide, len(zeros))
        s3 = load_rows(scratch, sums + d + 3 * LANES, wide, len(zeros))
        for s in range(rows.count):
            at, w, line = vi + s * step + d, weights + s, ahead + d * rows.count + 4 * s * LANES
            prefetch_elements(values, line, 4 * LANES)
            s0 = fma_rows(load(values, at), scratch, w, CHUNK, s0)
            s1 = fma_rows(load(values, at + LANES), scratch, w, CHUNK, s1)
            s2 = fma_rows(load(values, at + 2 * LANES), scratch, w, CHUNK, s2)
            s3 = fma_rows(load(values, at + 3 * LANES), scratch, w, CHUNK, s3)
        store_rows(scratch, sums + d, wide, s0)
        store_rows(scratch, sums + d + LANES, wide, s1)
        store_rows(scratch, sums + d + 2 * LANES, wide, s2)
        store_rows(scratch, sums + d + 3 * LANES, wide, s3)
        d += 4 * LANES
    while d < wide:
        s0 = load_rows(scratch, sums + d, wide, len(zeros))
        for s in range(rows.count):
            s0 = fma_rows(load(values, vi + s * step + d), scratch, weights + s, CHUNK, s0)
        store_rows(scratch, sums + d, wide, s0)
        d += LANES


@kernel(strict=True)
def merge_chunks(partial, chunks, sinks, out, lo, hi):
    """out (H, D) for heads lo:hi from the first ``chunks`` of partial (H, >= chunks, partial_width(D)).

    sinks: as in ``Scoring``.
    """
    dim, state = out.shape[1], partial.shape[2] - LANES
    for head in range(lo, hi):
        parts, y = partial[head], out[head]
        top, total = NEGATIVE_INFINITY, np.float32(0)
        y[:] = total
        for c in range(chunks):
            top, total, keep, add = update_softmax(top, total, parts[c, state], parts[c, state + 1])
            fold_sums(y, keep, parts[c, :dim], add)
        # If every score is -inf, so is the largest, and the softmax is undefined: top - top makes the result NaN.
        multiply(y, normaliser(sinks, head, top, total) + (top - top))


@inline_kernel(independent=True)
def fold_sums(y, keep, chunk, add):
    """y = keep y + add chunk."""
    for i in range(y.size):
        y[i] = fma(y[i], keep, chunk[i] * add)


@inline_kernel(independent=True)
def multiply(y, factor):
    """y *= factor."""
    for i in range(y.size):
        y[i] *= factor
