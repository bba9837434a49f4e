"""Linear layers and their weights: every layout against NumPy on the weights as they were rounded."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ruvllm.kernels.quant.panels import Panels
from ruvllm.model import weights
from ruvllm.model.linear import Linear
from ruvllm.model.random_weights import RandomTensor
from ruvllm.model.weights import LAYOUTS, layout_for, matrix_bytes

SHAPES = [(1, 1), (1, 33), (15, 16), (16, 64), (17, 31), (50, 75), (49, 1030)]
ROUNDED: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


class ArrayTensor:
    """A weight tensor in memory."""

    dtype = "F32"

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self.shape = values.shape

    def float32(self, lo: int = 0, hi: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        assert out is None
        return self.values[lo:hi]

    def quantized(self, layout: str) -> Panels:
        raise NotImplementedError

    def release(self) -> None:
        pass


def as_float64(layout: str, tensor: RandomTensor) -> np.ndarray:
    """The weights of a float layout, rounded by NumPy; those of an integer layout, decoded row by row."""
    if layout in ROUNDED:
        return tensor.float32().astype(ROUNDED[layout]).astype(np.float64)
    linear = Linear.load(tensor, layout)
    return linear.take(np.arange(tensor.shape[0])).astype(np.float64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_product(layout: str, shape: tuple[int, int]) -> None:
    rows, columns = shape
    tensor = RandomTensor("w", shape, seed=3)
    bias = np.random.default_rng(1).standard_normal(rows).astype(np.float32)
    linear = Linear.load(tensor, layout, ArrayTensor(bias))
    plain = Linear.load(tensor, layout)
    w = as_float64(layout, tensor)
    for tokens in (1, 2, 5, 6, 7, 13):
        x = np.random.default_rng(tokens).standard_normal((tokens, columns), np.float32)
        got = linear(x)
        expected = x.astype(np.float64) @ w.T + bias
        # Float layouts add up in float32; integer ones round x to 8 bits in groups of 32 first.
        tolerance = 1e-10 if layout in ROUNDED else 2e-4
        assert ((got - expected) ** 2).sum() <= tolerance * ((expected - bias) ** 2).sum() + 1e-12
        np.testing.assert_array_equal(plain(x) + bias, got)
        out = np.full((tokens, rows), np.nan, np.float32)
        assert linear(x, out=out) is out
        np.testing.assert_array_equal(out, got)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_what_was_loaded(layout: str, shape: tuple[int, int]) -> None:
    tensor = RandomTensor("w", shape, seed=4)
    linear = Linear.load(tensor, layout)
    assert (linear.rows, linear.columns) == shape
    assert linear.layout == layout
    x = tensor.float32()
    ids = np.random.default_rng(5).permutation(shape[0])
    found = linear.take(ids)
    assert found.dtype == np.float32 and found.shape == shape
    for i, row in zip(ids, found, strict=True):
        if layout in ROUNDED:
            np.testing.assert_array_equal(row, x[i].astype(ROUNDED[layout]).astype(np.float32))
        else:
            step = np.abs(x[i]).max() / {"int8": 127, "int4": 7}[layout]
            assert np.abs(row - x[i]).max() <= step  # half a step, and the scale's own rounding


@pytest.mark.parametrize("layout", list(ROUNDED))
def test_rounding_is_to_nearest_even_and_keeps_what_is_no_number(layout: str) -> None:
    ties = [1.00390625, 1.01171875, 1.00048828125, 1.00146484375]
    values = np.array([[*ties, -0.0, 65519.0, 65520.0, 1e-8]], np.float32)
    special = np.array([[np.inf, -np.inf, np.nan, -np.nan, 3.4e38, 1e-45, 6e-8, -65504]], np.float32)
    x = np.concatenate([values, special])
    linear = Linear.load(ArrayTensor(x), layout)
    with np.errstate(over="ignore"):
        expected = x.astype(ROUNDED[layout]).astype(np.float32)
    np.testing.assert_array_equal(linear.take(np.arange(2)), expected)
    assert np.signbit(linear.take(np.array([0]))[0, 4])


@pytest.mark.parametrize("layout", list(ROUNDED))
def test_reading_in_pieces_gives_the_same(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = RandomTensor("w", (300, 40), seed=5)
    whole = Linear.load(tensor, layout).weights
    monkeypatch.setattr(weights, "_PACK_BYTES", 4 * 40 * 48)  # three panels at a time
    pieces = Linear.load(tensor, layout).weights
    np.testing.assert_array_equal(pieces.panels, whole.panels)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes(layout: str) -> None:
    bias = np.zeros(64, np.float32)
    linear = Linear.load(RandomTensor("w", (64, 256), seed=0), layout, ArrayTensor(bias))
    assert linear.nbytes - bias.nbytes == matrix_bytes((64, 256), layout, mins=False)
    assert layout in repr(linear) and "256 -> 64" in repr(linear) and "bias" in repr(linear)


def test_bytes_of_matrices_by_hand() -> None:
    """Rows are filled up to 16, columns of integers to 32; a group has a scale of two bytes and perhaps a min."""
    assert matrix_bytes((17, 33), "f32") == 4 * 32 * 33
    assert matrix_bytes((17, 33), "f16") == matrix_bytes((17, 33), "bf16") == 2 * 32 * 33
    assert matrix_bytes((17, 33), "int8") == 32 * 2 * (32 + 2)
    assert matrix_bytes((17, 33), "int5") == 32 * 2 * (20 + 2)
    assert matrix_bytes((17, 33), "int4") == 32 * 2 * (16 + 4)  # floats are rounded to codes with a min
    assert matrix_bytes((17, 33), "int8", mins=True) == 32 * 2 * (32 + 4)


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [("F32", "f32"), ("F16", "f16"), ("BF16", "bf16"), ("Q4_1", "int4"), ("Q5_K", "int5"), ("Q8_0", "int8")],
)
def test_auto_keeps_the_precision_of_the_file(dtype: str, layout: str) -> None:
    assert layout_for("auto", dtype) == layout
    assert all(layout_for(choice, dtype) == choice for choice in LAYOUTS)


def test_random_tensors_can_be_read_in_any_ranges() -> None:
    tensor = RandomTensor("layers.0.q", (600, 9), seed=1)
    whole = tensor.float32()
    for lo, hi in ((0, 600), (0, 1), (255, 257), (256, 512), (511, 600)):
        np.testing.assert_array_equal(tensor.float32(lo, hi), whole[lo:hi])
        out = np.empty((hi - lo, 9), np.float32)
        assert tensor.float32(lo, hi, out) is out
        np.testing.assert_array_equal(out, whole[lo:hi])
    assert np.abs(whole.std() * 3 - 1) < 0.05
    assert (RandomTensor("layers.1.q", (600, 9), seed=1).float32() != whole).any()
