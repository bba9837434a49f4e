"""Activations: softmax over the last axis, and SiLU times the up-projection."""

from typing import Any

import numpy as np
from numba import prange

from ruvllm.kernels import _check, reference
from ruvllm.kernels._jit import inline_kernel, kernel, parallel_kernel
from ruvllm.kernels._math import exp_of_few, silu
from ruvllm.kernels._simd import (
    LANES,
    f32_load,
    f32_load_first,
    f32_store,
    f32_store_first,
    f32_zero,
    greater,
    hmax,
    hsum,
    lanes_between,
    splat,
)
from ruvllm.kernels._small import alike, may_write, room, rows_of, small_call
from ruvllm.kernels._spec import KernelSpec
from ruvllm.kernels._threads import PARALLEL_ELEMENTS, launch, threads_for
from ruvllm.kernels._views import flat

_MINUS_INFINITY = np.float32(-np.inf)
_ZERO = np.float32(0)
_STRIP = 512  # elements that are summed in float32


@inline_kernel
def maximum(x: Any, start: Any, n: Any) -> Any:
    """The largest of n elements from the flat index ``start``, NaN ignored; -inf for none.

    Four running maxima, because each waits for the one before it.
    """
    m0 = splat(_MINUS_INFINITY)
    m1, m2, m3 = m0, m0, m0
    whole = n - n % (4 * LANES)
    for i in range(start, start + whole, 4 * LANES):
        m0 = greater(f32_load(x, i), m0)
        m1 = greater(f32_load(x, i + LANES), m1)
        m2 = greater(f32_load(x, i + 2 * LANES), m2)
        m3 = greater(f32_load(x, i + 3 * LANES), m3)
    for i in range(whole, n, LANES):
        v = f32_load_first(x, start + i, n - i)
        m0 = greater(lanes_between(v, 0, n - i, _MINUS_INFINITY), m0)
    return hmax(greater(greater(m0, m1), greater(m2, m3)))


@inline_kernel
def exp_shifted_sum(x: Any, start: Any, n: Any, shift: Any, out: Any, out_start: Any) -> Any:
    """Write exp(x - shift) for n elements and return their sum as float64.

    A float32 sum of thousands of terms loses digits that every result then lacks: four vectors are summed over _STRIP
    elements, and these sums in float64.
    """
    total = 0.0
    offset = splat(shift)
    whole = n - n % (4 * LANES)
    for first in range(0, whole, _STRIP):
        s0, s1, s2, s3 = f32_zero(), f32_zero(), f32_zero(), f32_zero()
        for i in range(first, min(first + _STRIP, whole), 4 * LANES):
            e0 = exp_of_few(f32_load(x, start + i) - offset)
            e1 = exp_of_few(f32_load(x, start + i + LANES) - offset)
            e2 = exp_of_few(f32_load(x, start + i + 2 * LANES) - offset)
            e3 = exp_of_few(f32_load(x, start + i + 3 * LANES) - offset)
            f32_store(out, out_start + i, e0)
            f32_store(out, out_start + i + LANES, e1)
            f32_store(out, out_start + i + 2 * LANES, e2)
            f32_store(out, out_start + i + 3 * LANES, e3)
            s0, s1, s2, s3 = s0 + e0, s1 + e1, s2 + e2, s3 + e3
        total += np.float64(hsum((s0 + s1) + (s2 + s3)))
    for i in range(whole, n, LANES):
        e0 = exp_of_few(f32_load_first(x, start + i, n - i) - offset)
        f32_store_first(out, out_start + i, e0, n - i)
        total += np.float64(hsum(lanes_between(e0, 0, n - i, _ZERO)))
    return total


@kernel(strict=True)
def softmax_rows(x: Any, out: Any, lo: Any, hi: Any) -> None:
    """Rows lo:hi of softmax. x, out (rows, n)."""
    n = x.shape[1]
    for row in range(lo, hi):
        total = exp_shifted_sum(x, row * n, n, maximum(x, row * n, n), out, row * n)
        at = row * n
        scale = splat(np.float32(1.0 / total))
        whole = n - n % LANES
        for i in range(at, at + whole, LANES):
            f32_store(out, i, f32_load(out, i) * scale)
        if whole < n:
            f32_store_first(out, at + whole, f32_load_first(out, at + whole, n - whole) * scale, n - whole)


