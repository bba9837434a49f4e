"""The one place that compiles kernels: the decorators, their flags and their cache.

``FASTMATH`` is the design's fastmath without "nnan" and "ninf": with those two, LLVM may assume that no
NaN and no infinity exists, folds ``isnan`` to False and turns a mask of -inf into NaN.
"contract" gives fused multiply-adds, "reassoc" lets sums be vectorised.
"""

from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core import config

from ruvllm.kernels._cache import KernelCache

FASTMATH = frozenset({"contract", "reassoc", "nsz", "arcp", "afn"})

DISABLE_JIT: bool = getattr(config, "DISABLE_JIT", 0) != 0  # NUMBA_DISABLE_JIT=1: kernels run as plain Python

# Every compiled function of the project, in order of definition: warmup, explain and the tests walk it.
COMPILED: list[Any] = []


def kernel(function: Callable | None = None, *, strict: bool = False) -> Any:
    """Compile a serial body ``(…, lo, hi)``: no allocation, no exception.

    ``strict=True`` keeps every rounding as written: no multiply-add but ``fma``, no reordering. It is for bodies made
    of SIMD vectors, which need no reordering to be fast, and must give the same bits wherever they are inlined
    (alone, in a parallel kernel, in the decode region); and for results that must equal another program's.
    """
    if function is None:
        return lambda f: kernel(f, strict=strict)
    return _compile(function, fastmath=False if strict else set(FASTMATH))


def inline_kernel(function: Callable) -> Any:
    """Compile a small helper that LLVM always inlines, so that SIMD values stay in registers; strict, see kernel."""
    return _compile(function, fastmath=False, forceinline=True)


def parallel_kernel(function: Callable) -> Any:
    """Compile a kernel whose ``prange`` splits rows over threads; it calls ``kernel`` bodies and never raises."""
    return _compile(function, fastmath=set(FASTMATH), parallel=True)


def _compile(function: Callable, **options: Any) -> Any:
    dispatcher = njit(function, error_model="numpy", nogil=True, **options)
    if DISABLE_JIT:  # njit handed the plain Python function back: a debugger can step through it
        return dispatcher
    flags = ",".join(f"{k}={sorted(v) if isinstance(v, set) else v}" for k, v in sorted(options.items()))
    dispatcher._cache = KernelCache(function, flags)
    COMPILED.append(dispatcher)
    return dispatcher
