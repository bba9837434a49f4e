"""How many threads a call may use, and from how much work on more than one thread pays."""

import threading

import numba

# Work per call below which one thread is as fast: a parallel launch costs a few microseconds (omp, tbb).
PARALLEL_ELEMENTS = 32768  # elements streamed by a kernel that does little arithmetic on each
PARALLEL_MACS = 262144  # multiply-adds

_local = threading.local()


def num_threads() -> int:
    """Threads that numba will use for a parallel call made now from this Python thread."""
    return int(numba.get_num_threads())
