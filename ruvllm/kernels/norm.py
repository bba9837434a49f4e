"""Normalisation over the last axis: RMSNorm, LayerNorm, and the root mean square itself.

    rms_norm:    x / sqrt(mean(x^2) + eps) * weight
    layer_norm:  (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

Every row is normalised by itself: one sum over it, then one loop that scales it. Arrays are (rows, n), C-contiguous.
RMSNorm and LayerNorm have four forms each (the root mean square needs no threads and no small call). From the inside:

- ``rms_norm_rows``, the body: plain loops over the rows lo:hi, which LLVM vectorises.
- ``rms_norm_parallel``: the rows split over threads. No row is split, so any number of threads gives the same bits.
- ``rms_norm_small``: checks and body in one compiled call, for arrays so small that checks in Python would take longer
  than the body.
- ``rms_norm``, the public function: it tries the small call, which returns False for large or unusual arrays; then it
  checks its arguments in Python, and runs the body on one thread or on several.

``rms_norm_part`` is the body once more, to be called by other kernels. ``independent``, ``strict``, ``sum_kernel`` and
``as_part`` are explained in jit/decorators.py.
"""

from typing import Any

import numpy as np

from ruvllm.kernels import check, reference
from ruvllm.kernels.jit.decorators import as_part, inline_kernel, kernel, sum_kernel
from ruvllm.kernels.jit.small_calls import may_write, new_output, rows_of, small_call
from ruvllm.kernels.simd.sums import sum_of_few, sum_of_squares
from ruvllm.kernels.spec import KernelSpec, grid
from ruvllm.kernels.threads.over_rows import over_rows, run_rows
from ruvllm.kernels.threads.pool import PARALLEL_STREAM

_ZERO, _ONE = np.float32(0), np.float32(1)


# --- RMSNorm ------------------------------------------------------------------------------------------------------


@kernel(independent=True)
def rms_norm_rows(x, weight, eps, out, lo, hi):
    """Rows lo:hi of rms_norm. x, out (rows, n); weight (n,)."""
    n = x.shape[1]
    for row in range(lo, hi):
        v, y = x[row], out[row]
        scale = _ONE / np.sqrt(sum_of_squares(v) / np.float32(n) + np.float32(eps))
        for i in range(n):
            y[i] = v[i] * scale * weight[i]


rms_norm_parallel = over_rows(rms_norm_rows)
rms_norm_part = as_part(rms_norm_rows)


