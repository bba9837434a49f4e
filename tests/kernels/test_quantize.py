"""Quantise and dequantise: the error bound at any magnitude, exactness where codes can be exact, packing."""

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ruvllm.kernels import reference
from ruvllm.kernels.quant.layout import INT4, INT5, INT8
from ruvllm.kernels.quant.panels import Panels, empty_panels, pack_groups, take_quant_rows
from ruvllm.kernels.quant.weights import dequantize, quantize_int4, quantize_int8, quantize_parallel, quantize_rows

SIDES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=70)
METHODS = ("int8", "int4", "int4 with mins")
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)


def quantize(method: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    if method == "int8":
        return (*quantize_int8(x), None)
    return quantize_int4(x, symmetric=method == "int4")


def assert_within_half_a_step(method: str, x: np.ndarray) -> None:
    """|scale code + min - x| <= |scale| / 2 for every element, in float64; and what fills a group up is harmless."""
    codes, scales, mins = quantize(method, x)
    assert codes.dtype == (np.int8 if method == "int8" else np.uint8)
    assert codes.min(initial=0) >= (-127 if method == "int8" else 0)
    assert codes.max(initial=0) <= (127 if method == "int8" else 15)
    y = reference.dequantize(codes, scales, mins)
    step = np.repeat(np.abs(scales.view(np.float16).astype(np.float64)), 32, -1)
    k = x.shape[-1]
    error = np.abs(y[..., :k] - x)
    # Besides, the float32 arithmetic that chose the code: roundings of up to 127 steps, or at float32's lower end.
    assert (error <= step[..., :k] * (0.5 + 5e-5) + 2e-43).all()
    if mins is None:
        assert (y[..., k:] == 0).all()
    else:
        first = x[..., -(k % 32), None] if k % 32 else 0
        assert (np.abs(y[..., k:] - first) <= step[..., k:] * (0.5 + 5e-5)).all()


@EVERY_METHOD
@given(data=st.data())
def test_no_error_exceeds_half_a_step(method: str, data: st.DataObject) -> None:
    exponent = data.draw(st.integers(-149, 15), label="exponent")
    bound = float(np.float32(2.0**exponent))
    numbers = st.floats(-bound, bound, width=32, allow_subnormal=True)
    assert_within_half_a_step(method, data.draw(hnp.arrays(np.float32, SIDES, elements=numbers, fill=numbers)))


@EVERY_METHOD
def test_no_error_exceeds_half_a_step_in_many_groups(method: str) -> None:
    rng = np.random.default_rng(0)
    for exponent in (-40, -30, -26, -25, -24, -22, -20, -15, -10, -3, 0, 5, 8):
        for k in (1, 31, 32, 33, 100, 576):
            scale = np.float32(2.0**exponent)
            x = rng.standard_normal((64, k), np.float32) * scale
            assert_within_half_a_step(method, x)
            assert_within_half_a_step(method, np.abs(x))  # one sign
            assert_within_half_a_step(method, -np.abs(x))
            assert_within_half_a_step(method, x + 100 * scale)  # far from zero
            assert_within_half_a_step(method, np.sign(x) * scale)  # two values
            assert_within_half_a_step(method, np.full_like(x, 1.2345 * scale))  # constant
            x[:, 0] *= 50  # an outlier
            assert_within_half_a_step(method, x)


@EVERY_METHOD
def test_constant_groups_and_zeros_are_nearly_exact(method: str) -> None:
    for value in (0.0, -0.0, 1.0, -1.0, 0.3, -0.02, 1234.5):
        x = np.full((2, 64), value, np.float32)
        y = dequantize(*quantize(method, x))
        np.testing.assert_allclose(y, x, rtol=2.0**-11, atol=0)
    for value in (6e-8, 1e-20, 1e-45):
        x = np.full((2, 64), value, np.float32)
        assert np.abs(dequantize(*quantize(method, x)) - x).max() <= 2.0**-25


@EVERY_METHOD
def test_numbers_that_are_codes_come_back_exactly(method: str) -> None:
    """What was 4 or 8 bits before is not rounded a second time."""
    rng = np.random.default_rng(1)
    scales = rng.standard_normal((50, 3, 1)).astype(np.float16).astype(np.float64)
    if method == "int8":
        codes = rng.integers(-127, 128, (50, 3, 32))
        codes[:, :, 5] = 127
    elif method == "int4":
        codes = rng.integers(-8, 8, (50, 3, 32))
        codes[:, :, 5] = -8
    else:
        scales = np.abs(scales)
        codes = rng.integers(0, 16, (50, 3, 32))
        codes[:, :, 5:7] = (0, 15)
    low = scales * rng.integers(-20, 1, scales.shape) if method == "int4 with mins" else 0.0
    low = np.float64(np.float16(low))
    x = (codes * scales + low).astype(np.float32).reshape(50, 96)
    y = dequantize(*quantize(method, x))
    np.testing.assert_allclose(y, x, rtol=0, atol=float(np.abs(x).max()) * 2e-7)


@pytest.mark.parametrize(
    "method, kind, at_most", [("int8", "Q8_0", 1.001), ("int4", "Q4_0", 0.95), ("int4 with mins", "Q4_1", 0.9)]
)
def test_no_worse_than_ggmls_own(method: str, kind: str, at_most: float) -> None:
    """Squared errors against those of the gguf package's quantiser of the same format."""
    x = np.random.default_rng(2).standard_normal((64, 1024), np.float32)
    peer = gguf.GGMLQuantizationType[kind]
    theirs = gguf.quants.dequantize(gguf.quants.quantize(x, peer), peer)
    y = dequantize(*quantize(method, x))
    assert np.sum((y - x) ** 2) <= at_most * np.sum((theirs - x) ** 2)


@EVERY_METHOD
def test_any_number_of_axes(method: str) -> None:
    x = np.random.default_rng(3).standard_normal((2, 3, 4, 70), np.float32)
    flat = quantize(method, x.reshape(-1, 70))
    for found, expected in zip(quantize(method, x), flat, strict=True):
        if expected is not None:
            assert found is not None and found.shape == (2, 3, 4, expected.shape[-1])
            np.testing.assert_array_equal(found.reshape(expected.shape), expected)
    codes, scales, mins = quantize(method, x[0, 0, 0])
    assert (codes.shape, scales.shape) == ((96,), (3,))
    np.testing.assert_array_equal(codes, flat[0][0])
    y = dequantize(codes, scales, mins, columns=70)
    assert y.shape == (70,)
    np.testing.assert_allclose(y, reference.dequantize(codes, scales, mins, 70), rtol=1e-6, atol=1e-7)
    for shape in ((0, 64), (3, 0), (0,), (2, 0, 5)):
        codes, scales, mins = quantize(method, np.empty(shape, np.float32))
        assert codes.shape == (*shape[:-1], -(-shape[-1] // 32) * 32)
        assert dequantize(codes, scales, mins, columns=shape[-1]).shape == shape


@EVERY_METHOD
def test_same_for_any_number_of_threads(method: str) -> None:
    x = np.random.default_rng(4).standard_normal((37, 100), np.float32)
    codes, scales, mins = quantize(method, x)
    kind = INT8 if method == "int8" else INT4
    for threads in (1, 2, 5):
        found = np.empty_like(codes), np.empty_like(scales), np.empty((37, 0 if mins is None else 4), np.uint16)
        quantize_parallel(threads, len(x), kind, x, found[0].view(np.uint8), found[1], found[2])
        for array, expected in zip(found, (codes, scales, found[2] if mins is None else mins), strict=True):
            np.testing.assert_array_equal(array, expected)
    part = np.full(codes.shape, 99, codes.dtype)
    quantize_rows(kind, x, part.view(np.uint8), np.empty_like(scales), np.empty_like(found[2]), 3, 7)
    np.testing.assert_array_equal(part[3:7], codes[3:7])
    assert (part[:3] == 99).all() and (part[7:] == 99).all()


@EVERY_METHOD
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(method: str, bad: float) -> None:
    for k, column in ((32, 0), (70, 69), (70, 40), (1, 0)):
        x = np.ones((2, 3, k), np.float32)
        x[1, 2, column] = bad
        with pytest.raises(ValueError, match=rf"^x: expected finite numbers, found {bad} at \(1, 2, {column}\)$"):
            quantize(method, x)


@pytest.mark.parametrize(
    "method, largest",
    [
        ("int8", 127 * 65504),
        ("int8", -127 * 65504),
        ("int4", 8 * 65504),
        ("int4", -8 * 65504),
        ("int4 with mins", 15 * 65504),
        ("int4 with mins", -65504),
    ],
)
def test_numbers_beyond_half_precision_scales_are_refused(method: str, largest: float) -> None:
    x = np.zeros((3, 40), np.float32)
    x[2, 35] = largest
    assert_within_half_a_step(method, x)
    for factor in (1.1, 1e10, 3e38 / abs(largest)):
        x[2, 35] = largest * factor
        with pytest.raises(ValueError, match=r"^x: expected numbers that 16-bit .* at \(2, 35\)$"):
            quantize(method, x)


def test_arguments_are_checked() -> None:
    for function in (quantize_int8, quantize_int4):
        with pytest.raises(TypeError, match="^x: expected float32"):
            function(np.zeros((2, 32)))
        with pytest.raises(ValueError, match="^x: expected at least 1"):
            function(np.float32(1) * np.ones((), np.float32))
    codes, scales = quantize_int8(np.ones((2, 64), np.float32))
    for arguments, error, says in (
        ((codes.astype(np.int16), scales), TypeError, "codes: expected int8 or uint8"),
        ((codes[:, :32], scales), ValueError, "codes: expected shape"),
        ((codes, scales.view(np.float16)), TypeError, "scales: expected a uint16 array"),
        ((codes, scales, scales[:, :1]), ValueError, "mins: expected shape"),
        ((codes, scales, scales.view(np.int16)), TypeError, "mins: expected a uint16 array"),
        ((codes, scales, None, 32), ValueError, "columns: expected"),
        ((codes, scales, None, 65), ValueError, "columns: expected"),
    ):
        with pytest.raises(error, match=f"^{says}"):
            dequantize(*arguments)


def test_layout_of_inputs_does_not_matter() -> None:
    x = np.random.default_rng(5).standard_normal((6, 64), np.float32)
    wide = np.full((6, 128), np.nan, np.float32)
    wide[:, ::2] = x
    codes, scales = quantize_int8(x)
    np.testing.assert_array_equal(quantize_int8(wide[:, ::2])[0], codes)
    np.testing.assert_array_equal(
        dequantize(np.asfortranarray(codes), np.asfortranarray(scales)), dequantize(codes, scales)
    )


# --- panels -------------------------------------------------------------------------------------------------------


def random_groups(kind: int, n: int, groups: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, {INT4: 16, INT5: 32, INT8: 256}[kind], (n, 32 * groups), np.uint8)
    scales, mins = rng.standard_normal((2, n, groups)).astype(np.float16).view(np.uint16)
    return codes, scales, mins


def dirty_panels(kind: int, n: int, columns: int, mins: bool) -> Panels:
    panels = empty_panels(kind, n, columns, mins)
    panels.blocks[...] = 0xAB
    return panels


def unpacked(panels: Panels) -> np.ndarray:
    """Codes (16 P, 32 G) by the layout's definition: byte i of line j is row i // 4, column 4 j + i % 4."""
    p, g, lines, _ = panels.codes.shape
    quads = panels.codes.reshape(p, g, lines, 16, 4)
    if panels.kind == INT5:
        fifth = np.stack([quads[:, :, 4] >> j & 1 for j in range(8)], axis=2)
        quads = np.concatenate((quads[:, :, :4] & 15, quads[:, :, :4] >> 4), axis=2) + 16 * fifth
    if panels.kind == INT4:
        quads = np.concatenate((quads & 15, quads >> 4), axis=2)
    return quads.transpose(0, 3, 1, 2, 4).reshape(16 * p, 32 * g)


@pytest.mark.parametrize("kind", [INT4, INT5, INT8])
@pytest.mark.parametrize("with_mins", [False, True])
def test_panels_hold_the_groups(kind: int, with_mins: bool) -> None:
    for n, groups in ((1, 1), (15, 2), (16, 3), (17, 1), (33, 5), (300, 18)):
        codes, scales, mins = random_groups(kind, n, groups)
        panels = dirty_panels(kind, n, 32 * groups, with_mins)
        assert panels.blocks.ctypes.data % 64 == 0
        pack_groups(codes, scales, mins if with_mins else None, panels)
        np.testing.assert_array_equal(unpacked(panels)[:n], codes)
        assert panels.mins.shape[2] == 16 * with_mins
        for to, given_rows in ((panels.scales, scales), (panels.mins, mins))[: 1 + with_mins]:
            rows = to.transpose(0, 2, 1).reshape(16 * len(to), to.shape[1])
            np.testing.assert_array_equal(rows[:n], given_rows)
            assert not rows[n:].any()  # zero weights, whatever the codes
        values = codes.view(np.int8) if kind == INT8 else codes
        if kind == INT5 and not with_mins:
            values = values.astype(np.int8) - np.int8(16)
        expected = dequantize(values, scales, mins if with_mins else None)
        for columns in (32 * groups, 32 * groups - 5):  # a row may end within a group
            ids = np.array([n - 1, 0, n // 2, 0])
            buffer = np.full((6, columns), np.float32(7))
            np.testing.assert_array_equal(take_quant_rows(panels, ids, buffer[1:-1]), expected[ids, :columns])
            assert (buffer[[0, -1]] == 7).all()


@pytest.mark.parametrize("kind", [INT4, INT5, INT8])
def test_panels_packed_in_parts_are_the_same(kind: int) -> None:
    n, groups = 117, 3
    codes, scales, mins = random_groups(kind, n, groups)
    whole = dirty_panels(kind, n, 96, True)
    pack_groups(codes, scales, mins, whole)
    parts = dirty_panels(kind, n, 96, True)
    for lo, hi in ((0, 16), (16, 64), (64, 117)):
        pack_groups(codes[lo:hi], scales[lo:hi], mins[lo:hi], parts.part(lo, hi))
    np.testing.assert_array_equal(parts.blocks, whole.blocks)
    assert whole.nbytes == 8 * 16 * groups * ({INT4: 16, INT5: 20, INT8: 32}[kind] + 4)


def test_packing_arguments_are_checked() -> None:
    codes, scales, mins = random_groups(INT4, 20, 2)
    panels, symmetric = empty_panels(INT4, 20, 64, True), empty_panels(INT4, 20, 64, False)
    for arguments, error, says in (
        ((codes[:16], scales[:16], mins[:16], panels), ValueError, "codes: expected the rows of 2 panels"),
        ((codes[:, :32], scales, mins, panels), ValueError, "codes: expected shape"),
        ((codes.astype(np.int32), scales, mins, panels), TypeError, "codes: expected uint8"),
        ((codes, scales[:, :1], mins, panels), ValueError, "scales: expected shape"),
        ((codes, scales.view(np.float16), mins, panels), TypeError, "scales: expected uint16"),
        ((codes, scales, None, panels), ValueError, "mins: expected shape"),
        ((codes, scales, mins, symmetric), ValueError, "mins: expected shape"),
    ):
        with pytest.raises(error, match=says):
            pack_groups(*arguments)
    with pytest.raises(ValueError, match="lo: expected a multiple of 16, found 8"):
        panels.part(8, 20)
