"""exp, sigmoid and SiLU of one float32, in loops that LLVM vectorises; exp, exp2 and a tanh also of a vector.

LLVM vectorises no call of ``math.exp`` without a vector math library. A polynomial after range reduction (Cody & Waite,
*Software Manual for the Elementary Functions*, 1980) is a dozen multiply-adds, which it does vectorise. It must be
compiled strictly: reassociation would cancel the constant that is added and then subtracted, to round.
"""

from typing import Any

import numpy as np

from ruvllm.kernels.jit.decorators import inline_kernel
from ruvllm.kernels.simd.vectors import at_most, fma, max_or_second, power_of_two

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)  # ln 2 in two parts: n * high is exact
_LN2_LOW = np.float32(-2.12194440e-4)
_LOWEST = np.float32(-88)  # n = -127 there, whose power of two has no bits: 0
_HIGHEST = np.float32(89.0)  # 2**128: infinity
_INTEGERS = np.float32(1.5 * 2**23)  # float32 values of this size are integers: adding it rounds to nearest
# minimax for the relative error of e**r on |r| <= 0.35: 3.3e-9
_P2 = np.float32(0.49999993)
_P3 = np.float32(0.16666515)
_P4 = np.float32(0.04166846)
_P5 = np.float32(0.00836942)
_P6 = np.float32(0.00138131)
_ONE, _TWO = np.float32(1), np.float32(2)
_T3, _T5, _T7 = np.float32(-1 / 3), np.float32(2 / 15), np.float32(-17 / 315)
_NEAR_ZERO = np.float32(0.2)
# 2**f - 1 over f for |f| <= 1/2, by least squares of the relative error: below 1e-7.
_E1 = np.float32(0.69314698)
_E2 = np.float32(0.24022242)
_E3 = np.float32(0.05550734)
_E4 = np.float32(0.00967151)
_E5 = np.float32(0.00132647)
_CUBIC, _TWICE_SQRT_2_OVER_PI = np.float32(0.044715), np.float32(1.5957691216057308)
_SMALLEST = np.float32(-126)  # 2**-126: the smallest normal float32


@inline_kernel
def exp(x: Any) -> Any:
    """e**x, relative error below 2e-7; 0 below -87.69, infinity above 88.3, NaN stays NaN.

    x = n ln 2 + r with |r| <= ln 2 / 2, so e**x = 2**n e**r, and e**r is a polynomial of degree 6.
    """
    bounded = max_or_second(_LOWEST, at_most(x, _HIGHEST))
    shifted = fma(bounded, _LOG2E, _INTEGERS)
    n = shifted - _INTEGERS
    r = fma(n, -_LN2_LOW, fma(n, -_LN2_HIGH, bounded))
    p = fma(_P6, r, _P5)
    p = fma(p, r, _P4)
    p = fma(p, r, _P3)
    p = fma(p, r, _P2)
    p = fma(p, r, _ONE)
    p = fma(p, r, _ONE)
    return p * power_of_two(shifted)


@inline_kernel
def exp2_of_negative(x: Any) -> Any:
    """2**x of x <= 0, relative error below 2e-7; 2**-126 below -126, 1 at 0, NaN stays NaN.

    Half the work of ``exp``: for the weights of a softmax, whose scores can be scaled by log2(e) beforehand.
    """
    bounded = max_or_second(_SMALLEST, x)
    shifted = bounded + _INTEGERS
    f = bounded - (shifted - _INTEGERS)
    p = fma(_E5, f, _E4)
    p = fma(p, f, _E3)
    p = fma(p, f, _E2)
    p = fma(p, f, _E1)
    return fma(p, f, _ONE) * power_of_two(shifted)


@inline_kernel
def sigmoid(x: Any) -> Any:
    """1 / (1 + e**-x)."""
    return _ONE / (_ONE + exp(-x))


@inline_kernel
def silu(x: Any) -> Any:
    """x * sigmoid(x) (Elfwing et al. 2017; "swish")."""
    return x * sigmoid(x)


@inline_kernel
def tanh_by_exp(x: Any) -> Any:
    """1 - 2 / (e**2x + 1) = tanh(x), with an absolute error below 2e-7; near 0 the difference cancels."""
    return _ONE - _TWO / (_ONE + exp(x + x))


@inline_kernel
def tanh(x: Any) -> Any:
    """(e**2x - 1) / (e**2x + 1), relative error below 1e-6: near 0 by its Taylor series, which cancels nothing."""
    z = x * x
    near = fma(fma(fma(z, _T7, _T5), z, _T3) * z, x, x)
    return near if abs(x) < _NEAR_ZERO else tanh_by_exp(x)


@inline_kernel
def gelu(x: Any) -> Any:
    """x sigmoid(2 z) = 0.5 x (1 + tanh z), z = sqrt(2 / pi) (x + 0.044715 x^3): GELU by its tanh approximation."""
    return x * sigmoid(fma(x * x * x, _CUBIC, x) * _TWICE_SQRT_2_OVER_PI)
