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
    CACHE_BLOCKS,
    CACHES,
    CHUNKS,
    KEY_ROWS,
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


@view_kernel
def _scoring(m, scoring):
    return Scoring(scoring.window, number(m, scoring.scale))


@view_kernel
def _cache(m, cache, kv_heads, dtype):
    """Keys (KV, blocks, key rows, 16) and values (KV, 16 blocks, width) of one layer."""
    blocks = m.header[CACHE_BLOCKS]
    keys = array_at(address_of(m, cache.keys), (kv_heads, blocks, m.header[KEY_ROWS], np.int64(LANES)), dtype)
    return Cache(keys, array_at(address_of(m, cache.values), (kv_heads, blocks * LANES, m.header[VALUE_WIDTH]), dtype))


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
    def append_rows(m, k, v, cache: Cache, kv_heads, dim):
        lo, hi = row_range(m)
        keys, values = _cache(m, cache, kv_heads, dtype)
        new_keys, new_values = _heads(m, k, kv_heads, dim)[lo:hi], _heads(m, v, kv_heads, dim)[lo:hi]
        kv_append_heads(new_keys, new_values, keys, values, _positions(m)[lo:hi], np.int64(0), kv_heads)

    return append_rows


@cache
def attend(dtype: type) -> Operation:
    """out (rows, heads, dim) = attention of q over one layer's cache; members steal chunks from each other."""

    @operation
    def attend_rows(m, q, cache: Cache, out, sizes: Sizes, scoring: Scoring, stealing: Stealing):
        _, units = _units(m.rows, sizes.heads, sizes.kv_heads)
        cached, rule = _cache(m, cache, sizes.kv_heads, dtype), _scoring(m, scoring)
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
    def token(m, q, k, v, cache: Cache, sizes: Sizes, scoring: Scoring):
        heads, kv_heads, dim = sizes
        cached, positions = _cache(m, cache, kv_heads, dtype), _positions(m)
        chunks = _chunks(positions[0], scoring.window)
        lo, hi = part(kv_heads * chunks, m.rank, m.size)
        new_keys, new_values = _heads(m, k, kv_heads, dim), _heads(m, v, kv_heads, dim)
        kv_append_heads(new_keys, new_values, cached.keys, cached.values, positions, lo // chunks, hi // chunks)
        query, partial = _heads(m, q, heads, dim)[0], _partial(m, np.int64(1), heads, dim)[0]
        attend_token_part(query, cached, positions[0], _scoring(m, scoring), partial, _scratch(m), lo, hi)

    return token


@operation
def merge(m, out, heads, dim, window):
    """out (1, heads, dim) from the partial results of ``attend_token``."""
    chunks = _chunks(_positions(m)[0], window)
    merge_chunks(_partial(m, np.int64(1), heads, dim)[0], chunks, _heads(m, out, heads, dim)[0], np.int64(0), heads)


@view_kernel
def _sequence_cache(m, sequence, layer, kv_heads, dtype, itemsize):
    """One layer of the cache of one of several sequences; CACHES is a table of (keys, values, blocks)."""
    caches = array_at(m.header[CACHES], (sequence + 1, np.int64(3)), np.int64)
    keys, values, blocks = caches[sequence, 0], caches[sequence, 1], caches[sequence, 2]
    key_bytes = kv_heads * blocks * m.header[KEY_ROWS] * LANES * itemsize
    value_bytes = kv_heads * blocks * LANES * m.header[VALUE_WIDTH] * itemsize
    k = array_at(keys + layer * key_bytes, (kv_heads, blocks, m.header[KEY_ROWS], np.int64(LANES)), dtype)
    return Cache(k, array_at(values + layer * value_bytes, (kv_heads, blocks * LANES, m.header[VALUE_WIDTH]), dtype))


@cache
def append_each(dtype: type) -> Operation:
    """Write row i of k and v (rows, KV, dim) into the cache of sequence i."""
    itemsize = np.dtype(dtype).itemsize

    @operation
    def append_to_each(m, k, v, layer, kv_heads, dim):
        lo, hi = row_range(m)
        new_keys, new_values, positions = _heads(m, k, kv_heads, dim), _heads(m, v, kv_heads, dim), _positions(m)
        for i in range(lo, hi):
            keys, values = _sequence_cache(m, i, layer, kv_heads, dtype, itemsize)
            one_key, one_value, position = new_keys[i : i + 1], new_values[i : i + 1], positions[i : i + 1]
            kv_append_heads(one_key, one_value, keys, values, position, np.int64(0), kv_heads)

    return append_to_each


@cache
def attend_each(dtype: type) -> Operation:
    """out (rows, heads, dim): row i of q attends to the cache of sequence i. A chunk is one kv head of one row."""
    itemsize = np.dtype(dtype).itemsize

    @operation
    def attend_to_each(m, q, out, layer, sizes: Sizes, scoring: Scoring, stealing: Stealing):
        heads, kv_heads, dim = sizes
        queries, result, positions = _heads(m, q, heads, dim), _heads(m, out, heads, dim), _positions(m)
        partial, group, rule = _partial(m, m.rows, heads, dim), heads // kv_heads, _scoring(m, scoring)
        for k in range(m.size if stealing.steal else 1):
            share = member_share(m, m.rows * kv_heads, stealing, k)
            unit = share.lo + take_chunk(share)
            while unit < share.hi:
                i, head = unit // kv_heads, unit % kv_heads
                cached, chunks = (
                    _sequence_cache(m, i, layer, kv_heads, dtype, itemsize),
                    _chunks(positions[i], rule.window),
                )
                lo, hi = head * chunks, (head + 1) * chunks
                attend_token_part(queries[i], cached, positions[i], rule, partial[i], _scratch(m), lo, hi)
                merge_chunks(partial[i], chunks, result[i], head * group, (head + 1) * group)
                unit = share.lo + take_chunk(share)

    return attend_to_each
