"""Checks of the public functions' arguments: each error names the argument, what it was and what was expected."""

from typing import Any

import numpy as np


def float32(name: str, array: Any, ndim: int | None = None, shape: tuple[int | None, ...] | None = None) -> np.ndarray:
    """``array`` as a C-contiguous float32 NumPy array that compiled code may read.

    A float32 array is taken as it is; other strides or byte order, and tensors of other libraries that NumPy can
    view (``__array__``, DLPack), are copied or viewed.

    Raises:
        TypeError: it is no array, or not of float32.
        ValueError: wrong number of dimensions or wrong sizes.
    """
    if type(array) is not np.ndarray:
        array = _as_numpy(name, array)
    if array.dtype != np.float32:
        raise TypeError(f"{name}: expected float32, found {array.dtype}")
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, found shape {array.shape}")
    if shape is not None:
        _require_shape(name, array, shape)
    if not (array.flags.c_contiguous and array.dtype.isnative and array.flags.aligned):
        array = np.ascontiguousarray(array, np.float32)
    return array


def integers(name: str, array: Any, ndim: int = 1) -> np.ndarray:
    """``array`` as a C-contiguous int64 array. Raises TypeError for anything but integers, ValueError for shape."""
    found = np.asarray(array)
    if found.dtype.kind not in "iu" and found.size:
        raise TypeError(f"{name}: expected integers, found {found.dtype}")
    if found.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, found shape {found.shape}")
    return np.ascontiguousarray(found, np.int64)


def output(name: str, out: Any, shape: tuple[int, ...]) -> np.ndarray:
    """``out`` if it can take the result, or a new float32 array.

    Raises:
        TypeError: not a float32 NumPy array.
        ValueError: wrong shape, not C-contiguous, or read-only.
    """
    if out is None:
        return np.empty(shape, np.float32)
    if type(out) is not np.ndarray or out.dtype != np.float32 or not out.dtype.isnative:
        raise TypeError(f"{name}: expected a float32 NumPy array, found {getattr(out, 'dtype', type(out).__name__)}")
    if out.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, found {out.shape}")
    if not out.flags.c_contiguous or not out.flags.writeable or not out.flags.aligned:
        raise ValueError(f"{name}: must be C-contiguous, aligned and writable")
    return out


def _require_shape(name: str, array: np.ndarray, shape: tuple[int | None, ...]) -> None:
    if array.ndim != len(shape) or any(s is not None and s != n for s, n in zip(shape, array.shape, strict=True)):
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{name}: expected shape ({wanted}), found {array.shape}")


def _as_numpy(name: str, array: Any) -> np.ndarray:
    if hasattr(array, "__dlpack__"):
        return np.from_dlpack(array)
    if hasattr(array, "__array__") or isinstance(array, list | tuple):
        return np.asarray(array, np.float32 if isinstance(array, list | tuple) else None)
    raise TypeError(f"{name}: expected an array, found {type(array).__name__}")
