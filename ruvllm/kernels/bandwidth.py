"""How fast this machine reads memory: the limit of every kernel that reads more than it computes."""

import time
from typing import Any

import numpy as np
from numba import prange

from ruvllm.kernels import reference
from ruvllm.kernels._jit import kernel, parallel_kernel
from ruvllm.kernels._memory import aligned_empty
from ruvllm.kernels._simd import LANES, f32_load, f32_load_first, f32_zero, hsum
from ruvllm.kernels._spec import KernelSpec
from ruvllm.kernels._threads import launch, limited_to, num_threads

_STEP = 8 * LANES  # eight running sums: additions are never what the loop waits for


@kernel(strict=True)
def sum_range(x: Any, sums: Any, slot: Any, lo: Any, hi: Any) -> None:
    """sums[slot] = the sum of x[lo:hi]. x (n,)."""
    s0, s1, s2, s3 = f32_zero(), f32_zero(), f32_zero(), f32_zero()
    s4, s5, s6, s7 = f32_zero(), f32_zero(), f32_zero(), f32_zero()
    whole = lo + (hi - lo) // _STEP * _STEP
    for i in range(lo, whole, _STEP):
        s0 = s0 + f32_load(x, i)
        s1 = s1 + f32_load(x, i + LANES)
        s2 = s2 + f32_load(x, i + 2 * LANES)
        s3 = s3 + f32_load(x, i + 3 * LANES)
        s4 = s4 + f32_load(x, i + 4 * LANES)
        s5 = s5 + f32_load(x, i + 5 * LANES)
        s6 = s6 + f32_load(x, i + 6 * LANES)
        s7 = s7 + f32_load(x, i + 7 * LANES)
    for i in range(whole, hi, LANES):
        s0 = s0 + f32_load_first(x, i, hi - i)
    sums[slot] = hsum(((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7)))


@parallel_kernel
def sum_parallel(x: Any, sums: Any, threads: Any) -> None:
    """sum_range with x split over threads, one sum each. sums (threads,)."""
    vectors = (x.size + LANES - 1) // LANES
    for t in prange(threads):
        end = min(vectors * (t + 1) // threads * LANES, x.size)
        sum_range(x, sums, t, vectors * t // threads * LANES, end)


def read_bandwidth(nbytes: int = 1 << 28, repeats: int = 5, threads: int | None = None) -> float:
    """Bytes per second at which all threads together read a float32 buffer, summing it; the best of ``repeats``.

    Args:
        nbytes: size of the buffer, >= 4; much larger than the last cache, or the cache is what is measured.
        repeats: how often it is read, >= 1.
        threads: how many threads read; None for as many as kernels use.

    Raises:
        ValueError: a number that is too small.
    """
    if threads is None:
        threads = num_threads()
    for name, value, least in (("nbytes", nbytes, 4), ("repeats", repeats, 1), ("threads", threads, 1)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, found {value}")
    x = aligned_empty(nbytes // 4)
    x[:] = 1
    sums = np.empty(threads, np.float32)
    best = np.inf
    with limited_to(threads):
        _sum(x, sums)  # compiles, and starts the threads
        for _ in range(repeats):
            start = time.perf_counter()
            _sum(x, sums)
            best = min(best, time.perf_counter() - start)
    return x.nbytes / best


def _sum(x: np.ndarray, sums: np.ndarray) -> None:
    if sums.size == 1:
        sum_range(x, sums, 0, 0, x.size)
    else:
        launch(sum_parallel, x, sums, sums.size)


def buffer_sum(x: np.ndarray, threads: int = 1) -> float:
    """The sum of x (n,) float32, as read_bandwidth reads it."""
    sums = np.empty(threads, np.float32)
    _sum(x, sums)
    return float(sums.sum(dtype=np.float64))


SPECS = [
    KernelSpec(
        name="read_bandwidth",
        function=buffer_sum,
        compiled=(sum_range, sum_parallel),
        reference=reference.buffer_sum,
        formula="sum(x), to see how fast x is read",
        example=lambda rng, n: {"x": rng.uniform(0.5, 1.5, n).astype(np.float32)},
        flops=lambda n: float(n),
        bytes=lambda n: 4.0 * n,
        sizes=({"n": 1 << 16}, {"n": 1 << 22}),
    ),
]
