"""Normalisation over the last axis: RMSNorm, LayerNorm, and the root mean square itself."""

from typing import Any

import numpy as np
from numba import prange

from ruvllm.kernels import _check, reference
from ruvllm.kernels._jit import inline_kernel, kernel, parallel_kernel
from ruvllm.kernels._simd import (
    LANES,
    f32_load,
    f32_load_first,
    f32_store,
    f32_store_first,
    f32_zero,
    fma,
    hsum,
    lanes_between,
    splat,
)
from ruvllm.kernels._small import may_write, room, rows_of, small_call
from ruvllm.kernels._spec import KernelSpec
from ruvllm.kernels._threads import PARALLEL_STREAM, launch, threads_for

# --- sums of one row: four running sums, because each waits for the one before it ---------------------------------


@inline_kernel
def sum_of_squares(x: Any, start: Any, n: Any) -> Any:
    """The sum of the squares of n elements from the flat index ``start``."""
    s0, s1, s2, s3 = f32_zero(), f32_zero(), f32_zero(), f32_zero()
    whole = n - n % (4 * LANES)
    for i in range(start, start + whole, 4 * LANES):
        a, b = f32_load(x, i), f32_load(x, i + LANES)
        c, d = f32_load(x, i + 2 * LANES), f32_load(x, i + 3 * LANES)
        s0 = fma(a, a, s0)
        s1 = fma(b, b, s1)
        s2 = fma(c, c, s2)
        s3 = fma(d, d, s3)
    for i in range(whole, n, LANES):
        a = f32_load_first(x, start + i, n - i)
        s0 = fma(a, a, s0)
    return hsum((s0 + s1) + (s2 + s3))


# --- RMSNorm ------------------------------------------------------------------------------------------------------


@kernel(strict=True)
def rms_norm_rows(x: Any, weight: Any, eps: Any, out: Any, lo: Any, hi: Any) -> None:
    """Rows lo:hi of rms_norm. x, out (rows, n); weight (n,)."""
    n = x.shape[1]
    whole = n - n % LANES
    rest = n - whole
    for row in range(lo, hi):
        at = row * n
        scale = splat(np.float32(1) / np.sqrt(sum_of_squares(x, at, n) / np.float32(n) + np.float32(eps)))
        for i in range(0, whole, LANES):
            f32_store(out, at + i, f32_load(x, at + i) * scale * f32_load(weight, i))
        if rest:
            y = f32_load_first(x, at + whole, rest) * scale * f32_load_first(weight, whole, rest)
            f32_store_first(out, at + whole, y, rest)


