"""Operations of attention over KV caches: many tokens of one sequence, one token, tokens of several sequences."""

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ruvllm.kernels.attention import decode, kv
from ruvllm.kernels.attention.prefill import attend_prompt_part, attend_prompt_share, prompt_units
from ruvllm.kernels.attention.tile import CHUNK, Cache, Scoring
from ruvllm.kernels.jit.decorators import as_part, inline_kernel, view_kernel
from ruvllm.kernels.jit.views import array_at
from ruvllm.kernels.matmul.micro_kernels import LANES
from ruvllm.kernels.operations.matmul import Stealing, member_share
from ruvllm.kernels.tape import (
    BLOCK_ROWS,
    CACHES,
    CHUNKS,
    KEY_ROWS,
    PARTIAL,
    POSITIONS,
    RUN_COUNT,
    RUNS,
    SCRATCH,
    SCRATCH_SIZE,
    SLOTS,
    TABLE_SIZE,
    TOKENS,
    VALUE_WIDTH,
    Operation,
    address_of,
    number,
    operation,
    row_range,
)
from ruvllm.kernels.threads.team import part, take_chunk

kv_append_heads = as_part(kv.kv_append_heads)
attend_token_part = as_part(decode.attend_token)
merge_chunks = as_part(decode.merge_chunks)
_units = inline_kernel(prompt_units)


class Sizes(NamedTuple):
    """Query heads, kv heads, and elements of a head."""

    heads: Any
    kv_heads: Any
    dim: Any


class Scores(NamedTuple):
    """A ``Scoring`` on the tape: operands of its numbers and of its sinks, 0 if there are none."""

    window: Any
    scale: Any
    softcap: Any
    sinks: Any


@view_kernel
def _sinks(m, sinks, heads):
    return array_at(address_of(m, sinks), heads if sinks else np.int64(0), np.float32)


@view_kernel
def _scoring(m, scores, heads):
    sinks = _sinks(m, scores.sinks, heads)
    return Scoring(scores.window, number(m, scores.scale), number(m, scores.softcap), sinks)


