"""Dot product, scaling and addition; odd sizes are in test_specs."""

import numpy as np
import pytest

from ruvllm.kernels import add, buffer_sum, dot, scale


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_dot_of_vectors_and_of_rows() -> None:
    a, b = _normal(2, 3, 257), _normal(2, 3, 257, seed=1)
    y = dot(a, b)
    np.testing.assert_allclose(y, np.sum(a.astype(np.float64) * b, axis=-1), rtol=1e-4, atol=1e-5)
    one = dot(a[0, 0], b[0, 0])
    assert one.shape == ()
    assert one == y[0, 0]
    np.testing.assert_array_equal(dot(np.empty((2, 0), np.float32), np.empty((2, 0), np.float32)), [0, 0])


def test_scale_and_add_in_place_and_in_any_shape() -> None:
    a, b = _normal(2, 3, 45), _normal(2, 3, 45, seed=1)
    np.testing.assert_array_equal(scale(a, 0.3), a * np.float32(0.3))
    np.testing.assert_array_equal(add(a, b), a + b)
    changed = a.copy()
    assert scale(changed, -2, out=changed) is changed
    np.testing.assert_array_equal(changed, -2 * a)
    assert add(changed, b, out=changed) is changed
    np.testing.assert_array_equal(changed, -2 * a + b)
    assert add(np.float32(1).reshape(()), np.float32(2).reshape(())) == 3
    assert scale(np.empty((0, 3), np.float32), 2).shape == (0, 3)


def test_special_values() -> None:
    x = np.array([np.nan, np.inf, -np.inf, 0, -0.0], np.float32)
    np.testing.assert_array_equal(scale(x, 2), x)
    np.testing.assert_array_equal(add(x, -x), np.array([np.nan, np.nan, np.nan, 0, 0], np.float32))


def test_shapes_that_do_not_fit() -> None:
    for function in (dot, add):
        with pytest.raises(ValueError, match=r"b: expected shape \(3, 4\), found \(4,\)"):
            function(_normal(3, 4), _normal(4))
    with pytest.raises(ValueError, match="a: expected at least 1 dimensions"):
        dot(np.array(1, np.float32), np.array(1, np.float32))
    with pytest.raises(ValueError, match="x: expected 1 dimensions"):
        buffer_sum(_normal(3, 4))


def test_buffer_sum() -> None:
    assert buffer_sum(np.ones(1_000_003, np.float32)) == 1_000_003
    assert buffer_sum(np.empty(0, np.float32)) == 0
