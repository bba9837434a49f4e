"""Operations of attention over KV caches: many tokens of one sequence, one token, one token of each of several."""

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ruvllm.kernels.attention import decode, kv
from ruvllm.kernels.attention.prefill import attend_prompt_share, prompt_units
from ruvllm.kernels.attention.tile import CHUNK, Cache, Scoring
from ruvllm.kernels.jit.decorators import as_part, inline_kernel, view_kernel
from ruvllm.kernels.jit.views import array_at
from ruvllm.kernels.matmul.micro_kernels import LANES
from ruvllm.kernels.operations.matmul import Stealing, member_share
from ruvllm.kernels.tape import (
    CACHES,
    CHUNKS,
    KEY_ROWS,
    LAYERS,
    PARTIAL,
    POSITIONS,
    SCRATCH,
    SCRATCH_SIZE,
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
def _cache(m, sequence, layer, kv_heads, dtype):
    """One layer of the cache of a sequence; CACHES is a table (sequences, LAYERS) of (keys, values, blocks)."""
    layers = m.header[LAYERS]
    table = array_at(m.header[CACHES], (sequence + 1, layers, np.int64(3)), np.int64)
    keys, values, blocks = table[sequence, layer, 0], table[sequence, layer, 1], table[sequence, layer, 2]
    k = array_at(keys, (kv_heads, blocks, m.header[KEY_ROWS], np.int64(LANES)), dtype)
    return Cache(k, array_at(values, (kv_heads, blocks * LANES, m.header[VALUE_WIDTH]), dtype))


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
def _partial(m, sequences, heads, dim):
    """Partial results (sequences, heads, chunks, width): for each chunk a weighted sum, its maximum and its total."""
    width = (dim + LANES - 1) // LANES * LANES + LANES
    return array_at(address_of(m, np.int64(PARTIAL)), (sequences, heads, m.header[CHUNKS], width), np.float32)


@cache
def append(dtype: type) -> Operation:
    """Write k and v (rows, KV, dim) into one layer's cache of this dtype."""

    @operation
    def append_rows(m, k, v, layer, kv_heads, dim):
        lo, hi = row_range(m)
        keys, values = _cache(m, np.int64(0), layer, kv_heads, dtype)
        new_keys, new_values = _heads(m, k, kv_heads, dim)[lo:hi], _heads(m, v, kv_heads, dim)[lo:hi]
        kv_append_heads(new_keys, new_values, keys, values, _positions(m)[lo:hi], np.int64(0), kv_heads)

    return append_rows


@cache
def attend(dtype: type) -> Operation:
    """out (rows, heads, dim) = attention of q over one layer's cache; members steal chunks from each other."""

    @operation
    def attend_rows(m, q, layer, out, sizes: Sizes, scores: Scores, stealing: Stealing):
        _, units = _units(m.rows, sizes.heads, sizes.kv_heads)
        cached, rule = _cache(m, np.int64(0), layer, sizes.kv_heads, dtype), _scoring(m, scores, sizes.heads)
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
        cached, positions = _cache(m, np.int64(0), layer, kv_heads, dtype), _positions(m)
        chunks = _chunks(positions[0], scores.window)
        lo, hi = part(kv_heads * chunks, m.rank, m.size)
        new_keys, new_values = _heads(m, k, kv_heads, dim), _heads(m, v, kv_heads, dim)
        kv_append_heads(new_keys, new_values, cached.keys, cached.values, positions, lo // chunks, hi // chunks)
        query, partial = _heads(m, q, heads, dim)[0], _partial(m, np.int64(1), heads, dim)[0]
        attend_token_part(query, cached, positions[0], _scoring(m, scores, heads), partial, _scratch(m), lo, hi)

    return token


@operation
def merge(m, out, heads, dim, window, sinks):
    """out (1, heads, dim) from the partial results of ``attend_token``."""
    chunks, partial = _chunks(_positions(m)[0], window), _partial(m, np.int64(1), heads, dim)[0]
    merge_chunks(partial, chunks, _sinks(m, sinks, heads), _heads(m, out, heads, dim)[0], np.int64(0), heads)


@cache
def append_each(dtype: type) -> Operation:
    """Write row i of k and v (rows, KV, dim) into the cache of sequence i."""

    @operation
    def append_to_each(m, k, v, layer, kv_heads, dim):
        lo, hi = row_range(m)
        new_keys, new_values, positions = _heads(m, k, kv_heads, dim), _heads(m, v, kv_heads, dim), _positions(m)
        for i in range(lo, hi):
            keys, values = _cache(m, i, layer, kv_heads, dtype)
            one_key, one_value, position = new_keys[i : i + 1], new_values[i : i + 1], positions[i : i + 1]
            kv_append_heads(one_key, one_value, keys, values, position, np.int64(0), kv_heads)

    return append_to_each


@cache
def attend_each(dtype: type) -> Operation:
    """out (rows, heads, dim): row i of q attends to the cache of sequence i. A chunk is one kv head of one row."""

    @operation
    def attend_to_each(m, q, out, layer, sizes: Sizes, scores: Scores, stealing: Stealing):
        heads, kv_heads, dim = sizes
        queries, result, positions = _heads(m, q, heads, dim), _heads(m, out, heads, dim), _positions(m)
        partial, group, rule = _partial(m, m.rows, heads, dim), heads // kv_heads, _scoring(m, scores, heads)
        for k in range(m.size if stealing.steal else 1):
            share = member_share(m, m.rows * kv_heads, stealing, k)
            unit = share.lo + take_chunk(share)
            while unit < share.hi:
                i, head = unit // kv_heads, unit % kv_heads
                cached, chunks = (
                    _cache(m, i, layer, kv_heads, dtype),
                    _chunks(positions[i], rule.window),
                )
                lo, hi = head * chunks, (head + 1) * chunks
                attend_token_part(queries[i], cached, positions[i], rule, partial[i], _scratch(m), lo, hi)
                merge_chunks(partial[i], chunks, rule.sinks, result[i], head * group, (head + 1) * group)
                unit = share.lo + take_chunk(share)

    return attend_to_each
