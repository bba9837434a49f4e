"""exp, sigmoid and SiLU on SIMD vectors.

LLVM has no vector ``exp`` without a vector math library and calls the scalar one 16 times instead. A polynomial
after range reduction (Cody & Waite, *Software Manual for the Elementary Functions*, 1980) is a dozen multiply-adds.
"""

from typing import Any

import numpy as np

from ruvllm.kernels._jit import inline_kernel
from ruvllm.kernels._simd import (
    fma,
    fmax,
    fmin,
    greater,
    nan_or_zero_below,
    power_of_two,
    round_to_i32,
    splat,
    to_f32,
)

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)  # ln 2 in two parts: n * high is exact
_LN2_LOW = np.float32(-2.12194440e-4)
_LOWEST = np.float32(-87.33654)  # ln of the smallest normal float32
_HIGHEST = np.float32(89.0)  # 2**128: infinity
_P0 = np.float32(1.9875691500e-4)
_P1 = np.float32(1.3981999507e-3)
_P2 = np.float32(8.3334519073e-3)
_P3 = np.float32(4.1665795894e-2)
_P4 = np.float32(1.6666665459e-1)
_P5 = np.float32(5.0000001201e-1)
_ONE = np.float32(1)
# 2**f - 1 over f for |f| <= 1/2, by least squares of the relative error: below 1e-7.
_E1 = np.float32(0.69314698)
_E2 = np.float32(0.24022242)
_E3 = np.float32(0.05550734)
_E4 = np.float32(0.00967151)
_E5 = np.float32(0.00132647)
_SMALLEST = np.float32(-126)  # 2**-126: the smallest normal float32


@inline_kernel
def exp(x: Any) -> Any:
    """e**x for 16 lanes, relative error below 2e-7; 0 below -87.3, infinity above 88.3, NaN stays NaN.

    x = n ln 2 + r with |r| <= ln 2 / 2, so e**x = 2**n e**r, and e**r is a polynomial of degree 7.
    """
    bounded = fmin(fmax(x, splat(_LOWEST)), splat(_HIGHEST))
    n = round_to_i32(bounded * splat(_LOG2E))
    nf = to_f32(n)
    r = fma(nf, splat(-_LN2_HIGH), bounded)
    r = fma(nf, splat(-_LN2_LOW), r)
    p = fma(splat(_P0), r, splat(_P1))
    p = fma(p, r, splat(_P2))
    p = fma(p, r, splat(_P3))
    p = fma(p, r, splat(_P4))
    p = fma(p, r, splat(_P5))
    y = fma(p * r, r, r + splat(_ONE)) * power_of_two(n)
    return nan_or_zero_below(x, _LOWEST, y)


@inline_kernel
def exp2_of_negative(x: Any) -> Any:
    """2**x for 16 lanes of x <= 0, relative error below 2e-7; 2**-126 below -126, 1 at 0, NaN stays NaN.

    Half the work of ``exp``: for the weights of a softmax, whose scores can be scaled by log2(e) beforehand.
    """
    bounded = greater(splat(_SMALLEST), x)
    n = round_to_i32(bounded)
    f = bounded - to_f32(n)
    p = fma(splat(_E5), f, splat(_E4))
    p = fma(p, f, splat(_E3))
    p = fma(p, f, splat(_E2))
    p = fma(p, f, splat(_E1))
    return fma(p, f, splat(_ONE)) * power_of_two(n)


@inline_kernel
def sigmoid(x: Any) -> Any:
    """1 / (1 + e**-x) for 16 lanes."""
    one = splat(_ONE)
    return one / (one + exp(f32_negative(x)))


@inline_kernel
def f32_negative(x: Any) -> Any:
    """-x for 16 lanes."""
    return splat(np.float32(0)) - x


@inline_kernel
def silu(x: Any) -> Any:
    """x * sigmoid(x) for 16 lanes (Elfwing et al. 2017; "swish")."""
    return x * sigmoid(x)
