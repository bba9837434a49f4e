"""Operations of attention over KV caches: many tokens of one sequence, one token, one token of each of several."""

from functools import cache
from typing import Any

import numpy as np

from ruvllm.kernels.attention import decode as token_attention
from ruvllm.kernels.attention import kv as kv_kernels
from ruvllm.kernels.attention.prefill import attend_split, attend_turns
from ruvllm.kernels.attention.tile import CHUNK
from ruvllm.kernels.jit.decorators import as_part, inline_kernel, view_kernel
from ruvllm.kernels.jit.views import array_at
from ruvllm.kernels.matmul.micro_kernels import LANES
from ruvllm.kernels.operations.matmul import team_sync
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
from ruvllm.kernels.threads.team import part, share_of, take_turn

kv_append_heads = as_part(kv_kernels.kv_append_heads)
attend_token_chunks = as_part(token_attention.attend_token_chunks)
merge_chunks = as_part(token_attention.merge_chunks)
_split = inline_kernel(attend_split)


@view_kernel
def _cache(m: Any, keys: Any, values: Any, kv_heads: Any, dtype: Any) -> Any:
    """Keys (KV, blocks, key rows, 16) and values (KV, 16 blocks, width) of one layer."""
    blocks = m.header[CACHE_BLOCKS]
    k = array_at(address_of(m, keys), (kv_heads, blocks, m.header[KEY_ROWS], np.int64(LANES)), dtype)
    return k, array_at(address_of(m, values), (kv_heads, blocks * LANES, m.header[VALUE_WIDTH]), dtype)


@view_kernel
def _heads(m: Any, operand: Any, heads: Any, dim: Any) -> Any:
    return array_at(address_of(m, operand), (m.rows, heads, dim), np.float32)


@view_kernel
def _scratch(m: Any) -> Any:
    """This member's scratch buffer."""
    return array_at(address_of(m, np.int64(SCRATCH)), m.header[SCRATCH_SIZE], np.float32)


@view_kernel
def _positions(m: Any) -> Any:
    return array_at(address_of(m, np.int64(POSITIONS)), m.header[TOKENS], np.int64)


@inline_kernel
def _chunks(position: Any, window: Any) -> Any:
    """Chunks of the cache that a token at ``position`` attends to."""
    return position // CHUNK + 1 - max(0, position - window + 1) // CHUNK


@view_kernel
def _partial(m: Any, sequences: Any, heads: Any, dim: Any) -> Any:
    """Partial results (sequences, heads, chunks, width): for each chunk a weighted sum, its maximum and its total."""
    width = (dim + LANES - 1) // LANES * LANES + LANES
    return array_at(address_of(m, np.int64(PARTIAL)), (sequences, heads, m.header[CHUNKS], width), np.float32)


@cache
def append(dtype: type) -> Operation:
    """Write k and v (rows, KV, dim) into one layer's cache of this dtype."""

    @operation
    def append_rows(m: Any, k: Any, v: Any, keys: Any, values: Any, kv_heads: Any, dim: Any) -> None:
        lo, hi = row_range(m)
        cached_keys, cached_values = _cache(m, keys, values, kv_heads, dtype)
        new_keys, new_values = _heads(m, k, kv_heads, dim)[lo:hi], _heads(m, v, kv_heads, dim)[lo:hi]
        kv_append_heads(
            new_keys, new_values, cached_keys, cached_values, _positions(m)[lo:hi], np.int64(0), kv_heads
        )  # fmt: skip

    return append_rows


@cache
def attend(dtype: type) -> Operation:
    """out (rows, heads, dim) = attention of q over one layer's cache; members steal chunks of each other's shares."""

    @operation
    def attend_rows(
        m: Any, q: Any, keys: Any, values: Any, out: Any, heads: Any, kv_heads: Any, dim: Any, window: Any,
        scale: Any, share: Any, steal: Any,
    ) -> None:  # fmt: skip
        _, units = _split(m.rows, heads, kv_heads)
        cached_keys, cached_values = _cache(m, keys, values, kv_heads, dtype)
        queries, result, sync = _heads(m, q, heads, dim), _heads(m, out, heads, dim), team_sync(m)
        for i in range(m.size if steal else 1):
            member = (m.rank + i) % m.size
            lo, hi = part(units, member, m.size)
            counter = share_of(sync, m.rank, member, share)
            attend_turns(
                queries, cached_keys, cached_values, _positions(m), window, number(m, scale), result, _scratch(m),
                lo, hi, sync, counter, m.size == 1,
            )  # fmt: skip

    return attend_rows