@parallel_kernel
def softmax_parallel(x: Any, out: Any, threads: Any) -> None:
    """softmax_rows with the rows split over threads."""
    rows = x.shape[0]
    for t in prange(threads):
        softmax_rows(x, out, rows * t // threads, rows * (t + 1) // threads)


@small_call((2, 2), (1, 1))
def softmax_small(x: Any, out: Any) -> bool:
    """softmax of fewer elements than PARALLEL_ELEMENTS."""
    if out.shape != x.shape or not 0 < x.size < PARALLEL_ELEMENTS or not may_write(out, x):
        return False
    softmax_rows(rows_of(x), rows_of(out), 0, x.size // x.shape[-1])
    return True


def softmax(x: Any, out: np.ndarray | None = None) -> np.ndarray:
    """y = exp(x - max(x)) / sum(exp(x - max(x))), over the last axis.

    Args:
        x: (..., n) float32, n >= 1; -inf gives 0.
        out: (..., n) float32 to write into; may be ``x`` itself.

    Returns:
        (..., n) float32. A row of nothing but -inf, or with NaN or +inf in it, becomes NaN.

    Raises:
        TypeError: an argument is not a float32 array.
        ValueError: ``x`` has no dimension, or ``out`` does not match.

    Source: subtracting the maximum is Blanchard, Higham & Higham 2021, "Accurately computing the log-sum-exp
    and softmax functions".
    """
    y: Any = room(x.shape) if out is None and type(x) is np.ndarray else out
    if softmax_small(x, y):
        return y
    x = _check.float32("x", x, min_ndim=1)
    out = _check.output("out", out, x.shape, x)
    if x.size:
        rows, to = _check.rows(x), _check.rows(out)
        count = rows.shape[0]
        threads = threads_for(x.size, PARALLEL_ELEMENTS, count)
        if threads == 1:
            softmax_rows(rows, to, 0, count)
        else:
            launch(softmax_parallel, rows, to, threads)
    return out


@kernel(strict=True)
def silu_mul_range(gate: Any, up: Any, out: Any, lo: Any, hi: Any) -> None:
    """Elements lo:hi, counted flat, of silu_mul. gate, up, out: any one shape."""
    whole = lo + (hi - lo) // LANES * LANES
    for i in range(lo, whole, LANES):
        f32_store(out, i, silu(f32_load(gate, i)) * f32_load(up, i))
    if whole < hi:
        count = hi - whole
        f32_store_first(out, whole, silu(f32_load_first(gate, whole, count)) * f32_load_first(up, whole, count), count)


@parallel_kernel
def silu_mul_parallel(gate: Any, up: Any, out: Any, threads: Any) -> None:
    """silu_mul_range with the elements split over threads, at multiples of a vector."""
    n = gate.size
    vectors = (n + LANES - 1) // LANES
    for t in prange(threads):
        end = vectors * (t + 1) // threads * LANES
        silu_mul_range(gate, up, out, vectors * t // threads * LANES, min(end, n))


@small_call((2, 2, 2), (1, 1, 1))
def silu_mul_small(gate: Any, up: Any, out: Any) -> bool:
    """silu_mul of fewer elements than PARALLEL_ELEMENTS."""
    if gate.size >= PARALLEL_ELEMENTS or not alike(gate, up, out):
        return False
    silu_mul_range(flat(gate), flat(up), flat(out), 0, gate.size)
    return True


def silu_mul(gate: Any, up: Any, out: np.ndarray | None = None) -> np.ndarray:
    """y = gate * sigmoid(gate) * up: the gated activation of LLaMA's feed-forward ("SwiGLU").

    Args:
        gate: (...) float32.
        up: float32 of the same shape.
        out: float32 of the same shape to write into; may be ``gate`` or ``up`` itself.

    Returns:
        float32 of the shape of ``gate``.

    Raises:
        TypeError: an argument is not a float32 array.
        ValueError: shapes do not match.

    Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """
    y: Any = room(gate.shape) if out is None and type(gate) is np.ndarray else out
    if silu_mul_small(gate, up, y):
        return y
    gate = _check.float32("gate", gate)
    up = _check.float32("up", up, shape=gate.shape)
    out = _check.output("out", out, gate.shape, gate, up)
    flat_gate, flat_up, flat_out = gate.ravel(), up.ravel(), out.ravel()
    threads = threads_for(gate.size, PARALLEL_ELEMENTS, gate.size)
    if threads == 1:
        silu_mul_range(flat_gate, flat_up, flat_out, 0, gate.size)
    else:
        launch(silu_mul_parallel, flat_gate, flat_up, flat_out, threads)
    return out


SPECS = [
    KernelSpec(
        name="softmax",
        function=softmax,
        compiled=(softmax_rows, softmax_parallel),
        reference=reference.softmax,
        formula="exp(x - max(x)) / sum(exp(x - max(x)))",
        example=lambda rng, rows, n: {"x": 4 * rng.standard_normal((rows, n), np.float32)},
        flops=lambda rows, n: 5.0 * rows * n,
        bytes=lambda rows, n: 8.0 * rows * n,
        sizes=({"rows": 1, "n": 768}, {"rows": 1, "n": 4096}, {"rows": 64, "n": 4096}),
    ),
    KernelSpec(
        name="silu_mul",
        function=silu_mul,
        compiled=(silu_mul_range, silu_mul_parallel),
        reference=reference.silu_mul,
        formula="gate * sigmoid(gate) * up",
        example=lambda rng, rows, n: {
            "gate": 4 * rng.standard_normal((rows, n), np.float32),
            "up": rng.standard_normal((rows, n), np.float32),
        },
        flops=lambda rows, n: 5.0 * rows * n,
        bytes=lambda rows, n: 12.0 * rows * n,
        sizes=({"rows": 1, "n": 768}, {"rows": 1, "n": 4096}, {"rows": 64, "n": 4096}),
    ),
]
