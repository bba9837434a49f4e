"""The KV cache's layout, and appending to it.

One layer: keys (KV, B, K, 16), in blocks of 16 positions, which are the lanes of a panel; values (KV, S, DV) by
position, DV = D rounded up to 16. Both are float32, IEEE half bits (uint16), or int8. In float caches, K = D.

In int8, each key and each value of a head has one scale, its largest magnitude / 127. A block ends with the scales of
its 16 keys and then of its 16 values, as float32: 8 more rows of 16 bytes, so K = D + 8.
"""

from typing import Any

import numpy as np
from numba import prange

from ruvllm.kernels import check, reference
from ruvllm.kernels.attention.tile import CHUNK, Cache, chunk_at, plain_cache
from ruvllm.kernels.jit.decorators import inline_kernel, kernel, parallel_kernel
from ruvllm.kernels.jit.views import flat
from ruvllm.kernels.matmul.micro_kernels import LANES
from ruvllm.kernels.simd.vectors import (
    f32_load,
    f32_load_first,
    f32_zero,
    fma,
    hmax,
    hsum,
    load_rows,
    max_or_second,
    read_scales,
    scaled,
    scaled_rows,
    splat,
    store_element,
    store_element_rows,
    store_elements,
    store_scale,
    zip_rows,
)
from ruvllm.kernels.spec import KernelSpec
from ruvllm.kernels.threads.over_rows import run_rows
from ruvllm.kernels.threads.pool import PARALLEL_ELEMENTS

SCALE_ROWS = 8  # rows of 16 bytes that hold the scales of a block of int8 keys and values
VALUE_SCALE_ROW = 4  # the first of these with scales of values
_LARGEST, _ONE = np.float32(127), np.float32(1)
_INT8 = np.dtype(np.int8)
_CACHED = (np.dtype(np.float32), np.dtype(np.uint16), _INT8)  # dtypes of a cache


def padded(head_dim: int) -> int:
    """head_dim rounded up to whole vectors: the row length of the value cache."""
    return (head_dim + LANES - 1) // LANES * LANES


def key_rows(head_dim: int, dtype: Any) -> int:
    """Rows of a block of keys of this dtype."""
    return head_dim + (SCALE_ROWS if dtype == _INT8 else 0)


@kernel(strict=True)
def kv_append_heads(k, v, cache, positions, lo, hi):
    """Write k, v (T, KV, D) of tokens at positions (T,) into a ``Cache``, for kv heads lo:hi."""
    tokens, heads, dim = k.shape
    keys, values = cache.keys, cache.values
    k_flat, v_flat = flat(k), flat(v)
    block = keys.shape[2] * LANES
    wide = values.shape[2]
    row = heads * dim
    whole = dim - dim % LANES
    for head in range(lo, hi):
        t = 0
        while t < tokens:
            xi = t * row + head * dim
            position = positions[t] % CHUNK
            keys_flat, values_flat, first = chunk_at(cache, head, positions[t] - position)
            ki, vi = (first + position) // LANES * block, (first + position) * wide
            count = LANES if _fill_block(positions, t) else 1
            transposed = whole if count == LANES else 0
            for i in range(count):
                at, j = xi + i * row, position % LANES + i
                k_scale, v_scale = _scale(k_flat, at, dim), _scale(v_flat, at, dim)
                store_scale(keys_flat, ki + dim * LANES + 4 * j, k_scale)
                store_scale(keys_flat, ki + (dim + VALUE_SCALE_ROW) * LANES + 4 * j, v_scale)
                for d in range(transposed, dim):
                    store_element(keys_flat, ki + d * LANES + j, k_flat[at + d], _ONE / k_scale)
                for d in range(0, whole, LANES):
                    scaled_values = scaled(values, f32_load(v_flat, at + d), splat(_ONE / v_scale))
                    store_elements(values_flat, vi + i * wide + d, scaled_values)
                for d in range(whole, dim):
                    store_element(values_flat, vi + i * wide + d, v_flat[at + d], _ONE / v_scale)
            for d in range(0, transposed, LANES):  # 16 x 16 elements: positions become lanes
                lines = zip_rows(zip_rows(zip_rows(zip_rows(load_rows(k_flat, xi + d, row, LANES)))))
                lines = scaled_rows(keys, lines, splat(_ONE) / read_scales(keys_flat, ki + dim * LANES))
                store_element_rows(keys_flat, ki + d * LANES, LANES, lines)
            t += count