@small_call((2, 1, float, 2), (1, 1, float, 1))
def rms_norm_small(x, weight, eps, out):
    """rms_norm of fewer elements than PARALLEL_STREAM."""
    if out.shape != x.shape or weight.size != x.shape[-1] or not 0 <= eps < np.inf:
        return False
    if not 0 < x.size < PARALLEL_STREAM or not may_write(out, x) or not may_write(out, weight):
        return False
    rms_norm_rows(rows_of(x), weight, eps, rows_of(out), 0, x.size // weight.size)
    return True


def rms_norm(x: Any, weight: Any, eps: float = 1e-5, out: np.ndarray | None = None) -> np.ndarray:
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last axis.

    Args:
        x: (..., n) float32.
        weight: (n,) float32.
        eps: added to the mean square, >= 0; > 0 keeps a zero row finite.
        out: (..., n) float32 to write into; may be ``x`` itself.

    Returns:
        (..., n) float32. Sum, scale and weight are all in float32: the order is x * scale, then * weight.

    Raises:
        TypeError: an argument is not a float32 array.
        ValueError: shapes do not match, or eps is negative.

    Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization".
    """
    y: Any = new_output(x.shape) if out is None and type(x) is np.ndarray else out
    if rms_norm_small(x, weight, eps, y):
        return y
    if check.is_half(out):
        return check.rounded(out, rms_norm, x, weight, eps)
    x = check.float32("x", x, min_ndim=1)
    weight = check.float32("weight", weight, shape=x.shape[-1:])
    out = check.output("out", out, x.shape, x, weight)
    eps = check.not_negative("eps", eps)
    if x.size:
        rows, to = check.rows(x), check.rows(out)
        run_rows(rms_norm_rows, rms_norm_parallel, x.size, PARALLEL_STREAM, rows.shape[0], rows, weight, eps, to)
    return out


# --- addition and RMSNorm -----------------------------------------------------------------------------------------


@inline_kernel(independent=True)
def add_to(y, x):
    """y += x."""
    for i in range(y.size):
        y[i] += x[i]


@kernel(strict=True)
def add_rms_norm_rows(x, residual, weight, eps, out, lo, hi):
    """Rows lo:hi of add_rms_norm. x, residual, out (rows, n); weight (n,)."""
    for row in range(lo, hi):
        add_to(residual[row], x[row])
        rms_norm_part(residual, weight, eps, out, row, row + 1)


add_rms_norm_parallel = over_rows(add_rms_norm_rows)


def add_rms_norm(
    x: Any, residual: np.ndarray, weight: Any, eps: float = 1e-5, out: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """residual += x; y = residual / sqrt(mean(residual^2) + eps) * weight, over the last axis, in one pass.

    This is what stands between two blocks of a transformer: the sum goes on as the residual stream, and its norm is
    the next block's input. A row is normalised while it is in the L1 cache.

    Args:
        x: (..., n) float32, the output of a block.
        residual: (..., n) float32, C-contiguous; the sum is written into it.
        weight: (n,) float32.
        eps: added to the mean square, >= 0; > 0 keeps a zero row finite.
        out: (..., n) float32 to write y into; may be ``x`` itself.

    Returns:
        y (..., n) float32, and ``residual``. Both have the bits of ``add`` and ``rms_norm``.

    Raises:
        TypeError: an argument is not a float32 array.
        ValueError: shapes do not match, eps is negative, or ``out`` shares memory with ``residual``.

    Source: the fusion is that of vLLM and FlashInfer.
    """
    x = check.float32("x", x, min_ndim=1)
    weight = check.float32("weight", weight, shape=x.shape[-1:])
    residual = check.apart("residual", check.output("residual", check.given("residual", residual), x.shape), x, weight)
    out = check.apart("out", check.output("out", out, x.shape, x, weight), residual)
    eps = check.not_negative("eps", eps)
    if x.size:
        rows = check.rows(x)
        arguments = rows, check.rows(residual), weight, eps, check.rows(out)
        run_rows(add_rms_norm_rows, add_rms_norm_parallel, x.size, PARALLEL_STREAM, len(rows), *arguments)
    return out, residual


# --- root mean square ---------------------------------------------------------------------------------------------


@kernel(strict=True)
def rms_rows(x, out, lo, hi):
    """Rows lo:hi of rms. x (rows, n); out (rows,)."""
    for row in range(lo, hi):
        out[row] = np.sqrt(sum_of_squares(x[row]) / np.float32(x.shape[1]))


def rms(x: Any, out: np.ndarray | None = None) -> np.ndarray:
    """y = sqrt(mean(x^2)), over the last axis.

    Args:
        x: (..., n) float32, n >= 1.
        out: (...) float32 to write into.

    Returns:
        (...) float32, a zero-dimensional array for one row.

    Raises:
        TypeError: an argument is not a float32 array.
        ValueError: ``x`` is zero-dimensional, its last axis is empty, or ``out`` does not match.
    """
    if check.is_half(out):
        return check.rounded(out, rms, x)
    x = check.float32("x", x, min_ndim=1)
    if not x.shape[-1]:
        raise ValueError(f"x: the mean over an empty last axis is undefined, found shape {x.shape}")
    out = check.output("out", out, x.shape[:-1], x)
    rms_rows(check.rows(x), out.reshape(-1), 0, out.size)
    return out


# --- LayerNorm ----------------------------------------------------------------------------------------------------


@sum_kernel
def mean_and_variance(x, guess):
    """The mean of d = x - guess, and the variance of d, which is that of x."""
    total, squares = _ZERO, _ZERO
    for i in range(x.size):
        d = difference(x[i], guess)
        total += d
        squares += d * d
    mean = total / np.float32(x.size)
    return mean, max(squares / np.float32(x.size) - mean * mean, _ZERO)


@inline_kernel
def difference(a, b):
    """a - b, compiled strictly: inside a sum, LLVM could reassociate it, and the cancellation would be back."""
    return a - b


@kernel(independent=True)
def layer_norm_rows(x, weight, bias, with_bias, eps, out, lo, hi):
    """Rows lo:hi of layer_norm. x, out (rows, n); weight, bias (n,), bias not read unless with_bias.

    E[x^2] - E[x]^2 cancels where the mean is much larger than the deviation, so deviations d = x - c from a guess c of
    the mean are summed and squared instead: variance = E[d^2] - E[d]^2, mean = c + E[d]. The guess is the mean of the
    row's first elements; where it turns out to be off by more than the deviation, a second pass takes the mean that
    the first has found. (x - c) - E[d] is more accurate than x - (c + E[d]).
    """
    n = x.shape[1]
    first = min(n, 16)
    for row in range(lo, hi):
        v, y = x[row], out[row]
        guess = sum_of_few(v[:first]) / np.float32(first)
        shift, variance = mean_and_variance(v, guess)
        if shift * shift > variance:
            guess = guess + shift
            shift, variance = mean_and_variance(v, guess)
        scale = _ONE / np.sqrt(variance + np.float32(eps))
        if with_bias:
            for i in range(n):
                y[i] = (v[i] - guess - shift) * scale * weight[i] + bias[i]
        else:
            for i in range(n):
                y[i] = (v[i] - guess - shift) * scale * weight[i]


layer_norm_parallel = over_rows(layer_norm_rows)


@small_call((2, 1, 1, bool, float, 2), (1, 1, 1, bool, float, 1))
def layer_norm_small(x, weight, bias, with_bias, eps, out):
    """layer_norm of fewer elements than PARALLEL_STREAM."""
    n = x.shape[-1]
    if out.shape != x.shape or weight.size != n or bias.size != n or not 0 <= eps < np.inf:
        return False
    if not (may_write(out, x) and may_write(out, weight) and may_write(out, bias)):
        return False
    if not 0 < x.size < PARALLEL_STREAM:
        return False
    layer_norm_rows(rows_of(x), weight, bias, with_bias, eps, rows_of(out), 0, x.size // n)
    return True


def layer_norm(x: Any, weight: Any, bias: Any = None, eps: float = 1e-5, out: np.ndarray | None = None) -> np.ndarray:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the last axis.

    Args:
        x: (..., n) float32.
        weight: (n,) float32.
        bias: (n,) float32, or None for none.
        eps: added to the variance (mean of squared deviations), >= 0; > 0 keeps a constant row finite.
        out: (..., n) float32 to write into; may be ``x`` itself.

    Returns:
        (..., n) float32, accurate where the mean is thousands of times the deviation.

    Raises:
        TypeError: an argument is not a float32 array.
        ValueError: shapes do not match, or eps is negative.

    Source: Ba, Kiros & Hinton 2016, "Layer Normalization"; the two passes are Chan, Golub & LeVeque 1983,
    "Algorithms for Computing the Sample Variance".
    """
    y: Any = new_output(x.shape) if out is None and type(x) is np.ndarray else out
    if layer_norm_small(x, weight, weight if bias is None else bias, bias is not None, eps, y):
        return y
    if check.is_half(out):
        return check.rounded(out, layer_norm, x, weight, bias, eps)
    x = check.float32("x", x, min_ndim=1)
    shape = x.shape
    last = shape[-1:]
    weight = check.float32("weight", weight, shape=last)
    with_bias = bias is not None
    bias = check.float32("bias", bias, shape=last) if with_bias else weight
    out = check.output("out", out, shape, x, weight, bias)
    eps = check.not_negative("eps", eps)
    if x.size:
        rows = check.rows(x)
        arguments = rows, weight, bias, with_bias, eps, check.rows(out)
        run_rows(layer_norm_rows, layer_norm_parallel, x.size, PARALLEL_STREAM, len(rows), *arguments)
    return out


_SIZES = grid(rows=(1, 64), n=(768, 1024, 2048, 4096, 8192))

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
        sizes=_SIZES,
    ),
    KernelSpec(
        name="add_rms_norm",
        function=add_rms_norm,
        compiled=(add_rms_norm_rows, add_rms_norm_parallel),
        reference=reference.add_rms_norm,
        formula="s = residual + x; s / sqrt(mean(s^2) + eps) * weight",
        example=lambda rng, rows, n: {
            "x": rng.standard_normal((rows, n), np.float32),
            "residual": rng.standard_normal((rows, n), np.float32),
            "weight": rng.standard_normal(n, np.float32),
            "eps": 1e-5,
        },
        flops=lambda rows, n: 5.0 * rows * n,
        bytes=lambda rows, n: 4.0 * (4 * rows * n + n),
        sizes=_SIZES,
    ),
    KernelSpec(
        name="layer_norm",
        function=layer_norm,
        compiled=(layer_norm_rows, layer_norm_parallel),
        reference=reference.layer_norm,
        formula="(x - mean(x)) / sqrt(var(x) + eps) * weight + bias",
        example=lambda rng, rows, n: {
            "x": rng.standard_normal((rows, n), np.float32),
            "weight": rng.standard_normal(n, np.float32),
            "bias": rng.standard_normal(n, np.float32),
            "eps": 1e-5,
        },
        flops=lambda rows, n: 8.0 * rows * n,
        bytes=lambda rows, n: 4.0 * (2 * rows * n + 2 * n),
        sizes=_SIZES,
    ),
    KernelSpec(
        name="rms",
        function=rms,
        compiled=(rms_rows,),
        reference=reference.rms,
        formula="sqrt(mean(x^2))",
        example=lambda rng, rows, n: {"x": rng.standard_normal((rows, n), np.float32)},
        flops=lambda rows, n: 2.0 * rows * n,
        bytes=lambda rows, n: 4.0 * rows * n,
        sizes=({"rows": 1, "n": 768}, {"rows": 1, "n": 4096}, {"rows": 64, "n": 4096}),
    ),
]
