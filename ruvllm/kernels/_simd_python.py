"""The vectors of _simd as NumPy arrays: what runs under NUMBA_DISABLE_JIT=1, and what says what each means.

Unlike the compiled ones these loads and stores raise IndexError outside the array.
"""

from typing import Any

import numpy as np

LANES = 16


def fma(a: Any, b: Any, c: Any) -> Any:
    return a * b + c


fmax, fmin = np.fmax, np.fmin


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


def lane(v: Any, i: int) -> Any:
    return v[i]


def _elements(array: Any, index: int, count: int) -> Any:
    """A view of ``count`` elements from the flat index ``index``."""
    if count and not 0 <= index <= array.size - count:
        raise IndexError(f"elements {index} to {index + count} of an array of {array.size}")
    return array.reshape(-1)[index : index + count]


def _load(array: Any, index: int) -> Any:
    return _elements(array, index, LANES).copy()


def _store(array: Any, index: int, value: Any) -> None:
    _elements(array, index, LANES)[:] = value


f32_load = i32_load = _load
f32_store = i32_store = _store


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
    return v


def store_scalar(array: Any, index: int, value: Any) -> None:
    _elements(array, index, 1)[0] = np.float16(value).view(np.uint16) if array.dtype == np.uint16 else value


def f16_to_f32(x: Any) -> Any:
    return np.float32(np.uint16(x).view(np.float16))


def f32_to_f16(x: Any) -> Any:
    return np.float16(x).view(np.uint16)


def round_to_i32(v: Any) -> Any:
    return np.rint(v).astype(np.int32)


def to_f32(v: Any) -> Any:
    return v.astype(np.float32)


def power_of_two(v: Any) -> Any:
    return ((v + np.int32(127)) << np.int32(23)).view(np.float32)


def nan_or_zero_below(x: Any, limit: Any, y: Any) -> Any:
    return np.where(np.isnan(x), x, np.where(x < limit, np.float32(0), y))


def evens(a: Any, b: Any) -> Any:
    return np.concatenate((a, b))[0::2]


def odds(a: Any, b: Any) -> Any:
    return np.concatenate((a, b))[1::2]


def zip_low(a: Any, b: Any) -> Any:
    return np.stack((a, b), 1).reshape(-1)[:LANES]


def zip_high(a: Any, b: Any) -> Any:
    return np.stack((a, b), 1).reshape(-1)[LANES:]


def prefetch(array: Any, index: int) -> None:
    """A hint to the hardware: nothing to do here."""


def u8_load(array: Any, index: int) -> Any:
    return _elements(array, index, 64).copy()


def quad_at(array: Any, index: int) -> Any:
    return _elements(array, index, 4).astype(np.int32)


def low_nibbles(v: Any) -> Any:
    return v & np.uint8(15)


def high_nibbles(v: Any) -> Any:
    return v >> np.uint8(4)


def dot_begin() -> Any:
    return np.zeros(LANES, np.int32)


def dot_add(acc: Any, w: Any, quad: Any) -> Any:
    return acc + w.reshape(LANES, 4).astype(np.int32) @ quad


def dot_end(acc: Any) -> Any:
    return acc


def sdot_begin(total: Any) -> Any:
    return np.zeros(LANES, np.int32)


def sdot_add(acc: Any, w: Any, quad: Any) -> Any:
    return acc + w.view(np.int8).reshape(LANES, 4).astype(np.int32) @ quad


def i8_store(array: Any, index: int, value: Any) -> None:
    _elements(array, index, LANES)[:] = value.astype(np.int8)


def i32_hsum(v: Any) -> Any:
    return v.sum(dtype=np.int32)
