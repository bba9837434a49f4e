"""Memory: how much is free, buffers aligned to cache lines (so that no result depends on an address), scratch."""

import math
import threading
from typing import Any

import numpy as np

from ruvllm import container
from ruvllm.errors import InsufficientMemoryError

CACHE_LINE = 64
_BLOCK = 1 << 25  # bytes of a block that smaller weights share
_LARGE = 1 << 22  # bytes from which NumPy requests huge pages
# The largest scratch buffer, in floats, that a thread keeps between calls: fresh memory costs a page fault every 4 KB.
_KEPT_FLOATS = 1 << 22


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
    """A bump allocator: pieces are cut from large blocks in order; a block is freed with its last piece."""

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

    They then share huge pages. With a separate array for each, one core read the matrices of a small model a tenth to
    a third more slowly (they got small pages), and matrices of a few MB an eighth to a fifth more slowly (their first
    and last huge page was not whole).
    """
    dtype = np.dtype(dtype)
    nbytes = _count(shape) * dtype.itemsize
    if nbytes >= _BLOCK:
        return aligned_empty(shape, dtype)
    return _blocks.take(nbytes).view(dtype).reshape(shape)


def aligned_zeros(
    shape: int | tuple[int, ...], dtype: Any = np.float32, alignment: int = CACHE_LINE
) -> np.ndarray:  # fmt: skip
    """Like ``aligned_empty``, filled with zeros; untouched pages cost no memory."""
    dtype = np.dtype(dtype)
    count = _count(shape)
    raw = np.zeros(count * dtype.itemsize + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + count * dtype.itemsize].view(dtype).reshape(shape)


class _ThreadScratch(threading.local):
    """The scratch buffer that this Python thread keeps between calls."""

    array = np.empty(0, np.float32)


_thread_scratch = _ThreadScratch()


def scratch(count: int) -> np.ndarray:
    """A scratch buffer of ``count`` uninitialised float32 elements, aligned to 64 bytes; the next call reuses it."""
    array = _thread_scratch.array
    if array.size < count:
        array = aligned_empty(max(count, _LARGE // 4))
        if count <= _KEPT_FLOATS:
            _thread_scratch.array = array
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
