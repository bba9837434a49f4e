"""A parallel region: one compiled function that all threads enter once, with a table of arguments.

The function is compiled to a C function of one integer. ``enter``, one ``parallel=True`` kernel for all of them, calls
it by address, so that numba's wrappers around it stay small. The integer is the address of an int64 table that holds
whatever the function needs: integers, and addresses of arrays, which ``array_at`` turns back into arrays.
"""

import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any

from numba import prange, types

from ruvllm.kernels.jit.cache import KernelCache
from ruvllm.kernels.jit.decorators import DISABLE_JIT, name_by_closure, parallel_kernel
from ruvllm.kernels.jit.private.dispatch import c_function
from ruvllm.kernels.threads.pool import launch
from ruvllm.kernels.threads.team import call_address

_compiling = threading.RLock()


@parallel_kernel
def enter(address: Any, table: Any, threads: Any) -> None:
    """Each of the threads calls the C function at ``address`` with the address of the table."""
    for _ in prange(threads):
        call_address(address, table)


class CFunction:
    """A function of int64 parameters, compiled strictly to a C function that compiled code can call by its address."""

    parameters = 1

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self._enclosed = name_by_closure(function)
        self.__name__ = getattr(function, "__name__", "region")
        self.__doc__ = function.__doc__

    @cached_property
    def address(self) -> int:
        """The C function's address; the first use compiles the function, or loads it from the cache."""
        with _compiling:
            signature = types.void(*(types.int64,) * self.parameters)
            self._compiled = c_function(self.function, signature, KernelCache(self.function, "region", self._enclosed))
        return int(self._compiled.address)

    def __call__(self, *arguments: int) -> None:
        """Call it from Python."""
        if DISABLE_JIT:
            self.function(*arguments)
        else:
            _ = self.address
            self._compiled.ctypes(*arguments)


class Region(CFunction):
    """``function(table)``, to be entered by several threads at once; it may use barriers (``threads.team``). Strict."""

    def run(self, table: int, threads: int) -> None:
        """Let ``threads`` threads enter; returns when the last has left. table: the address of an int64 table."""
        if DISABLE_JIT:
            self.function(table)
        else:
            launch(enter, self.address, table, threads)
