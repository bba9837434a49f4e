"""The vectors of vectors_llvm.py as NumPy arrays: they run under NUMBA_DISABLE_JIT=1, and define what each one means.

Unlike the compiled ones these loads and stores raise IndexError outside the array.
"""

from typing import Any

import numpy as np

LANES = 16


def fma(a: Any, b: Any, c: Any) -> Any:
    # The product of two float32 is exact in float64, so this rounds like the instruction in all but rare cases.
    exact = np.multiply(a, b, dtype=np.float64) + c
    return exact.astype(np.float32) if isinstance(exact, np.ndarray) else np.float32(exact)


fmax, fmin, max_or_nan = np.fmax, np.fmin, np.maximum


def max_or_second(a: Any, b: Any) -> Any:
    return np.where(a > b, a, b)[()]  # a scalar for two scalars


def splat(x: Any) -> Any:
    return np.full(LANES, x, np.int32 if isinstance(x, int | np.integer) else np.float32)


def splat_at(array: Any, index: int) -> Any:
    return splat(_elements(array, index, 1)[0])


def f32_zero() -> Any:
    return np.zeros(LANES, np.float32)


def hsum(v: Any) -> Any:
    while len(v) > 1:
        v = v[: len(v) // 2] + v[len(v) // 2 :]
    return v[0]


def hmax(v: Any) -> Any:
    return np.fmax.reduce(v)


def _elements(array: Any, index: int, count: int) -> Any:
    """A view of ``count`` elements from the flat index ``index``."""
    if count and not 0 <= index <= array.size - count:
        raise IndexError(f"elements {index} to {index + count} of an array of {array.size}")
    return array.reshape(-1)[index : index + count]


def _load(array: Any, index: int) -> Any:
    return _elements(array, index, LANES).copy()


def _store(array: Any, index: int, value: Any) -> None:
    _elements(array, index, LANES)[:] = value


f32_load, f32_store = _load, _store


def f32_store_first(array: Any, index: int, value: Any, count: int) -> None:
    count = max(0, min(count, LANES))
    _elements(array, index, count)[:] = value[:count]


def f32_load_first(array: Any, index: int, count: int) -> Any:
    count = max(0, min(count, LANES))
    v = f32_zero()
    v[:count] = _elements(array, index, count)
    return v


def lanes_between(value: Any, first: int, end: int, other: Any) -> Any:
    i = np.arange(LANES)
    return np.where((i >= first) & (i < end), value, np.float32(other))


def load(array: Any, index: int) -> Any:
    v = _load(array, index)
    if v.dtype == np.uint16:
        return v.view(np.float16).astype(np.float32)
    if v.dtype == np.int16:
        return (v.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return v.astype(np.float32)


def f16_load(array: Any, index: int) -> Any:
    return _elements(array, index, 2 * LANES).copy().view(np.float16).astype(np.float32)


def f16_to_f32(x: Any) -> Any:
    return np.float32(np.uint16(x).view(np.float16))


def f32_to_f16(x: Any) -> Any:
    return np.float16(x).view(np.uint16)


def round_to_i32(v: Any) -> Any:
    return np.rint(v).astype(np.int32)


def to_f32(v: Any) -> Any:
    return v.astype(np.float32)


def power_of_two(v: Any) -> Any:
    return ((v.view(np.int32) << np.int32(23)) + np.int32(127 << 23)).view(np.float32)


def at_most(v: Any, limit: Any) -> Any:
    return np.where(v > limit, np.float32(limit), v)[()]


def zero_below(x: Any, limit: Any, y: Any) -> Any:
    return np.where(x < limit, np.float32(0), y)


def evens(a: Any, b: Any) -> Any:
    return np.concatenate((a, b))[0::2]


def odds(a: Any, b: Any) -> Any:
    return np.concatenate((a, b))[1::2]


def zip_low(a: Any, b: Any) -> Any:
    return np.stack((a, b), 1).reshape(-1)[:LANES]


def zip_high(a: Any, b: Any) -> Any:
    return np.stack((a, b), 1).reshape(-1)[LANES:]


def low_halves(a: Any, b: Any) -> Any:
    return np.concatenate((a[:8], b[:8]))


def prefetch(array: Any, index: int) -> None:
    """A hint to the hardware: nothing to do here."""


prefetch_l2 = prefetch_stream = prefetch
STREAMS_THROUGH_L1 = False


def u8_load(array: Any, index: int) -> Any:
    return _elements(array, index, 64).copy()


def quad_at(array: Any, index: int) -> Any:
    return _elements(array, index, 4).astype(np.int32)


def low_nibbles(v: Any) -> Any:
    return tuple(map(low_nibbles, v)) if isinstance(v, tuple) else v & np.uint8(15)


def high_nibbles(v: Any) -> Any:
    return tuple(map(high_nibbles, v)) if isinstance(v, tuple) else v >> np.uint8(4)


def bytes_to_f32(v: Any, j: int) -> Any:
    return v.reshape(LANES, 4)[:, j].view(np.int8).astype(np.float32)


def bits_at(v: Any, first: int, count: int) -> Any:
    return (v.view(np.uint32) >> np.uint32(first) & np.uint32((1 << count) - 1)).astype(np.int32)


def dot_begin() -> Any:
    return np.zeros(LANES, np.int32)


def dot_add(acc: Any, w: Any, quad: Any) -> Any:
    return acc + w.reshape(LANES, 4).astype(np.int32) @ quad


def dot_end(acc: Any) -> Any:
    return acc


def with_fifth_bit(nibbles: Any, bits: Any, j: int) -> Any:
    if isinstance(nibbles, tuple):
        return tuple(with_fifth_bit(a, b, j) for a, b in zip(nibbles, bits, strict=True))
    return nibbles | ((bits >> np.uint8(j)) & np.uint8(1)) << np.uint8(4)


def i8_store(array: Any, index: int, value: Any) -> None:
    _elements(array, index, LANES)[:] = value.astype(np.int8)


def largest_magnitude(a: Any, b: Any) -> Any:
    return np.max(np.abs((a, b)))


def find_magnitude(v: Any, magnitude: Any) -> int:
    found = np.flatnonzero(np.abs(v) == magnitude)
    return int(found[0]) if len(found) else LANES


def without_lane(v: Any, i: int) -> Any:
    return np.where(np.arange(LANES) == i, np.float32(0), v)


def i32_hsum(v: Any) -> Any:
    return v.sum(dtype=np.int32)


# --- several vectors at once -------------------------------------------------------------------------------------


def f32_zeros(rows: int) -> Any:
    return (f32_zero(),) * rows


def fma_rows(w: Any, x: Any, index: int, step: int, sums: Any) -> Any:
    return tuple(w * _elements(x, index + row * step, 1)[0] + total for row, total in enumerate(sums))


def fma_two(a: Any, b: Any, x: Any, index: Any, step: Any, left: Any, right: Any) -> tuple[Any, Any]:
    return fma_rows(a, x, index, step, left), fma_rows(b, x, index, step, right)


def fma_three(
    a: Any, b: Any, c: Any, x: Any, index: Any, step: Any, left: Any, middle: Any, right: Any
) -> tuple[Any, Any, Any]:
    return (
        fma_rows(a, x, index, step, left), fma_rows(b, x, index, step, middle), fma_rows(c, x, index, step, right),
    )  # fmt: skip


def fma_each(w: Any, rows: Any, sums: Any) -> Any:
    return tuple(fma(w, row, total) for row, total in zip(rows, sums, strict=True))


def fma_outer(left: Any, right: Any, sums: Any) -> Any:
    return tuple(fma(a, b, sums[i * len(right) + j]) for i, a in enumerate(left) for j, b in enumerate(right))


def sum_rows(a: Any, b: Any) -> Any:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def sum_lanes(rows: Any) -> Any:
    return np.array([hsum(row) for row in rows], np.float32)


def load_rows(array: Any, index: int, step: int, rows: int) -> Any:
    return tuple(f32_load(array, index + row * step) for row in range(rows))


def store_rows(array: Any, index: int, step: int, rows: Any) -> None:
    for row, value in enumerate(rows):
        f32_store(array, index + row * step, value)


def add_rows(array: Any, index: int, step: int, rows: Any) -> None:
    for row, value in enumerate(rows):
        f32_store(array, index + row * step, f32_load(array, index + row * step) + value)


def zip_rows(rows: Any) -> Any:
    half = len(rows) // 2
    pairs = zip(rows[:half], rows[half:], strict=True)
    return tuple(merged for a, b in pairs for merged in (zip_low(a, b), zip_high(a, b)))


def never_inline() -> None:
    """Nothing to do: Python inlines nothing."""


def stack_f32(count: int) -> Any:
    return np.zeros(count, np.float32)


def stack_i32(count: int) -> Any:
    return np.zeros(count, np.int32)


def stack_i64(count: int) -> Any:
    return np.zeros(count, np.int64)


def lines_of(w: Any, at: Any, offset: int) -> Any:
    return tuple(u8_load(w, start + offset) for start in at)


def f16_of(w: Any, at: Any, offset: int) -> Any:
    return tuple(f16_load(w, start + offset) for start in at)


def offset_rows(offsets: Any, index: int, step: int, at: Any, tile: Any) -> Any:
    rows = range(len(tile) // len(at))
    return tuple(splat(_elements(offsets, index + row * step, 1)[0]) for row in rows) * len(at)


def signed_offset_rows(offsets: Any, index: int, step: int, at: Any, tile: Any) -> Any:
    return (np.zeros(LANES, np.int32),) * len(tile)


def start_rows(offsets: Any) -> Any:
    return offsets


def end_rows(sums: Any, offsets: Any) -> Any:
    return sums


def _panels_and_rows(tile: Any, panels: Any) -> Any:
    """Panel and token of each vector of a tile."""
    rows = len(tile) // len(panels)
    return [(vector, panels[i // rows], i % rows) for i, vector in enumerate(tile)]


def dot_rows(sums: Any, lines: Any, xq: Any, index: int, step: int) -> Any:
    return tuple(dot_add(acc, w, quad_at(xq, index + row * step)) for acc, w, row in _panels_and_rows(sums, lines))


def sdot_rows(sums: Any, lines: Any, xq: Any, index: int, step: int) -> Any:
    return dot_rows(sums, tuple(w.view(np.int8) for w in lines), xq, index, step)


def fma_panels(w: Any, x: Any, index: int, tile: Any) -> Any:
    return tuple(fma(v, splat_at(x, index + row), total) for total, v, row in _panels_and_rows(tile, w))


def scale_rows(tile: Any, sums: Any, scales: Any, xs: Any, index: int) -> Any:
    factors = (scale * splat_at(xs, index + row) for _, scale, row in _panels_and_rows(tile, scales))
    return tuple(fma(to_f32(s), factor, total) for total, s, factor in zip(tile, sums, factors, strict=True))


def fma_columns(columns: Any, offsets: Any, index: int, x: Any, x_index: int, step: int, at: Any, tile: Any) -> Any:
    def vector(panel: int, row: int) -> Any:
        return f32_load(columns, offsets[index + row * step] * len(at) + panel * LANES)

    found = _panels_and_rows(tile, range(len(at)))
    return tuple(fma(vector(p, row), splat_at(x, x_index + 2 * row * step), total) for total, p, row in found)


def store_panels(out: Any, starts: Any, offset: int, step: int, tile: Any) -> None:
    for vector, start, row in _panels_and_rows(tile, starts):
        f32_store(out, start + offset + row * step, vector)


# --- elements of a KV cache --------------------------------------------------------------------------------------


def _rounded_to(cache: Any, vector: Any) -> Any:
    if cache.dtype == np.uint16:
        return vector.astype(np.float16).view(np.uint16)
    if cache.dtype == np.int8:
        return np.nan_to_num(np.clip(np.rint(vector), -128, 127)).astype(np.int8)
    return vector


def store_elements(cache: Any, index: int, vector: Any) -> None:
    _elements(cache, index, LANES)[:] = _rounded_to(cache, vector)


def store_element(cache: Any, index: int, value: Any, inverse: Any) -> None:
    one = np.full(1, value * inverse if cache.dtype == np.int8 else value, np.float32)
    _elements(cache, index, 1)[:] = _rounded_to(cache, one)


def store_element_rows(cache: Any, index: int, step: int, rows: Any) -> None:
    for row, vector in enumerate(rows):
        store_elements(cache, index + row * step, vector)


def store_scale(cache: Any, index: int, scale: Any) -> None:
    if cache.dtype == np.int8:
        _elements(cache, index, 4)[:] = np.frombuffer(np.float32(scale).tobytes(), np.int8)


def read_scales(cache: Any, index: int) -> Any:
    if cache.dtype != np.int8:
        return splat(np.float32(1))
    return np.frombuffer(_elements(cache, index, 4 * LANES).tobytes(), np.float32)


def scaled(cache: Any, vector: Any, scales: Any) -> Any:
    return vector * scales if cache.dtype == np.int8 else vector


def scaled_rows(cache: Any, rows: Any, scales: Any) -> Any:
    return tuple(scaled(cache, row, scales) for row in rows)


def must_be_float32(array: Any) -> None:
    assert array.dtype == np.float32
