"""exp, sigmoid and SiLU against NumPy in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ruvllm.kernels.jit.decorators import kernel
from ruvllm.kernels.simd import math
from ruvllm.kernels.simd.vectors import f32_load, f32_store


def _of_each(function: Any) -> Callable[[Any, Any], None]:
    @kernel(independent=True)
    def run(x: Any, out: Any) -> None:
        for i in range(x.size):
            out[i] = function(x[i])

    return run


def _of_sixteen(function: Any) -> Callable[[Any, Any], None]:
    @kernel(strict=True)
    def run(x: Any, out: Any) -> None:
        for i in range(0, x.size, 16):
            f32_store(out, i, function(f32_load(x, i)))

    return run


_exp, _sigmoid, _silu = _of_each(math.exp), _of_each(math.sigmoid), _of_each(math.silu)


def _f32(values: list[float]) -> np.ndarray:
    return np.array(values, np.float32)


def _run(function, x: np.ndarray) -> np.ndarray:
    padded = np.concatenate((x, np.zeros(-x.size % 16))).astype(np.float32)
    out = np.empty_like(padded)
    function(padded, out)
    return out[: x.size]


@pytest.mark.parametrize(("low", "high"), [(-87.3, 88.3), (-1, 1), (-1e-3, 1e-3), (-20, 0)])
def test_exp_is_within_two_roundings(low: float, high: float) -> None:
    x = np.linspace(low, high, 1_000_000).astype(np.float32)
    expected = np.exp(x.astype(np.float64))
    assert np.max(np.abs(_run(_exp, x) - expected) / expected) < 2e-7


def test_exp_at_its_ends() -> None:
    x = _f32([-np.inf, -1e38, -104, -87.7, -0.0, 0, 88.4, 1e38, np.inf])
    np.testing.assert_array_equal(_run(_exp, x), _f32([0, 0, 0, 0, 1, 1, np.inf, np.inf, np.inf]))


def test_exp_below_the_normal_numbers() -> None:
    x = np.linspace(-87.68, -87.33, 1000).astype(np.float32)
    np.testing.assert_allclose(_run(_exp, x), np.exp(x.astype(np.float64)), rtol=2e-7, atol=2.0**-149)


@pytest.mark.parametrize("function", [math.exp, math.exp2_of_negative], ids=["exp", "exp2_of_negative"])
def test_sixteen_at_once_are_the_bits_of_each(function: Any) -> None:
    x = np.concatenate([np.linspace(-130, 0, 100_000), [-np.inf, np.nan, -0.0]]).astype(np.float32)
    np.testing.assert_array_equal(_run(_of_sixteen(function), x), _run(_of_each(function), x))


def test_nan_stays_nan() -> None:
    for function in (_exp, _sigmoid, _silu):
        y = _run(function, _f32([np.nan, 1, -np.nan]))
        np.testing.assert_array_equal(np.isnan(y), [True, False, True])


def test_exp_never_falls() -> None:
    """Not even where the range reduction changes its power of two."""
    x = np.concatenate([k * np.log(2) / 2 + np.linspace(-1e-5, 1e-5, 200) for k in range(-20, 20)])
    x = np.sort(x).astype(np.float32)
    y = _run(_exp, x)
    assert (y[1:] >= y[:-1] * (1 - 1.2e-7)).all()


def test_sigmoid_and_silu() -> None:
    x = np.linspace(-100, 100, 1_000_000).astype(np.float32)
    wide = x.astype(np.float64)
    expected = 1 / (1 + np.exp(-wide))
    np.testing.assert_allclose(_run(_sigmoid, x), expected, rtol=4e-7, atol=1e-37)
    np.testing.assert_allclose(_run(_silu, x), wide * expected, rtol=4e-7, atol=1e-35)


def test_silu_of_huge_numbers() -> None:
    x = _f32([-3e38, -1e30, -1e5, 1e5, 1e30, 3e38])
    np.testing.assert_array_equal(_run(_silu, x), _f32([0, 0, 0, 1e5, 1e30, 3e38]))
