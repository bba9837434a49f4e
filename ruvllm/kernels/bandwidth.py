"""How fast this machine reads memory: the limit of every kernel that reads more than it computes."""

import time
from typing import Any

import numpy as np

from ruvllm.kernels import check, reference
from ruvllm.kernels.jit.decorators import kernel
from ruvllm.kernels.matmul.micro_kernels import STREAMS
from ruvllm.kernels.memory import aligned_empty, require_memory
from ruvllm.kernels.simd.vectors import LANES, f32_load, f32_load_first, f32_zero, hsum
from ruvllm.kernels.spec import KernelSpec, grid
from ruvllm.kernels.threads.over_rows import over_rows, run_rows
from ruvllm.kernels.threads.pool import PARALLEL_ELEMENTS, limited_to, num_threads

_STEP = 2 * STREAMS * LANES  # eight accumulators, so that additions are never the limit
_PIECES = 64  # fixed, so that the result does not depend on the number of threads


@kernel(strict=True)
def sum_pieces(x, sums, lo, hi):
    """Pieces lo:hi of buffer_sum. x (n,), cut into as many pieces as there are sums (pieces,)."""
    vectors = (x.size + LANES - 1) // LANES
    for piece in range(lo, hi):
        start = vectors * piece // sums.size * LANES
        end = min(vectors * (piece + 1) // sums.size * LANES, x.size)
        s0, s1, s2, s3 = f32_zero(), f32_zero(), f32_zero(), f32_zero()
        s4, s5, s6, s7 = f32_zero(), f32_zero(), f32_zero(), f32_zero()
        run = (end - start) // _STEP * (2 * LANES)  # length of each of four streams
        for i in range(start, start + run, 2 * LANES):
            s0 = s0 + f32_load(x, i)
            s1 = s1 + f32_load(x, i + LANES)
            s2 = s2 + f32_load(x, i + run)
            s3 = s3 + f32_load(x, i + run + LANES)
            s4 = s4 + f32_load(x, i + 2 * run)
            s5 = s5 + f32_load(x, i + 2 * run + LANES)
            s6 = s6 + f32_load(x, i + 3 * run)
            s7 = s7 + f32_load(x, i + 3 * run + LANES)
        for i in range(start + STREAMS * run, end, LANES):
            s0 = s0 + f32_load_first(x, i, end - i)
        sums[piece] = hsum(((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7)))


sum_parallel = over_rows(sum_pieces)


def read_bandwidth(nbytes: int = 1 << 28, repeats: int = 5, threads: int | None = None) -> float:
    """Bytes per second at which all threads together read a float32 buffer, summing it; the best of ``repeats``.

    Args:
        nbytes: size of the buffer, >= 4; much larger than the last-level cache, which is measured otherwise.
        repeats: how often it is read, >= 1.
        threads: how many threads read; None for as many as kernels use.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: a number that is too small.
        InsufficientMemoryError: the buffer does not fit.
    """
    if threads is None:
        threads = num_threads()
    for name, value, least in (("nbytes", nbytes, 4), ("repeats", repeats, 1), ("threads", threads, 1)):
        if check.integer(name, value) < least:
            raise ValueError(f"{name}: expected at least {least}, found {value}")
    require_memory(nbytes, f"a buffer of {nbytes} bytes")
    threads = min(threads, _PIECES)
    x = aligned_empty(nbytes // 4)
    x[:] = 1
    sums = np.empty(_PIECES, np.float32)
    best = np.inf
    with limited_to(threads):
        _sum(x, sums, 0)  # compiles, and starts the threads
        for _ in range(repeats):
            start = time.perf_counter()
            _sum(x, sums, 0)
            best = min(best, time.perf_counter() - start)
    return x.nbytes / best


def _sum(x: np.ndarray, sums: np.ndarray, threshold: int) -> None:
    run_rows(sum_pieces, sum_parallel, x.size, threshold, sums.size, x, sums)


def buffer_sum(x: Any) -> float:
    """sum(x) of x (n,) float32, at memory bandwidth: what ``read_bandwidth`` measures.

    Raises:
        TypeError: ``x`` is not a float32 array.
        ValueError: ``x`` does not have one dimension.
    """
    x = check.float32("x", x, ndim=1)
    sums = np.empty(_PIECES, np.float32)
    _sum(x, sums, PARALLEL_ELEMENTS)
    return float(sums.sum(dtype=np.float64))


SPECS = [
    KernelSpec(
        name="buffer_sum",
        function=buffer_sum,
        compiled=(sum_pieces, sum_parallel),
        reference=reference.buffer_sum,
        formula="sum(x)",
        example=lambda rng, n: {"x": rng.uniform(0.5, 1.5, n).astype(np.float32)},
        flops=lambda n: float(n),
        bytes=lambda n: 4.0 * n,
        sizes=grid(n=tuple(1 << bits for bits in (16, 17, 18, 19, 20, 22, 26))),  # 256 KB to 256 MB
    ),
]
