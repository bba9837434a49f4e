"""What attention does to a tile: some rows (queries that share a kv head) against blocks of keys and values.

The queries of a tile lie beside each other, number by number. Sums are taken position by position and
dimension by dimension, so that a row's result depends neither on the tile's size nor on its other rows.
"""

from typing import Any

import numpy as np

from ruvllm.kernels.jit.decorators import inline_kernel
from ruvllm.kernels.matmul.micro_kernels import LANES, WIDE
from ruvllm.kernels.simd.math import exp2_of_negative
from ruvllm.kernels.simd.vectors import (
    f32_load,
    f32_load_first,
    f32_store,
    f32_zero,
    fma_rows,
    fma_two,
    greater,
    hmax,
    lanes_between,
    load,
    load_rows,
    prefetch_l2,
    read_scales,
    scaled,
    scaled_rows,
    splat,
    store_rows,
    zip_rows,
)

# Rows of a tile and panels at a time, by the target's registers: 12 x 2 sums of AVX-512's 32 (14 loads serve 24
# multiply-adds), 6 x 1 of two registers each of AVX2's 16, 6 x 1 of four each of NEON's 32.
ROWS, PAIRS = (12, True) if WIDE else (6, False)
Q_STEP = 16 if WIDE else 8  # from one number of a tile's first query to its next: at least ROWS, a power of two
CHUNK = 256  # positions per step of the softmax: scores, keys and values of a chunk stay in the caches
LOG2_E = np.float32(1.4426950408889634)
NEGATIVE_INFINITY = np.float32(-np.inf)


