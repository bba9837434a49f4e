"""Backward passes of RMSNorm and SwiGLU: the gradients of their inputs from the gradient of their output (training)."""

from typing import Any

import numpy as np

from ruvllm.kernels import check, reference
from ruvllm.kernels.jit.decorators import kernel, sum_kernel
from ruvllm.kernels.simd.math import sigmoid
from ruvllm.kernels.simd.vectors import fma
from ruvllm.kernels.spec import KernelSpec
from ruvllm.kernels.threads.over_rows import over_elements, over_rows, run_elements, run_rows
from ruvllm.kernels.threads.pool import PARALLEL_ELEMENTS

_ZERO, _ONE = np.float32(0), np.float32(1)


@kernel(independent=True)
def rms_norm_backward_rows(x, weight, eps, dy, add, dx, lo, hi):
    """Rows lo:hi of rms_norm_backward; with ``add``, dx += the gradient. x, dy, dx (rows, n); weight (n,)."""
    n = x.shape[1]
    per_n = _ONE / np.float32(n)
    for row in range(lo, hi):
        v, d, y = x[row], dy[row], dx[row]
        squares, products = squares_and_products(v, weight, d)
        scale = _ONE / np.sqrt(squares * per_n + np.float32(eps))
        back = -products * per_n * scale * scale * scale
        for i in range(n):
            g = fma(v[i], back, d[i] * weight[i] * scale)
            y[i] = y[i] + g if add else g


@sum_kernel
def squares_and_products(x, weight, dy):
    """sum(x * x) and sum(x * weight * dy)."""
    squares, products = _ZERO, _ZERO
    for i in range(x.size):
        squares += x[i] * x[i]
        products += x[i] * (weight[i] * dy[i])
    return squares, products


rms_norm_backward_parallel = over_rows(rms_norm_backward_rows)


def rms_norm_backward(
    x: Any, weight: Any, dy: Any, eps: float = 1e-5, add: bool = False, out: np.ndarray | None = None
) -> np.ndarray:
    """dx = r (w dy) - x r^3 mean(w dy x), r = 1 / sqrt(mean(x^2) + eps): the gradient of y = rms_norm(x, w).

    Args:
        x: (..., n) float32, the input of the norm.
        weight: (n,) float32.
        dy: (..., n) float32, the gradient of its output.
        eps: as in the forward pass.
        add: add to ``out``, as for a residual stream.
        out: (..., n) float32 to write into; not an input.

    Returns:
        (..., n) float32.

    Raises:
        TypeError: an argument is not a float32 array, or there is no ``out`` to add to.
        ValueError: shapes do not match, or eps is negative.

    Source: the chain rule on Zhang & Sennrich 2019, "Root Mean Square Layer Normalization".
    """
    x = check.float32("x", x, min_ndim=1)
    weight = check.float32("weight", weight, shape=x.shape[-1:])
    dy = check.float32("dy", dy, shape=x.shape)
    eps = check.not_negative("eps", eps)
    if add and out is None:
        raise TypeError("out: expected a float32 NumPy array to add to, found None")
    out = check.output("out", out, x.shape, x, weight, dy)
    if x.size:
        rows = check.rows(x)
        arguments = rows, weight, eps, check.rows(dy), add, check.rows(out)
        run_rows(
            rms_norm_backward_rows, rms_norm_backward_parallel, x.size, PARALLEL_ELEMENTS, len(rows), *arguments
        )
    return out


@kernel(independent=True)
def silu_mul_backward_range(gate, up, dy, d_gate, d_up, lo, hi):
    """Elements lo:hi of silu_mul_backward. All (n,)."""
    gate, up, dy, d_gate, d_up = gate[lo:hi], up[lo:hi], dy[lo:hi], d_gate[lo:hi], d_up[lo:hi]
    for i in range(gate.size):
        g, u, d = gate[i], up[i], dy[i]
        s = sigmoid(g)
        d_gate[i] = d * u * s * fma(g, _ONE - s, _ONE)
        d_up[i] = d * g * s


silu_mul_backward_parallel = over_elements(silu_mul_backward_range)


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
    gate = check.float32("gate", gate)
    up = check.float32("up", up, shape=gate.shape)
    dy = check.float32("dy", dy, shape=gate.shape)
    d_gate = check.output("d_gate", d_gate, gate.shape, gate, up, dy)
    d_up = check.output("d_up", d_up, gate.shape, gate, up, dy)
    run_elements(silu_mul_backward_range, silu_mul_backward_parallel, PARALLEL_ELEMENTS, gate, up, dy, d_gate, d_up)
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
            "eps": 0.1,  # large, for rows of one element, whose gradient vanishes as eps does
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
