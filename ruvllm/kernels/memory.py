"""Memory: how much is free, and buffers aligned to cache lines, so that no result depends on an address."""

import math
import threading
from typing import Any

import numpy as np

from ruvllm import container
from ruvllm.errors import InsufficientMemoryError

CACHE_LINE = 64
_BLOCK = 1 << 25  # bytes of a block that smaller weights share
_LARGE = 1 << 22  # bytes from which NumPy asks the system for huge pages
_KEPT_FLOATS = (
    1 << 22
)  # of scratch kept between calls by each Python thread: fresh memory costs a page fault every 4 KB


def _count(shape: int | tuple[int, ...]) -> int:
    """Elements of an array, five times faster than ``np.prod``."""
    return math.prod(shape) if isinstance(shape, tuple) else int(shape)


def aligned_empty(shape: int | tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """An uninitialised C-contiguous array whose data start at a multiple of 64 bytes."""
    dtype = np.dtype(dtype)
    count = _count(shape)
    raw = np.empty(count * dtype.itemsize + CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % CACHE_LINE
    return raw[start : start + count * dtype.itemsize].view(dtype).reshape(shape)


class _Blocks:
    """Large blocks, handed out a piece at a time; a block is freed with its last piece."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> np.ndarray:
        """``nbytes`` of uninitialised memory, aligned to 64 bytes."""
        with self._lock:
            if nbytes > len(self._left):
                self._left = aligned_empty(_BLOCK, np.uint8)
            taken = self._left[:nbytes]
            self._left = self._left[-(-nbytes // CACHE_LINE) * CACHE_LINE :]
            return taken


_blocks = _Blocks()


def weights_empty(shape: int | tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Like ``aligned_empty``, for weights: smaller ones are contiguous in the order of allocation.

    They then share huge pages: on small pages of their own, one core read the matrices of a small model a tenth to a
    third more slowly. Those of a few MB, whose first and last huge page would not be whole, an eighth to a fifth.
    """
    dtype = np.dtype(dtype)
    nbytes = _count(shape) * dtype.itemsize
    if nbytes >= _BLOCK:
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
    """``count`` uninitialised float32 elements for the time of one call, aligned to 64 bytes."""
    array = _kept.array
    if array.size < count:
        array = aligned_empty(max(count, _LARGE // 4))
        if count <= _KEPT_FLOATS:
            _kept.array = array
    return array[:count]


def free_memory() -> int | None:
    """Bytes available on the machine and within the container; None if neither is known."""
    free = []
    if (limits := container.memory()) is not None:
        free.append(limits[1])
    try:
        import psutil
    except ImportError:  # kernels need numpy and numba alone
        pass
    else:
        free.append(int(psutil.virtual_memory().available))
    return min(free, default=None)


def require_memory(needed: float, what: str) -> None:
    """Raise InsufficientMemoryError if fewer than ``needed`` bytes are known to be free."""
    free = free_memory()
    if free is None:
        return
    needed = min(needed, 1e30)  # an integer of hundreds of digits overflows a float
    if needed > free:
        raise InsufficientMemoryError(f"{what}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
