"""exp, sigmoid and SiLU on SIMD vectors.

LLVM has no vector ``exp`` without a vector math library and calls the scalar one 16 times instead. A polynomial
after range reduction (Cody & Waite, *Software Manual for the Elementary Functions*, 1980) is a dozen multiply-adds.
"""

from typing import Any

import numpy as np

from ruvllm.kernels._jit import inline_kernel
from ruvllm.kernels._simd import at_most, fma, greater, power_of_two, splat, zero_below

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)  # ln 2 in two parts: n * high is exact
_LN2_LOW = np.float32(-2.12194440e-4)
_LOWEST = np.float32(-87.33654)  # ln of the smallest normal float32
_HIGHEST = np.float32(89.0)  # 2**128: infinity
_INTEGERS = np.float32(1.5 * 2**23)  # float32 numbers of this size are integers: adding it rounds to nearest
# minimax for the relative error of e**r on |r| <= 0.35: 3.3e-9
_P2 = np.float32(0.49999993)
_P3 = np.float32(0.16666515)
_P4 = np.float32(0.04166846)
_P5 = np.float32(0.00836942)
_P6 = np.float32(0.00138131)
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
    """e**x for 16 lanes, relative error below 2e-7; 0 below -87.3, infinity above 88.3, NaN stays NaN."""
    return exp_of_few(at_most(x, _HIGHEST))


@inline_kernel
def exp_of_few(x: Any) -> Any:
    """exp for lanes that are all below 89, or NaN: what is left after a maximum was taken away.

    x = n ln 2 + r with |r| <= ln 2 / 2, so e**x = 2**n e**r, and e**r is a polynomial of degree 6.
    """
    bounded = greater(splat(_LOWEST), x)
    shifted = fma(bounded, splat(_LOG2E), splat(_INTEGERS))
    n = shifted - splat(_INTEGERS)
    r = fma(n, splat(-_LN2_HIGH), bounded)
    r = fma(n, splat(-_LN2_LOW), r)
    p = fma(splat(_P6), r, splat(_P5))
    p = fma(p, r, splat(_P4))
    p = fma(p, r, splat(_P3))
    p = fma(p, r, splat(_P2))
    p = fma(p, r, splat(_ONE))
    p = fma(p, r, splat(_ONE))
    return zero_below(x, _LOWEST, p * power_of_two(shifted))


@inline_kernel
def exp2_of_negative(x: Any) -> Any:
    """2**x for 16 lanes of x <= 0, relative error below 2e-7; 2**-126 below -126, 1 at 0, NaN stays NaN.

    Half the work of ``exp``: for the weights of a softmax, whose scores can be scaled by log2(e) beforehand.
    """
    bounded = greater(splat(_SMALLEST), x)
    shifted = bounded + splat(_INTEGERS)
    f = bounded - (shifted - splat(_INTEGERS))
    p = fma(splat(_E5), f, splat(_E4))
    p = fma(p, f, splat(_E3))
    p = fma(p, f, splat(_E2))
    p = fma(p, f, splat(_E1))
    return fma(p, f, splat(_ONE)) * power_of_two(shifted)


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
