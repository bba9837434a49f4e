"""Float32 products of plain arrays: matrix-vector and matrix-matrix."""

import math
from typing import Any

import numpy as np

from ruvllm.kernels import check, reference
from ruvllm.kernels.jit.decorators import inline_kernel, kernel
from ruvllm.kernels.jit.small_calls import SCRATCH, apart, new_output, small_call
from ruvllm.kernels.jit.views import flat
from ruvllm.kernels.matmul.blas import blas_gemm, measure, takes_blas
from ruvllm.kernels.matmul.gemm import gemm_batch, gemm_batch_parallel, gemm_parallel, gemm_part, gemm_scratch_size
from ruvllm.kernels.matmul.micro_kernels import LANES, STREAMS, WIDE
from ruvllm.kernels.matmul.panels import panel_count
from ruvllm.kernels.memory import scratch
from ruvllm.kernels.simd.vectors import f32_load, f32_load_first, f32_zeros, fma_each, hsum, load_rows, prefetch_l2
from ruvllm.kernels.spec import KernelSpec, grid
from ruvllm.kernels.threads.over_rows import over_rows, run_rows
from ruvllm.kernels.threads.pool import PARALLEL_MACS, PARALLEL_TILE_MACS, launch, limited_to, num_threads, threads_for
from ruvllm.kernels.threads.team import chunk_counters

_gemm_scratch_size = inline_kernel(gemm_scratch_size)
_AHEAD = 512  # prefetch distance, in elements
_FAR = 1 << 20  # elements in a quarter of a matrix that is too large for the caches


@inline_kernel
def four_rows(w, at, step, columns, x, out, i, far):
    """out[i + r far] = sum_k w[at + r step + k] x[k] for r < 4: each load of x serves four rows.

    With enough registers, each row has four accumulators. Rows that lie far apart come from memory and are prefetched,
    because the hardware prefetcher stops at the end of each page.
    """
    s0 = f32_zeros(STREAMS)
    s1, s2, s3 = s0, s0, s0
    wide = columns - columns % (4 * LANES) if WIDE else 0
    whole = wide if WIDE else columns - columns % LANES
    for k in range(0, wide, 4 * LANES):
        row = at + k
        if far > 1:
            for ahead in range(row + _AHEAD, row + _AHEAD + 4 * LANES, LANES):
                for r in range(STREAMS):
                    prefetch_l2(w, ahead + r * step)
        s0 = fma_each(f32_load(x, k), load_rows(w, row, step, STREAMS), s0)
        s1 = fma_each(f32_load(x, k + LANES), load_rows(w, row + LANES, step, STREAMS), s1)
        s2 = fma_each(f32_load(x, k + 2 * LANES), load_rows(w, row + 2 * LANES, step, STREAMS), s2)
        s3 = fma_each(f32_load(x, k + 3 * LANES), load_rows(w, row + 3 * LANES, step, STREAMS), s3)
    for k in range(wide, whole, LANES):
        s0 = fma_each(f32_load(x, k), load_rows(w, at + k, step, STREAMS), s0)
    for k in range(whole, columns, LANES):
        row, n = at + k, columns - k
        rows = (
            f32_load_first(w, row, n), f32_load_first(w, row + step, n), f32_load_first(w, row + 2 * step, n),
            f32_load_first(w, row + 3 * step, n),
        )  # fmt: skip
        s0 = fma_each(f32_load_first(x, k, n), rows, s0)
    out[i] = hsum((s0[0] + s1[0]) + (s2[0] + s3[0]))
    out[i + far] = hsum((s0[1] + s1[1]) + (s2[1] + s3[1]))
    out[i + 2 * far] = hsum((s0[2] + s1[2]) + (s2[2] + s3[2]))
    out[i + 3 * far] = hsum((s0[3] + s1[3]) + (s2[3] + s3[3]))


