"""RMSNorm and LayerNorm where a float32 formula is easily wrong; odd sizes are in test_specs."""

import numpy as np
import pytest

from ruvllm.kernels import add_rms_norm, layer_norm, reference, rms, rms_norm


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("mean", [1e2, 1e4, 1e6, -1e7])
@pytest.mark.parametrize("n", [17, 768, 4096])
def test_layer_norm_where_the_mean_is_much_larger_than_the_deviation(mean: float, n: int) -> None:
    x = (_normal(3, n).astype(np.float64) + mean).astype(np.float32)
    weight, bias = _normal(n, seed=1), _normal(n, seed=2)
    expected = reference.layer_norm(x, weight, bias)
    np.testing.assert_allclose(layer_norm(x, weight, bias), expected, rtol=1e-5, atol=1e-5)


def test_layer_norm_of_a_constant_row_is_its_bias() -> None:
    x, bias = np.full((2, 100), 12345.678, np.float32), _normal(100)
    np.testing.assert_array_equal(layer_norm(x, np.ones(100, np.float32), bias), np.tile(bias, (2, 1)))


def test_layer_norm_without_bias() -> None:
    x, weight = _normal(5, 33), _normal(33, seed=1)
    np.testing.assert_allclose(layer_norm(x, weight), reference.layer_norm(x, weight), rtol=1e-5, atol=1e-6)


def test_rms_norm_of_zeros_is_zero_and_of_huge_numbers_finite() -> None:
    ones = np.ones(40, np.float32)
    assert (rms_norm(np.zeros((1, 40), np.float32), ones) == 0).all()
    np.testing.assert_allclose(rms_norm(np.full((1, 40), 1e18, np.float32), ones), 1, rtol=1e-6)


def test_eps_is_inside_the_root() -> None:
    x, ones = np.full((1, 24), 1e-3, np.float32), np.ones(24, np.float32)
    np.testing.assert_allclose(rms_norm(x, ones, eps=3e-6), 1e-3 / np.sqrt(1e-6 + 3e-6), rtol=1e-6)
    x[0, ::2] = -1e-3
    np.testing.assert_allclose(np.abs(layer_norm(x, ones, eps=3e-6)), 1e-3 / np.sqrt(1e-6 + 3e-6), rtol=1e-6)


@pytest.mark.parametrize("shape", [(19,), (4, 19), (2, 3, 19), (1, 2, 3, 19)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    x, weight = _normal(*shape), _normal(19, seed=1)
    for function in (rms_norm, layer_norm):
        rows = np.stack([function(row, weight) for row in x.reshape(-1, 19)])
        np.testing.assert_array_equal(function(x, weight), rows.reshape(shape))
    assert rms(x).shape == shape[:-1]
    np.testing.assert_allclose(rms(x), reference.rms(x), rtol=1e-6)


def test_in_place() -> None:
    for function in (rms_norm, layer_norm):
        x, weight = _normal(7, 45), _normal(45, seed=1)
        expected = function(x, weight)
        assert function(x, weight, out=x) is x
        np.testing.assert_array_equal(x, expected)


def test_nan_stays_in_its_row() -> None:
    x, weight = _normal(3, 20), _normal(20, seed=1)
    clean = rms_norm(x, weight), layer_norm(x, weight)
    x[1, 7] = np.nan
    for y, before in zip((rms_norm(x, weight), layer_norm(x, weight)), clean, strict=True):
        assert np.isnan(y[1]).all()
        np.testing.assert_array_equal(y[[0, 2]], before[[0, 2]])


def test_no_rows_and_no_columns() -> None:
    assert rms_norm(np.empty((0, 8), np.float32), np.ones(8, np.float32)).shape == (0, 8)
    assert layer_norm(np.empty((3, 0), np.float32), np.empty(0, np.float32)).shape == (3, 0)


def test_shapes_that_do_not_fit() -> None:
    x = _normal(3, 8)
    for function in (rms_norm, layer_norm):
        with pytest.raises(ValueError, match=r"weight: expected shape \(8\), found \(7,\)"):
            function(x, np.ones(7, np.float32))
        with pytest.raises(ValueError, match="x: expected at least 1 dimensions"):
            function(np.float32(1).reshape(()), np.ones(1, np.float32))
        with pytest.raises(ValueError, match=r"out: expected shape \(3, 8\), found \(8, 3\)"):
            function(x, np.ones(8, np.float32), out=np.empty((8, 3), np.float32))
    with pytest.raises(ValueError, match="bias: expected shape"):
        layer_norm(x, np.ones(8, np.float32), np.ones(9, np.float32))
    with pytest.raises(ValueError, match="x: the mean over an empty last axis"):
        rms(np.empty((2, 0), np.float32))


@pytest.mark.parametrize("eps", [-1e-5, float("nan"), float("inf")])
def test_an_eps_that_is_none_is_refused(eps: float) -> None:
    x = np.ones(8, np.float32)
    for call in (rms_norm, layer_norm):
        with pytest.raises(ValueError, match=r"eps: expected a finite number >= 0"):
            call(x, x, eps=eps)


@pytest.mark.parametrize("rows", [1, 3, 300])
def test_add_and_norm_in_one_pass_have_the_bits_of_two(rows: int) -> None:
    rng = np.random.default_rng(rows)
    x, residual = rng.standard_normal((2, rows, 577), np.float32)
    weight = rng.standard_normal(577, np.float32)
    stream = residual.copy()
    y, summed = add_rms_norm(x, stream, weight, 1e-6)
    assert summed is stream
    np.testing.assert_array_equal(stream, residual + x)
    np.testing.assert_array_equal(y, rms_norm(residual + x, weight, 1e-6))
    assert add_rms_norm(x, residual, weight, 1e-6, out=x)[0] is x  # the block's output is not needed any more
    np.testing.assert_array_equal(x, y)
    with pytest.raises(ValueError, match="^out: shares memory"):
        add_rms_norm(x, residual, weight, out=residual)
    with pytest.raises(ValueError, match="^residual: shares memory"):
        add_rms_norm(x, x, weight)
    with pytest.raises(TypeError, match="^residual: expected a float32 NumPy array, found None"):
        add_rms_norm(x, None, weight)  # type: ignore[arg-type]
