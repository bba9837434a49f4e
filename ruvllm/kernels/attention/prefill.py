"""Attention of new tokens over a KV cache (attention/kv.py), in one pass of online softmax (flash attention).

Rows of a tile are query heads and tokens that share a kv head: row i of kv head g is token i // (H/KV) and query head
g H/KV + i % (H/KV), so that every key and value that is loaded serves all of them. A block of 16 keys is a panel:
scores of 16 positions without sums across lanes. Values lie by position, so their weighted sum is a panel product too.

Softmax is computed while reading: per query the largest score so far m, the sum l of 2^(score - m) and the sum of
weighted values are rescaled when m grows (Milakov & Gimelshein 2018; Dao et al. 2022). Scores are scaled by log2(e),
so that 2^x serves for e^x. A query sees positions max(0, p - window + 1) .. p, by loop bounds; nothing outside them
counts. Chunks of positions begin at multiples of CHUNK and sums are taken position by position, so that a token's
result depends on no other token of the call, as long as their values are finite.
"""

from typing import Any

import numpy as np
from numba import prange

from ruvllm.kernels.attention import decode as token_attention
from ruvllm.kernels.attention.tile import (
    CHUNK,
    LOG2_E,
    NEGATIVE_INFINITY,
    Q_STEP,
    ROWS,
    add_weighted_values,
    copy_queries,
    largest_score,
    query_at,
    scores,
    to_weights,
    turned,
)
from ruvllm.kernels.jit.decorators import as_part, inline_kernel, kernel, parallel_kernel, part_kernel
from ruvllm.kernels.jit.views import flat
from ruvllm.kernels.matmul.micro_kernels import LANES, WIDE, put
from ruvllm.kernels.simd.math import exp2_of_negative
from ruvllm.kernels.simd.vectors import f32_load, f32_store, f32_zero, f32_zeros, fma, hsum, splat
from ruvllm.kernels.threads.pool import PARALLEL_MACS, launch, threads_for
from ruvllm.kernels.threads.team import TURN_STEP, part, take_turn, turn_counts

_UNITS = 4  # that make a turn
MOST_TILES = 4 if WIDE else 6  # that read a chunk of keys and values while the second-level cache holds it
NO_WINDOW = 1 << 62


def scratch_size(head_dim: int) -> int:
    """Floats of scratch that one thread needs: scores and queries of a tile; queries, sums, l, m of all; old m."""
    wide = (head_dim + LANES - 1) // LANES * LANES
    return ROWS * CHUNK + Q_STEP * LANES + MOST_TILES * (Q_STEP * wide + ROWS * (wide + LANES) + LANES) + LANES