@parallel_kernel
def rms_norm_parallel(x: Any, weight: Any, eps: Any, out: Any, threads: Any) -> None:
    """rms_norm_rows with the rows split over threads."""
    rows = x.shape[0]
    for t in prange(threads):
        rms_norm_rows(x, weight, eps, out, rows * t // threads, rows * (t + 1) // threads)


@small_call((2, 1, float, 2), (1, 1, float, 1))
def rms_norm_small(x: Any, weight: Any, eps: Any, out: Any) -> bool:
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
    y: Any = room(x.shape) if out is None and type(x) is np.ndarray else out
    if rms_norm_small(x, weight, eps, y):
        return y
    x = _check.float32("x", x, min_ndim=1)
    weight = _check.float32("weight", weight, shape=x.shape[-1:])
    out = _check.output("out", out, x.shape, x, weight)
    eps = _check.not_negative("eps", eps)
    if x.size:
        rows, to = _check.rows(x), _check.rows(out)
        count = rows.shape[0]
        threads = threads_for(x.size, PARALLEL_STREAM, count)
        if threads == 1:
            rms_norm_rows(rows, weight, eps, to, 0, count)
        else:
            launch(rms_norm_parallel, rows, weight, eps, to, threads)
    return out


# --- root mean square ---------------------------------------------------------------------------------------------


@kernel
def rms_rows(x: Any, out: Any, lo: Any, hi: Any) -> None:
    """Rows lo:hi of rms. x (rows, n); out (rows,)."""
    n = x.shape[1]
    for row in range(lo, hi):
        out[row] = np.sqrt(sum_of_squares(x, row * n, n) / np.float32(n))


def rms(x: Any, out: np.ndarray | None = None) -> np.ndarray:
    """y = sqrt(mean(x^2)), over the last axis.

    Args:
        x: (..., n) float32, n >= 1.
        out: (...) float32 to write into.

    Returns:
        (...) float32, an array of no dimension for one row.

    Raises:
        TypeError: an argument is not a float32 array.
        ValueError: ``x`` has no last axis or an empty one, or ``out`` does not match.
    """
    x = _check.float32("x", x, min_ndim=1)
    if not x.shape[-1]:
        raise ValueError(f"x: the mean over an empty last axis is undefined, found shape {x.shape}")
    out = _check.output("out", out, x.shape[:-1], x)
    rms_rows(_check.rows(x), out.reshape(-1), 0, out.size)
    return out


# --- LayerNorm ----------------------------------------------------------------------------------------------------


@inline_kernel
def mean_and_variance(x: Any, start: Any, n: Any, guess: Any) -> Any:
    """Mean of d = x - guess over n elements from the flat index ``start``, and their variance, which is that of x."""
    s0, s1, s2, s3 = f32_zero(), f32_zero(), f32_zero(), f32_zero()
    q0, q1, q2, q3 = f32_zero(), f32_zero(), f32_zero(), f32_zero()
    center = splat(guess)
    whole = n - n % (4 * LANES)
    for i in range(start, start + whole, 4 * LANES):
        a, b = f32_load(x, i) - center, f32_load(x, i + LANES) - center
        c, d = f32_load(x, i + 2 * LANES) - center, f32_load(x, i + 3 * LANES) - center
        s0, s1, s2, s3 = s0 + a, s1 + b, s2 + c, s3 + d
        q0, q1, q2, q3 = fma(a, a, q0), fma(b, b, q1), fma(c, c, q2), fma(d, d, q3)
    for i in range(whole, n, LANES):
        a = lanes_between(f32_load_first(x, start + i, n - i) - center, 0, n - i, np.float32(0))
        s0, q0 = s0 + a, fma(a, a, q0)
    mean = hsum((s0 + s1) + (s2 + s3)) / np.float32(n)
    return mean, max(hsum((q0 + q1) + (q2 + q3)) / np.float32(n) - mean * mean, np.float32(0))


@kernel(strict=True)
def layer_norm_rows(x: Any, weight: Any, bias: Any, with_bias: Any, eps: Any, out: Any, lo: Any, hi: Any) -> None:
    """Rows lo:hi of layer_norm. x, out (rows, n); weight, bias (n,), bias not read unless with_bias.

    E[x^2] - E[x]^2 cancels where the mean is much larger than the deviation, so deviations d = x - c from a guess c of
    the mean are summed and squared instead: variance = E[d^2] - E[d]^2, mean = c + E[d]. The guess is the mean of the
    row's first elements; where it turns out to be off by more than the deviation, a second pass takes the mean that
    the first has found. (That needs strict: (x - c) - E[d] must not become x - (c + E[d]).)
    """
    n = x.shape[1]
    whole = n - n % LANES
    rest = n - whole
    first = min(n, LANES)
    for row in range(lo, hi):
        at = row * n
        guess = hsum(f32_load_first(x, at, first)) / np.float32(first)
        error, variance = mean_and_variance(x, at, n, guess)
        if error * error > variance:
            guess = guess + error
            error, variance = mean_and_variance(x, at, n, guess)
        scale = splat(np.float32(1) / np.sqrt(variance + np.float32(eps)))
        center, correction = splat(guess), splat(error)
        for i in range(0, whole, LANES):
            y = (f32_load(x, at + i) - center - correction) * scale * f32_load(weight, i)
            f32_store(out, at + i, y + f32_load(bias, i) if with_bias else y)
        if rest:
            d = f32_load_first(x, at + whole, rest) - center - correction
            y = d * scale * f32_load_first(weight, whole, rest)
            y = y + f32_load_first(bias, whole, rest) if with_bias else y
            f32_store_first(out, at + whole, y, rest)


@parallel_kernel
def layer_norm_parallel(x: Any, weight: Any, bias: Any, with_bias: Any, eps: Any, out: Any, threads: Any) -> None:
    """layer_norm_rows with the rows split over threads."""
    rows = x.shape[0]
    for t in prange(threads):
        lo, hi = rows * t // threads, rows * (t + 1) // threads
        layer_norm_rows(x, weight, bias, with_bias, eps, out, lo, hi)


@small_call((2, 1, 1, bool, float, 2), (1, 1, 1, bool, float, 1))
def layer_norm_small(x: Any, weight: Any, bias: Any, with_bias: Any, eps: Any, out: Any) -> bool:
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


def layer_norm(
    x: Any, weight: Any, bias: Any = None, eps: float = 1e-5, out: np.ndarray | None = None
) -> np.ndarray:
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
    y: Any = room(x.shape) if out is None and type(x) is np.ndarray else out
    if layer_norm_small(x, weight, weight if bias is None else bias, bias is not None, eps, y):
        return y
    x = _check.float32("x", x, min_ndim=1)
    shape = x.shape
    last = shape[-1:]
    weight = _check.float32("weight", weight, shape=last)
    with_bias = bias is not None
    bias = _check.float32("bias", bias, shape=last) if with_bias else weight
    out = _check.output("out", out, shape, x, weight, bias)
    eps = _check.not_negative("eps", eps)
    if x.size:
        rows, to = _check.rows(x), _check.rows(out)
        count = rows.shape[0]
        threads = threads_for(x.size, PARALLEL_STREAM, count)
        if threads == 1:
            layer_norm_rows(rows, weight, bias, with_bias, eps, to, 0, count)
        else:
            launch(layer_norm_parallel, rows, weight, bias, with_bias, eps, to, threads)
    return out


_SIZES = (
    *({"rows": 1, "n": n} for n in (768, 1024, 2048, 4096, 8192)),
    {"rows": 64, "n": 4096},
)

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