@view_kernel
def _cache(m, layer, kv_heads, dtype, start):
    """One layer of the cache, of the sequence whose blocks begin at ``start`` in the layer's block table.

    CACHES has two numbers for each layer: the address of its block table, and its offset in each block.
    """
    row = array_at(m.header[CACHES] + 16 * layer, np.int64(2), np.int64)
    table = array_at(row[0] + 8 * start, m.header[TABLE_SIZE] - start, np.int64)
    rows = m.header[BLOCK_ROWS]
    k = array_at(row[0], (kv_heads, rows // LANES, m.header[KEY_ROWS], np.int64(LANES)), dtype)
    v = array_at(row[0], (kv_heads, rows, m.header[VALUE_WIDTH]), dtype)
    return Cache(k, v, table, row[1])


@view_kernel
def _heads(m, operand, heads, dim):
    return array_at(address_of(m, operand), (m.rows, heads, dim), np.float32)


@view_kernel
def _scratch(m):
    """This member's scratch buffer."""
    return array_at(address_of(m, np.int64(SCRATCH)), m.header[SCRATCH_SIZE], np.float32)


@view_kernel
def _positions(m):
    return array_at(address_of(m, np.int64(POSITIONS)), m.header[TOKENS], np.int64)


@inline_kernel
def _chunks(position, window):
    """Chunks of the cache that a token at ``position`` attends to."""
    return position // CHUNK + 1 - max(0, position - window + 1) // CHUNK


@view_kernel
def _partial(m, heads, dim):
    """Partial results (heads, chunks, width): for each chunk a weighted sum, its maximum and its total."""
    width = (dim + LANES - 1) // LANES * LANES + LANES
    return array_at(address_of(m, np.int64(PARTIAL)), (heads, m.header[CHUNKS], width), np.float32)


@cache
def append(dtype: type) -> Operation:
    """Write k and v (rows, KV, dim) into one layer's cache of this dtype; members divide them by rows or by heads."""

    @operation
    def append_rows(m, k, v, layer, kv_heads, dim, by_heads):
        lo, hi = (np.int64(0), m.rows) if by_heads else row_range(m)
        first, end = part(kv_heads, m.rank, m.size) if by_heads else (np.int64(0), kv_heads)
        cached = _cache(m, layer, kv_heads, dtype, np.int64(0))
        new_keys, new_values = _heads(m, k, kv_heads, dim)[lo:hi], _heads(m, v, kv_heads, dim)[lo:hi]
        kv_append_heads(new_keys, new_values, cached, _positions(m)[lo:hi], first, end)

    return append_rows


@cache
def attend(dtype: type) -> Operation:
    """out (rows, heads, dim) = attention of q over one layer's cache; members steal chunks from each other."""

    @operation
    def attend_rows(m, q, layer, out, sizes: Sizes, scores: Scores, stealing: Stealing):
        _, units = _units(m.rows, sizes.heads, sizes.kv_heads)
        cached, rule = _cache(m, layer, sizes.kv_heads, dtype, np.int64(0)), _scoring(m, scores, sizes.heads)
        queries, result = _heads(m, q, sizes.heads, sizes.dim), _heads(m, out, sizes.heads, sizes.dim)
        for i in range(m.size if stealing.steal else 1):
            share = member_share(m, units, stealing, i)
            attend_prompt_share(queries, cached, _positions(m), rule, result, _scratch(m), share)

    return attend_rows


@cache
def attend_token(dtype: type) -> Operation:
    """One token: append k and v (1, KV, dim) to the cache and leave partial results of attention of q over it.

    The member that has the last chunk of a kv head appends to that head: no other member reads that chunk.
    """

    @operation
    def token(m, q, k, v, layer, sizes: Sizes, scores: Scores):
        heads, kv_heads, dim = sizes
        cached, positions = _cache(m, layer, kv_heads, dtype, np.int64(0)), _positions(m)
        chunks = _chunks(positions[0], scores.window)
        lo, hi = part(kv_heads * chunks, m.rank, m.size)
        new_keys, new_values = _heads(m, k, kv_heads, dim), _heads(m, v, kv_heads, dim)
        kv_append_heads(new_keys, new_values, cached, positions, lo // chunks, hi // chunks)
        query, partial = _heads(m, q, heads, dim)[0], _partial(m, heads, dim)
        attend_token_part(query, cached, positions[0], _scoring(m, scores, heads), partial, _scratch(m), lo, hi)

    return token


@operation
def merge(m, out, heads, dim, window, sinks):
    """out (1, heads, dim) from the partial results of ``attend_token``."""
    chunks, partial = _chunks(_positions(m)[0], window), _partial(m, heads, dim)
    merge_chunks(partial, chunks, _sinks(m, sinks, heads), _heads(m, out, heads, dim)[0], np.int64(0), heads)


@cache
def append_blocks(dtype: type) -> Operation:
    """Write k and v (rows, KV, dim), rows of several sequences, into one layer of a pool.

    SLOTS (rows,): the position of each in its sequence, from the beginning of the block table on.
    """

    @operation
    def append_to_blocks(m, k, v, layer, kv_heads, dim):
        lo, hi = row_range(m)
        pool = _cache(m, layer, kv_heads, dtype, np.int64(0))
        new_keys, new_values = _heads(m, k, kv_heads, dim)[lo:hi], _heads(m, v, kv_heads, dim)[lo:hi]
        slots = array_at(address_of(m, np.int64(SLOTS)), m.rows, np.int64)[lo:hi]
        kv_append_heads(new_keys, new_values, pool, slots, np.int64(0), kv_heads)

    return append_to_blocks


@inline_kernel
def _run_units(rows, sizes):
    """Units of work of one run: as those of ``attend_prompt``, but one for each kv head where it has one row."""
    if rows == 1:
        return sizes.kv_heads
    _, units = _units(rows, sizes.heads, sizes.kv_heads)
    return units


@cache
def attend_runs(dtype: type) -> Operation:
    """out (rows, heads, dim): each run of rows of q, new tokens of one sequence, attends to the blocks of its sequence.

    RUNS (RUN_COUNT, 3) has for each run its first row, how many there are, and where its blocks begin in the tables.
    """

    @operation
    def attend_each_run(m, q, out, layer, sizes: Sizes, scores: Scores, stealing: Stealing):
        heads, kv_heads, dim = sizes
        queries, result, positions = _heads(m, q, heads, dim), _heads(m, out, heads, dim), _positions(m)
        rule, group = _scoring(m, scores, heads), heads // kv_heads
        runs = array_at(address_of(m, np.int64(RUNS)), (m.header[RUN_COUNT], np.int64(3)), np.int64)
        total = np.int64(0)
        for i in range(len(runs)):
            total += _run_units(runs[i, 1], sizes)
        for k in range(m.size if stealing.steal else 1):
            share = member_share(m, total, stealing, k)
            unit, run, before = share.lo + take_chunk(share), np.int64(0), np.int64(0)
            while unit < share.hi:
                while before + _run_units(runs[run, 1], sizes) <= unit:
                    before += _run_units(runs[run, 1], sizes)
                    run += 1
                lo, hi, first = runs[run, 0], runs[run, 0] + runs[run, 1], unit - before
                blocks = _cache(m, layer, kv_heads, dtype, runs[run, 2])
                if hi - lo == 1:
                    chunks, partial = _chunks(positions[lo], rule.window), _partial(m, heads, dim)
                    attend_token_part(
                        queries[lo], blocks, positions[lo], rule, partial, _scratch(m), first * chunks,
                        (first + 1) * chunks,
                    )  # fmt: skip
                    merge_chunks(partial, chunks, rule.sinks, result[lo], first * group, (first + 1) * group)
                else:
                    attend_prompt_part(
                        queries[lo:hi], blocks, positions[lo:hi], rule, result[lo:hi], _scratch(m), first, first + 1
                    )
                unit = share.lo + take_chunk(share)

    return attend_each_run
