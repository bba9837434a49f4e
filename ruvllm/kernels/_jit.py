"""The one place that compiles kernels: the decorators, their flags and their cache.

``FASTMATH`` is the design's fastmath without "nnan" and "ninf": with those two, LLVM may assume that no
NaN and no infinity exists, folds ``isnan`` to False and turns a mask of -inf into NaN.
"contract" gives fused multiply-adds, "reassoc" lets sums be vectorised.

Serial kernels and their helpers own no memory, so they count no references to it (numba's private option ``_nrt``).
Numba counts up and down for each array that a helper is given; LLVM takes that away again where it sees both, but not
around every loop: a tile of a matrix product then took 250 cycles longer. The price: numba refuses to compile a
function that makes an array and returns it, but for ``view_kernel``.
"""

import copy
import hashlib
import inspect
from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core import config
from numba.core.compiler import Compiler

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
    return _compile(function, fastmath=False if strict else set(FASTMATH), _nrt=False)


def inline_kernel(function: Callable) -> Any:
    """Compile a small helper that LLVM always inlines, so that SIMD values stay in registers; strict, see kernel.

    It has no machine code of its own, and Python cannot call it.
    """
    return _part(function, forceinline=True, _nrt=False)


def view_kernel(function: Callable) -> Any:
    """inline_kernel for a helper that returns arrays over memory whose owner numba does not know (see ``_views``)."""
    return _part(function, forceinline=True, _nrt=True)


def part_kernel(function: Callable) -> Any:
    """Compile a large function that only other kernels call; strict. It exists as a part of their machine code."""
    # forceinline is said because numba compiles a function with the options of its first caller where it says nothing.
    return _part(function, forceinline=False, _nrt=False)


def _part(function: Callable, **options: Any) -> Any:
    return _compile(function, cached=False, fastmath=False, pipeline_class=_NoMachineCode, **options)


def as_part(body: Any) -> Any:
    """A body once more, as a part of a larger kernel: it need not be made ready to run by itself."""
    return body if DISABLE_JIT else part_kernel(body.py_func)


def parallel_kernel(function: Callable) -> Any:
    """Compile a kernel whose ``prange`` splits rows over threads; it calls ``kernel`` bodies and never raises."""
    return _compile(function, fastmath=set(FASTMATH), parallel=True, pipeline_class=_OneMachineCode)


class _NoMachineCode(Compiler):
    """Stops at LLVM IR: what only other kernels call need not be made ready to run, which halves compile times."""

    def __init__(
        self, typingctx: Any, targetctx: Any, library: Any, args: Any, return_type: Any, flags: Any, locals: Any
    ) -> None:
        flags.no_cpython_wrapper = True
        flags.no_cfunc_wrapper = True
        super().__init__(typingctx, targetctx, library, args, return_type, flags, locals)
        self.state.targetctx = _leaving_ir(self.state.targetctx, lambda name: False)


class _OneMachineCode(Compiler):
    """Makes machine code of a parallel kernel once.

    Numba makes it four times: of the loop's body, of two wrappers around it, and of the kernel, each with a copy of
    all that it calls. The first three stay LLVM IR here, for they only become parts of the last. So nothing in the loop
    may need Python, not even print.
    """

    def __init__(
        self, typingctx: Any, targetctx: Any, library: Any, args: Any, return_type: Any, flags: Any, locals: Any
    ) -> None:
        super().__init__(typingctx, targetctx, library, args, return_type, flags, locals)
        self.state.targetctx = _leaving_ir(self.state.targetctx, lambda name: name == self.state.func_id.func_qualname)


def _leaving_ir(targetctx: Any, runs: Callable[[str], bool]) -> Any:
    """A target that leaves all libraries as LLVM IR but those of whose name ``runs`` is true."""
    target = copy.copy(targetctx)  # shares everything but the last step
    target.cached_internal_func = {}
    codegen = _UnoptimizedCodegen(targetctx.codegen(), runs)
    target.codegen = lambda: codegen
    target.get_executable = lambda library, fndesc, env: (
        targetctx.get_executable(library, fndesc, env) if runs(library.name) else _not_callable()
    )
    return target


class _UnoptimizedCodegen:
    """Numba's code generator, but its libraries leave the rest to the kernel that they become a part of.

    All but those of whose name ``runs`` is true are not optimised, and never added to the execution engine: it would
    make machine code of them, and where two modules define a function the linker takes the first, so that the kernel
    would call the slow copy.
    """

    def __init__(self, codegen: Any, runs: Callable[[str], bool]) -> None:
        self._codegen, self._runs = codegen, runs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codegen, name)

    def create_library(self, name: str, **options: Any) -> Any:
        library = self._codegen.create_library(name, **options)
        if self._runs(name):
            return library

        def finalize() -> None:
            library._finalize_dynamic_globals()
            library._finalized = True

        library._optimize_final_module = lambda: None
        library._finalize_final_module = finalize
        return library


def _not_callable() -> Any:
    """What numba takes for the entry point: it must be a builtin, a new one each time, and raise if Python calls it."""
    return [].clear


def name_by_closure(function: Callable) -> str:
    """Add what a function encloses to its name, and return that: "" where it encloses nothing.

    Numba makes a symbol of a function's name, its argument types and a counter of this process. Machine code of several
    processes meets in one through the cache, and of two functions with one symbol the linker takes the first: what one
    line of source makes for several values needs several names.
    """
    enclosed = ", ".join(_described(cell.cell_contents) for cell in function.__closure__ or ())
    if enclosed:
        function.__qualname__ += f"_{hashlib.sha256(enclosed.encode()).hexdigest()[:12]}"
    return enclosed


def _described(value: Any) -> str:
    """The same in every process: a function by module and name, which tells what it encloses in turn."""
    function = getattr(value, "py_func", value)
    return f"{function.__module__}.{function.__qualname__}" if inspect.isfunction(function) else repr(value)


def _compile(function: Callable, cached: bool = True, **options: Any) -> Any:
    name_by_closure(function)
    dispatcher = njit(function, error_model="numpy", nogil=True, **options)
    if DISABLE_JIT:  # njit handed the plain Python function back: a debugger can step through it
        return dispatcher
    if not cached:
        return dispatcher
    flags = ",".join(f"{k}={sorted(v) if isinstance(v, set) else v}" for k, v in sorted(options.items()))
    dispatcher._cache = KernelCache(function, flags)
    COMPILED.append(dispatcher)
    return dispatcher