@kernel(strict=True)
def gemv_rows(a, x, out, lo, hi):
    """out[i] = sum_k a[i, k] x[k] for rows lo:hi, four at a time.

    From memory, rows that lie far apart are fastest (see STREAMS); from a cache, neighbours are.
    """
    columns = a.shape[1]
    w = flat(a)
    quarter = (hi - lo) // STREAMS
    far, step = (quarter, 1) if quarter * columns >= _FAR else (1, STREAMS)
    for i in range(lo, lo + quarter * step, step):
        four_rows(w, i * columns, far * columns, columns, x, out, i, far)
    for i in range(lo + STREAMS * quarter, hi):
        four_rows(w, i * columns, 0, columns, x, out, i, 0)


gemv_parallel = over_rows(gemv_rows)


@small_call((2, 1, 1))
def gemv_small(a, x, out):
    """gemv of fewer multiply-adds than PARALLEL_MACS."""
    if a.shape[1] != x.size or a.shape[0] != out.size or a.size >= PARALLEL_MACS:
        return False
    if not apart(out, a) or not apart(out, x):
        return False
    gemv_rows(a, x, out, 0, out.size)
    return True


def gemv(a: np.ndarray, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """y = A x.

    Args:
        a: (..., M, K) float32, row-major: leading dimensions are stacked rows of one product.
        x: (K,) float32.
        out: (..., M) float32 to write into; not an input.

    Returns:
        (..., M) float32. The bits are the same for any number of threads. The last ones differ between processors with
        AVX-512 and others: four times as many sums are kept side by side there, in another order of additions.

    Raises:
        TypeError: not float32.
        ValueError: shapes do not match.
    """
    y: Any = new_output(a.shape[:-1]) if out is None and type(a) is np.ndarray else out
    if gemv_small(a, x, y):
        return y
    if check.is_half(out):
        return check.rounded(out, gemv, a, x)
    a = check.float32("a", a, min_ndim=2)
    x = check.float32("x", x, shape=a.shape[-1:])
    out = check.apart("out", check.output("out", out, a.shape[:-1]), a, x)
    rows, y = (a, out) if a.ndim == 2 else (check.rows(a), out.reshape(-1))
    run_rows(gemv_rows, gemv_parallel, a.size, PARALLEL_MACS, y.size, rows, x, y)
    return out


@small_call((2, 2, bool, 1, 2))
def gemm_small(a, b, transposed, group, out):
    """gemm of fewer multiply-adds than PARALLEL_TILE_MACS, or gemm_nt with ``transposed``.

    group: scratch for the panels of b.
    """
    (rows, inner), columns = a.shape, out.shape[1]
    wanted = (columns, inner) if transposed else (inner, columns)
    macs = rows * columns * inner
    if b.shape != wanted or out.shape[0] != rows or not 0 < macs < PARALLEL_TILE_MACS:
        return False
    panels = (columns + LANES - 1) // LANES
    if _gemm_scratch_size(inner, panels) > group.size or not apart(out, a) or not apart(out, b):
        return False
    gemm_part(a, b, transposed, group, out, 0, panels)
    return True


def _try_small(a: Any, b: Any, transposed: bool, out: Any, backend: str) -> bool:
    """Whether gemm_small has done the product."""
    return backend in ("auto", "numba") and bool(gemm_small(a, b, transposed, scratch(SCRATCH), out))


def gemm(a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None, backend: str = "auto") -> np.ndarray:
    """C = A B.

    Args:
        a: (..., M, K) float32: leading dimensions are stacked rows of one product.
        b: (K, N) float32.
        out: (..., M, N) float32 to write into; not an input.
        backend: "numba" for our kernels, "blas" for NumPy's BLAS, "auto" for BLAS where it was measured to be much
            faster on this host (see ``blas``). BLAS may round differently with other numbers of threads.

    Raises:
        TypeError: not float32.
        ValueError: shapes do not match, or the backend is unknown.
    """
    plain = type(a) is np.ndarray and type(b) is np.ndarray
    y: Any = new_output(a.shape[:-1] + b.shape[1:]) if out is None and plain else out
    if _try_small(a, b, False, y, backend):
        return y
    if check.is_half(out):
        return check.rounded(out, gemm, a, b, None, backend)
    a = _rows("a", a)
    b = check.float32("b", b)
    if b.ndim != 2 or len(b) != a.shape[-1]:
        raise ValueError(f"b: expected shape ({a.shape[-1]}, any), found {b.shape}")
    out = check.apart("out", check.output("out", out, (*a.shape[:-1], b.shape[1])), a, b)
    multiply(a, b, False, out, backend)
    return out


def gemm_nt(a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None, backend: str = "auto") -> np.ndarray:
    """C = A B^T: a linear layer with weights b.

    Args:
        a: (..., M, K) float32: leading dimensions are stacked rows of one product.
        b: (N, K) float32.
        out: (..., M, N) float32 to write into; not an input.
        backend: "numba" for our kernels, "blas" for NumPy's BLAS, "auto" for BLAS where it was measured to be much
            faster on this host (see ``blas``). BLAS may round differently with other numbers of threads.

    Raises:
        TypeError: not float32.
        ValueError: shapes do not match, or the backend is unknown.
    """
    plain = type(a) is np.ndarray and type(b) is np.ndarray
    y: Any = new_output(a.shape[:-1] + b.shape[:1]) if out is None and plain else out
    if _try_small(a, b, True, y, backend):
        return y
    if check.is_half(out):
        return check.rounded(out, gemm_nt, a, b, None, backend)
    a = _rows("a", a)
    b = check.float32("b", b)
    if b.ndim != 2 or b.shape[1] != a.shape[-1]:
        raise ValueError(f"b: expected shape (any, {a.shape[-1]}), found {b.shape}")
    out = check.apart("out", check.output("out", out, (*a.shape[:-1], b.shape[0])), a, b)
    multiply(a, b, True, out, backend)
    return out


def batched_gemm(a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """C[i] = A[i] B[i] for each i of the leading dimensions.

    Args:
        a: (..., M, K) float32.
        b: (..., K, N) float32 with the same leading dimensions.
        out: (..., M, N) float32 to write into; not an input.

    Raises:
        TypeError: not float32.
        ValueError: shapes do not match.
    """
    if check.is_half(out):
        return check.rounded(out, batched_gemm, a, b)
    a = _rows("a", a)
    b = check.float32("b", b, shape=(*a.shape[:-2], a.shape[-1], None))
    out = check.apart("out", check.output("out", out, (*a.shape[:-1], b.shape[-1])), a, b)
    count = math.prod(a.shape[:-2])
    if not out.size or not a.shape[-1]:
        out[...] = 0
        return out
    left, right, product = (array.reshape(count, *array.shape[-2:]) for array in (a, b, out))
    threads = threads_for(out.size * a.shape[-1], PARALLEL_TILE_MACS, max(count, 2))
    if threads > count:
        for i in range(count):
            multiply(left[i], right[i], False, product[i])
        return out
    groups = _groups(threads, a.shape[-1], panel_count(out.shape[-1]))
    if threads == 1:
        gemm_batch(left, right, groups[0], product, 0, count)
    else:
        launch(gemm_batch_parallel, left, right, groups, product, threads)
    return out


def _rows(name: str, a: Any) -> np.ndarray:
    a = check.float32(name, a)
    if a.ndim < 2:
        raise ValueError(f"{name}: expected (..., M, K), found shape {a.shape}")
    return a


def multiply(a: np.ndarray, b: np.ndarray, transposed: bool, out: np.ndarray, backend: str = "numba") -> None:
    """out = a b, or a b^T, where leading dimensions of a and out are stacked rows."""
    inner, columns = a.shape[-1], out.shape[-1]
    if a.ndim > 2:
        a, out = a.reshape(math.prod(a.shape[:-1]), inner), out.reshape(math.prod(out.shape[:-1]), columns)
    rows, panels = len(out), panel_count(columns)
    pairs = (panels + 1) // 2  # a thread takes at least two panels
    macs = rows * columns * inner
    threads = threads_for(macs, PARALLEL_TILE_MACS, max(pairs, rows))
    if takes_blas(backend, macs, threads, _numba_gemm):
        blas_gemm(a, b.T if transposed else b, out, threads)
        return
    if not macs:
        out[...] = 0
        return
    by_rows = threads > 1 and pairs % threads != 0 and pairs < 4 * threads <= rows
    if not by_rows:
        threads = min(threads, pairs)
    if threads == 1:
        gemm_part(a, b, transposed, scratch(gemm_scratch_size(inner, panels)), out, 0, panels)
    else:
        groups, counts = _groups(threads, inner, panels), chunk_counters(threads)
        launch(gemm_parallel, a, b, transposed, groups, out, by_rows, counts, threads)


def calibrate_blas() -> None:
    """Measure again where BLAS is faster than gemm, on one thread and on all; see ``blas``."""
    for threads in sorted({1, num_threads()}):
        with limited_to(threads):
            measure(threads, _numba_gemm)


def _numba_gemm(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    multiply(a, b, False, out)


def _groups(threads: int, inner: int, panels: int) -> np.ndarray:
    size = gemm_scratch_size(inner, panels)
    return scratch(threads * size).reshape(threads, size)


def _matrices(rng: Any, m: int, n: int, k: int) -> dict[str, Any]:
    return {"a": rng.standard_normal((m, k), np.float32), "b": rng.standard_normal((k, n), np.float32)}


SPECS = [
    KernelSpec(
        name="gemv",
        function=gemv,
        compiled=(gemv_rows, gemv_parallel),
        reference=reference.gemv,
        formula="A x",
        example=lambda rng, m, k: {
            "a": rng.standard_normal((m, k), np.float32),
            "x": rng.standard_normal(k, np.float32),
        },
        flops=lambda m, k: 2.0 * m * k,
        bytes=lambda m, k: 4.0 * (m * k + m + k),
        sizes=tuple({"m": n, "k": n} for n in (256, 512, 1024, 2048, 4096)),
    ),
    KernelSpec(
        name="gemm",
        function=gemm,
        compiled=(gemm_part, gemm_parallel),
        reference=reference.gemm,
        formula="A B",
        example=_matrices,
        flops=lambda m, n, k: 2.0 * m * n * k,
        bytes=lambda m, n, k: 4.0 * (m * k + k * n + m * n),
        sizes=tuple({"m": n, "n": n, "k": n} for n in (128, 256, 512, 1024, 2048, 4096)),
    ),
    KernelSpec(
        name="gemm_nt",
        function=gemm_nt,
        compiled=(gemm_part, gemm_parallel),
        reference=reference.gemm_nt,
        formula="A B^T",
        example=lambda rng, m, n, k: {
            "a": rng.standard_normal((m, k), np.float32),
            "b": rng.standard_normal((n, k), np.float32),
        },
        flops=lambda m, n, k: 2.0 * m * n * k,
        bytes=lambda m, n, k: 4.0 * (m * k + k * n + m * n),
        sizes=(
            {"m": 4, "n": 576, "k": 576},
            {"m": 64, "n": 1536, "k": 576},
            *grid(m=(1, 4, 16, 64, 512), n=4096, k=4096),
        ),
    ),
    KernelSpec(
        name="batched_gemm",
        function=batched_gemm,
        compiled=(gemm_batch, gemm_batch_parallel),
        reference=reference.batched_gemm,
        formula="A[i] B[i]",
        example=lambda rng, batch, m, n, k: {
            "a": rng.standard_normal((batch, m, k), np.float32),
            "b": rng.standard_normal((batch, k, n), np.float32),
        },
        flops=lambda batch, m, n, k: 2.0 * batch * m * n * k,
        bytes=lambda batch, m, n, k: 4.0 * batch * (m * k + k * n + m * n),
        sizes=({"batch": 4, "m": 64, "n": 64, "k": 64},),
    ),
]
