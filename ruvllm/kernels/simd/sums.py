"""Sums and the maximum of one float32 row, with the order of additions left to LLVM (``sum_kernel``)."""

from typing import Any

import numpy as np

from ruvllm.kernels.jit.decorators import sum_kernel
from ruvllm.kernels.simd.math import exp
from ruvllm.kernels.simd.vectors import max_or_nan

_STRIP = 512  # elements that are summed in float32: sums of thousands lose digits

_ZERO = np.float32(0)
_MINUS_INFINITY = np.float32(-np.inf)


@sum_kernel
def sum_of_products(x: Any, y: Any) -> Any:
    """sum(x * y)."""
    total = _ZERO
    for i in range(x.size):
        total += x[i] * y[i]
    return total


@sum_kernel
def sum_of_squares(x: Any) -> Any:
    """sum(x * x)."""
    total = _ZERO
    for i in range(x.size):
        total += x[i] * x[i]
    return total


@sum_kernel
def maximum(x: Any) -> Any:
    """max(x), NaN where an element is NaN, -inf where there is none."""
    top = _MINUS_INFINITY
    for i in range(x.size):
        top = max_or_nan(top, x[i])
    return top


@sum_kernel
def sum_of_few(x: Any) -> Any:
    """sum(x) in float32, for a few elements: a sum of thousands would lose digits."""
    total = _ZERO
    for i in range(x.size):
        total += x[i]
    return total


@sum_kernel
def exp_sum(x: Any, shift: Any, scale: Any) -> Any:
    """sum(exp((x - shift) * scale)) in float64; strips of it are summed in float32."""
    total = 0.0
    for first in range(0, x.size, _STRIP):
        v, part = x[first : first + _STRIP], _ZERO
        for i in range(v.size):
            part += exp((v[i] - shift) * scale)
        total += np.float64(part)
    return total


@sum_kernel
def exp_and_sum(x: Any, shift: Any, out: Any) -> Any:
    """out = exp(x - shift); returns sum(out) in float64, of which strips are summed in float32. out may be x."""
    total = 0.0
    for first in range(0, x.size, _STRIP):
        v, y, part = x[first : first + _STRIP], out[first : first + _STRIP], _ZERO
        for i in range(v.size):
            y[i] = exp(v[i] - shift)
            part += y[i]
        total += np.float64(part)
    return total
