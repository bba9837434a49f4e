"""How many threads numba uses, asked without its locks."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
from numba.np.ufunc import parallel

from ruvllm.kernels.jit.private.parts import part


def _without_locks() -> Any:
    return getattr(parallel, "_get_num_threads")  # noqa: B009  it is set when threads start


@part("thread_count", "small parallel calls take a microsecond longer")
def has_thread_count() -> bool:
    """Whether numba's C function returns the same number as ``numba.get_num_threads``."""
    count = int(numba.get_num_threads())  # starts the threads
    return int(_without_locks()()) == count


@cache
def thread_counter() -> Callable[[], int]:
    """The function that returns how many threads a parallel call would use now; getting it starts the threads.

    numba.get_num_threads takes two locks, which cost more than a small kernel.
    """
    counter: Callable[[], int] = _without_locks() if has_thread_count() else numba.get_num_threads
    return counter
