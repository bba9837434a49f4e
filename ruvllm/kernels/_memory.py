"""Memory: whether there is enough, and buffers that start on a cache line, on whose place nothing then depends."""

from typing import Any

import numpy as np

from ruvllm.errors import InsufficientMemoryError

CACHE_LINE = 64


def aligned_empty(shape: int | tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """An uninitialised C-contiguous array whose data start at a multiple of 64 bytes."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64))
    raw = np.empty(count * dtype.itemsize + CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % CACHE_LINE
    return raw[start : start + count * dtype.itemsize].view(dtype).reshape(shape)


def aligned_zeros(shape: int | tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Like ``aligned_empty``, filled with zeros; untouched pages cost no memory."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64))
    raw = np.zeros(count * dtype.itemsize + CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % CACHE_LINE
    return raw[start : start + count * dtype.itemsize].view(dtype).reshape(shape)


def require_memory(needed: float, what: str) -> None:
    """Raise InsufficientMemoryError, with the numbers, unless ``needed`` bytes are free; without psutil, never."""
    try:
        import psutil
    except ImportError:  # kernels need numpy and numba alone
        return
    free = psutil.virtual_memory().available
    needed = min(needed, 1e30)  # an integer of hundreds of digits is no float
    if needed > free:
        raise InsufficientMemoryError(f"{what}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
