"""Bounded activations: softcap, and SwiGLU with clamped inputs."""

from typing import Any

import numpy as np

from ruvllm.kernels import check, reference
from ruvllm.kernels.activation import gated
from ruvllm.kernels.jit.decorators import kernel
from ruvllm.kernels.simd.math import sigmoid, tanh
from ruvllm.kernels.simd.vectors import at_most, max_or_second
from ruvllm.kernels.spec import KernelSpec, grid
from ruvllm.kernels.threads.over_rows import over_elements, run_rows
from ruvllm.kernels.threads.pool import PARALLEL_ELEMENTS

_ONE = np.float32(1)


@kernel(independent=True)
def softcap_range(x, cap, out, lo, hi):
    """Elements lo:hi of softcap. x, out (n,)."""
    limit, x, out = np.float32(cap), x[lo:hi], out[lo:hi]
    inverse = _ONE / limit
    for i in range(out.size):
        out[i] = limit * tanh(x[i] * inverse)


softcap_parallel = over_elements(softcap_range)


def softcap(x: Any, cap: float, out: np.ndarray | None = None) -> np.ndarray:
    """y = cap tanh(x / cap): close to x where |x| is far below ``cap``, and never beyond it.

    Args:
        x: (...) float32.
        cap: > 0.
        out: float32 of the same shape to write into; may be ``x`` itself.

    Returns:
        float32 of the shape of ``x``.

    Raises:
        TypeError: an argument is not a float32 array.
        ValueError: ``out`` does not match, or ``cap`` is not positive.

    Source: Gemma Team 2024, "Gemma 2: Improving Open Language Models at a Practical Size".
    """
    if check.is_half(out):
        return check.rounded(out, softcap, x, cap)
    x = check.float32("x", x)
    out = check.output("out", out, x.shape, x)
    cap = check.positive("cap", cap)
    run_rows(softcap_range, softcap_parallel, x.size, PARALLEL_ELEMENTS, x.size, x.ravel(), cap, out.ravel())
    return out


@kernel(independent=True)
def clamped_swiglu_range(gate, up, limit, alpha, out, lo, hi):
    """Elements lo:hi of clamped_swiglu. gate, up, out (n,)."""
    most, slope = np.float32(limit), np.float32(alpha)
    gate, up, out = gate[lo:hi], up[lo:hi], out[lo:hi]
    for i in range(out.size):
        g = at_most(gate[i], most)
        out[i] = (max_or_second(-most, at_most(up[i], most)) + _ONE) * (g * sigmoid(slope * g))


clamped_swiglu_parallel = over_elements(clamped_swiglu_range)


def clamped_swiglu(
    gate: Any, up: Any, limit: float = 7.0, alpha: float = 1.702, out: np.ndarray | None = None
) -> np.ndarray:
    """y = (u + 1) g sigmoid(alpha g), with g = min(gate, limit) and u = up clamped to -limit .. limit.

    Args:
        gate: (...) float32.
        up: float32 of the same shape.
        limit: > 0.
        alpha: slope of the sigmoid.
        out: float32 of the same shape to write into; may be ``gate`` or ``up`` itself.

    Returns:
        float32 of the shape of ``gate``.

    Raises:
        TypeError: an argument is not a float32 array.
        ValueError: shapes do not match, or ``limit`` or ``alpha`` is not positive.

    Source: OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card".
    """
    scalars = check.positive("limit", limit), check.positive("alpha", alpha)
    return gated(clamped_swiglu_range, clamped_swiglu_parallel, gate, up, out, scalars)


_SIZES = grid(rows=(1, 64), n=(768, 2048, 8192))

SPECS = [
    KernelSpec(
        name="softcap",
        function=softcap,
        compiled=(softcap_range, softcap_parallel),
        reference=reference.softcap,
        formula="cap * tanh(x / cap)",
        example=lambda rng, rows, n: {"x": 20 * rng.standard_normal((rows, n), np.float32), "cap": 30.0},
        flops=lambda rows, n: 4.0 * rows * n,
        bytes=lambda rows, n: 8.0 * rows * n,
        sizes=_SIZES,
    ),
    KernelSpec(
        name="clamped_swiglu",
        function=clamped_swiglu,
        compiled=(clamped_swiglu_range, clamped_swiglu_parallel),
        reference=reference.clamped_swiglu,
        formula="(clamp(up) + 1) * g * sigmoid(alpha * g), g = min(gate, limit)",
        example=lambda rng, rows, n: {
            "gate": 5 * rng.standard_normal((rows, n), np.float32),
            "up": 5 * rng.standard_normal((rows, n), np.float32),
        },
        flops=lambda rows, n: 9.0 * rows * n,
        bytes=lambda rows, n: 12.0 * rows * n,
        sizes=_SIZES,
    ),
]
