"""Attention of one new token over a KV cache, cut into chunks of positions so that threads can share long contexts.

Each kv head and chunk of 256 positions is a unit: it gives, for every query head of the group, the largest score m,
l = sum 2^(score - m) and the sum of values weighted by 2^(score - m), with scores scaled by log2(e) so that 2^x serves
for e^x. ``merge_chunks`` adds the chunks of a head up, each times 2^(m - largest m) ("flash-decoding", Dao et al.
2023). Chunks are cut at fixed positions, so the result does not depend on the number of threads. The cache's layout is
that of attention/kv.py.
"""

from typing import Any

import numpy as np

from ruvllm.kernels.attention.tile import (
    CHUNK,
    LOG2_E,
    PAIRS,
    copy_queries,
    largest_score,
    scores,
    to_weights,
    turned_4,
)
from ruvllm.kernels.jit.decorators import inline_kernel, kernel
from ruvllm.kernels.jit.views import flat
from ruvllm.kernels.matmul.micro_kernels import LANES
from ruvllm.kernels.simd.math import exp2_of_negative
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
    prefetch_l2,
    store_rows,
)

GROUP = 4  # query heads that read a block of keys and values together


def partial_width(head_dim: int) -> int:
    """Floats of one head's result of one chunk: the weighted sum, padded to whole vectors, then m and l."""
    return (head_dim + LANES - 1) // LANES * LANES + LANES


def token_scratch_size(head_dim: int, group: int) -> int:
    """Floats of scratch that one thread needs: scores of the heads of a group; queries and sums of GROUP of them."""
    wide = (head_dim + LANES - 1) // LANES * LANES
    return (group + GROUP - 1) // GROUP * GROUP * CHUNK + GROUP * LANES + 2 * GROUP * wide


def chunk_count(positions: int) -> int:
    """Chunks that may hold ``positions`` positions."""
    return (positions + CHUNK - 1) // CHUNK


