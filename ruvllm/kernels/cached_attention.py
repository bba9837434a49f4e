"""Attention of new tokens over a KV cache: append, then one pass of online softmax (flash attention).

Cache of one layer: keys (KV, B, D, 16), in blocks of 16 positions whose positions are the lanes, so that the
scores of 16 positions are one panel product without sums across lanes; values (KV, S, DV) by position, DV = D
rounded up to 16, so that the weighted sum of values is a panel product too. Both are float32 or IEEE half bits.

Softmax is computed while reading: per query the largest score so far m, the sum l of e^(score - m) and the sum of
weighted values are rescaled when m grows (Milakov & Gimelshein 2018; Dao et al. 2022). A query sees positions
max(0, p - window + 1) .. p, by loop bounds; nothing outside them is read.
"""

from typing import Any

import numpy as np
from numba import prange

from ruvllm.kernels import _check, reference, token_attention
from ruvllm.kernels._jit import inline_kernel, kernel, parallel_kernel
from ruvllm.kernels._math import exp
from ruvllm.kernels._simd import (
    f32_load,
    f32_store,
    f32_zero,
    fmax,
    hmax,
    hsum,
    lane,
    lanes_between,
    splat,
    store_scalar,
)
from ruvllm.kernels._spec import KernelSpec
from ruvllm.kernels._threads import PARALLEL_MACS, launch, threads_for
from ruvllm.kernels._tile import LANES, TILE, put, tile_times_panel, token_times_panel
from ruvllm.kernels._views import flat

CHUNK = 256  # positions per step of the online softmax: scores, keys and values of a chunk stay in the caches
NO_WINDOW = 1 << 62
_NEGATIVE_INFINITY = np.float32(-np.inf)


def scratch_size(head_dim: int) -> int:
    """Floats of scratch that one thread needs: scores, weighted sums, and (m, l) of six queries."""
    return TILE * (CHUNK + padded(head_dim)) + 2 * LANES


def padded(head_dim: int) -> int:
    """head_dim rounded up to whole vectors: the row length of the value cache."""
    return (head_dim + LANES - 1) // LANES * LANES


@kernel(strict=True)
def kv_append_heads(k: Any, v: Any, keys: Any, values: Any, positions: Any, lo: Any, hi: Any) -> None:
    """Write k, v (T, KV, D) of tokens at positions (T,) into the cache of one layer, for kv heads lo:hi."""
    tokens, _, dim = k.shape
    keys_flat, values_flat = flat(keys), flat(values)
    for head in range(lo, hi):
        for t in range(tokens):
            position = positions[t]
            block, j = position // LANES, position % LANES
            ki = (head * keys.shape[1] + block) * dim * LANES + j
            vi = (head * values.shape[1] + position) * values.shape[2]
            for d in range(dim):
                store_scalar(keys_flat, ki + d * LANES, k[t, head, d])
                store_scalar(values_flat, vi + d, v[t, head, d])


