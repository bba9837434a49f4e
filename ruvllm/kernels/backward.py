"""What RMSNorm and SwiGLU hand back: the gradients of their inputs from the gradient of their output (training)."""

from typing import Any

import numpy as np
from numba import prange

from ruvllm.kernels import _check, reference
from ruvllm.kernels._jit import inline_kernel, kernel, parallel_kernel
from ruvllm.kernels._math import sigmoid
from ruvllm.kernels._simd import (
    LANES,
    f32_load,
    f32_load_first,
    f32_store,
    f32_store_first,
    f32_zero,
    fma,
    hsum,
    splat,
)
from ruvllm.kernels._spec import KernelSpec
from ruvllm.kernels._threads import PARALLEL_ELEMENTS, launch, threads_for
from ruvllm.kernels._tile import put
from ruvllm.kernels._views import flat

_ONE = np.float32(1)


@inline_kernel
def _some(x: Any, at: Any, count: Any) -> Any:
    """16 numbers, or the first ``count`` of them."""
    return f32_load(x, at) if count >= LANES else f32_load_first(x, at, count)


@kernel(strict=True)
def rms_norm_backward_rows(x: Any, weight: Any, eps: Any, dy: Any, add: Any, dx: Any, lo: Any, hi: Any) -> None:
    """Rows lo:hi of rms_norm_backward, or of dx += it with ``add``. x, dy, dx (rows, n); weight (n,)."""
    n = x.shape[1]
    xs, dys, dxs = flat(x), flat(dy), flat(dx)
    for row in range(lo, hi):
        at = row * n
        squares, products = f32_zero(), f32_zero()
        for i in range(0, n, LANES):
            v = _some(xs, at + i, n - i)
            squares = fma(v, v, squares)
            products = fma(_some(dys, at + i, n - i) * _some(weight, i, n - i), v, products)
        per_n = _ONE / np.float32(n)
        scale = _ONE / np.sqrt(hsum(squares) * per_n + np.float32(eps))
        back = splat(-hsum(products) * per_n * scale * scale * scale)
        for i in range(0, n, LANES):
            g = _some(dys, at + i, n - i) * _some(weight, i, n - i) * splat(scale)
            put(dxs, at + i, fma(_some(xs, at + i, n - i), back, g), n - i, add)


