"""Attention of many new tokens over a KV cache (attention/kv.py), in one pass of online softmax (flash attention).

A tile's rows are the queries (tokens and query heads) that share a kv head, so that each key and value that is loaded
serves all of them. A block of 16 keys is a panel: 16 scores without sums across lanes. Values lie by position, so
their weighted sum is a panel product too.

Softmax is computed on the way: for each chunk of 256 positions and each query, the largest score m, the sum l of
2^(score - m) and the weighted sum of values are computed, and added to those of the chunks before, rescaled to the
largest m so far (Milakov & Gimelshein 2018; Dao et al. 2022). Scores are scaled by log2(e), so that 2^x serves for e^x.
A query sees positions max(0, p - window + 1) .. p; loop bounds and masked lanes exclude all others. Chunks begin at
multiples of CHUNK, are added in their order, and sums run position by position: a token's result depends on no other
token of the call, as long as their values are finite, and is the same to the bit if it is computed alone
(attention/decode.py).
"""

from typing import Any, NamedTuple

import numpy as np
from numba import prange

from ruvllm.kernels.attention.decode import attend_token, merge_chunks, partial_width, token_scratch_size
from ruvllm.kernels.attention.kv import VALUE_SCALE_ROW
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
    cap_scores,
    chunk_at,
    copy_queries,
    largest_score,
    normaliser,
    query_factor,
    query_index,
    scores,
    sum_weighted_values,
    to_weights,
    transpose,
    update_softmax,
)
from ruvllm.kernels.jit.decorators import as_part, inline_kernel, kernel, parallel_kernel, part_kernel
from ruvllm.kernels.jit.views import flat
from ruvllm.kernels.matmul.micro_kernels import LANES, WIDE, put
from ruvllm.kernels.simd.vectors import f32_load, f32_store, f32_zero, f32_zeros, fma, hsum, splat
from ruvllm.kernels.threads.pool import PARALLEL_MACS, launch, threads_for
from ruvllm.kernels.threads.team import COUNTER_STRIDE, chunk_counters, share_of, take_chunk

_CLAIMED_UNITS = 4  # units of work that a thread claims at a time
MAX_TILES = 4 if WIDE else 6  # tiles of a unit: they share each chunk of keys and values while it is in the L2 cache
_STATE = 4 * LANES  # floats of ``Softmax`` for the rows of a tile, without their sums
NO_WINDOW = 1 << 62
_NO_SINKS = np.empty(0, np.float32)


def prompt_scratch_size(head_dim: int) -> int:
    """Floats of scratch per thread: scores, queries and sums of a tile's chunk; queries, sums, m and l of all tiles."""
    wide = (head_dim + LANES - 1) // LANES * LANES
    tile = ROWS * CHUNK + Q_STEP * LANES + ROWS * wide
    return tile + MAX_TILES * (Q_STEP * wide + ROWS * wide + _STATE)


class TileRows(NamedTuple):
    """Rows first : first + count of a tile, numbered as in ``Heads``: ``group`` rows of each token. positions: (T,)."""

    positions: Any
    first: Any
    count: Any
    group: Any


class Softmax(NamedTuple):
    """Offsets in scratch of the state of a tile's online softmax.

    row: four vectors, one lane for each row of the tile: m, l, and the factors of its sums so far and of the chunk's.
    sums: weighted sums of values (rows, wide) so far; chunk_sums: those of the chunk alone.
    """

    scratch: Any
    row: Any
    sums: Any
    chunk_sums: Any
    wide: Any


