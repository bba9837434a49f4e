"""Softmax and SiLU times up: infinities, NaN, in place; odd sizes are in test_specs."""

import numpy as np
import pytest

from ruvllm.kernels import reference, silu_mul, softmax

INF, NAN = np.inf, np.nan


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("n", [5, 16, 70, 257])
def test_softmax_of_masked_rows(n: int) -> None:
    """Minus infinity is no weight at all; a row of nothing else has no distribution, as in NumPy."""
    x = _normal(6, n)
    x[0, ::2] = -INF
    x[1, 1:] = -INF
    x[2] = -INF
    x[3, n // 2] = NAN
    x[4, n - 1] = INF
    with np.errstate(invalid="ignore"):
        expected = reference.softmax(x)
    y = softmax(x)
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=1e-37)
    assert (y[0, ::2] == 0).all()
    assert y[1, 0] == 1
    assert np.isnan(y[2:5]).all()


def test_softmax_of_huge_and_of_distant_numbers() -> None:
    x = np.array([[3e38, 3e38, -3e38], [1000, 999, 0], [-1000, -1001, -1e30]], np.float32)
    np.testing.assert_allclose(softmax(x), reference.softmax(x), rtol=1e-6, atol=1e-38)


def test_softmax_sums_to_one_and_ignores_a_shift() -> None:
    x = 4 * _normal(5, 1023)
    y = softmax(x)
    np.testing.assert_allclose(y.sum(axis=-1, dtype=np.float64), 1, rtol=1e-6)
    np.testing.assert_allclose(softmax(x + np.float32(64)), y, rtol=1e-4)


@pytest.mark.parametrize("shape", [(19,), (4, 19), (2, 3, 19)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    x, up = _normal(*shape), _normal(*shape, seed=1)
    np.testing.assert_array_equal(softmax(x), np.stack([softmax(r) for r in x.reshape(-1, 19)]).reshape(shape))
    np.testing.assert_allclose(silu_mul(x, up), reference.silu_mul(x, up), rtol=1e-5)


def test_in_place() -> None:
    x, up = _normal(7, 45), _normal(7, 45, seed=1)
    expected = softmax(x), silu_mul(x, up)
    for change, wanted in zip((lambda a: softmax(a, out=a), lambda a: silu_mul(a, up, out=a)), expected, strict=True):
        changed = x.copy()
        assert change(changed) is changed
        np.testing.assert_array_equal(changed, wanted)
    assert silu_mul(x, up, out=up) is up
    np.testing.assert_array_equal(up, expected[1])


def test_silu_at_its_ends() -> None:
    gate = np.array([-1e30, -200, -90, 0, 90, 200, 1e30, INF, NAN], np.float32)
    np.testing.assert_allclose(
        silu_mul(gate, np.ones_like(gate)), [0, 0, 0, 0, 90, 200, 1e30, INF, NAN], rtol=1e-6, atol=1e-35
    )


def test_nothing_in_nothing_out() -> None:
    assert softmax(np.empty((3, 0), np.float32)).shape == (3, 0)
    assert silu_mul(np.empty((0, 4), np.float32), np.empty((0, 4), np.float32)).shape == (0, 4)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"up: expected shape \(3, 4\), found \(4, 3\)"):
        silu_mul(_normal(3, 4), _normal(4, 3))
    with pytest.raises(ValueError, match="x: expected at least 1 dimensions"):
        softmax(np.array(1, np.float32))