@inline_kernel
def _scale(x, xi, dim):
    """The largest magnitude of dim elements / 127; NaN if one of them is NaN or infinite."""
    top, not_finite = f32_zero(), f32_zero()
    for d in range(0, dim, LANES):
        v = f32_load(x, xi + d) if d + LANES <= dim else f32_load_first(x, xi + d, dim - d)
        top = max_or_second(max_or_second(v, f32_zero() - v), top)
        not_finite = fma(v, f32_zero(), not_finite)
    return hmax(top) / _LARGEST + hsum(not_finite)


@inline_kernel
def _fill_block(positions, t):
    """Whether the tokens from t on fill a block of 16 positions, in order."""
    if positions[t] % LANES or t + LANES > len(positions):
        return False
    for i in range(1, LANES):
        if positions[t + i] != positions[t] + i:
            return False
    return True


@parallel_kernel
def kv_append_parallel(threads, heads, k, v, cache, positions):
    """kv_append_heads with the kv heads split over threads."""
    for t in prange(threads):
        kv_append_heads(k, v, cache, positions, heads * t // threads, heads * (t + 1) // threads)


def append(k: np.ndarray, v: np.ndarray, cache: Cache, positions: np.ndarray) -> None:
    """kv_append for callers that own their buffers (``model.Attention``) and guarantee their sizes."""
    arguments = k, v, cache, positions
    run_rows(kv_append_heads, kv_append_parallel, k.size, PARALLEL_ELEMENTS, len(cache.keys), *arguments)


def kv_append(
    k: np.ndarray, v: np.ndarray, keys: np.ndarray, values: np.ndarray, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """keys[h, p // 16, :, p % 16] = k[t, h] and values[h, p] = v[t, h] for the position p of each token t, in place.

    An int8 cache holds each k[t, h] and v[t, h] rounded, with its scale max|x| / 127.

    Args:
        k, v: (T, KV, D) float32.
        keys: (KV, B, D, 16) float32 or uint16 (IEEE half bits), or (KV, B, D + 8, 16) int8; position p is lane
            p % 16 of block p // 16. The last 8 rows of int8 blocks hold scales.
        values: (KV, 16 B, DV) of the same dtype, DV = D rounded up to a multiple of 16.
        positions: (T,) integers from 0 to 16 B - 1.

    Returns:
        ``keys`` and ``values``.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype or shape, or a position is outside the cache.
    """
    k, v = check.float32("k", k, ndim=3), check.float32("v", v, ndim=3)
    positions = check.integers("positions", positions)
    _require_cache(keys, values, k.shape[2])
    if k.shape != v.shape or k.shape[1] != keys.shape[0] or len(positions) != len(k):
        raise ValueError(f"k: {k.shape}, v {v.shape} and positions {positions.shape} do not fit keys {keys.shape}")
    if len(positions) and positions.view(np.uint64).max() >= values.shape[1]:  # as unsigned, negative ones are huge
        found = f"{positions.min()} to {positions.max()}"
        raise ValueError(f"positions: expected 0 to {values.shape[1] - 1}, found {found}")
    append(k, v, plain_cache(keys, values), positions)
    return keys, values


def _require_cache(keys: np.ndarray, values: np.ndarray, dim: int) -> None:
    for name, array in (("keys", keys), ("values", values)):
        if not isinstance(array, np.ndarray):
            expected = "a float32, uint16 or int8 NumPy array"
            raise TypeError(f"{name}: expected {expected}, found {type(array).__name__}")
        if array.dtype not in _CACHED or not array.flags.c_contiguous or not array.flags.writeable:
            expected = "a writable C-contiguous float32, uint16 or int8 array"
            raise TypeError(f"{name}: expected {expected}, found {array.dtype}")
    wanted = (keys.shape[0], keys.shape[1] * LANES, padded(dim)) if keys.ndim == 4 else None
    fit = values.shape == wanted and keys.dtype == values.dtype
    if not fit or keys.shape[2:] != (key_rows(dim, keys.dtype), LANES):
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
        compiled=(kv_append_heads, kv_append_parallel),
        reference=reference.kv_append,
        formula="keys[:, p // 16, :, p % 16] = k, values[:, p, :D] = v",
        example=_append_example,
        flops=lambda tokens, kv_heads, dim, length: (
            2.0 * tokens * kv_heads * dim
        ),  # elements moved: nothing is computed
        bytes=lambda tokens, kv_heads, dim, length: 16.0 * tokens * kv_heads * dim,
        sizes=(
            {"tokens": 1, "kv_heads": 8, "dim": 128, "length": 1024},
            {"tokens": 128, "kv_heads": 3, "dim": 64, "length": 512},
            *({"tokens": t, "kv_heads": 32, "dim": 128, "length": t} for t in (256, 512, 1024, 2048)),
        ),
        tolerance=0.0,
    )
]