def attend_split(tokens: int, heads: int, kv_heads: int) -> tuple[int, int]:
    """How attend_units divides its work: (tiles of one unit, units).

    As many tiles as can share what is read, but fewer where threads would have too few units.
    """
    rows = tokens * (heads // kv_heads)
    tiles = max(1, min(MOST_TILES, (rows + ROWS - 1) // ROWS * kv_heads // 16))
    return tiles, kv_heads * ((rows + tiles * ROWS - 1) // (tiles * ROWS))


_split = inline_kernel(attend_split)


@kernel(strict=True)
def attend_units(
    q: Any, keys: Any, values: Any, positions: Any, window: Any, scale: Any, out: Any, scratch: Any, lo: Any, hi: Any
) -> None:
    """Attention of q (T, H, D) into out (T, H, D), for the units lo:hi of attend_split(T, H, KV).

    A unit is one kv head and some tiles of rows. positions (T,) must be appended already.
    scratch: (scratch_size(D),) float32, this thread's own.
    """
    tokens, heads, dim = q.shape
    kv_heads = keys.shape[0]
    group = heads // kv_heads
    wide = values.shape[2]
    unit_tiles, units = _split(tokens, heads, kv_heads)
    most, count = unit_tiles * ROWS, units // kv_heads
    q_flat, out_flat = flat(q), flat(out)
    keys_flat, values_flat = flat(keys), flat(values)
    block = keys.shape[2] * LANES
    stage = ROWS * CHUNK
    queries = stage + Q_STEP * LANES
    sums = queries + MOST_TILES * Q_STEP * wide
    totals = sums + MOST_TILES * ROWS * wide
    tops = totals + MOST_TILES * ROWS * LANES
    old_tops = tops + MOST_TILES * LANES
    for i in range(0, tops, LANES):
        f32_store(scratch, i, f32_zero())
    for unit in range(lo, hi):
        # Early and late rows by turns: a causal mask gives late ones more to do, and threads take runs of units.
        kv, turn = unit // count, unit % count
        first_row = (turn // 2 if turn % 2 == 0 else count - 1 - turn // 2) * most
        rows = min(most, tokens * group - first_row)
        for tile in range(0, rows, ROWS):
            copy_queries(
                q_flat, first_row + tile, min(ROWS, rows - tile), kv, group, heads, dim, scale * LOG2_E,
                scratch, stage, queries + tile // ROWS * Q_STEP * wide, Q_STEP, turned,
            )  # fmt: skip
        for i in range(sums, sums + rows * wide, LANES):
            f32_store(scratch, i, f32_zero())
        for row in range(rows):
            f32_store(scratch, totals + row * LANES, f32_zero())
        for i in range(tops, old_tops, LANES):
            f32_store(scratch, i, splat(NEGATIVE_INFINITY))
        first, end = _span(positions, first_row, rows, group, window)
        for chunk in range(first // CHUNK * CHUNK, end, CHUNK):
            for tile in range(0, rows, ROWS):
                tile_rows = min(ROWS, rows - tile)
                tile_first, tile_end = _span(positions, first_row + tile, tile_rows, group, window)
                begin = max(tile_first, chunk) // LANES * LANES  # whole blocks of keys: the rest is masked below
                start, stop = begin - chunk, min(tile_end - chunk, CHUNK)
                if start >= stop:
                    continue
                ki = (kv * keys.shape[1] + begin // LANES) * block
                vi = (kv * values.shape[1] + begin) * wide
                scores(
                    f32_zeros(ROWS), keys_flat, ki, block, dim,
                    scratch, queries + tile // ROWS * Q_STEP * wide, Q_STEP, 0, start, stop,
                )  # fmt: skip
                _softmax_step(
                    scratch, start, stop, chunk, positions, first_row + tile, tile_rows, group, window,
                    tops + tile // ROWS * LANES, old_tops, totals + tile * LANES, sums + tile * wide, wide,
                    keys_flat, ki + (dim + 4) * LANES, block,
                )  # fmt: skip
                add_weighted_values(
                    f32_zeros(ROWS), values_flat, vi, wide, scratch, start, stop - start, sums + tile * wide, wide
                )
        for row in range(rows):
            # Where every score was -inf, so is the largest: from them no weights follow, so NaN.
            top = scratch[tops + row // ROWS * LANES + row % ROWS]
            inverse = splat(np.float32(1) / hsum(f32_load(scratch, totals + row * LANES)) + (top - top))
            oi = query_at(first_row + row, kv, group, heads, dim)
            for d in range(0, dim, LANES):
                put(out_flat, oi + d, f32_load(scratch, sums + row * wide + d) * inverse, dim - d, False)


@inline_kernel
def _span(positions: Any, first_row: Any, rows: Any, group: Any, window: Any) -> Any:
    """First position and end of the positions that any of the rows sees."""
    t0, t1 = first_row // group, (first_row + rows - 1) // group
    first, end = positions[t0], positions[t0]
    for t in range(t0 + 1, t1 + 1):
        first, end = min(first, positions[t]), max(end, positions[t])
    return max(0, first - window + 1), end + 1


@inline_kernel
def _softmax_step(
    scratch: Any, start: Any, stop: Any, chunk: Any, positions: Any, first_row: Any, rows: Any, group: Any,
    window: Any, tops: Any, old_tops: Any, totals: Any, sums: Any, wide: Any, keys: Any, scales: Any, block: Any,
) -> None:  # fmt: skip
    """Turn scores start:stop of a tile's rows into weights 2^(score - m); weights of what a row does not see are 0.

    Where m grew, the row's l (16 partial sums) and weighted sums are rescaled by 2^(old m - new m). One thing after
    the other for all rows, so that a row's chain of operations does not have to wait for that of the last one.
    """
    f32_store(scratch, old_tops, f32_load(scratch, tops))
    for r in range(rows):
        first, end = _span(positions, first_row + r, 1, group, window)
        found = largest_score(scratch, r * CHUNK, start, stop, first - chunk, end - chunk)
        scratch[tops + r] = max(scratch[tops + r], found)
    for r in range(rows):
        first, end = _span(positions, first_row + r, 1, group, window)
        total = to_weights(
            scratch, r * CHUNK, start, stop, first - chunk, end - chunk, scratch[tops + r], keys, scales, block
        )
        shrink = exp2_of_negative(splat(scratch[old_tops + r] - scratch[tops + r]))
        if scratch[tops + r] > scratch[old_tops + r]:
            total = fma(f32_load(scratch, totals + r * LANES), shrink, total)
            for i in range(sums + r * wide, sums + (r + 1) * wide, LANES):
                f32_store(scratch, i, f32_load(scratch, i) * shrink)
        else:
            total = f32_load(scratch, totals + r * LANES) + total
        f32_store(scratch, totals + r * LANES, total)


attend_units_part = as_part(attend_units)


@part_kernel
def attend_turns(
    q: Any, keys: Any, values: Any, positions: Any, window: Any, scale: Any, out: Any, scratch: Any, first: Any,
    end: Any, counts: Any, share: Any, alone: Any,
) -> None:  # fmt: skip
    """attend_units of the units first:end by chunks that are left; counts[share] numbers them (threads/team.py)."""
    lo = first + take_turn(counts, share, alone) * _UNITS
    while lo < end:
        attend_units_part(q, keys, values, positions, window, scale, out, scratch, lo, min(lo + _UNITS, end))
        lo = first + take_turn(counts, share, alone) * _UNITS


@parallel_kernel
def attend_parallel(
    q: Any, keys: Any, values: Any, positions: Any, window: Any, scale: Any, out: Any, scratch: Any, counts: Any,
    threads: Any,
) -> None:  # fmt: skip
    """attend_units with the units split over threads; who has done its own takes turns of the others'.

    scratch (threads, scratch_size(D)); counts: turn_counts(threads).
    """
    _, units = _split(q.shape[0], q.shape[1], keys.shape[0])
    for t in prange(threads):
        for i in range(threads):
            member = (t + i) % threads
            first, end = part(units, member, threads)
            share = member * TURN_STEP
            attend_turns(
                q, keys, values, positions, window, scale, out, scratch[t], first, end, counts, share, False
            )  # fmt: skip


@parallel_kernel
def attend_token_parallel(
    q: Any, keys: Any, values: Any, position: Any, window: Any, scale: Any, partial: Any, scratch: Any, threads: Any
) -> None:
    """attend_token_chunks with the units split over threads; merge_chunks has to follow.

    partial (H, chunks, partial_width(D)); scratch (threads, token_scratch_size(D, H / KV)).
    """
    units = keys.shape[0] * partial.shape[1]
    for t in prange(threads):
        lo, hi = units * t // threads, units * (t + 1) // threads
        token_attention.attend_token_chunks(q, keys, values, position, window, scale, partial, scratch[t], lo, hi)


def cached_attention(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    positions: np.ndarray,
    window: int | None,
    scale: float,
    out: np.ndarray,
    scratch: np.ndarray,
) -> np.ndarray:
    """out (T, H, D) = softmax(scale q k^T) v over the positions that each query sees in the cache of one layer.

    For callers that own their buffers (``model.Attention``): sizes are theirs to guarantee.
    scratch: (threads at the most, scratch_size(D)) float32.
    """
    tokens, heads, dim = q.shape
    reach = NO_WINDOW if window is None else window
    if tokens == 1:
        _attend_token(q[0], keys, values, int(positions[0]), reach, np.float32(scale), out[0], len(scratch))
        return out
    work = int(tokens * heads * dim * min(int(positions[-1]) + 1, reach))
    _, units = attend_split(tokens, heads, len(keys))
    threads = min(threads_for(work, PARALLEL_MACS, units), len(scratch))
    if threads == 1:
        attend_units(q, keys, values, positions, reach, np.float32(scale), out, scratch[0], 0, units)
    else:
        counts = turn_counts(threads)
        launch(attend_parallel, q, keys, values, positions, reach, np.float32(scale), out, scratch, counts, threads)
    return out


def _attend_token(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, position: int, window: int, scale: np.float32, out: np.ndarray,
    most: int,
) -> None:  # fmt: skip
    """One token, by the bodies that the decode region uses, on at most so many threads."""
    heads, dim = q.shape
    chunks = position // CHUNK + 1 - max(0, position - window + 1) // CHUNK
    units, size = len(keys) * chunks, token_attention.token_scratch_size(dim, heads // len(keys))
    threads = min(threads_for(2 * heads * dim * min(position + 1, window), PARALLEL_MACS, units), most)
    partial = np.empty((heads, chunks, token_attention.partial_width(dim)), np.float32)
    scratch = np.empty((threads, size), np.float32)
    if threads == 1:
        token_attention.attend_token_chunks(q, keys, values, position, window, scale, partial, scratch[0], 0, units)
    else:
        launch(attend_token_parallel, q, keys, values, position, window, scale, partial, scratch, threads)
    token_attention.merge_chunks(partial, chunks, out, 0, heads)
