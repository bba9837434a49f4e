"""Normalisation: RMSNorm and LayerNorm over the last axis."""

from typing import Any

import numpy as np
from numba import prange

from ruvllm.kernels import _check, reference
from ruvllm.kernels._jit import kernel, parallel_kernel
from ruvllm.kernels._spec import KernelSpec
from ruvllm.kernels._threads import PARALLEL_ELEMENTS, num_threads


@kernel
def rms_norm_rows(x: Any, weight: Any, eps: Any, out: Any, lo: Any, hi: Any) -> None:
    """Rows lo:hi of rms_norm. x, out (rows, n); weight (n,)."""
    n = x.shape[1]
    for row in range(lo, hi):
        squares = np.float32(0)
        for i in range(n):
            squares += x[row, i] * x[row, i]
        scale = np.float32(1) / np.sqrt(squares / np.float32(n) + eps)
        for i in range(n):
            out[row, i] = x[row, i] * scale * weight[i]


@parallel_kernel
def rms_norm_parallel(x: Any, weight: Any, eps: Any, out: Any, threads: Any) -> None:
    rows = x.shape[0]
    for t in prange(threads):
        rms_norm_rows(x, weight, eps, out, rows * t // threads, rows * (t + 1) // threads)


def rms_norm(x: Any, weight: Any, eps: float = 1e-5, out: np.ndarray | None = None) -> np.ndarray:
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last axis.

    Args:
        x: (..., n) float32.
        weight: (n,) float32.
        eps: added to the mean square, > 0 keeps a zero row finite.
        out: (..., n) float32 to write into; may be ``x`` itself.

    Returns:
        (..., n) float32. Sum, scale and weight are all in float32: the order is x * scale, then * weight.

    Raises:
        TypeError: an argument is not a float32 array.
        ValueError: shapes do not match.

    Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization".
    """
    x = _check.float32("x", x)
    weight = _check.float32("weight", weight, shape=(x.shape[-1] if x.ndim else None,))
    out = _check.output("out", out, x.shape)
    if x.size:
        rows = x.reshape(-1, x.shape[-1])
        if x.size < PARALLEL_ELEMENTS:
            rms_norm_rows(rows, weight, np.float32(eps), out.reshape(rows.shape), 0, rows.shape[0])
        else:
            rms_norm_parallel(rows, weight, np.float32(eps), out.reshape(rows.shape), num_threads())
    return out


SPECS = [
    KernelSpec(
        name="rms_norm",
        function=rms_norm,
        compiled=(rms_norm_rows, rms_norm_parallel),
        reference=reference.rms_norm,
        formula="x / sqrt(mean(x^2) + eps) * weight",
        example=lambda rng, rows, n: {
            "x": rng.standard_normal((rows, n), np.float32),
            "weight": rng.standard_normal(n, np.float32),
            "eps": 1e-5,
        },
        flops=lambda rows, n: 4.0 * rows * n,
        bytes=lambda rows, n: 4.0 * (2 * rows * n + n),
        sizes=({"rows": 1, "n": 768}, {"rows": 1, "n": 4096}, {"rows": 64, "n": 4096}),
    ),
]