@kernel(strict=True)
def attend_units(
    q: Any, keys: Any, values: Any, positions: Any, window: Any, scale: Any, out: Any, scratch: Any, lo: Any, hi: Any
) -> None:
    """Attention of q (T, H, D) into out (T, H, D), for the units lo:hi.

    A unit is one head and a tile of up to six tokens: unit = head * ceil(T / 6) + tile. positions (T,) must be
    appended already. scratch: (scratch_size(D),) float32, this thread's own.
    """
    tokens, heads, dim = q.shape
    wide = values.shape[2]
    group = heads // keys.shape[0]
    tiles = (tokens + TILE - 1) // TILE
    q_flat, out_flat = flat(q), flat(out)
    keys_flat, values_flat = flat(keys), flat(values)
    sums = TILE * CHUNK
    state = sums + TILE * wide
    for unit in range(lo, hi):
        head, t0 = unit // tiles, unit % tiles * TILE
        rows = min(TILE, tokens - t0)
        kv = head // group
        k_base = kv * keys.shape[1] * dim * LANES
        v_base = kv * values.shape[1] * wide
        qi = (t0 * heads + head) * dim
        for r in range(rows):
            scratch[state + r] = _NEGATIVE_INFINITY
            scratch[state + LANES + r] = 0
        for i in range(sums, state, LANES):
            f32_store(scratch, i, f32_zero())
        first, end = _span(positions, t0, rows, window)
        for chunk in range(first // CHUNK * CHUNK, end, CHUNK):
            # Whole blocks of keys: scores of positions outside a query's span are masked below.
            start = max(first, chunk) // LANES * LANES
            stop = min(end, chunk + CHUNK)
            for s in range(start, stop, LANES):
                ki = k_base + s * dim
                if rows == TILE:
                    tile_times_panel(
                        keys_flat, ki, LANES, q_flat, qi, heads * dim, dim, scratch, s - chunk, CHUNK, LANES, False
                    )
                else:
                    for r in range(rows):
                        at = qi + r * heads * dim
                        token_times_panel(
                            keys_flat, ki, LANES, q_flat, at, dim, scratch, r * CHUNK + s - chunk, LANES, False
                        )
            for r in range(rows):
                last = positions[t0 + r]
                a = max(0, last - window + 1)
                _softmax_step(scratch, r, start - chunk, stop - chunk, a - chunk, last + 1 - chunk, scale, wide)
            for d in range(0, wide, LANES):
                vi = v_base + start * wide + d
                if rows == TILE:
                    tile_times_panel(
                        values_flat, vi, wide, scratch, start - chunk, CHUNK, stop - start,
                        scratch, sums + d, wide, LANES, True,
                    )  # fmt: skip
                else:
                    for r in range(rows):
                        token_times_panel(
                            values_flat, vi, wide, scratch, r * CHUNK + start - chunk, stop - start,
                            scratch, sums + r * wide + d, LANES, True,
                        )  # fmt: skip
        for r in range(rows):
            inverse = np.float32(1) / scratch[state + LANES + r]
            oi = qi + r * heads * dim
            for d in range(0, dim, LANES):
                put(out_flat, oi + d, f32_load(scratch, sums + r * wide + d) * splat(inverse), dim - d, False)


@inline_kernel
def _span(positions: Any, t0: Any, rows: Any, window: Any) -> Any:
    """First position and end of the positions that any of the tile's queries sees."""
    first, end = positions[t0], positions[t0]
    for r in range(rows):
        first, end = min(first, positions[t0 + r]), max(end, positions[t0 + r])
    return max(0, first - window + 1), end + 1


@inline_kernel
def _softmax_step(
    scratch: Any, row: Any, start: Any, stop: Any, first: Any, end: Any, scale: Any, wide: Any
) -> None:
    """Turn scores start:stop of a row into weights e^(scale * score - m); weights outside first:end are 0.

    Where m grew, the row's l and weighted sums are rescaled by e^(old m - new m).
    """
    base = row * CHUNK
    sums = TILE * CHUNK + row * wide
    state = TILE * (CHUNK + wide) + row
    factor = splat(scale)
    largest = splat(_NEGATIVE_INFINITY)
    for i in range(start, stop, LANES):
        scores = f32_load(scratch, base + i) * factor
        largest = fmax(largest, lanes_between(scores, first - i, end - i, _NEGATIVE_INFINITY))
    old = scratch[state]
    new = fmax(old, hmax(largest))
    if new == _NEGATIVE_INFINITY:  # nothing of this chunk is visible to this query
        for i in range(start, stop, LANES):
            f32_store(scratch, base + i, f32_zero())
        return
    total = f32_zero()
    for i in range(start, stop, LANES):
        weights = exp(f32_load(scratch, base + i) * factor - splat(new))
        weights = lanes_between(weights, first - i, end - i, np.float32(0))
        f32_store(scratch, base + i, weights)
        total = total + weights
    shrink = exp(splat(old - new))
    scratch[state] = new
    scratch[state + LANES] = scratch[state + LANES] * lane(shrink, 0) + hsum(total)
    for i in range(sums, sums + wide, LANES):
        f32_store(scratch, i, f32_load(scratch, i) * shrink)


@parallel_kernel
def attend_parallel(
    q: Any, keys: Any, values: Any, positions: Any, window: Any, scale: Any, out: Any, scratch: Any, threads: Any
) -> None:
    """attend_units with the units split over threads; scratch (threads, scratch_size(D))."""
    units = q.shape[1] * ((q.shape[0] + TILE - 1) // TILE)
    for t in prange(threads):
        attend_units(
            q, keys, values, positions, window, scale, out, scratch[t], units * t // threads, units * (t + 1) // threads
        )


def kv_append(
    k: np.ndarray, v: np.ndarray, keys: np.ndarray, values: np.ndarray, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Store keys and values of new tokens in the cache of one layer, in place.

    Args:
        k, v: (T, KV, D) float32.
        keys: (KV, B, D, 16) float32 or uint16 (IEEE half bits); position p is lane p % 16 of block p // 16.
        values: (KV, 16 B, DV) of the same dtype, DV = D rounded up to a multiple of 16.
        positions: (T,) integers from 0 to 16 B - 1.

    Returns:
        ``keys`` and ``values``.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype or shape, or a position is outside the cache.
    """
    k, v = _check.float32("k", k, ndim=3), _check.float32("v", v, ndim=3)
    positions = _check.integers("positions", positions)
    _require_cache(keys, values, k.shape[2])
    if k.shape != v.shape or k.shape[1] != keys.shape[0] or len(positions) != len(k):
        raise ValueError(f"k: {k.shape}, v {v.shape} and positions {positions.shape} do not fit keys {keys.shape}")
    if len(positions) and not 0 <= positions.min() <= positions.max() < values.shape[1]:
        found = f"{positions.min()} to {positions.max()}"
        raise ValueError(f"positions: expected 0 to {values.shape[1] - 1}, found {found}")
    kv_append_heads(k, v, keys, values, positions, 0, keys.shape[0])
    return keys, values


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
        _attend_token(q[0], keys, values, int(positions[0]), reach, np.float32(scale), out[0])
        return out
    work = int(tokens * heads * dim * min(int(positions[-1]) + 1, reach))
    units = heads * ((tokens + TILE - 1) // TILE)
    threads = min(threads_for(work, PARALLEL_MACS, units), len(scratch))
    if threads == 1:
        attend_units(q, keys, values, positions, reach, np.float32(scale), out, scratch[0], 0, units)
    else:
        launch(attend_parallel, q, keys, values, positions, reach, np.float32(scale), out, scratch, threads)
    return out


def _attend_token(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, position: int, window: int, scale: np.float32, out: np.ndarray
) -> None:
    """One token, by the bodies that the decode region uses."""
    heads, dim = q.shape
    chunks = position // token_attention.CHUNK + 1 - max(0, position - window + 1) // token_attention.CHUNK
    partial = np.empty((heads, chunks, token_attention.partial_width(dim)), np.float32)
    scratch = np.empty(heads // len(keys) * token_attention.CHUNK, np.float32)
    units = len(keys) * chunks
    token_attention.attend_token_chunks(q, keys, values, position, window, scale, partial, scratch, 0, units)
    token_attention.merge_chunks(partial, chunks, out, 0, heads)


def _require_cache(keys: np.ndarray, values: np.ndarray, dim: int) -> None:
    for name, array in (("keys", keys), ("values", values)):
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{name}: expected a float32 or uint16 NumPy array, found {type(array).__name__}")
        if array.dtype not in (np.float32, np.uint16) or not array.flags.c_contiguous or not array.flags.writeable:
            raise TypeError(f"{name}: expected a writable C-contiguous float32 or uint16 array, found {array.dtype}")
    wanted = (keys.shape[0], keys.shape[1] * LANES, padded(dim)) if keys.ndim == 4 else None
    if keys.ndim != 4 or keys.shape[2:] != (dim, LANES) or values.shape != wanted or keys.dtype != values.dtype:
        raise ValueError(f"keys: {keys.shape} and values {values.shape} are no cache for head_dim {dim}")


def _append_example(rng: Any, tokens: int, kv_heads: int, dim: int, length: int) -> dict[str, Any]:
    blocks = -(-max(tokens, length) // LANES)
    return {
        "k": rng.standard_normal((tokens, kv_heads, dim), np.float32),
        "v": rng.standard_normal((tokens, kv_heads, dim), np.float32),
        "keys": rng.standard_normal((kv_heads, blocks, dim, LANES), np.float32),
        "values": rng.standard_normal((kv_heads, blocks * LANES, padded(dim)), np.float32),
        "positions": rng.permutation(blocks * LANES)[:tokens],
    }


SPECS = [
    KernelSpec(
        name="kv_append",
        function=kv_append,
        compiled=(kv_append_heads,),
        reference=reference.kv_append,
        formula="keys[:, p // 16, :, p % 16] = k, values[:, p, :D] = v",
        example=_append_example,
        flops=lambda tokens, kv_heads, dim, length: 2.0 * tokens * kv_heads * dim,  # numbers moved: nothing is computed
        bytes=lambda tokens, kv_heads, dim, length: 16.0 * tokens * kv_heads * dim,
        sizes=(
            {"tokens": 1, "kv_heads": 8, "dim": 128, "length": 1024},
            {"tokens": 128, "kv_heads": 3, "dim": 64, "length": 512},
        ),
        tolerance=0.0,
    )
]