def prompt_units(tokens: int, heads: int, kv_heads: int) -> tuple[int, int]:
    """How attend_prompt divides its work: (tiles of one unit, units).

    Tiles of a unit share the keys and values that they read; there are fewer where threads would have too few units.
    """
    rows = tokens * (heads // kv_heads)
    tiles = max(1, min(MAX_TILES, (rows + ROWS - 1) // ROWS * kv_heads // 16))
    return tiles, kv_heads * ((rows + tiles * ROWS - 1) // (tiles * ROWS))


_units = inline_kernel(prompt_units)


@kernel(strict=True)
def attend_prompt(q, cache, positions, scoring, out, scratch, lo, hi):
    """Attention of q (T, H, D) into out (T, H, D), for the units lo:hi of prompt_units(T, H, KV).

    out may have two more columns, for m and for what the weighted sums were multiplied by (see ``with_lse``).

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
    block = keys.shape[2] * LANES
    stage = ROWS * CHUNK
    queries = stage + Q_STEP * LANES
    sums = queries + MAX_TILES * Q_STEP * wide
    chunk_sums = sums + MAX_TILES * ROWS * wide
    states = chunk_sums + ROWS * wide
    for i in range(0, sums, LANES):
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
        for i in range(states, states + MAX_TILES * _STATE, _STATE):
            f32_store(scratch, i, splat(NEGATIVE_INFINITY))
            f32_store(scratch, i + LANES, f32_zero())
        first, end = _visible(TileRows(positions, first_row, rows, group), scoring.window)
        for chunk in range(first // CHUNK * CHUNK, end, CHUNK):
            found = chunk_at(cache, kv, chunk)
            panels = Keys(found.keys, block, dim)
            for tile in range(0, rows, ROWS):
                tile_rows = TileRows(positions, first_row + tile, min(ROWS, rows - tile), group)
                tile_first, tile_end = _visible(tile_rows, scoring.window)
                begin = max(tile_first, chunk) // LANES * LANES  # whole blocks of keys: the rest is masked below
                start, stop = begin - chunk, min(tile_end - chunk, CHUNK)
                if start >= stop:
                    continue
                ki, vi = (found.row + start) // LANES * block, (found.row + start) * wide
                tile_queries = Queries(scratch, queries + tile // ROWS * Q_STEP * wide, Q_STEP)
                scores(f32_zeros(ROWS), panels, ki, tile_queries, 0, start, stop, ki)
                if scoring.softcap > 0:
                    for row in range(tile_rows.count):
                        cap_scores(scratch, row * CHUNK, start, stop, scoring.softcap)
                state = Softmax(scratch, states + tile // ROWS * _STATE, sums + tile * wide, chunk_sums, wide)
                _weigh_chunk(state, tile_rows, scoring.window, chunk, start, stop, panels, ki)
                sum_weighted_values(
                    f32_zeros(ROWS), found.values, vi, wide, scratch, start, stop - start, chunk_sums
                )  # fmt: skip
                for r in range(tile_rows.count):
                    at = state.row + r
                    keep, add = splat(scratch[at + 2 * LANES]), splat(scratch[at + 3 * LANES])
                    for d in range(r * wide, (r + 1) * wide, LANES):
                        added = f32_load(scratch, chunk_sums + d) * add
                        f32_store(scratch, state.sums + d, fma(f32_load(scratch, state.sums + d), keep, added))
        for row in range(rows):
            # If every score is -inf, so is the largest, and the softmax is undefined: top - top makes the result NaN.
            at = states + row // ROWS * _STATE + row % ROWS
            top, head = scratch[at], kv * group + (first_row + row) % group
            factor = normaliser(scoring.sinks, head, top, scratch[at + LANES]) + (top - top)
            oi = query_index(of, first_row + row) * out.shape[2]
            for d in range(0, dim, LANES):
                put(out_flat, oi + d, f32_load(scratch, sums + row * wide + d) * splat(factor), dim - d, False)
            if out.shape[2] > dim:
                out_flat[oi + dim], out_flat[oi + dim + 1] = top, factor


@inline_kernel
def _visible(rows, window):
    """The range of positions that any of the rows sees: first, end."""
    positions, group = rows.positions, rows.group
    t0, t1 = rows.first // group, (rows.first + rows.count - 1) // group
    first, end = positions[t0], positions[t0]
    for t in range(t0 + 1, t1 + 1):
        first, end = min(first, positions[t]), max(end, positions[t])
    return max(0, first - window + 1), end + 1


@inline_kernel
def _row_span(rows, r, window, chunk, start, stop):
    """The span start:stop of a chunk, and what row r sees of it."""
    first, end = _visible(TileRows(rows.positions, rows.first + r, 1, rows.group), window)
    return Span(start, stop, first - chunk, end - chunk)


@inline_kernel
def _weigh_chunk(state, rows, window, chunk, start, stop, keys, ki):
    """Turn scores start:stop of a tile's rows into weights 2^(score - m of the chunk), 0 of what a row does not see.

    Updates m and l of each row. Two loops over the rows, so that one row's chain of operations need not wait for
    another's.
    """
    scratch, tops = state.scratch, state.row
    totals, found, adds = tops + LANES, tops + 2 * LANES, tops + 3 * LANES
    for r in range(rows.count):
        scratch[found + r] = largest_score(scratch, r * CHUNK, _row_span(rows, r, window, chunk, start, stop))
    for r in range(rows.count):
        span, scales = _row_span(rows, r, window, chunk, start, stop), ki + (keys.dim + VALUE_SCALE_ROW) * LANES
        top = scratch[found + r]
        total = hsum(to_weights(scratch, r * CHUNK, span, top, keys.elements, scales, keys.block))
        scratch[tops + r], scratch[totals + r], scratch[found + r], scratch[adds + r] = update_softmax(
            scratch[tops + r], scratch[totals + r], top, total
        )


attend_prompt_part = as_part(attend_prompt)


@part_kernel
def attend_prompt_share(q, cache, positions, scoring, out, scratch, share):
    """attend_prompt of the units of a share that no thread has claimed (``threads.team``)."""
    lo = share.lo + take_chunk(share) * _CLAIMED_UNITS
    while lo < share.hi:
        attend_prompt_part(q, cache, positions, scoring, out, scratch, lo, min(lo + _CLAIMED_UNITS, share.hi))
        lo = share.lo + take_chunk(share) * _CLAIMED_UNITS


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
    out: (T, H, D), or with two more columns, as ``attend_prompt`` writes it.
    scratch: (most threads, prompt_scratch_size(D)) float32.
    """
    tokens, heads, dim = q.shape
    if tokens == 1 and out.shape[2] == dim:
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
    """One token, with the kernels that decoding uses."""
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
