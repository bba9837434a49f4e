"""Attention of many new tokens over a KV cache (attention/kv.py), in one pass of online softmax (flash attention).

A tile's rows are the queries (tokens and query heads) that share a kv head, so that each key and value that is loaded
serves all of them. A block of 16 keys is a panel: 16 scores without sums across lanes. Values lie by position, so
their weighted sum is a panel product too.

Softmax is computed on the way: for each query, the largest score so far m, the sum l of 2^(score - m) and the weighted
sum of values are rescaled when m grows (Milakov & Gimelshein 2018; Dao et al. 2022). Scores are scaled by log2(e), so
that 2^x serves for e^x. A query sees positions max(0, p - window + 1) .. p; loop bounds and masked lanes exclude all
others. Chunks begin at multiples of CHUNK and sums run position by position: a token's result depends on no other
token of the call, as long as their values are finite.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import prange

from ruvllm.kernels.attention.decode import attend_token, merge_chunks, partial_width, token_scratch_size
from ruvllm.kernels.attention.tile import (
    CHUNK,
    NEGATIVE_INFINITY,
    Q_STEP,
    ROWS,
    Cache,
    Heads,
    Keys,
    Queries,
    Scoring,
    Span,
    add_weighted_values,
    cap_scores,
    copy_queries,
    largest_score,
    normaliser,
    query_at,
    query_factor,
    scores,
    to_weights,
    transpose,
)
from ruvllm.kernels.jit.decorators import as_part, inline_kernel, kernel, parallel_kernel, part_kernel
from ruvllm.kernels.jit.views import flat
from ruvllm.kernels.matmul.micro_kernels import LANES, WIDE, put
from ruvllm.kernels.simd.math import exp2_of_negative
from ruvllm.kernels.simd.vectors import f32_load, f32_store, f32_zero, f32_zeros, fma, hsum, splat
from ruvllm.kernels.threads.pool import PARALLEL_MACS, launch, threads_for
from ruvllm.kernels.threads.team import COUNTER_STRIDE, chunk_counters, share_of, take_chunk

_UNITS = 4  # of a chunk of work
MOST_TILES = 4 if WIDE else 6  # that read a chunk of keys and values while it is in the L2 cache
NO_WINDOW = 1 << 62
_NO_SINKS = np.empty(0, np.float32)


def prompt_scratch_size(head_dim: int) -> int:
    """Floats of scratch per thread: scores and queries of a tile; queries, sums, l and m of all tiles; old m."""
    wide = (head_dim + LANES - 1) // LANES * LANES
    return ROWS * CHUNK + Q_STEP * LANES + MOST_TILES * (Q_STEP * wide + ROWS * (wide + LANES) + LANES) + LANES


class Rows(NamedTuple):
    """``count`` rows from ``first`` on, numbered as in ``Heads``: ``group`` rows of each token. positions: (T,)."""

    positions: Any
    first: Any
    count: Any
    group: Any


class Softmax(NamedTuple):
    """A tile's online softmax in scratch: m of each row at tops, before this chunk at old_tops; 16 partial sums of l
    of each row at totals; weighted sums of values (rows, wide) at sums."""

    scratch: Any
    tops: Any
    old_tops: Any
    totals: Any
    sums: Any
    wide: Any


def prompt_units(tokens: int, heads: int, kv_heads: int) -> tuple[int, int]:
    """How attend_prompt divides its work: (tiles of one unit, units).

    As many tiles as can share what is read, but fewer where threads would have too few units.
    """
    rows = tokens * (heads // kv_heads)
    tiles = max(1, min(MOST_TILES, (rows + ROWS - 1) // ROWS * kv_heads // 16))
    return tiles, kv_heads * ((rows + tiles * ROWS - 1) // (tiles * ROWS))


_units = inline_kernel(prompt_units)


@kernel(strict=True)
def attend_prompt(q, cache, positions, scoring, out, scratch, lo, hi):
    """Attention of q (T, H, D) into out (T, H, D), for the units lo:hi of prompt_units(T, H, KV).

    A unit is one kv head and some tiles of rows. cache: a ``Cache``, to which positions (T,) are appended already;
    scoring: a ``Scoring``; scratch: (prompt_scratch_size(D),) float32, this thread's own.
    """
    tokens, heads, dim = q.shape
    keys, values = cache.keys, cache.values
    kv_heads = keys.shape[0]
    group = heads // kv_heads
    wide = values.shape[2]
    unit_tiles, units = _units(tokens, heads, kv_heads)
    most, count = unit_tiles * ROWS, units // kv_heads
    q_flat, out_flat = flat(q), flat(out)
    keys_flat, values_flat = flat(keys), flat(values)
    block = keys.shape[2] * LANES
    panels = Keys(keys_flat, block, dim)
    stage = ROWS * CHUNK
    queries = stage + Q_STEP * LANES
    sums = queries + MOST_TILES * Q_STEP * wide
    totals = sums + MOST_TILES * ROWS * wide
    tops = totals + MOST_TILES * ROWS * LANES
    old_tops = tops + MOST_TILES * LANES
    for i in range(0, tops, LANES):
        f32_store(scratch, i, f32_zero())
    for unit in range(lo, hi):
        # Early and late rows alternate: the causal mask gives late ones more to do, and threads take runs of units.
        kv, index = unit // count, unit % count
        first_row = (index // 2 if index % 2 == 0 else count - 1 - index // 2) * most
        rows = min(most, tokens * group - first_row)
        of = Heads(q_flat, kv, group, heads, dim)
        for tile in range(0, rows, ROWS):
            to = Queries(scratch, queries + tile // ROWS * Q_STEP * wide, Q_STEP)
            copy_queries(of, first_row + tile, min(ROWS, rows - tile), query_factor(scoring), to, stage, transpose)
        for i in range(sums, sums + rows * wide, LANES):
            f32_store(scratch, i, f32_zero())
        for row in range(rows):
            f32_store(scratch, totals + row * LANES, f32_zero())
        for i in range(tops, old_tops, LANES):
            f32_store(scratch, i, splat(NEGATIVE_INFINITY))
        first, end = _seen(Rows(positions, first_row, rows, group), scoring.window)
        for chunk in range(first // CHUNK * CHUNK, end, CHUNK):
            for tile in range(0, rows, ROWS):
                tile_rows = Rows(positions, first_row + tile, min(ROWS, rows - tile), group)
                tile_first, tile_end = _seen(tile_rows, scoring.window)
                begin = max(tile_first, chunk) // LANES * LANES  # whole blocks of keys: the rest is masked below
                start, stop = begin - chunk, min(tile_end - chunk, CHUNK)
                if start >= stop:
                    continue
                stored = chunk % values.shape[1] + start
                ki = (kv * keys.shape[1] + stored // LANES) * block
                vi = (kv * values.shape[1] + stored) * wide
                tile_queries = Queries(scratch, queries + tile // ROWS * Q_STEP * wide, Q_STEP)
                scores(f32_zeros(ROWS), panels, ki, tile_queries, 0, start, stop)
                if scoring.softcap > 0:
                    for row in range(tile_rows.count):
                        cap_scores(scratch, row * CHUNK, start, stop, scoring.softcap)
                state = Softmax(
                    scratch, tops + tile // ROWS * LANES, old_tops, totals + tile * LANES, sums + tile * wide, wide
                )
                _softmax_step(state, tile_rows, scoring.window, chunk, start, stop, panels, ki)
                add_weighted_values(
                    f32_zeros(ROWS), values_flat, vi, wide, scratch, start, stop - start, sums + tile * wide
                )
        for row in range(rows):
            # If every score is -inf, so is the largest, and the softmax is undefined: top - top makes the result NaN.
            top = scratch[tops + row // ROWS * LANES + row % ROWS]
            head, total = kv * group + (first_row + row) % group, hsum(f32_load(scratch, totals + row * LANES))
            inverse = splat(normaliser(scoring.sinks, head, top, total) + (top - top))
            oi = query_at(of, first_row + row)
            for d in range(0, dim, LANES):
                put(out_flat, oi + d, f32_load(scratch, sums + row * wide + d) * inverse, dim - d, False)


@inline_kernel
def _seen(rows, window):
    """First position and end of the positions that any of the rows sees."""
    positions, group = rows.positions, rows.group
    t0, t1 = rows.first // group, (rows.first + rows.count - 1) // group
    first, end = positions[t0], positions[t0]
    for t in range(t0 + 1, t1 + 1):
        first, end = min(first, positions[t]), max(end, positions[t])
    return max(0, first - window + 1), end + 1


@inline_kernel
def _row_span(rows, r, window, chunk, start, stop):
    """The span start:stop of a chunk, and what row r sees of it."""
    first, end = _seen(Rows(rows.positions, rows.first + r, 1, rows.group), window)
    return Span(start, stop, first - chunk, end - chunk)


@inline_kernel
def _softmax_step(state, rows, window, chunk, start, stop, keys, ki):
    """Turn scores start:stop of a tile's rows into weights 2^(score - m); weights of what a row does not see are 0.

    Where m grew, the row's l and weighted sums are rescaled by 2^(old m - new m). Two loops over the rows, so that one
    row's chain of operations need not wait for another's.
    """
    scratch, tops, old_tops, wide = state.scratch, state.tops, state.old_tops, state.wide
    f32_store(scratch, old_tops, f32_load(scratch, tops))
    for r in range(rows.count):
        found = largest_score(scratch, r * CHUNK, _row_span(rows, r, window, chunk, start, stop))
        scratch[tops + r] = max(scratch[tops + r], found)
    for r in range(rows.count):
        span, scales = _row_span(rows, r, window, chunk, start, stop), ki + (keys.dim + 4) * LANES
        total = to_weights(scratch, r * CHUNK, span, scratch[tops + r], keys.elements, scales, keys.block)
        shrink = exp2_of_negative(splat(scratch[old_tops + r] - scratch[tops + r]))
        at = state.totals + r * LANES
        if scratch[tops + r] > scratch[old_tops + r]:
            total = fma(f32_load(scratch, at), shrink, total)
            for i in range(state.sums + r * wide, state.sums + (r + 1) * wide, LANES):
                f32_store(scratch, i, f32_load(scratch, i) * shrink)
        else:
            total = f32_load(scratch, at) + total
        f32_store(scratch, at, total)


attend_prompt_part = as_part(attend_prompt)


@part_kernel
def attend_prompt_share(q, cache, positions, scoring, out, scratch, share):
    """attend_prompt of the chunks of a share of the units that nobody has claimed (``threads.team``)."""
    lo = share.lo + take_chunk(share) * _UNITS
    while lo < share.hi:
        attend_prompt_part(q, cache, positions, scoring, out, scratch, lo, min(lo + _UNITS, share.hi))
        lo = share.lo + take_chunk(share) * _UNITS


@parallel_kernel
def attend_prompt_parallel(q, cache, positions, scoring, out, scratch, counts, threads):
    """attend_prompt with the units split over threads; a thread that finishes steals chunks from the others.

    scratch (threads, prompt_scratch_size(D)); counts: chunk_counters(threads).
    """
    _, units = _units(q.shape[0], q.shape[1], cache.keys.shape[0])
    for t in prange(threads):
        for i in range(threads):
            member = (t + i) % threads
            share = share_of(units, counts, member * COUNTER_STRIDE, member, threads)
            attend_prompt_share(q, cache, positions, scoring, out, scratch[t], share)


@parallel_kernel
def attend_token_parallel(q, cache, position, scoring, partial, scratch, threads):
    """attend_token with the units split over threads; merge_chunks has to follow.

    partial (H, chunks, partial_width(D)); scratch (threads, token_scratch_size(D, H / KV)).
    """
    units = cache.keys.shape[0] * partial.shape[1]
    for t in prange(threads):
        lo, hi = units * t // threads, units * (t + 1) // threads
        attend_token(q, cache, position, scoring, partial, scratch[t], lo, hi)


def scoring_of(
    window: int | None, scale: float, softcap: float | None = None, sinks: np.ndarray | None = None
) -> Scoring:
    """``window`` positions, or all if None; scores are multiplied by ``scale``; see ``Scoring``."""
    return Scoring(
        NO_WINDOW if window is None else window, np.float32(scale), np.float32(softcap or 0),
        _NO_SINKS if sinks is None else sinks,
    )  # fmt: skip


def attend_cache(
    q: np.ndarray, cache: Cache, positions: np.ndarray, scoring: Scoring, out: np.ndarray, scratch: np.ndarray
) -> np.ndarray:
    """out (T, H, D) = softmax(scale q k^T) v over the positions that each query sees in the cache of one layer.

    For callers that own their buffers (``model.Attention``) and guarantee their sizes.
    scratch: (most threads, prompt_scratch_size(D)) float32.
    """
    tokens, heads, dim = q.shape
    if tokens == 1:
        _attend_token(q[0], cache, int(positions[0]), scoring, out[0], len(scratch))
        return out
    work = int(tokens * heads * dim * min(int(positions[-1]) + 1, scoring.window))
    _, units = prompt_units(tokens, heads, len(cache.keys))
    threads = min(threads_for(work, PARALLEL_MACS, units), len(scratch))
    if threads == 1:
        attend_prompt(q, cache, positions, scoring, out, scratch[0], 0, units)
    else:
        launch(attend_prompt_parallel, q, cache, positions, scoring, out, scratch, chunk_counters(threads), threads)
    return out


def _attend_token(
    q: np.ndarray, cache: Cache, position: int, scoring: Scoring, out: np.ndarray, most_threads: int
) -> None:
    """One token, by the bodies that the decode region uses."""
    heads, dim = q.shape
    kv_heads = len(cache.keys)
    chunks = position // CHUNK + 1 - max(0, position - scoring.window + 1) // CHUNK
    units, size = kv_heads * chunks, token_scratch_size(dim, heads // kv_heads)
    work = 2 * heads * dim * min(position + 1, scoring.window)
    threads = min(threads_for(work, PARALLEL_MACS, units), most_threads)
    partial = np.empty((heads, chunks, partial_width(dim)), np.float32)
    scratch = np.empty((threads, size), np.float32)
    if threads == 1:
        attend_token(q, cache, position, scoring, partial, scratch[0], 0, units)
    else:
        launch(attend_token_parallel, q, cache, position, scoring, partial, scratch, threads)
    merge_chunks(partial, chunks, scoring.sinks, out, 0, heads)