@parallel_kernel
def rms_norm_backward_parallel(x: Any, weight: Any, eps: Any, dy: Any, add: Any, dx: Any, threads: Any) -> None:
    """rms_norm_backward_rows with the rows split over threads."""
    rows = x.shape[0]
    for t in prange(threads):
        rms_norm_backward_rows(x, weight, eps, dy, add, dx, rows * t // threads, rows * (t + 1) // threads)


def rms_norm_backward(
    x: Any, weight: Any, dy: Any, eps: float = 1e-5, add: bool = False, out: np.ndarray | None = None
) -> np.ndarray:
    """dx = r (w dy) - x r^3 mean(w dy x), r = 1 / sqrt(mean(x^2) + eps): the gradient of y = rms_norm(x, w).

    Args:
        x: (..., n) float32, the input of the norm.
        weight: (n,) float32.
        dy: (..., n) float32, the gradient of its output.
        eps: as in the forward pass.
        add: add to what is in ``out``, as the gradient of a residual stream asks for.
        out: (..., n) float32 to write into; not an input.

    Returns:
        (..., n) float32.

    Raises:
        TypeError: an argument is not a float32 array, or there is no ``out`` to add to.
        ValueError: shapes do not match, or eps is negative.

    Source: the chain rule on Zhang & Sennrich 2019, "Root Mean Square Layer Normalization".
    """
    x = _check.float32("x", x, min_ndim=1)
    weight = _check.float32("weight", weight, shape=x.shape[-1:])
    dy = _check.float32("dy", dy, shape=x.shape)
    eps = _check.not_negative("eps", eps)
    if add and out is None:
        raise TypeError("out: expected a float32 NumPy array to add to, found None")
    out = _check.output("out", out, x.shape, x, weight, dy)
    if x.size:
        rows, dys, to = _check.rows(x), _check.rows(dy), _check.rows(out)
        threads = threads_for(x.size, PARALLEL_ELEMENTS, len(rows))
        if threads == 1:
            rms_norm_backward_rows(rows, weight, eps, dys, add, to, 0, len(rows))
        else:
            launch(rms_norm_backward_parallel, rows, weight, eps, dys, add, to, threads)
    return out


@kernel(strict=True)
def silu_mul_backward_range(gate: Any, up: Any, dy: Any, d_gate: Any, d_up: Any, lo: Any, hi: Any) -> None:
    """Elements lo:hi, counted flat, of silu_mul_backward. All of one shape."""
    one = splat(_ONE)
    for i in range(lo, hi, LANES):
        g, u, d = _some(gate, i, hi - i), _some(up, i, hi - i), _some(dy, i, hi - i)
        s = sigmoid(g)
        to_gate = d * u * s * fma(g, one - s, one)
        to_up = d * g * s
        if hi - i >= LANES:
            f32_store(d_gate, i, to_gate)
            f32_store(d_up, i, to_up)
        else:
            f32_store_first(d_gate, i, to_gate, hi - i)
            f32_store_first(d_up, i, to_up, hi - i)


@parallel_kernel
def silu_mul_backward_parallel(gate: Any, up: Any, dy: Any, d_gate: Any, d_up: Any, threads: Any) -> None:
    """silu_mul_backward_range with the elements split over threads, at multiples of a vector."""
    n = gate.size
    vectors = (n + LANES - 1) // LANES
    for t in prange(threads):
        end = min(vectors * (t + 1) // threads * LANES, n)
        silu_mul_backward_range(gate, up, dy, d_gate, d_up, vectors * t // threads * LANES, end)


def silu_mul_backward(
    gate: Any, up: Any, dy: Any, d_gate: np.ndarray | None = None, d_up: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """d_gate = dy up s (1 + gate (1 - s)), d_up = dy gate s, s = sigmoid(gate): gradients of silu(gate) up.

    Args:
        gate, up, dy: (...) float32 of one shape.
        d_gate, d_up: float32 of that shape to write into; they may be ``gate`` and ``up`` themselves.

    Returns:
        (d_gate, d_up).

    Raises:
        TypeError: an argument is not a float32 array.
        ValueError: shapes do not match.

    Source: the chain rule on Shazeer 2020, "GLU Variants Improve Transformer".
    """
    gate = _check.float32("gate", gate)
    up = _check.float32("up", up, shape=gate.shape)
    dy = _check.float32("dy", dy, shape=gate.shape)
    d_gate = _check.output("d_gate", d_gate, gate.shape, gate, up, dy)
    d_up = _check.output("d_up", d_up, gate.shape, gate, up, dy)
    arrays = gate.ravel(), up.ravel(), dy.ravel(), d_gate.ravel(), d_up.ravel()
    threads = threads_for(gate.size, PARALLEL_ELEMENTS, gate.size)
    if threads == 1:
        silu_mul_backward_range(*arrays, 0, gate.size)
    else:
        launch(silu_mul_backward_parallel, *arrays, threads)
    return d_gate, d_up


SPECS = [
    KernelSpec(
        name="rms_norm_backward",
        function=rms_norm_backward,
        compiled=(rms_norm_backward_rows, rms_norm_backward_parallel),
        reference=reference.rms_norm_backward,
        formula="r (w dy) - x r^3 mean(w dy x), r = 1 / sqrt(mean(x^2) + eps)",
        example=lambda rng, rows, n: {
            "x": rng.standard_normal((rows, n), np.float32),
            "weight": rng.standard_normal(n, np.float32),
            "dy": rng.standard_normal((rows, n), np.float32),
            "eps": 0.1,  # large, for one number alone: its gradient vanishes with eps
        },
        flops=lambda rows, n: 10.0 * rows * n,
        bytes=lambda rows, n: 4.0 * (3 * rows * n + n),
        sizes=({"rows": 1, "n": 768}, {"rows": 64, "n": 576}, {"rows": 64, "n": 4096}),
    ),
    KernelSpec(
        name="silu_mul_backward",
        function=silu_mul_backward,
        compiled=(silu_mul_backward_range, silu_mul_backward_parallel),
        reference=reference.silu_mul_backward,
        formula="dy up s (1 + gate (1 - s)) and dy gate s, s = sigmoid(gate)",
        example=lambda rng, rows, n: {
            "gate": 4 * rng.standard_normal((rows, n), np.float32),
            "up": rng.standard_normal((rows, n), np.float32),
            "dy": rng.standard_normal((rows, n), np.float32),
        },
        flops=lambda rows, n: 10.0 * rows * n,
        bytes=lambda rows, n: 20.0 * rows * n,
        sizes=({"rows": 1, "n": 768}, {"rows": 64, "n": 1536}, {"rows": 64, "n": 4096}),
    ),
]
