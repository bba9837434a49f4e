"""GeGLU: gelu(gate) * up, the gated activation of Gemma's feed-forward."""

from typing import Any

import numpy as np
from numba import prange

from ruvllm.kernels import _check, reference
from ruvllm.kernels._jit import inline_kernel, kernel, parallel_kernel
from ruvllm.kernels._math import sigmoid
from ruvllm.kernels._simd import LANES, f32_load, f32_load_first, f32_store, f32_store_first, fma, splat
from ruvllm.kernels._spec import KernelSpec
from ruvllm.kernels._threads import PARALLEL_ELEMENTS, launch, threads_for

_CUBIC = np.float32(0.044715)
_TWICE_SQRT_2_OVER_PI = np.float32(1.5957691216057308)


@inline_kernel
def _gelu(x: Any) -> Any:
    """0.5 x (1 + tanh(z)) = x sigmoid(2 z) for 16 lanes."""
    return x * sigmoid(fma(x * x * x, splat(_CUBIC), x) * splat(_TWICE_SQRT_2_OVER_PI))


@kernel(strict=True)
def gelu_mul_range(gate: Any, up: Any, out: Any, lo: Any, hi: Any) -> None:
    """Elements lo:hi, counted flat, of gelu_mul. gate, up, out: any one shape."""
    whole = lo + (hi - lo) // LANES * LANES
    for i in range(lo, whole, LANES):
        f32_store(out, i, _gelu(f32_load(gate, i)) * f32_load(up, i))
    if whole < hi:
        count = hi - whole
        f32_store_first(out, whole, _gelu(f32_load_first(gate, whole, count)) * f32_load_first(up, whole, count), count)


@parallel_kernel
def gelu_mul_parallel(gate: Any, up: Any, out: Any, threads: Any) -> None:
    """gelu_mul_range with the elements split over threads, at multiples of a vector."""
    n = gate.size
    vectors = (n + LANES - 1) // LANES
    for t in prange(threads):
        end = vectors * (t + 1) // threads * LANES
        gelu_mul_range(gate, up, out, vectors * t // threads * LANES, min(end, n))


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
    gate = _check.float32("gate", gate)
    up = _check.float32("up", up, shape=gate.shape)
    out = _check.output("out", out, gate.shape, gate, up)
    flat_gate, flat_up, flat_out = gate.ravel(), up.ravel(), out.ravel()
    threads = threads_for(gate.size, PARALLEL_ELEMENTS, gate.size)
    if threads == 1:
        gelu_mul_range(flat_gate, flat_up, flat_out, 0, gate.size)
    else:
        launch(gelu_mul_parallel, flat_gate, flat_up, flat_out, threads)
    return out


SPECS = [
    KernelSpec(
        name="gelu_mul",
        function=gelu_mul,
        compiled=(gelu_mul_range, gelu_mul_parallel),
        reference=reference.gelu_mul,
        formula="gate * (1 + tanh(sqrt(2/pi) * (gate + 0.044715 * gate**3))) / 2 * up",
        example=lambda rng, rows, n: {
            "gate": 4 * rng.standard_normal((rows, n), np.float32),
            "up": rng.standard_normal((rows, n), np.float32),
        },
        flops=lambda rows, n: 9.0 * rows * n,
        bytes=lambda rows, n: 12.0 * rows * n,
        sizes=({"rows": 1, "n": 768}, {"rows": 1, "n": 4096}, {"rows": 64, "n": 4096}),
    ),
]
