"""quant_matmul and pack_quantized for callers from outside; the product itself is tested in test_quant."""

import numpy as np
import pytest

import ruvllm.kernels as K
from ruvllm.kernels import reference

RNG = np.random.default_rng(3)
W = RNG.standard_normal((37, 83), np.float32)


def quantized(layout: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    return (*K.quantize_int8(W), None) if layout == "int8" else K.quantize_int4(W, symmetric=layout == "int4")


def packed(layout: str) -> K.QuantMatrix:
    return K.pack_quantized(*quantized(layout), 83)


@pytest.mark.parametrize("layout", ["int8", "int4", "mins"])
def test_rows_are_those_that_were_packed(layout: str) -> None:
    w = packed(layout)
    codes, scales, mins = quantized(layout)
    expected = reference.dequantize(codes, scales, mins, 83)
    np.testing.assert_allclose(w.rows(), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(w.rows([5, 0]), w.rows()[[5, 0]])
    assert w.bits == (8 if layout == "int8" else 4) and w.shape == W.shape
    assert repr(w).startswith(f"QuantMatrix(37 x 83, {w.bits} bits{', mins' if layout == 'mins' else ''}, ")
    with pytest.raises(ValueError, match="^ids: expected rows 0 to 36, found 2 to 37"):
        w.rows([2, 37])


@pytest.mark.parametrize("layout", ["int8", "int4", "mins"])
@pytest.mark.parametrize("lead", [(), (1,), (13,), (2, 3)])
def test_products_are_close_to_those_of_floats(layout: str, lead: tuple[int, ...]) -> None:
    w = packed(layout)
    x = RNG.standard_normal((*lead, 83), np.float32)
    x[..., 7] = 200  # an outlier, which must not cost the others their bits
    y = K.quant_matmul(x, w)
    assert y.shape == (*lead, 37)
    exact = x.astype(np.float64) @ w.rows().astype(np.float64).T
    assert np.sqrt(np.mean((y - exact) ** 2)) < 0.01 * np.sqrt(83)
    ours = reference.quant_matmul(x, w)
    np.testing.assert_allclose(y, ours, rtol=1e-4, atol=1e-4 * np.abs(ours).max())


def test_outliers_are_kept_by_column() -> None:
    x = np.full((2, 40), 0.5, np.float32)
    x[0, [39, 3, 20]] = 100, -50, 30
    codes, scales, outliers = K.quantize_activations(x)
    np.testing.assert_array_equal(outliers[0], [[0, 0.5], [3, -50], [20, 30], [39, 100]])
    assert not codes[0, [0, 3, 20, 39]].any() and (codes[0, 4:20] == 127).all()
    np.testing.assert_allclose(scales, 0.5 / 127, rtol=1e-6)
    assert K.quantize_activations(np.zeros((0, 5), np.float32))[0].shape == (0, 32)
    assert np.isnan(K.quantize_activations(np.full(5, np.nan, np.float32))[1]).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.ones((2, 64)), np.ones((2, 2), np.uint16)), TypeError, "codes: expected int8 or uint8, found float64"),
        (([1], np.ones((2, 2), np.uint16)), TypeError, "codes: expected int8 or uint8, found list"),
        ((np.ones((2, 64), np.int8), np.ones((2, 3), np.uint16)), ValueError, "codes: expected shape"),
        ((np.ones((2, 64), np.int8), np.ones((2, 2))), TypeError, "scales: expected a uint16 array, found float64"),
        ((np.full((2, 64), 16, np.uint8), np.ones((2, 2), np.uint16)), ValueError, "codes: expected 0 to 15, found 16"),
        ((np.ones(64, np.int8), np.ones(2, np.uint16)), ValueError, "codes: expected a matrix"),
        ((np.ones((2, 64), np.int8), np.ones((2, 2), np.uint16), None, 65), ValueError, "columns: expected"),
        ((np.ones((2, 64), np.int8), np.ones((2, 2), np.uint16), np.ones((2, 1), np.uint16)), ValueError, "mins: exp"),
    ],
)
def test_what_cannot_be_packed_is_refused(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        K.pack_quantized(*arguments)


def test_what_cannot_be_multiplied_is_refused() -> None:
    w = K.pack_quantized(*K.quantize_int8(W), columns=83)
    with pytest.raises(ValueError, match="^x: expected rows of 83"):
        K.quant_matmul(np.ones((2, 84), np.float32), w)
    with pytest.raises(TypeError, match="^w: expected a QuantMatrix"):
        K.quant_matmul(np.ones((2, 83), np.float32), W)  # type: ignore[arg-type]
    x = np.ones((2, 37), np.float32)
    square = K.pack_quantized(*K.quantize_int8(W[:, :37].copy()), columns=37)
    with pytest.raises(ValueError, match="^out: shares memory"):
        K.quant_matmul(x, square, out=x)
