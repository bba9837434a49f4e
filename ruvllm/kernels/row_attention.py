"""Attention of one token over keys and values that lie in rows, perhaps in blocks of a pool (paged).

Chunks of 256 positions give partial results that are merged, as in token_attention.py. Rows of keys are not panels, so
sixteen positions' products with a query are summed lane by lane first, and their lanes then together: 45 operations
for sixteen scores. Rows that are no whole vectors, or crowd each other out of the cache, and groups of 16 positions
that lie in several blocks or end early, are copied together before; the results are the same bits.
"""

from typing import Any

import numpy as np
from numba import prange

from ruvllm.kernels._attention_tile import CHUNK, LOG2_E, largest_score, to_weights
from ruvllm.kernels._jit import inline_kernel, kernel, parallel_kernel
from ruvllm.kernels._simd import (
    f32_load,
    f32_load_first,
    f32_store,
    f32_zero,
    f32_zeros,
    fma_each,
    hsum,
    load_rows,
    splat,
    sum_lanes,
)
from ruvllm.kernels._tile import LANES
from ruvllm.kernels._views import flat
from ruvllm.kernels.token_attention import GROUP, add_weighted_values

_ONE = np.float32(1)
_CROWDED = 512  # rows so many floats apart, or a multiple, have too few places in the first-level cache for 16 of them


def row_scratch_size(head_dim: int, group: int) -> int:
    """Floats of scratch that one thread needs: scores, queries and sums of a group's heads; 16 rows."""
    heads = (group + GROUP - 1) // GROUP * GROUP
    return heads * CHUNK + (2 * heads + LANES) * ((head_dim + LANES - 1) // LANES * LANES)


@kernel(strict=True)
def attend_row_chunks(
    q: Any, k: Any, v: Any, table: Any, length: Any, scale: Any, partial: Any, scratch: Any, lo: Any, hi: Any
) -> None:
    """Units lo:hi of one token: unit = kv head * chunks + chunk.

    q (H, D); k, v (blocks, block_size, KV, D): row s of the sequence is row s % block_size of block
    table[s // block_size]. partial (H, chunks, partial_width(D)); scratch (row_scratch_size(D, H / KV),).
    """
    heads, dim = q.shape
    size, kv_heads = k.shape[1], k.shape[2]
    group = heads // kv_heads
    step = kv_heads * dim
    wide = (dim + LANES - 1) // LANES * LANES
    width = partial.shape[2]
    chunks = (length + CHUNK - 1) // CHUNK
    q_flat, k_flat, v_flat, parts = flat(q), flat(k), flat(v), flat(partial)
    tiled = (group + GROUP - 1) // GROUP * GROUP
    queries = tiled * CHUNK
    sums = queries + tiled * wide
    rows = sums + tiled * wide
    for unit in range(lo, hi):
        kv, c = unit // chunks, unit % chunks
        base = c * CHUNK
        count = min(length - base, CHUNK)
        _copy_rows(q_flat, kv * group * dim, dim, group, dim, wide, scale * LOG2_E, scratch, queries)
        for i in range(sums, rows, LANES):
            f32_store(scratch, i, f32_zero())
        for s in range(0, count, LANES):
            at = _run(table, base + s, length, size, wide == dim and (group == 1 or step % _CROWDED != 0))
            if at >= 0:
                _scores(k_flat, at * step + kv * dim, step, scratch, queries, wide, group, s)
            else:
                _gather(k_flat, table, base + s, length, size, step, kv * dim, dim, wide, scratch, rows)
                _scores(scratch, rows, wide, scratch, queries, wide, group, s)
        for head in range(group):
            at = ((kv * group + head) * partial.shape[1] + c) * width + wide
            top = largest_score(scratch, head * CHUNK, 0, count, 0, count)
            total = to_weights(scratch, head * CHUNK, 0, count, 0, count, top, k_flat, 0, 0)
            parts[at] = top
            parts[at + 1] = hsum(total)
        for r in range(0, group, GROUP):
            s = 0
            while s < count:
                at = _run(table, base + s, length, size, wide == dim)
                weights, to = r * CHUNK + s, sums + r * wide
                n = min(count - s, LANES)
                if at >= 0 and size >= length:  # one run of rows
                    n = count - s
                if at >= 0 and group == 1:
                    add_weighted_values(f32_zeros(1), v_flat, at * step + kv * dim, step, wide, scratch, weights, n, to)
                elif at >= 0:
                    add_weighted_values(
                        f32_zeros(GROUP), v_flat, at * step + kv * dim, step, wide, scratch, weights, n, to
                    )
                else:
                    _gather(v_flat, table, base + s, length, size, step, kv * dim, dim, wide, scratch, rows)
                    add_weighted_values(f32_zeros(GROUP), scratch, rows, wide, wide, scratch, weights, n, to)
                s += n
        for head in range(group):
            at = ((kv * group + head) * partial.shape[1] + c) * width
            for d in range(0, wide, LANES):
                f32_store(parts, at + d, f32_load(scratch, sums + head * wide + d))


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
def _scores(keys: Any, ki: Any, step: Any, scratch: Any, queries: Any, wide: Any, group: Any, to: Any) -> None:
    """scratch[to + r CHUNK + j] = query r times the key at ki + j step, for j < 16."""
    for r in range(group):
        sums = f32_zeros(LANES)
        for d in range(0, wide, LANES):
            sums = fma_each(f32_load(scratch, queries + r * wide + d), load_rows(keys, ki + d, step, LANES), sums)
        f32_store(scratch, to + r * CHUNK, sum_lanes(sums))


@parallel_kernel
def attend_rows_parallel(
    q: Any, k: Any, v: Any, table: Any, length: Any, scale: Any, partial: Any, scratch: Any, threads: Any
) -> None:
    """attend_row_chunks with the units split over threads; scratch (threads, row_scratch_size(D, H / KV))."""
    units = k.shape[2] * ((length + CHUNK - 1) // CHUNK)
    for t in prange(threads):
        attend_row_chunks(
            q, k, v, table, length, scale, partial, scratch[t], units * t // threads, units * (t + 1) // threads
        )
