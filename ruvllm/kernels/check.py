"""Checks of the public functions' arguments: each error names the argument, what it was and what was expected."""

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np

from ruvllm.kernels.halves import bfloat16_bits, widened
from ruvllm.kernels.halves import is_half as is_half

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
    view (``__array__``, DLPack), are copied or viewed. float16 and bfloat16 are widened, which is exact.

    Raises:
        TypeError: it is not an array, or not of float32, float16 or bfloat16.
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
        raise ValueError("q: expected heads of at least one element, found none")
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


def bits(name: str, array: Any, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """``array`` of uint16, C-contiguous. Raises TypeError for anything else, ValueError for another shape."""
    if not isinstance(array, _ndarray) or array.dtype != np.uint16:
        raise TypeError(f"{name}: expected a uint16 array, found {getattr(array, 'dtype', type(array).__name__)}")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, found {array.shape}")
    return np.require(array, None, ("C", "A", "W"))


def codes(array: Any, scales: Any, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes (..., group G), int8 or uint8, and their scales (..., G), as compiled code takes them.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes that do not match.
    """
    if not isinstance(array, _ndarray) or array.dtype not in (np.int8, np.uint8):
        raise TypeError(f"codes: expected int8 or uint8, found {getattr(array, 'dtype', type(array).__name__)}")
    scales = bits("scales", scales)
    if not scales.ndim:
        raise ValueError("scales: expected at least 1 dimension, found shape ()")
    shape = *scales.shape[:-1], scales.shape[-1] * group
    if array.shape != shape:
        raise ValueError(f"codes: expected shape {shape}, found {array.shape}")
    return np.require(array, None, ("C", "A", "W")), scales


def columns(value: Any, groups: int, group: int) -> int:
    """``value`` columns that so many groups hold, the last one in part; all if None.

    Raises:
        TypeError, ValueError: no integer, or too many or too few.
    """
    if value is None:
        return groups * group
    value = integer("columns", value)
    if not (groups - 1) * group < value <= groups * group:
        raise ValueError(f"columns: expected a number that {groups} groups of {group} hold, found {value}")
    return value


def float64(name: str, array: Any) -> np.ndarray:
    """Real numbers as a C-contiguous float64 array. Raises TypeError for anything else."""
    found = _from_sequence(name, array)
    if found.dtype.kind not in "iuf" and found.size:
        raise TypeError(f"{name}: expected real numbers, found {found.dtype}")
    return np.ascontiguousarray(found, np.float64)


def given(name: str, array: Any) -> Any:
    """``array``, which is changed in place. Raises TypeError if it is None."""
    if array is None:
        raise TypeError(f"{name}: expected a float32 NumPy array, found None")
    return array


def output(name: str, out: Any, shape: tuple[int, ...], *inputs: np.ndarray) -> np.ndarray:
    """``out`` if it can take the result, or a new float32 array. It may be one of the inputs, but not a piece of one.

    float16 and bfloat16 are for ``rounded``, which public functions try before.

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


def rounded(out: np.ndarray, function: Callable[..., np.ndarray], *arguments: Any) -> np.ndarray:
    """``function(*arguments)`` rounded to the nearest elements of ``out``, an array of float16 or bfloat16.

    Raises:
        ValueError: ``out`` has another shape than the result, or is read-only.
    """
    result = function(*arguments)
    if out.shape != result.shape:
        raise ValueError(f"out: expected shape {result.shape}, found {out.shape}")
    if not out.flags.writeable:
        raise ValueError("out: must be writable")
    with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, as in other libraries
        out[...] = result
    return out


def flag(name: str, value: Any) -> bool:
    """``value`` as a bool. Raises TypeError unless it is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected True or False, found {value!r}")
    return bool(value)


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
    """The same elements as float32, C-contiguous, aligned, native and writable; a view where they already are."""
    if type(array) is not _ndarray:
        array = _as_numpy(name, array)
    if is_half(array):
        array = widened(array)
    if array.dtype.type is not np.float32:
        hint = f"; convert it: {name}.astype(np.float32)" if array.dtype == np.float64 else ""
        raise TypeError(f"{name}: expected float32, found {array.dtype}{hint}")
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
        return _of_dlpack(name, array)
    if isinstance(array, list | tuple):
        return _from_sequence(name, array, _FLOAT32)
    if hasattr(array, "__array__"):
        return np.asarray(array)
    raise TypeError(f"{name}: expected an array, found {type(array).__name__}")


def _of_dlpack(name: str, array: Any) -> np.ndarray:
    try:
        return np.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        try:
            bits = bfloat16_bits(array)  # which NumPy does not know
        except Exception:
            bits = None  # the first error says what is wrong
        if bits is not None:
            return widened(bits)
        raise TypeError(f"{name}: expected an array that NumPy can view, found {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    """An error in one line."""
    return " ".join(str(error).split())


def _from_sequence(name: str, sequence: Any, dtype: Any = None) -> np.ndarray:
    """``np.asarray`` with errors that name the argument."""
    try:
        return np.asarray(sequence, dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: expected numbers in rows of one length, found {error}") from None