@inline_kernel
def query_at(row: Any, kv: Any, group: Any, heads: Any, dim: Any) -> Any:
    """Where the query of row ``row`` of a kv head begins in q (T, H, D): token row // group, head row % group of it."""
    return (row // group * heads + kv * group + row % group) * dim


# The numbers of 4, 8 or 16 rows that lie beside each other, number by number.


@inline_kernel
def turned_4(scratch: Any, at: Any) -> Any:
    """Four rows of scratch transposed."""
    return zip_rows(zip_rows(load_rows(scratch, at, LANES, 4)))


@inline_kernel
def _turned_8(scratch: Any, at: Any) -> Any:
    return zip_rows(zip_rows(zip_rows(load_rows(scratch, at, LANES, 8))))


@inline_kernel
def _turned_16(scratch: Any, at: Any) -> Any:
    return zip_rows(zip_rows(zip_rows(zip_rows(load_rows(scratch, at, LANES, 16)))))


turned = _turned_16 if WIDE else _turned_8


@inline_kernel
def copy_queries(
    q: Any, first: Any, rows: Any, kv: Any, group: Any, heads: Any, dim: Any, factor: Any, scratch: Any, stage: Any,
    to: Any, step: Any, turn: Any,
) -> None:  # fmt: skip
    """scratch[to + d step + r] = factor q[row first + r, d] for r < rows, up to whole vectors of d.

    turn: makes lines of ``step`` rows, turned_4 or ``turned``. Needs 16 step floats of scratch at ``stage``.
    """
    for d in range(0, dim, LANES):
        for r in range(rows):
            at = query_at(first + r, kv, group, heads, dim) + d
            numbers = f32_load(q, at) if d + LANES <= dim else f32_load_first(q, at, dim - d)
            f32_store(scratch, stage + r * LANES, numbers * splat(factor))
        store_rows(scratch, to + d * step, LANES, turn(scratch, stage))


@inline_kernel
def scores(
    zeros: Any, keys: Any, ki: Any, block: Any, dim: Any, scratch: Any, queries: Any, step: Any, base: Any, start: Any,
    stop: Any,
) -> None:  # fmt: skip
    """scratch[base + r CHUNK + s] = query r times the key at s, for s in start:stop and the rest of the last block.

    ``zeros`` is a tuple of as many zeros as the tile has rows, whose numbers lie side by side, ``step`` apart from one
    dimension to the next; the block of ``start`` begins at keys[ki], the next ``block`` numbers behind it.
    """
    s = start
    while PAIRS and s + LANES < stop:
        left = right = zeros
        other, ahead = ki + block, ki + 2 * block
        for d in range(dim):
            prefetch_l2(keys, ahead + d * LANES)
            prefetch_l2(keys, ahead + block + d * LANES)
            left, right = fma_two(
                load(keys, ki + d * LANES), load(keys, other + d * LANES), scratch, queries + d * step, 1, left, right
            )
        store_rows(scratch, base + s, CHUNK, scaled_rows(keys, left, read_scales(keys, ki + dim * LANES)))
        store_rows(scratch, base + s + LANES, CHUNK, scaled_rows(keys, right, read_scales(keys, other + dim * LANES)))
        s += 2 * LANES
        ki += 2 * block
    while s < stop:
        left = zeros
        for d in range(dim):
            left = fma_rows(load(keys, ki + d * LANES), scratch, queries + d * step, 1, left)
        store_rows(scratch, base + s, CHUNK, scaled_rows(keys, left, read_scales(keys, ki + dim * LANES)))
        s += LANES
        ki += block


@inline_kernel
def largest_score(scratch: Any, base: Any, start: Any, stop: Any, first: Any, end: Any) -> Any:
    """The largest of a row's scores start:stop that lie in first:end; -inf if none does."""
    top = splat(NEGATIVE_INFINITY)
    for i in range(start, stop, LANES):
        found = f32_load(scratch, base + i)
        if i < first or i + LANES > end:
            found = lanes_between(found, first - i, end - i, NEGATIVE_INFINITY)
        top = greater(found, top)
    return hmax(top)


@inline_kernel
def to_weights(
    scratch: Any, base: Any, start: Any, stop: Any, first: Any, end: Any, top: Any, keys: Any, scales: Any, step: Any
) -> Any:
    """Turn a row's scores start:stop into weights 2^(score - top), 0 outside first:end; returns 16 sums of them.

    What is stored is the weight times the scale of its position's value (int8 caches): 16 scales at keys[scales],
    those of the next block ``step`` numbers behind.
    """
    zero_point = splat(top if top > NEGATIVE_INFINITY else np.float32(0))  # nothing seen so far: all weights are 0
    total = f32_zero()
    for i in range(start, stop, LANES):
        weights = exp2_of_negative(f32_load(scratch, base + i) - zero_point)
        to = scaled(keys, weights, read_scales(keys, scales + (i - start) // LANES * step))
        if i < first or i + LANES > end:
            weights = lanes_between(weights, first - i, end - i, np.float32(0))
            to = lanes_between(to, first - i, end - i, np.float32(0))
        f32_store(scratch, base + i, to)
        total = total + weights
    return total


@inline_kernel
def add_weighted_values(
    zeros: Any, values: Any, vi: Any, wide: Any, scratch: Any, weights: Any, count: Any, sums: Any, sums_row: Any
) -> None:
    """scratch[sums + r sums_row + d] += sum_s scratch[weights + r CHUNK + s] values[vi + s wide + d], d < wide."""
    d = 0
    while PAIRS and d + LANES < wide:
        left = load_rows(scratch, sums + d, sums_row, len(zeros))
        right = load_rows(scratch, sums + d + LANES, sums_row, len(zeros))
        for s in range(count):
            at = vi + s * wide + d
            left, right = fma_two(
                load(values, at), load(values, at + LANES), scratch, weights + s, CHUNK, left, right
            )
        store_rows(scratch, sums + d, sums_row, left)
        store_rows(scratch, sums + d + LANES, sums_row, right)
        d += 2 * LANES
    while d < wide:
        left = load_rows(scratch, sums + d, sums_row, len(zeros))
        for s in range(count):
            left = fma_rows(load(values, vi + s * wide + d), scratch, weights + s, CHUNK, left)
        store_rows(scratch, sums + d, sums_row, left)
        d += LANES
