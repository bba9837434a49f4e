"""Vectors: dot product, scaling, addition."""

from typing import Any

import numpy as np

from ruvllm.kernels import check, reference
from ruvllm.kernels.jit.decorators import kernel
from ruvllm.kernels.jit.small_calls import alike, apart, may_write, new_output, rows_of, small_call
from ruvllm.kernels.jit.views import flat
from ruvllm.kernels.simd.sums import sum_of_products
from ruvllm.kernels.spec import KernelSpec
from ruvllm.kernels.threads.over_rows import over_elements, run_elements, run_rows
from ruvllm.kernels.threads.pool import PARALLEL_STREAM


@kernel(strict=True)
def dot_rows(a, b, out, lo, hi):
    """Rows lo:hi of dot. a, b (rows, n); out (rows,)."""
    for row in range(lo, hi):
        out[row] = sum_of_products(a[row], b[row])


@small_call((2, 2, 1), (1, 1, 0))
def dot_small(a, b, out):
    """dot of fewer elements than PARALLEL_STREAM."""
    if b.shape != a.shape or out.shape != a.shape[:-1] or not 0 < a.size < PARALLEL_STREAM:
        return False
    if not apart(out, a) or not apart(out, b):
        return False
    dot_rows(rows_of(a), rows_of(b), flat(out), 0, out.size)
    return True


def dot(a: Any, b: Any, out: np.ndarray | None = None) -> np.ndarray:
    """y = sum(a * b), over the last axis.

    Args:
        a: (..., n) float32.
        b: (..., n) float32 of the same shape.
        out: (...) float32 to write into.

    Returns:
        (...) float32, a zero-dimensional array for two vectors.

    Raises:
        TypeError: an argument is not a float32 array.
        ValueError: shapes do not match, or ``a`` is zero-dimensional.
    """
    y: Any = new_output(a.shape[:-1]) if out is None and type(a) is np.ndarray else out
    if dot_small(a, b, y):
        return y
    if check.is_half(out):
        return check.rounded(out, dot, a, b)
    a = check.float32("a", a, min_ndim=1)
    b = check.float32("b", b, shape=a.shape)
    out = check.output("out", out, a.shape[:-1], a, b)
    if a.size:
        dot_rows(check.rows(a), check.rows(b), out.ravel(), 0, out.size)
    else:
        out[...] = 0
    return out


@kernel(independent=True)
def scale_range(x, factor, out, lo, hi):
    """Elements lo:hi of scale. x, out (n,)."""
    f, x, out = np.float32(factor), x[lo:hi], out[lo:hi]
    for i in range(out.size):
        out[i] = f * x[i]


scale_parallel = over_elements(scale_range)


@small_call((2, float, 2), (1, float, 1))
def scale_small(x, factor, out):
    """scale of fewer elements than PARALLEL_STREAM."""
    if out.shape != x.shape or x.size >= PARALLEL_STREAM or not may_write(out, x):
        return False
    scale_range(flat(x), factor, flat(out), 0, x.size)
    return True


def scale(x: Any, factor: float, out: np.ndarray | None = None) -> np.ndarray:
    """y = factor x.

    Args:
        x: (...) float32.
        factor: rounded to float32.
        out: float32 of the same shape to write into; may be ``x`` itself.

    Returns:
        float32 of the shape of ``x``.

    Raises:
        TypeError: an argument is not a float32 array.
        ValueError: ``out`` does not match.
    """
    y: Any = new_output(x.shape) if out is None and type(x) is np.ndarray else out
    if scale_small(x, factor, y):
        return y
    if check.is_half(out):
        return check.rounded(out, scale, x, factor)
    x = check.float32("x", x)
    out = check.output("out", out, x.shape, x)
    factor = check.number("factor", factor)
    run_rows(scale_range, scale_parallel, x.size, PARALLEL_STREAM, x.size, x.ravel(), factor, out.ravel())
    return out


@kernel(independent=True)
def add_range(a, b, out, lo, hi):
    """Elements lo:hi of add. a, b, out (n,)."""
    a, b, out = a[lo:hi], b[lo:hi], out[lo:hi]
    for i in range(out.size):
        out[i] = a[i] + b[i]


add_parallel = over_elements(add_range)


@small_call((2, 2, 2), (1, 1, 1))
def add_small(a, b, out):
    """add of fewer elements than PARALLEL_STREAM."""
    if a.size >= PARALLEL_STREAM or not alike(a, b, out):
        return False
    add_range(flat(a), flat(b), flat(out), 0, a.size)
    return True


def add(a: Any, b: Any, out: np.ndarray | None = None) -> np.ndarray:
    """y = a + b.

    Args:
        a: (...) float32.
        b: float32 of the same shape.
        out: float32 of the same shape to write into; may be ``a`` or ``b`` itself.

    Returns:
        float32 of the shape of ``a``.

    Raises:
        TypeError: an argument is not a float32 array.
        ValueError: shapes do not match.
    """
    y: Any = new_output(a.shape) if out is None and type(a) is np.ndarray else out
    if add_small(a, b, y):
        return y
    if check.is_half(out):
        return check.rounded(out, add, a, b)
    a = check.float32("a", a)
    b = check.float32("b", b, shape=a.shape)
    out = check.output("out", out, a.shape, a, b)
    run_elements(add_range, add_parallel, PARALLEL_STREAM, a, b, out)
    return out


def _example(rng: np.random.Generator, rows: int, n: int) -> dict[str, Any]:
    return {"a": rng.standard_normal((rows, n), np.float32), "b": rng.standard_normal((rows, n), np.float32)}


SPECS = [
    KernelSpec(
        name="dot",
        function=dot,
        compiled=(dot_rows,),
        reference=reference.dot,
        formula="sum(a * b)",
        # not far from parallel, so that the sum does not cancel and its relative error means something
        example=lambda rng, rows, n: {
            "a": rng.uniform(0.5, 1.5, (rows, n)).astype(np.float32),
            "b": rng.uniform(0.5, 1.5, (rows, n)).astype(np.float32),
        },
        flops=lambda rows, n: 2.0 * rows * n,
        bytes=lambda rows, n: 8.0 * rows * n,
        sizes=({"rows": 1, "n": 768}, {"rows": 1, "n": 4096}, {"rows": 64, "n": 4096}),
    ),
    KernelSpec(
        name="scale",
        function=scale,
        compiled=(scale_range, scale_parallel),
        reference=reference.scale,
        formula="factor x",
        example=lambda rng, rows, n: {"x": rng.standard_normal((rows, n), np.float32), "factor": 0.375},
        flops=lambda rows, n: 1.0 * rows * n,
        bytes=lambda rows, n: 8.0 * rows * n,
        sizes=({"rows": 1, "n": 4096}, {"rows": 64, "n": 4096}),
    ),
    KernelSpec(
        name="add",
        function=add,
        compiled=(add_range, add_parallel),
        reference=reference.add,
        formula="a + b",
        example=_example,
        flops=lambda rows, n: 1.0 * rows * n,
        bytes=lambda rows, n: 12.0 * rows * n,
        sizes=({"rows": 1, "n": 4096}, {"rows": 64, "n": 4096}),
    ),
]
