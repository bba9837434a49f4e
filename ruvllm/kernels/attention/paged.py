"""Attention of one token over plain rows of keys and values, (positions, KV, D), perhaps in blocks of a pool (paged).

Chunks of 256 positions give partial results that are merged, as in attention/decode.py. Within a chunk, all kv heads
take sixteen positions before the next sixteen, so that memory is read in order.

Rows of keys are not panels: products with a query are accumulated lane by lane, and the lanes are summed at the end.
Four heads take four positions at a time: eight loads serve sixteen multiply-adds, and sixteen sums of lanes need 45
operations. Rows that are not whole vectors, and groups of 16 positions that are split between blocks or end early, are
gathered into scratch first; the results are the same bits.

Meanwhile the rows of the next sixteen positions are prefetched, line by line. A core tracks two dozen misses, too few
to hide memory's latency, but prefetches in order let its hardware prefetcher bring the rest of a page.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import prange

from ruvllm.kernels.attention.decode import (
    HEAD_TILE,
    ValueRows,
    add_weighted_rows,
    chunk_count,
    merge_chunks,
    partial_width,
)
from ruvllm.kernels.attention.tile import CHUNK, LOG2_E, Span, largest_score, to_weights
from ruvllm.kernels.jit.decorators import inline_kernel, kernel, parallel_kernel
from ruvllm.kernels.jit.views import flat
from ruvllm.kernels.matmul.micro_kernels import LANES
from ruvllm.kernels.simd.vectors import (
    f32_load,
    f32_load_first,
    f32_store,
    f32_zero,
    f32_zeros,
    fma_each,
    fma_outer,
    hsum,
    load_rows,
    prefetch_l2,
    splat,
    store_rows,
    sum_lanes,
    zip_rows,
)

_ONE = np.float32(1)


_chunk_count = inline_kernel(chunk_count)
_partial_width = inline_kernel(partial_width)


def paged_scratch_size(head_dim: int, heads: int, kv_heads: int) -> int:
    """Floats of scratch per thread: scores, queries and sums of all heads; 16 rows; 4 vectors."""
    group = heads // kv_heads
    tiled = heads if group == 1 else kv_heads * ((group + HEAD_TILE - 1) // HEAD_TILE * HEAD_TILE)  # whole tiles
    wide = (head_dim + LANES - 1) // LANES * LANES
    return tiled * (CHUNK + 2 * wide) + LANES * wide + HEAD_TILE * LANES


class Pool(NamedTuple):
    """A sequence of ``length`` rows in a pool of blocks.

    k, v (blocks, block_size, KV, D): row s is row s % block_size of block table[s // block_size].
    """

    k: Any
    v: Any
    table: Any
    length: Any


class Scratch(NamedTuple):
    """Offsets in a thread's scratch: queries, sums (heads, wide); 16 gathered rows (16, wide); 4 vectors.

    The scores (heads, CHUNK) are at 0. ``tiled`` heads belong to each kv head.
    """

    memory: Any
    queries: Any
    sums: Any
    rows: Any
    stage: Any
    tiled: Any
    wide: Any


class Run(NamedTuple):
    """Positions s .. s + 15 of one kv head: rows in the pool, or gathered; ``ahead``: where the next 16 begin."""

    elements: Any
    start: Any
    stride: Any
    ahead: Any


@inline_kernel
def _scratch(memory, kv_heads, group, dim):
    tiled = 1 if group == 1 else (group + HEAD_TILE - 1) // HEAD_TILE * HEAD_TILE
    wide = (dim + LANES - 1) // LANES * LANES
    queries = kv_heads * tiled * CHUNK
    sums = queries + kv_heads * tiled * wide
    rows = sums + kv_heads * tiled * wide
    return Scratch(memory, queries, sums, rows, rows + LANES * wide, tiled, wide)


@kernel(strict=True)
def attend_paged_chunks(q, pool, scale, partial, memory, lo, hi):
    """Units lo:hi of one token: unit = chunk * kv heads + kv head.

    q (H, D); pool: a ``Pool``; partial (H, chunks, partial_width(D)); memory (paged_scratch_size(D, H, KV),).
    """
    heads, dim = q.shape
    kv_heads, length = pool.k.shape[2], pool.length
    group = heads // kv_heads
    width = partial.shape[2]
    q_flat, k_flat, v_flat, parts = flat(q), flat(pool.k), flat(pool.v), flat(partial)
    scratch = _scratch(memory, kv_heads, group, dim)
    tiled, wide = scratch.tiled, scratch.wide
    for i in range(scratch.queries, scratch.sums, LANES):  # heads that pad a tile
        f32_store(memory, i, f32_zero())
    for kv in range(kv_heads):
        for r in range(group):
            to = scratch.queries + (kv * tiled + r) * wide
            _copy_row(q_flat, (kv * group + r) * dim, dim, wide, scale * LOG2_E, memory, to)
    unit = lo
    while unit < hi:
        c, first = unit // kv_heads, unit % kv_heads
        end = min(kv_heads, first + hi - unit)
        unit += end - first
        base = c * CHUNK
        count = min(length - base, CHUNK)
        for i in range(scratch.sums, scratch.rows, LANES):
            f32_store(memory, i, f32_zero())
        for s in range(0, count, LANES):
            for kv in range(first, end):
                keys = _run(k_flat, pool, base + s, kv, scratch)
                to, query = kv * tiled * CHUNK + s, scratch.queries + kv * tiled * wide
                if group == 1:
                    _scores_of_one(keys, memory, query, wide, to)
                else:
                    for r in range(0, tiled, HEAD_TILE):
                        _scores_of_four(keys, memory, query + r * wide, wide, to + r * CHUNK, scratch.stage)
        for kv in range(first, end):
            for head in range(group):
                at = ((kv * group + head) * partial.shape[1] + c) * width + wide
                row = (kv * tiled + head) * CHUNK
                span = Span(0, count, 0, count)
                top = largest_score(memory, row, span)
                total = to_weights(memory, row, span, top, k_flat, 0, 0)
                parts[at] = top
                parts[at + 1] = hsum(total)
        for s in range(0, count, LANES):
            for kv in range(first, end):
                run = _run(v_flat, pool, base + s, kv, scratch)
                values = ValueRows(run.elements, run.start, run.stride, min(count - s, LANES))
                weights, to = kv * tiled * CHUNK + s, scratch.sums + kv * tiled * wide
                if group == 1:
                    add_weighted_rows(f32_zeros(1), values, run.ahead, wide, memory, weights, to)
                else:
                    for r in range(0, tiled, HEAD_TILE):
                        zeros, row = f32_zeros(HEAD_TILE), to + r * wide
                        add_weighted_rows(zeros, values, run.ahead, wide, memory, weights + r * CHUNK, row)
        for kv in range(first, end):
            for head in range(group):
                at = ((kv * group + head) * partial.shape[1] + c) * width
                for d in range(0, wide, LANES):
                    f32_store(parts, at + d, f32_load(memory, scratch.sums + (kv * tiled + head) * wide + d))


@kernel(strict=True)
def attend_paged(q, k, v, table, length, scale, memory, out):
    """All units on one thread, merged: out (H, D). memory: float32, the partial results and then the scratch."""
    heads, dim = q.shape
    chunks = _chunk_count(length)
    parts = heads * chunks * _partial_width(dim)
    partial = memory[:parts].reshape(heads, chunks, _partial_width(dim))
    attend_paged_chunks(q, Pool(k, v, table, length), scale, partial, memory[parts:], 0, k.shape[2] * chunks)
    merge_chunks(partial, chunks, memory[:0], out, 0, heads)


@inline_kernel
def _run(x, pool, position, kv, scratch):
    """16 rows of x, keys or values of the pool, from a position on; gathered unless they are whole, in one block."""
    size, kv_heads, dim = pool.k.shape[1], pool.k.shape[2], pool.k.shape[3]
    stride, wide = kv_heads * dim, scratch.wide
    if wide != dim or position + LANES > pool.length or position % size + LANES > size:
        _gather(x, pool, position, kv * dim, scratch)
        return Run(scratch.memory, scratch.rows, wide, (LANES - 1) * stride + kv * LANES * dim)
    row = pool.table[position // size] * size + position % size
    return Run(x, row * stride + kv * dim, stride, (row + LANES) * stride + kv * LANES * dim)


@inline_kernel
def _gather(x, pool, position, offset, scratch):
    """Copy the rows of up to 16 positions to scratch, padded with zeros; each begins at ``offset`` in its row of x."""
    size, kv_heads, dim = pool.k.shape[1], pool.k.shape[2], pool.k.shape[3]
    memory, wide = scratch.memory, scratch.wide
    for i in range(LANES):
        to = scratch.rows + i * wide
        if position + i < pool.length:
            row = pool.table[(position + i) // size] * size + (position + i) % size
            _copy_row(x, row * kv_heads * dim + offset, dim, wide, _ONE, memory, to)
        else:
            for d in range(0, wide, LANES):
                f32_store(memory, to + d, f32_zero())


@inline_kernel
def _copy_row(x, xi, dim, wide, factor, scratch, to):
    """scratch[to + d] = factor x[xi + d]; 0 for d from dim to wide."""
    for d in range(0, wide, LANES):
        row = f32_load(x, xi + d) if d + LANES <= dim else f32_load_first(x, xi + d, dim - d)
        f32_store(scratch, to + d, row * splat(factor))


@inline_kernel
def _prefetch_lines(x, xi, lines):
    for i in range(lines):
        prefetch_l2(x, xi + i * LANES)


@inline_kernel
def _scores_of_one(keys, scratch, query, wide, to):
    """scratch[to + j] = the query times key j of a ``Run``."""
    sums = f32_zeros(LANES)
    for d in range(0, wide, LANES):
        _prefetch_lines(keys.elements, keys.ahead + d * LANES, LANES)
        sums = fma_each(
            f32_load(scratch, query + d), load_rows(keys.elements, keys.start + d, keys.stride, LANES), sums
        )
    f32_store(scratch, to, sum_lanes(sums))


@inline_kernel
def _scores_of_four(keys, scratch, query, wide, to, stage):
    """scratch[to + r CHUNK + j] = query r times key j of a ``Run``, for r < HEAD_TILE.

    Of sixteen keys, every fourth is in one tile: two rounds of merging then put a query's scores in order.
    """
    for j in range(HEAD_TILE):
        sums = f32_zeros(LANES)
        for d in range(0, wide, LANES):
            rows = load_rows(keys.elements, keys.start + j * keys.stride + d, HEAD_TILE * keys.stride, HEAD_TILE)
            _prefetch_lines(keys.elements, keys.ahead + (j * wide + d) * HEAD_TILE, HEAD_TILE)
            sums = fma_outer(load_rows(scratch, query + d, wide, HEAD_TILE), rows, sums)
        f32_store(scratch, stage + j * LANES, sum_lanes(sums))
    store_rows(scratch, to, CHUNK, zip_rows(zip_rows(load_rows(scratch, stage, LANES, HEAD_TILE))))


@parallel_kernel
def attend_paged_parallel(q, k, v, table, length, scale, memory, threads):
    """attend_paged_chunks with the units split over threads; merge_chunks has to follow.

    memory: the partial results, then the scratch of each thread.
    """
    heads, dim = q.shape
    chunks = _chunk_count(length)
    parts = heads * chunks * _partial_width(dim)
    partial = memory[:parts].reshape(heads, chunks, _partial_width(dim))
    size = (memory.size - parts) // threads
    units = k.shape[2] * chunks
    for t in prange(threads):
        own = memory[parts + size * t : parts + size * (t + 1)]
        lo, hi = units * t // threads, units * (t + 1) // threads
        attend_paged_chunks(q, Pool(k, v, table, length), scale, partial, own, lo, hi)
