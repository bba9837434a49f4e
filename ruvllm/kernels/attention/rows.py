"""Attention of one token over keys and values that lie in rows, perhaps in blocks of a pool (paged).

Chunks of 256 positions give partial results that are merged, as in attention/decode.py. In a chunk, sixteen positions
are done for all kv heads before the next sixteen: memory is read in the order in which it lies.

Rows of keys are not panels, so products with a query are summed lane by lane first, and their lanes then together.
Four heads take four positions at a time: eight loads serve sixteen multiply-adds, and sixteen sums of lanes need 45
operations. Rows that are no whole vectors, and groups of 16 positions that lie in several blocks or end early, are
copied together before; the results are the same bits.

What the next sixteen positions need is asked for meanwhile, line by line: a core waits for two dozen lines at once, too
few for memory's latency, but where it sees lines asked for in order its prefetcher brings the rest of a page.
"""

from typing import Any

import numpy as np
from numba import prange

from ruvllm.kernels.attention.decode import GROUP, add_weighted_values, chunk_count, merge_chunks, partial_width
from ruvllm.kernels.attention.tile import CHUNK, LOG2_E, largest_score, to_weights
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


def row_scratch_size(head_dim: int, heads: int, kv_heads: int) -> int:
    """Floats of scratch that one thread needs: scores, queries and sums of all heads; 16 rows; 4 vectors."""
    group = heads // kv_heads
    tiled = heads if group == 1 else kv_heads * ((group + GROUP - 1) // GROUP * GROUP)  # one alone, or whole tiles
    wide = (head_dim + LANES - 1) // LANES * LANES
    return tiled * (CHUNK + 2 * wide) + LANES * wide + GROUP * LANES


@kernel(strict=True)
def attend_row_chunks(
    q: Any, k: Any, v: Any, table: Any, length: Any, scale: Any, partial: Any, scratch: Any, lo: Any, hi: Any
) -> None:
    """Units lo:hi of one token: unit = chunk * kv heads + kv head.

    q (H, D); k, v (blocks, block_size, KV, D): row s of the sequence is row s % block_size of block
    table[s // block_size]. partial (H, chunks, partial_width(D)); scratch (row_scratch_size(D, H, KV),).
    """
    heads, dim = q.shape
    size, kv_heads = k.shape[1], k.shape[2]
    group = heads // kv_heads
    tiled = 1 if group == 1 else (group + GROUP - 1) // GROUP * GROUP
    step = kv_heads * dim
    wide = (dim + LANES - 1) // LANES * LANES
    width = partial.shape[2]
    q_flat, k_flat, v_flat, parts = flat(q), flat(k), flat(v), flat(partial)
    queries = kv_heads * tiled * CHUNK
    sums = queries + kv_heads * tiled * wide
    rows = sums + kv_heads * tiled * wide
    stage = rows + LANES * wide
    for i in range(queries, sums, LANES):  # heads that pad a tile
        f32_store(scratch, i, f32_zero())
    for kv in range(kv_heads):
        to = queries + kv * tiled * wide
        _copy_rows(q_flat, kv * group * dim, dim, group, dim, wide, scale * LOG2_E, scratch, to)
    unit = lo
    while unit < hi:
        c, first = unit // kv_heads, unit % kv_heads
        end = min(kv_heads, first + hi - unit)
        unit += end - first
        base = c * CHUNK
        count = min(length - base, CHUNK)
        for i in range(sums, rows, LANES):
            f32_store(scratch, i, f32_zero())
        for s in range(0, count, LANES):
            at = _run(table, base + s, length, size, wide == dim)
            for kv in range(first, end):
                keys, ki, k_step = k_flat, at * step + kv * dim, step
                if at < 0:
                    _gather(k_flat, table, base + s, length, size, step, kv * dim, dim, wide, scratch, rows)
                    keys, ki, k_step = scratch, rows, wide
                ahead = (at + LANES) * step + kv * LANES * dim
                to, query = kv * tiled * CHUNK + s, queries + kv * tiled * wide
                if group == 1:
                    _scores_of_one(keys, ki, k_step, scratch, query, wide, to, ahead)
                else:
                    for r in range(0, tiled, GROUP):
                        _scores_of_four(
                            keys, ki, k_step, scratch, query + r * wide, wide, to + r * CHUNK, stage, ahead
                        )
        for kv in range(first, end):
            for head in range(group):
                at = ((kv * group + head) * partial.shape[1] + c) * width + wide
                row = (kv * tiled + head) * CHUNK
                top = largest_score(scratch, row, 0, count, 0, count)
                total = to_weights(scratch, row, 0, count, 0, count, top, k_flat, 0, 0)
                parts[at] = top
                parts[at + 1] = hsum(total)
        for s in range(0, count, LANES):
            at = _run(table, base + s, length, size, wide == dim)
            n = min(count - s, LANES)
            for kv in range(first, end):
                values, vi, v_step = v_flat, at * step + kv * dim, step
                if at < 0:
                    _gather(v_flat, table, base + s, length, size, step, kv * dim, dim, wide, scratch, rows)
                    values, vi, v_step = scratch, rows, wide
                ahead = (at + LANES) * step + kv * LANES * dim
                weights, to = kv * tiled * CHUNK + s, sums + kv * tiled * wide
                if group == 1:
                    add_weighted_values(f32_zeros(1), values, vi, v_step, wide, scratch, weights, n, to, ahead)
                else:
                    for r in range(0, tiled, GROUP):
                        add_weighted_values(
                            f32_zeros(GROUP), values, vi, v_step, wide, scratch, weights + r * CHUNK, n, to + r * wide,
                            ahead,
                        )
        for kv in range(first, end):
            for head in range(group):
                at = ((kv * group + head) * partial.shape[1] + c) * width
                for d in range(0, wide, LANES):
                    f32_store(parts, at + d, f32_load(scratch, sums + (kv * tiled + head) * wide + d))


@kernel(strict=True)
def attend_rows(q: Any, k: Any, v: Any, table: Any, length: Any, scale: Any, memory: Any, out: Any) -> None:
    """All units on one thread, merged: out (H, D). memory: float32, the partial results and then the scratch."""
    heads, dim = q.shape
    chunks = _chunk_count(length)
    parts = heads * chunks * _partial_width(dim)
    partial = memory[:parts].reshape(heads, chunks, _partial_width(dim))
    attend_row_chunks(q, k, v, table, length, scale, partial, memory[parts:], 0, k.shape[2] * chunks)
    merge_chunks(partial, chunks, out, 0, heads)


@inline_kernel
def _run(table: Any, position: Any, length: Any, size: Any, whole: Any) -> Any:
    """The row of the pool where 16 positions in a row begin, or -1 if they do not lie in one block, or not whole."""
    if not whole or position + LANES > length or position % size + LANES > size:
        return -1
    return table[position // size] * size + position % size


@inline_kernel
def _gather(
    x: Any, table: Any, position: Any, length: Any, size: Any, step: Any, offset: Any, dim: Any, wide: Any,
    scratch: Any, to: Any,
) -> None:  # fmt: skip
    """Copy the rows of 16 positions, or as many as there are, to scratch, filled up with zeros to whole vectors."""
    for i in range(LANES):
        if position + i < length:
            at = (table[(position + i) // size] * size + (position + i) % size) * step + offset
            _copy_rows(x, at, 0, 1, dim, wide, _ONE, scratch, to + i * wide)
        else:
            for d in range(0, wide, LANES):
                f32_store(scratch, to + i * wide + d, f32_zero())


@inline_kernel
def _copy_rows(
    x: Any, xi: Any, x_step: Any, rows: Any, dim: Any, wide: Any, factor: Any, scratch: Any, to: Any
) -> None:
    """scratch[to + r wide + d] = factor x[xi + r x_step + d]; 0 for d from dim on."""
    for r in range(rows):
        for d in range(0, wide, LANES):
            at = xi + r * x_step + d
            numbers = f32_load(x, at) if d + LANES <= dim else f32_load_first(x, at, dim - d)
            f32_store(scratch, to + r * wide + d, numbers * splat(factor))


@inline_kernel
def _ask_for(x: Any, xi: Any, lines: Any) -> None:
    """Have memory bring so many cache lines from x[xi] on."""
    for i in range(lines):
        prefetch_l2(x, xi + i * LANES)


@inline_kernel
def _scores_of_one(keys: Any, ki: Any, step: Any, scratch: Any, query: Any, wide: Any, to: Any, ahead: Any) -> None:
    """scratch[to + j] = the query times the key at ki + j step, for j < 16."""
    sums = f32_zeros(LANES)
    for d in range(0, wide, LANES):
        _ask_for(keys, ahead + d * LANES, LANES)
        sums = fma_each(f32_load(scratch, query + d), load_rows(keys, ki + d, step, LANES), sums)
    f32_store(scratch, to, sum_lanes(sums))


@inline_kernel
def _scores_of_four(
    keys: Any, ki: Any, step: Any, scratch: Any, query: Any, wide: Any, to: Any, stage: Any, ahead: Any
) -> None:
    """scratch[to + r CHUNK + j] = query r times the key at ki + j step, for r < GROUP and j < 16.

    Of sixteen keys, every fourth is in one tile: two rounds of merging then put a query's scores in order.
    """
    for j in range(GROUP):
        sums = f32_zeros(LANES)
        for d in range(0, wide, LANES):
            rows = load_rows(keys, ki + j * step + d, GROUP * step, GROUP)
            _ask_for(keys, ahead + (j * wide + d) * GROUP, GROUP)
            sums = fma_outer(load_rows(scratch, query + d, wide, GROUP), rows, sums)
        f32_store(scratch, stage + j * LANES, sum_lanes(sums))
    store_rows(scratch, to, CHUNK, zip_rows(zip_rows(load_rows(scratch, stage, LANES, GROUP))))


@parallel_kernel
def attend_rows_parallel(
    q: Any, k: Any, v: Any, table: Any, length: Any, scale: Any, partial: Any, scratch: Any, threads: Any
) -> None:
    """attend_row_chunks with the units split over threads; scratch (threads, row_scratch_size(D, H, KV))."""
    units = k.shape[2] * ((length + CHUNK - 1) // CHUNK)
    for t in prange(threads):
        attend_row_chunks(
            q, k, v, table, length, scale, partial, scratch[t], units * t // threads, units * (t + 1) // threads
        )
