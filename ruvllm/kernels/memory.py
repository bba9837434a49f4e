"""Memory: whether there is enough, and buffers that start on a cache line, on whose place nothing then depends."""

import math
import threading
from typing import Any

import numpy as np

from ruvllm import _container
from ruvllm.errors import InsufficientMemoryError

CACHE_LINE = 64
_BLOCK = 1 << 25  # bytes of memory that small weights share
_LARGE = 1 << 22  # bytes from which NumPy asks the system for huge pages
_KEPT_FLOATS = 1 << 22  # of scratch between calls, for each Python thread: fresh memory costs a page fault every 4 KB


def _count(shape: int | tuple[int, ...]) -> int:
    """Elements of an array; a fifth of the time of ``np.prod``."""
    return math.prod(shape) if isinstance(shape, tuple) else int(shape)


def aligned_empty(shape: int | tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """An uninitialised C-contiguous array whose data start at a multiple of 64 bytes."""
    dtype = np.dtype(dtype)
    count = _count(shape)
    raw = np.empty(count * dtype.itemsize + CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % CACHE_LINE
    return raw[start : start + count * dtype.itemsize].view(dtype).reshape(shape)


class _Blocks:
    """Large blocks, given away a piece at a time; a block is freed with the last piece of it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> np.ndarray:
        """``nbytes`` of uninitialised memory from a multiple of 64 bytes on."""
        with self._lock:
            if nbytes > len(self._left):
                self._left = aligned_empty(_BLOCK, np.uint8)
            taken = self._left[:nbytes]
            self._left = self._left[-(-nbytes // CACHE_LINE) * CACHE_LINE :]
            return taken


_blocks = _Blocks()


def weights_empty(shape: int | tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Like ``aligned_empty``, for weights: they lie side by side in the order in which they are asked for.

    Small matrices then share huge pages, and one begins where the one before it ends: on small pages of their own, one
    core read the matrices of a small model a tenth to a third more slowly.
    """
    dtype = np.dtype(dtype)
    nbytes = _count(shape) * dtype.itemsize
    if nbytes >= _LARGE:
        return aligned_empty(shape, dtype)
    return _blocks.take(nbytes).view(dtype).reshape(shape)


def aligned_zeros(shape: int | tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Like ``aligned_empty``, filled with zeros; untouched pages cost no memory."""
    dtype = np.dtype(dtype)
    count = _count(shape)
    raw = np.zeros(count * dtype.itemsize + CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % CACHE_LINE
    return raw[start : start + count * dtype.itemsize].view(dtype).reshape(shape)


class _Kept(threading.local):
    """The scratch that this Python thread has used before."""

    array = np.empty(0, np.float32)


_kept = _Kept()


def scratch(count: int) -> np.ndarray:
    """``count`` float32 numbers for the time of one call, at a multiple of 64 bytes; whatever was there is there."""
    array = _kept.array
    if array.size < count:
        array = aligned_empty(max(count, _LARGE // 4))
        if count <= _KEPT_FLOATS:
            _kept.array = array
    return array[:count]


def free_memory() -> int | None:
    """Bytes that can be had, of the machine and within the container; None where neither is known."""
    free = []
    if (limits := _container.memory()) is not None:
        free.append(limits[1])
    try:
        import psutil
    except ImportError:  # kernels need numpy and numba alone
        pass
    else:
        free.append(int(psutil.virtual_memory().available))
    return min(free, default=None)


def require_memory(needed: float, what: str) -> None:
    """Raise InsufficientMemoryError, with the numbers, unless ``needed`` bytes are free, as far as that is known."""
    free = free_memory()
    if free is None:
        return
    needed = min(needed, 1e30)  # an integer of hundreds of digits is no float
    if needed > free:
        raise InsufficientMemoryError(f"{what}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
