"""Activations: softmax over the last axis; SiLU and GELU of a gate times the up-projection."""

from typing import Any

import numpy as np

from ruvllm.kernels import check, reference
from ruvllm.kernels.jit.decorators import kernel
from ruvllm.kernels.jit.small_calls import alike, may_write, new_output, rows_of, small_call
from ruvllm.kernels.jit.views import flat
from ruvllm.kernels.simd.math import gelu, silu
from ruvllm.kernels.simd.sums import exp_and_sum, maximum
from ruvllm.kernels.spec import KernelSpec, grid
from ruvllm.kernels.threads.over_rows import over_elements, over_rows, run_rows
from ruvllm.kernels.threads.pool import PARALLEL_ELEMENTS


@kernel(independent=True)
def softmax_rows(x, out, lo, hi):
    """Rows lo:hi of softmax. x, out (rows, n)."""
    n = x.shape[1]
    for row in range(lo, hi):
        y = out[row]
        scale = np.float32(1.0 / exp_and_sum(x[row], maximum(x[row]), y))
        for i in range(n):
            y[i] *= scale


softmax_parallel = over_rows(softmax_rows)


@small_call((2, 2), (1, 1))
def softmax_small(x, out):
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
        ValueError: ``x`` is zero-dimensional, or ``out`` does not match.

    Source: subtracting the maximum is Blanchard, Higham & Higham 2021, "Accurately computing the log-sum-exp
    and softmax functions".
    """
    y: Any = new_output(x.shape) if out is None and type(x) is np.ndarray else out
    if softmax_small(x, y):
        return y
    if check.is_half(out):
        return check.rounded(out, softmax, x)
    x = check.float32("x", x, min_ndim=1)
    out = check.output("out", out, x.shape, x)
    if x.size:
        rows = check.rows(x)
        run_rows(softmax_rows, softmax_parallel, x.size, PARALLEL_ELEMENTS, len(rows), rows, check.rows(out))
    return out


@kernel(independent=True)
def silu_mul_range(gate, up, out, lo, hi):
    """Elements lo:hi of silu_mul. gate, up, out (n,)."""
    gate, up, out = gate[lo:hi], up[lo:hi], out[lo:hi]
    for i in range(out.size):
        out[i] = silu(gate[i]) * up[i]


silu_mul_parallel = over_elements(silu_mul_range)


@small_call((2, 2, 2), (1, 1, 1))
def silu_mul_small(gate, up, out):
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
    y: Any = new_output(gate.shape) if out is None and type(gate) is np.ndarray else out
    if silu_mul_small(gate, up, y):
        return y
    return gated(silu_mul_range, silu_mul_parallel, gate, up, out)


@kernel(independent=True)
def gelu_mul_range(gate, up, out, lo, hi):
    """Elements lo:hi of gelu_mul. gate, up, out (n,)."""
    gate, up, out = gate[lo:hi], up[lo:hi], out[lo:hi]
    for i in range(out.size):
        out[i] = gelu(gate[i]) * up[i]


gelu_mul_parallel = over_elements(gelu_mul_range)


def gelu_mul(gate: Any, up: Any, out: np.ndarray | None = None) -> np.ndarray:
    """y = 0.5 gate (1 + tanh(z)) up, z = sqrt(2 / pi) (gate + 0.044715 gate^3).

    The tanh approximation of GELU, as Gemma's checkpoints expect it ("gelu_pytorch_tanh").

    Args:
        gate: (...) float32.
        up: float32 of the same shape.
        out: float32 of the same shape to write into; may be ``gate`` or ``up`` itself.

    Returns:
        float32 of the shape of ``gate``.

    Raises:
        TypeError: an argument is not a float32 array.
        ValueError: shapes do not match.

    Source: Hendrycks & Gimpel 2016, "Gaussian Error Linear Units"; Shazeer 2020, "GLU Variants Improve Transformer".
    """
    return gated(gelu_mul_range, gelu_mul_parallel, gate, up, out)


def gated(
    body: Any, parallel: Any, gate: Any, up: Any, out: np.ndarray | None, scalars: tuple[float, ...] = ()
) -> np.ndarray:
    """A gated activation: checks, and the body(gate, up, *scalars, out) on one thread or on several."""
    if check.is_half(out):
        return check.rounded(out, gated, body, parallel, gate, up, None, scalars)
    gate = check.float32("gate", gate)
    up = check.float32("up", up, shape=gate.shape)
    out = check.output("out", out, gate.shape, gate, up)
    arguments = gate.ravel(), up.ravel(), *scalars, out.ravel()
    run_rows(body, parallel, gate.size, PARALLEL_ELEMENTS, gate.size, *arguments)
    return out


def _gate_and_up(rng: np.random.Generator, rows: int, n: int) -> dict[str, Any]:
    gate, up = rng.standard_normal((2, rows, n), np.float32)
    return {"gate": 4 * gate, "up": up}


_SIZES = grid(rows=(1, 64), n=(768, 1024, 2048, 4096, 8192))

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
        sizes=(*_SIZES, *grid(rows=1, n=(128, 256, 512))),
    ),
    KernelSpec(
        name="silu_mul",
        function=silu_mul,
        compiled=(silu_mul_range, silu_mul_parallel),
        reference=reference.silu_mul,
        formula="gate * sigmoid(gate) * up",
        example=_gate_and_up,
        flops=lambda rows, n: 5.0 * rows * n,
        bytes=lambda rows, n: 12.0 * rows * n,
        sizes=_SIZES,
    ),
    KernelSpec(
        name="gelu_mul",
        function=gelu_mul,
        compiled=(gelu_mul_range, gelu_mul_parallel),
        reference=reference.gelu_mul,
        formula="gate * (1 + tanh(sqrt(2/pi) * (gate + 0.044715 * gate**3))) / 2 * up",
        example=_gate_and_up,
        flops=lambda rows, n: 9.0 * rows * n,
        bytes=lambda rows, n: 12.0 * rows * n,
        sizes=_SIZES,
    ),
]