@cache
def attend_token(dtype: type) -> Operation:
    """One token: append k and v (1, KV, dim) to the cache and leave partial results of attention of q over it.

    The member that has the last chunk of a kv head appends to that head: no other member reads that chunk.
    """

    @operation
    def token(
        m: Any, q: Any, k: Any, v: Any, keys: Any, values: Any, heads: Any, kv_heads: Any, dim: Any, window: Any,
        scale: Any,
    ) -> None:  # fmt: skip
        cached_keys, cached_values = _cache(m, keys, values, kv_heads, dtype)
        positions = _positions(m)
        chunks = _chunks(positions[0], window)
        lo, hi = part(kv_heads * chunks, m.rank, m.size)
        new_keys, new_values = _heads(m, k, kv_heads, dim), _heads(m, v, kv_heads, dim)
        kv_append_heads(new_keys, new_values, cached_keys, cached_values, positions, lo // chunks, hi // chunks)
        attend_token_chunks(
            _heads(m, q, heads, dim)[0], cached_keys, cached_values, positions[0], window, number(m, scale),
            _partial(m, np.int64(1), heads, dim)[0], _scratch(m), lo, hi,
        )  # fmt: skip

    return token


@operation
def merge(m: Any, out: Any, heads: Any, dim: Any, window: Any) -> None:
    """out (1, heads, dim) from the partial results of ``attend_token``."""
    chunks = _chunks(_positions(m)[0], window)
    merge_chunks(_partial(m, np.int64(1), heads, dim)[0], chunks, _heads(m, out, heads, dim)[0], np.int64(0), heads)


@view_kernel
def _sequence_cache(m: Any, sequence: Any, layer: Any, kv_heads: Any, dtype: Any, itemsize: Any) -> Any:
    """One layer of the cache of one of several sequences; CACHES is a table of (keys, values, blocks)."""
    caches = array_at(m.header[CACHES], (sequence + 1, np.int64(3)), np.int64)
    keys, values, blocks = caches[sequence, 0], caches[sequence, 1], caches[sequence, 2]
    key_bytes = kv_heads * blocks * m.header[KEY_ROWS] * LANES * itemsize
    value_bytes = kv_heads * blocks * LANES * m.header[VALUE_WIDTH] * itemsize
    k = array_at(keys + layer * key_bytes, (kv_heads, blocks, m.header[KEY_ROWS], np.int64(LANES)), dtype)
    return k, array_at(values + layer * value_bytes, (kv_heads, blocks * LANES, m.header[VALUE_WIDTH]), dtype)


@cache
def append_each(dtype: type) -> Operation:
    """Write row i of k and v (rows, KV, dim) into the cache of sequence i."""
    itemsize = np.dtype(dtype).itemsize

    @operation
    def append_to_each(m: Any, k: Any, v: Any, layer: Any, kv_heads: Any, dim: Any) -> None:
        lo, hi = row_range(m)
        new_keys, new_values, positions = _heads(m, k, kv_heads, dim), _heads(m, v, kv_heads, dim), _positions(m)
        for i in range(lo, hi):
            cached_keys, cached_values = _sequence_cache(m, i, layer, kv_heads, dtype, itemsize)
            kv_append_heads(
                new_keys[i : i + 1], new_values[i : i + 1], cached_keys, cached_values, positions[i : i + 1],
                np.int64(0), kv_heads,
            )  # fmt: skip

    return append_to_each


@cache
def attend_each(dtype: type) -> Operation:
    """out (rows, heads, dim): row i of q attends to the cache of sequence i. A chunk is one kv head of one row."""
    itemsize = np.dtype(dtype).itemsize

    @operation
    def attend_to_each(
        m: Any, q: Any, out: Any, layer: Any, heads: Any, kv_heads: Any, dim: Any, window: Any, scale: Any,
        share: Any, steal: Any,
    ) -> None:  # fmt: skip
        queries, result = _heads(m, q, heads, dim), _heads(m, out, heads, dim)
        positions, sync = _positions(m), team_sync(m)
        partial, group = _partial(m, m.rows, heads, dim), heads // kv_heads
        for k in range(m.size if steal else 1):
            member = (m.rank + k) % m.size
            lo, hi = part(m.rows * kv_heads, member, m.size)
            counter = share_of(sync, m.rank, member, share)
            unit = lo + take_turn(sync, counter, m.size == 1)
            while unit < hi:
                i, head = unit // kv_heads, unit % kv_heads
                cached_keys, cached_values = _sequence_cache(m, i, layer, kv_heads, dtype, itemsize)
                chunks = _chunks(positions[i], window)
                attend_token_chunks(
                    queries[i], cached_keys, cached_values, positions[i], window, number(m, scale), partial[i],
                    _scratch(m), head * chunks, (head + 1) * chunks,
                )  # fmt: skip
                merge_chunks(partial[i], chunks, result[i], head * group, (head + 1) * group)
                unit = lo + take_turn(sync, counter, m.size == 1)

    return attend_to_each
