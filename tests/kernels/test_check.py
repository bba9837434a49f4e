"""What the public functions accept, and the one line that says what they do not."""

import re

import numpy as np
import pytest

from ruvllm.kernels import check


def test_a_plain_array_is_taken_as_it_is() -> None:
    x = np.ones((2, 3), np.float32)
    assert check.float32("x", x, ndim=2, shape=(2, 3), min_ndim=1) is x
    assert check.output("out", x, (2, 3)) is x
    ids = np.arange(3)
    assert check.integers("ids", ids) is ids


class _Foreign:
    """An array of another library: no NumPy array, but NumPy can view it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array


class _Dlpack(_Foreign):
    def __dlpack__(self, **options: object) -> object:
        return self.array.__dlpack__(**options)  # type: ignore[arg-type]

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class _ArrayMethod(_Foreign):
    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return self.array


@pytest.mark.parametrize("kind", [_Dlpack, _ArrayMethod])
def test_arrays_of_other_libraries_are_viewed(kind: type[_Foreign]) -> None:
    x = np.arange(6, dtype=np.float32)
    seen = check.float32("x", kind(x))
    assert np.shares_memory(seen, x)
    np.testing.assert_array_equal(seen, x)


def test_lists_of_numbers() -> None:
    np.testing.assert_array_equal(check.float32("x", [[1, 2], [3, 4]]), np.array([[1, 2], [3, 4]], np.float32))
    np.testing.assert_array_equal(check.integers("ids", [3, 1]), [3, 1])
    assert check.integers("ids", []).shape == (0,)


def _misaligned() -> np.ndarray:
    return np.zeros(25, np.uint8)[1:].view(np.float32)


@pytest.mark.parametrize(
    "x",
    [
        np.arange(12, dtype=np.float32)[::2],
        np.arange(12, dtype=np.float32).reshape(3, 4).T,
        np.arange(12, dtype=np.float32)[::-1],
        np.arange(12, dtype=">f4"),
        np.arange(12, dtype="<f4"),
        np.broadcast_to(np.float32(3), (2, 5)),
        _misaligned(),
        np.arange(4, dtype=np.float32).view(np.matrix),
    ],
    ids=["strided", "transposed", "reversed", "big-endian", "little-endian", "broadcast", "misaligned", "subclass"],
)
def test_every_layout_becomes_one_that_compiled_code_reads(x: np.ndarray) -> None:
    y = check.float32("x", x)
    np.testing.assert_array_equal(y, np.asarray(x))
    assert type(y) is np.ndarray
    assert y.dtype == np.float32
    assert y.flags.c_contiguous
    assert y.flags.aligned
    assert y.flags.writeable  # one type for the compiler, though nothing is written to it


def test_read_only_arrays_and_memory_maps_are_viewed_not_copied(tmp_path) -> None:
    x = np.arange(1000, dtype=np.float32)
    x.tofile(tmp_path / "x")
    x.flags.writeable = False
    assert np.shares_memory(check.float32("x", x), x)
    mapped = np.memmap(tmp_path / "x", np.float32, mode="r")
    seen = check.float32("x", mapped)
    assert type(seen) is np.ndarray
    assert np.shares_memory(seen, mapped)
    del mapped  # the view keeps the map alive
    np.testing.assert_array_equal(seen, x)
    assert check.float32("x", x[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("x", "found"),
    [
        (np.ones(3), "expected float32, found float64; convert it: weight.astype(np.float32)"),
        (np.ones(3, np.longdouble), f"expected float32, found {np.dtype(np.longdouble)}"),
        (np.ones(3, np.int32), "expected float32, found int32"),
        (np.ones(3, np.complex64), "expected float32, found complex64"),
        (np.array(["a"]), "expected float32, found <U1"),
        ("text", "expected an array, found str"),
        (None, "expected an array, found NoneType"),
        (3.5, "expected an array, found float"),
    ],
)
def test_what_is_no_float32_array(x: object, found: str) -> None:
    with pytest.raises(TypeError, match=f"^weight: {re.escape(found)}$"):
        check.float32("weight", x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ndim": 1}, "x: expected 1 dimensions, found shape (2, 3)"),
        ({"min_ndim": 3}, "x: expected at least 3 dimensions, found shape (2, 3)"),
        ({"shape": (2, 4)}, "x: expected shape (2, 4), found (2, 3)"),
        ({"shape": (None, 4)}, "x: expected shape (any, 4), found (2, 3)"),
        ({"shape": (2, 3, 1)}, "x: expected shape (2, 3, 1), found (2, 3)"),
        ({"shape": (6,)}, "x: expected shape (6), found (2, 3)"),
    ],
)
def test_wrong_shapes(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check.float32("x", np.ones((2, 3), np.float32), **options)
    check.float32("x", np.ones((2, 3), np.float32), shape=(None, 3))


def test_outputs() -> None:
    made = check.output("out", None, (2, 3))
    assert made.shape == (2, 3)
    assert made.dtype == np.float32
    for out, message in (
        (np.empty((2, 3)), "out: expected a float32 NumPy array, found float64"),
        ([[0.0] * 3] * 2, "out: expected a float32 NumPy array, found list"),
        (np.empty((2, 3), ">f4"), "out: expected a float32 NumPy array, found >f4"),
    ):
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            check.output("out", out, (2, 3))
    with pytest.raises(ValueError, match=re.escape("out: expected shape (2, 3), found (3, 2)")):
        check.output("out", np.empty((3, 2), np.float32), (2, 3))
    read_only = np.empty((2, 3), np.float32)
    read_only.flags.writeable = False
    for out in (read_only, np.empty((3, 2), np.float32).T, np.empty((2, 6), np.float32)[:, ::2], _misaligned()):
        with pytest.raises(ValueError, match="^out: must be C-contiguous, aligned and writable$"):
            check.output("out", out, out.shape)


def test_integers() -> None:
    for ids in (np.arange(3, dtype=np.uint8), np.arange(6)[::2], np.arange(3, dtype=">i4"), range(3)):
        y = check.integers("ids", ids)
        assert y.dtype == np.int64
        assert y.flags.carray
        np.testing.assert_array_equal(y, np.asarray(ids))
    read_only = np.arange(3)
    read_only.flags.writeable = False
    assert check.integers("ids", read_only).flags.writeable
    for wrong in (np.ones(3), np.array([True]), ["a"], None):
        with pytest.raises(TypeError, match="^ids: expected integers, found "):
            check.integers("ids", wrong)
    with pytest.raises(ValueError, match=re.escape("ids: expected 1 dimensions, found shape (1, 2)")):
        check.integers("ids", [[1, 2]])


def test_positive() -> None:
    assert check.positive("theta", 2) == 2.0
    for value in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="^theta: expected a finite number > 0, found "):
            check.positive("theta", value)
