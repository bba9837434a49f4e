"""Checks of the public functions' arguments: each error names the argument, what it was and what was expected."""

import math
from numbers import Integral, Real
from typing import Any

import numpy as np

_FLOAT32 = np.dtype(np.float32)  # one object for every native float32 array, so that "is" is enough to know it
_INT64 = np.dtype(np.int64)
_ndarray = np.ndarray


def float32(
    name: str,
    array: Any,
    ndim: int | None = None,
    shape: tuple[int | None, ...] | None = None,
    min_ndim: int = 0,
) -> np.ndarray:
    """``array`` as a C-contiguous float32 NumPy array that compiled code may read.

    A float32 array is taken as it is; other strides or byte order, and tensors of other libraries that NumPy can
    view (``__array__``, DLPack), are copied or viewed.

    Raises:
        TypeError: it is no array, or not of float32.
        ValueError: wrong number of dimensions or wrong sizes.
    """
    if type(array) is not _ndarray or array.dtype is not _FLOAT32 or not array.flags.carray:
        array = _converted(name, array)
    if shape is not None:
        if array.shape != shape:
            _require_shape(name, array, shape)
    elif ndim is not None:
        if array.ndim != ndim:
            raise ValueError(f"{name}: expected {ndim} dimensions, found shape {array.shape}")
    elif array.ndim < min_ndim:
        raise ValueError(f"{name}: expected at least {min_ndim} dimensions, found shape {array.shape}")
    return array


def rows(array: np.ndarray) -> np.ndarray:
    """(..., n) as (rows, n), a view: what row-range bodies take."""
    return array if array.ndim == 2 else array.reshape(-1, array.shape[-1])


def number(name: str, value: Any) -> float:
    """``value`` as a float. Raises TypeError unless it is a real number, ValueError beyond what a float can hold."""
    if type(value) is float:
        return value
    if not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, found {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number that a float can hold, found one of many digits") from None


def attention_scale(scale: Any, dim: int) -> float:
    """The scale given, or 1 / sqrt(dim).

    Raises:
        TypeError, ValueError: the scale is not a number, or the head dimension is 0.
    """
    if not dim:
        raise ValueError("q: expected heads of at least one number, found none")
    return 1.0 / math.sqrt(dim) if scale is None else number("scale", scale)


def integer(name: str, value: Any) -> int:
    """``value`` as an int. Raises TypeError unless it is an integer."""
    if type(value) is int:
        return value
    if not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer, found {value!r}")
    return int(value)


def positive(name: str, value: float) -> float:
    """``value`` as a float. Raises TypeError unless it is a number, ValueError unless it is finite and > 0."""
    value = number(name, value)
    if not 0 < value < np.inf:
        raise ValueError(f"{name}: expected a finite number > 0, found {value}")
    return value


def not_negative(name: str, value: float) -> float:
    """``value`` as a float. Raises TypeError unless it is a number, ValueError unless it is finite and >= 0."""
    value = number(name, value)
    if not 0 <= value < np.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, found {value}")
    return value


def integers(name: str, array: Any, ndim: int = 1) -> np.ndarray:
    """``array`` as a C-contiguous int64 array. Raises TypeError for anything but integers, ValueError for shape."""
    if type(array) is _ndarray and array.dtype is _INT64 and array.flags.carray and array.ndim == ndim:
        return array
    found = _from_sequence(name, array)
    if found.dtype.kind not in "iu" and found.size:
        raise TypeError(f"{name}: expected integers, found {found.dtype}")
    if found.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, found shape {found.shape}")
    return np.require(found, _INT64, ("C", "A", "W"))


def float64(name: str, array: Any) -> np.ndarray:
    """Real numbers as a C-contiguous float64 array. Raises TypeError for anything else."""
    found = _from_sequence(name, array)
    if found.dtype.kind not in "iuf" and found.size:
        raise TypeError(f"{name}: expected real numbers, found {found.dtype}")
    return np.ascontiguousarray(found, np.float64)


def output(name: str, out: Any, shape: tuple[int, ...], *inputs: np.ndarray) -> np.ndarray:
    """``out`` if it can take the result, or a new float32 array. It may be one of the inputs, but not a piece of one.

    Raises:
        TypeError: not a float32 NumPy array.
        ValueError: wrong shape, not C-contiguous, or read-only; or it begins within an input, or an input within it.
    """
    if out is None:
        return np.empty(shape, np.float32)
    if type(out) is not _ndarray or (out.dtype is not _FLOAT32 and out.dtype != _FLOAT32):
        raise TypeError(f"{name}: expected a float32 NumPy array, found {getattr(out, 'dtype', type(out).__name__)}")
    if out.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, found {out.shape}")
    if not out.flags.carray:  # C-contiguous, aligned, writable
        raise ValueError(f"{name}: must be C-contiguous, aligned and writable")
    for array in inputs:
        # Arrays that own their memory cannot overlap, and the test takes longer than a small kernel.
        if array is not out and (array.base is not None or out.base is not None) and np.may_share_memory(out, array):
            if array.nbytes != out.nbytes or _address(array) != _address(out):
                raise ValueError(f"{name}: overlaps an input; it may be the input itself")
    return out


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def apart(name: str, out: np.ndarray, *inputs: np.ndarray) -> np.ndarray:
    """``out``, for kernels that write a part of it before they have read all inputs.

    Raises ValueError if it shares memory with an input.
    """
    if out.base is None:  # arrays that own their memory cannot overlap, and the test takes longer than a small product
        for array in inputs:
            if array is out or array.base is not None:
                break
        else:
            return out
    for array in inputs:
        if np.may_share_memory(out, array):
            raise ValueError(f"{name}: shares memory with an input")
    return out


class _Readable:
    """A read-only array shown to NumPy as writable, so that Numba compiles no second version; kernels only read it."""

    def __init__(self, array: np.ndarray) -> None:
        self._keep = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def _converted(name: str, array: Any) -> np.ndarray:
    """The same float32 numbers C-contiguous, aligned, native and writable; a view where they already are."""
    if type(array) is not _ndarray:
        array = _as_numpy(name, array)
    if array.dtype.type is not np.float32:
        raise TypeError(f"{name}: expected float32, found {array.dtype}")
    array = np.require(array, _FLOAT32, ("C", "A"))
    return array if array.flags.writeable else np.asarray(_Readable(array))


def _require_shape(name: str, array: np.ndarray, shape: tuple[int | None, ...]) -> None:
    fits = array.ndim == len(shape)
    if fits:
        for size, found in zip(shape, array.shape, strict=True):  # a loop, not any(): half the time
            fits = fits and (size is None or size == found)
    if not fits:
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{name}: expected shape ({wanted}), found {array.shape}")


def _as_numpy(name: str, array: Any) -> np.ndarray:
    if isinstance(array, _ndarray):  # a memory map, or another subclass
        return np.asarray(array)
    if hasattr(array, "__dlpack__"):
        return np.from_dlpack(array)
    if isinstance(array, list | tuple):
        return _from_sequence(name, array, _FLOAT32)
    if hasattr(array, "__array__"):
        return np.asarray(array)
    raise TypeError(f"{name}: expected an array, found {type(array).__name__}")


def _from_sequence(name: str, sequence: Any, dtype: Any = None) -> np.ndarray:
    """``np.asarray`` with errors that name the argument."""
    try:
        return np.asarray(sequence, dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: expected numbers in rows of one length, found {error}") from None