@kernel(strict=True)
def attend_token_chunks(
    q: Any, keys: Any, values: Any, position: Any, window: Any, scale: Any, partial: Any, scratch: Any, lo: Any, hi: Any
) -> None:
    """Units lo:hi of the token at ``position``: unit = kv head * chunks + chunk, counted from the first chunk it sees.

    q (H, D); partial (H, chunks, partial_width(D)); scratch (token_scratch_size(D, H / KV),).
    """
    heads, dim = q.shape
    group = heads // keys.shape[0]
    wide = values.shape[2]
    width = partial.shape[2]
    first, end = max(0, position - window + 1), position + 1
    first_chunk = first // CHUNK
    chunks = (end + CHUNK - 1) // CHUNK - first_chunk
    q_flat, keys_flat, values_flat, parts = flat(q), flat(keys), flat(values), flat(partial)
    block = keys.shape[2] * LANES
    stage = (group + GROUP - 1) // GROUP * GROUP * CHUNK
    queries = stage + GROUP * LANES
    sums = queries + GROUP * wide
    for i in range(stage, queries, LANES):
        f32_store(scratch, i, f32_zero())
    for unit in range(lo, hi):
        kv, c = unit // chunks, unit % chunks
        base = (first_chunk + c) * CHUNK
        begin = max(first, base) // LANES * LANES
        start, stop = begin - base, min(end - base, CHUNK)
        ki = (kv * keys.shape[1] + begin // LANES) * block
        vi = (kv * values.shape[1] + begin) * wide
        for r in range(0, group, GROUP):
            copy_queries(
                q_flat, r, min(GROUP, group - r), kv, group, heads, dim, scale * LOG2_E, scratch, stage, queries,
                GROUP, turned_4,
            )  # fmt: skip
            if group == 1:
                scores(f32_zeros(1), keys_flat, ki, block, dim, scratch, queries, GROUP, 0, start, stop)
            else:
                scores(f32_zeros(GROUP), keys_flat, ki, block, dim, scratch, queries, GROUP, r * CHUNK, start, stop)
        for r in range(0, group, GROUP):
            for head in range(r, min(r + GROUP, group)):
                at = ((kv * group + head) * partial.shape[1] + c) * width + wide
                top = largest_score(scratch, head * CHUNK, start, stop, first - base, end - base)
                total = to_weights(
                    scratch, head * CHUNK, start, stop, first - base, end - base, top,
                    keys_flat, ki + (dim + 4) * LANES, block,
                )  # fmt: skip
                parts[at] = top
                parts[at + 1] = hsum(total)
            for i in range(sums, sums + GROUP * wide, LANES):
                f32_store(scratch, i, f32_zero())
            weights, count = r * CHUNK + start, stop - start
            ahead = vi + count * wide
            if group == 1:
                add_weighted_values(f32_zeros(1), values_flat, vi, wide, wide, scratch, weights, count, sums, ahead)
            else:
                add_weighted_values(f32_zeros(GROUP), values_flat, vi, wide, wide, scratch, weights, count, sums, ahead)
            for head in range(r, min(r + GROUP, group)):
                at = ((kv * group + head) * partial.shape[1] + c) * width
                for d in range(0, wide, LANES):
                    f32_store(parts, at + d, f32_load(scratch, sums + (head - r) * wide + d))


@inline_kernel
def add_weighted_values(
    zeros: Any, values: Any, vi: Any, step: Any, wide: Any, scratch: Any, weights: Any, count: Any, sums: Any,
    ahead: Any,
) -> None:  # fmt: skip
    """scratch[sums + r wide + d] += sum_s scratch[weights + r CHUNK + s] values[vi + s step + d], for d < wide.

    A run of four vectors of each value while it is there: memory is read in long pieces. As many values from ``ahead``
    on, which come next, are asked for in the order in which they lie: then the processor foresees what follows.
    """
    d = 0
    while (PAIRS or len(zeros) == 1) and d + 4 * LANES <= wide:
        s0 = load_rows(scratch, sums + d, wide, len(zeros))
        s1 = load_rows(scratch, sums + d + LANES, wide, len(zeros))
        s2 = load_rows(scratch, sums + d + 2 * LANES, wide, len(zeros))
        s3 = load_rows(scratch, sums + d + 3 * LANES, wide, len(zeros))
        for s in range(count):
            at, w, line = vi + s * step + d, weights + s, ahead + d * count + 4 * s * LANES
            for i in range(4):
                prefetch_l2(values, line + i * LANES)
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
        for s in range(count):
            s0 = fma_rows(load(values, vi + s * step + d), scratch, weights + s, CHUNK, s0)
        store_rows(scratch, sums + d, wide, s0)
        d += LANES


@kernel(strict=True)
def merge_chunks(partial: Any, chunks: Any, out: Any, lo: Any, hi: Any) -> None:
    """out (H, D) for heads lo:hi from the first ``chunks`` of partial (H, >= chunks, partial_width(D))."""
    dim, state = out.shape[1], partial.shape[2] - LANES
    for head in range(lo, hi):
        parts, y = partial[head], out[head]
        top = parts[0, state]
        for c in range(1, chunks):
            top = max(top, parts[c, state])
        total = np.float32(0)
        y[:] = total
        for c in range(chunks):
            weight = exp2_of_negative(parts[c, state] - top)
            total += parts[c, state + 1] * weight
            add_multiple(weight, parts[c, :dim], y)
        multiply(y, np.float32(1) / total)


@inline_kernel(independent=True)
def add_multiple(factor: Any, x: Any, y: Any) -> None:
    """y += factor x."""
    for i in range(y.size):
        y[i] = fma(factor, x[i], y[i])


@inline_kernel(independent=True)
def multiply(y: Any, factor: Any) -> None:
    """y *= factor."""
    for i in range(y.size):
        y[i] *= factor
