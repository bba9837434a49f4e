"""Rows split over threads: a body's parallel kernel, and calls that choose between it and the body alone."""

from typing import Any

import numpy as np
from numba import prange

from ruvllm.kernels.jit.decorators import parallel_kernel
from ruvllm.kernels.threads.pool import launch, threads_for


def over_rows(body: Any, step: int = 1) -> Any:
    """A parallel kernel ``(threads, rows, *arguments)`` of ``body(*arguments, lo, hi)``, split at multiples of step."""

    @parallel_kernel
    def parallel(threads, rows, *arguments):
        steps = (rows + step - 1) // step
        for t in prange(threads):
            body(*arguments, steps * t // threads * step, min(steps * (t + 1) // threads * step, rows))

    return parallel


def over_elements(body: Any) -> Any:
    """over_rows for a body over a range of float32 elements, split at cache lines."""
    return over_rows(body, 16)


def run_rows(body: Any, parallel: Any, work: int, threshold: int, rows: int, *arguments: Any) -> None:
    """Compute all rows: with the body alone below ``threshold`` units of work, else with its parallel kernel."""
    threads = threads_for(work, threshold, rows)
    if threads == 1:
        body(*arguments, 0, rows)
    else:
        launch(parallel, threads, rows, *arguments)


def run_elements(body: Any, parallel: Any, threshold: int, *arrays: np.ndarray) -> None:
    """run_rows over the elements of C-contiguous arrays of one shape."""
    count = arrays[0].size
    run_rows(body, parallel, count, threshold, count, *[array.ravel() for array in arrays])
