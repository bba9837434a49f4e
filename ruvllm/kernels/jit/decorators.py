"""The decorators that compile kernels, and the only place that chooses compiler flags.

How a body becomes fast, and gives the same bits wherever it is called: alone, by a parallel kernel, in a model's
forward pass, in a process that compiled it or one that found it in the cache.

- Loops count from 0 over rows or slices, ``for i in range(x.size)``, and not over ``range(lo, hi)`` of the whole: an
  index that might be negative would count from the end, and LLVM does not vectorise that (5 to 19 times slower).
- What is done element by element is ``kernel(independent=True)``: compiled strictly, so that each rounding is as
  written, in a vector or not. A multiply-add is written ``fma(a, b, c)``. Where ``out`` is an input, such a loop would
  be scalar without the promise of independence (6 to 9 times slower).
- A sum over a row is a ``sum_kernel`` of its own. It is fast only in an order that LLVM chooses, which depends on the
  surrounding code: so it is never inlined, and is optimised once (``private.libraries``). The order also depends on the
  width of registers: last bits differ between processors. Sums written with SIMD vectors would have one order, but
  take ten lines each, and made argmax and log_softmax 1.4 and 1.6 times slower.
- Constants are float32: ``0.0`` would turn all arithmetic into float64, at half the speed.
- What LLVM does not vectorise well is written with vectors (``simd.vectors``): matrix tiles, integer dot products,
  16-bit floats, adapters.

``FASTMATH`` is LLVM's ``fast`` without "nnan" and "ninf": with those two, LLVM may assume that no
NaN and no infinity exists, folds ``isnan`` to False and turns a mask of -inf into NaN.
"contract" gives fused multiply-adds, "reassoc" lets sums be vectorised.

Serial kernels and their helpers own no memory, so they are compiled without reference counts (``counting``).
Numba increments and decrements a count for each array that is passed to a helper; LLVM removes such a pair where it
sees both, but not around every loop: a tile of a matrix product then took 250 cycles longer. The price: numba refuses
to compile a function that makes an array and returns it, except as a ``view_kernel``.
"""

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

from numba import config, njit

from ruvllm.kernels.jit.cache import KernelCache, source_of
from ruvllm.kernels.jit.private.dispatch import counting, keep_in
from ruvllm.kernels.jit.private.libraries import Independent, IndependentPart, Parallel, Part, Serial, Sum

FASTMATH = frozenset({"contract", "reassoc", "nsz", "arcp", "afn"})

DISABLE_JIT: bool = getattr(config, "DISABLE_JIT", 0) != 0  # NUMBA_DISABLE_JIT=1: kernels run as plain Python

# Every compiled function of the project, in order of definition: warmup, explain and the tests walk it.
COMPILED: list[Any] = []

_independent: set[Any] = set()  # the functions of kernels with independent loops


def kernel(function: Callable | None = None, *, strict: bool = False, independent: bool = False) -> Any:
    """Compile a serial body ``(…, lo, hi)``: no allocation, no exception.

    ``strict=True`` compiles without FASTMATH, so that every rounding is as written: no multiply-add but ``fma``, no
    reordering. It is for bodies made of SIMD vectors or sums, and for results that must equal another program's.

    ``independent=True`` is strict, and promises that in each loop no iteration reads what another one writes. ``out``
    may be an input. A loop that breaks the promise, such as a prefix sum in an array, is silently wrong.
    """
    if function is None:
        return lambda f: kernel(f, strict=strict, independent=independent)
    if independent:
        _independent.add(function)
    compiler = Independent if independent else Serial
    fastmath = False if strict or independent else set(FASTMATH)
    return _compile(function, fastmath=fastmath, pipeline_class=compiler, **counting(False))


def sum_kernel(function: Callable) -> Any:
    """Compile a sum over a row, with the order of additions left to LLVM; only other kernels call it."""
    return _part(function, Sum, fastmath=set(FASTMATH), forceinline=False)


def inline_kernel(function: Callable | None = None, *, independent: bool = False) -> Any:
    """Compile a small helper that LLVM always inlines, so that SIMD values stay in registers; strict, see ``kernel``.

    It has no machine code of its own, and Python cannot call it.
    """
    if function is None:
        return lambda f: inline_kernel(f, independent=independent)
    return _part(function, IndependentPart if independent else Part, forceinline=True)


def view_kernel(function: Callable) -> Any:
    """inline_kernel for a helper that returns arrays over memory whose owner numba does not know (``jit.views``)."""
    return _part(function, Part, forceinline=True, counts=True)


def part_kernel(function: Callable) -> Any:
    """Compile a large function that only other kernels call; strict. Its machine code is a part of theirs."""
    # forceinline is explicit: an option that is not set, numba takes from the first caller.
    return _part(function, Part, forceinline=False)


def as_part(body: Any) -> Any:
    """A strict body compiled again as a part of larger kernels: to LLVM IR, without an entry point of its own."""
    if DISABLE_JIT:
        return body
    compiler = IndependentPart if body.py_func in _independent else Part
    return _part(body.py_func, compiler, forceinline=False)


def parallel_kernel(function: Callable) -> Any:
    """Compile a kernel whose ``prange`` splits rows over threads; it calls ``kernel`` bodies and never raises.

    It may close over compiled functions and integers only: its key in the cache describes those and nothing else.
    """
    return _compile(function, closure=True, fastmath=set(FASTMATH), parallel=True, pipeline_class=Parallel)


def _part(
    function: Callable, compiler: type[Part], forceinline: bool, fastmath: Any = False, counts: bool = False
) -> Any:
    return _compile(
        function, cached=False, fastmath=fastmath, pipeline_class=compiler, forceinline=forceinline, **counting(counts)
    )


def name_by_closure(function: Callable) -> str:
    """Describe the values that a function closes over, add a hash of that to its name, and return the description.

    It is "" where the function closes over nothing. Numba makes a symbol of a function's name, its argument types and a
    counter of this process. Through the cache, a process loads machine code that several others compiled, and of two
    functions with the same symbol the linker takes the first: the closures that one line of source makes for several
    values need several names.
    """
    enclosed = ", ".join(_described(cell.cell_contents) for cell in function.__closure__ or ())
    if enclosed:
        function.__qualname__ += f"_{hashlib.sha256(enclosed.encode()).hexdigest()[:12]}"
    return enclosed


def _described(value: Any) -> str:
    """A description that is the same in every process: of a function, its source and its name (with its closure)."""
    function = getattr(value, "py_func", value)
    source = source_of(function) if inspect.isfunction(function) else ""
    return f"{function.__qualname__} {source}" if source else repr(value)


def _compile(function: Callable, cached: bool = True, closure: bool = False, **options: Any) -> Any:
    enclosed = name_by_closure(function)
    dispatcher = njit(function, error_model="numpy", nogil=True, **options)
    if DISABLE_JIT:  # njit handed the plain Python function back: a debugger can step through it
        return dispatcher
    if not cached:
        return dispatcher
    flags = ",".join(f"{k}={sorted(v) if isinstance(v, set) else v}" for k, v in sorted(options.items()))
    keep_in(dispatcher, KernelCache(function, flags, enclosed if closure else ""))
    COMPILED.append(dispatcher)
    return dispatcher
