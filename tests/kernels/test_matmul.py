"""Products beyond what the shared tests of all kernels cover: stacked rows, nothing at all, packed 16-bit weights."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ruvllm.kernels import batched_gemm, dot, gemm, gemm_nt, gemv, grouped_gemm, reference
from ruvllm.kernels.matmul.panels import halve, linear_panels, pack, panel_count, panels_matmul, take_rows


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def assert_near(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.shape == expected.shape and got.dtype == np.float32
    assert ((got - expected) ** 2).sum() <= 1e-10 * (expected**2).sum()


def f64(a: np.ndarray) -> np.ndarray:
    return a.astype(np.float64)


@pytest.mark.parametrize("leading", [(), (1,), (2, 3)])
def test_leading_dimensions(leading: tuple[int, ...]) -> None:
    a, b, stack = normal(*leading, 5, 33), normal(33, 18, seed=1), normal(*leading, 33, 18, seed=2)
    assert_near(gemm(a, b), f64(a) @ f64(b))
    assert_near(gemm_nt(a, b.T.copy()), f64(a) @ f64(b))
    assert_near(batched_gemm(a, stack), f64(a) @ f64(stack))


@pytest.mark.parametrize(("m", "k", "n"), [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
def test_nothing_to_multiply(m: int, k: int, n: int) -> None:
    """A sum of no products is zero, also where ``out`` held something else."""
    expected = np.zeros((m, n), np.float32)
    a, b = normal(m, k), normal(k, n)
    for got in (gemm(a, b), gemm_nt(a, b.T.copy()), batched_gemm(a, b), gemm(a, b, np.ones((m, n), np.float32))):
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(gemv(normal(m, 0), normal(0)), np.zeros(m, np.float32))


def test_columns_beyond_one_block() -> None:
    """More than the 1024 columns that are added up in one pass, in tiles of six rows and the rest."""
    a, b = normal(13, 2500), normal(2500, 20, seed=1)
    assert_near(gemm(a, b), f64(a) @ f64(b))


def test_a_number_that_is_none_stays_in_its_row() -> None:
    a, b = normal(9, 40), normal(40, 20, seed=1)
    clean = gemm(a, b)
    a[4, 7], a[6, 0] = np.nan, np.inf
    got = gemm(a, b)
    assert np.isnan(got[4]).all() and not np.isfinite(got[6]).any()
    rest = [0, 1, 2, 3, 5, 7, 8]
    np.testing.assert_array_equal(got[rest], clean[rest])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gemv(normal(3, 4), normal(5)), "x: expected shape (4), found (5,)"),
        (lambda: gemv(normal(3), normal(3)), "a: expected at least 2 dimensions, found shape (3,)"),
        (lambda: gemm(normal(3, 4), normal(5, 6)), "b: expected shape (4, any), found (5, 6)"),
        (lambda: gemm(normal(4), normal(4, 6)), "a: expected (..., M, K), found shape (4,)"),
        (lambda: gemm(normal(3, 4), normal(2, 4, 6)), "b: expected shape (4, any), found (2, 4, 6)"),
        (lambda: gemm_nt(normal(3, 4), normal(4, 6)), "b: expected shape (any, 4), found (4, 6)"),
        (lambda: batched_gemm(normal(2, 3, 4), normal(3, 4, 5)), "b: expected shape (2, 4, any), found (3, 4, 5)"),
        (lambda: dot(normal(3), normal(4)), "b: expected shape"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)


# --- packed weights ----------------------------------------------------------------------------------------------

STORED: dict[Any, Any] = {np.float32: np.float32, np.uint16: np.float16, np.int16: ml_dtypes.bfloat16}


def packed(w: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Panels of w (N, K) in a storage type, and w as rounded."""
    rounded = w.astype(STORED[dtype])
    panels = np.full((panel_count(len(w)), w.shape[1], 16), 1, dtype)
    pack(rounded.view(dtype), panels)
    return panels, rounded.astype(np.float32)


@pytest.mark.parametrize("dtype", STORED, ids=lambda dtype: np.dtype(STORED[dtype]).name)
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 50])
def test_packed_product(rows: int, dtype: Any) -> None:
    for columns in (1, 3, 64, 1030):
        panels, w = packed(normal(rows, columns), dtype)
        ids = np.random.default_rng(rows).integers(0, rows, 7)
        buffer = np.full((9, columns), np.float32(7))
        np.testing.assert_array_equal(take_rows(panels, ids, buffer[1:-1]), w[ids])
        assert (buffer[[0, -1]] == 7).all()
        assert not panels[-1, :, rows - (len(panels) - 1) * 16 :].any()
        for tokens in (1, 5, 6, 7, 12):
            x = normal(tokens, columns, seed=tokens)
            buffer = np.full((tokens + 2, rows), 7, np.float32)
            assert_near(linear_panels(panels, x, buffer[1:-1]), f64(x) @ f64(w).T)
            assert (buffer[[0, -1]] == 7).all()


def test_packed_product_beyond_one_block_of_everything() -> None:
    """More tokens, rows and columns than are held in the caches at once; each token as if it were alone."""
    panels, w = packed(normal(330, 1060), np.float32)
    x = normal(150, 1060, seed=1)
    out = linear_panels(panels, x, np.empty((150, 330), np.float32))
    assert_near(out, f64(x) @ f64(w).T)
    for some in (slice(0, 1), slice(127, 129), slice(141, 150)):
        np.testing.assert_array_equal(linear_panels(panels, x[some], np.empty_like(out[some])), out[some])


@pytest.mark.parametrize("rows", [70, 650])
@pytest.mark.parametrize("dtype", STORED, ids=lambda dtype: np.dtype(STORED[dtype]).name)
def test_packed_product_is_the_same_on_several_threads(dtype: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a thread takes turns of what others have not done: five on fewer cores."""
    from ruvllm.kernels.matmul import panels as module

    panels, _ = packed(normal(rows, 40), dtype)
    before = panels.copy()
    for tokens in (1, 8, 20):
        x = normal(tokens, 40, seed=1)
        expected = linear_panels(panels, x, np.empty((tokens, rows), np.float32))
        for threads in (2, 3, 5):
            with monkeypatch.context() as patch:
                patch.setattr(module, "threads_for", lambda work, threshold, pieces, n=threads: n)
                out = linear_panels(panels, x, np.full((tokens, rows), np.nan, np.float32))
            np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(panels, before)


@pytest.mark.parametrize("columns", [70, 650])
def test_product_is_the_same_on_several_threads(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from ruvllm.kernels.matmul import public as module

    a, b = normal(90, 200), normal(200, columns, seed=1)
    expected = gemm(a, b, backend="numba")
    assert_near(expected, f64(a) @ f64(b))
    for threads in (1, 2, 3, 5):
        monkeypatch.setattr(module, "threads_for", lambda work, threshold, pieces, n=threads: n)
        for product in (gemm(a, b, backend="numba"), gemm_nt(a, np.ascontiguousarray(b.T), backend="numba")):
            np.testing.assert_array_equal(product, expected)


def test_halves_are_rounded_to_nearest_even() -> None:
    x = np.concatenate([normal(100_000) * 10.0 ** np.arange(-9, 11).repeat(5000), [0, -0.0, np.inf, -np.inf]])
    x = x.astype(np.float32)
    bits = np.empty(x.shape, np.uint16)
    halve(x, bits)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(bits, x.astype(np.float16).view(np.uint16))
    halve(np.full(3, np.nan, np.float32), bits[:3])
    assert np.isnan(bits[:3].view(np.float16)).all()


def test_an_empty_range_of_panels_writes_nothing() -> None:
    """Also after the last, ragged, panel."""
    rng = np.random.default_rng(9)
    panels = np.empty((panel_count(100), 33, 16), np.float32)
    pack(rng.standard_normal((100, 33), np.float32), panels)
    out = np.full((1, 100), np.float32(-5))
    for p in range(len(panels) + 1):
        panels_matmul(panels, rng.standard_normal((1, 33), np.float32), out, p, p)
    assert (out == -5).all()


def test_gemv_of_stacked_rows() -> None:
    a, x = normal(2, 3, 5, 37), normal(37)
    y = gemv(a, x, out=np.empty((2, 3, 5), np.float32))
    np.testing.assert_array_equal(y, np.array([[gemv(part, x) for part in parts] for parts in a]))
    np.testing.assert_allclose(y, a.astype(np.float64) @ x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_groups_of_rows_have_matrices_of_their_own(transposed: bool) -> None:
    a, b, sizes = normal(23, 19), normal(4, *((33, 19) if transposed else (19, 33))), [5, 0, 17, 1]
    out = np.full((23, 33), np.nan, np.float32)
    assert grouped_gemm(a, b, sizes, transposed, out) is out
    np.testing.assert_allclose(out, reference.grouped_gemm(a, b, sizes, transposed), rtol=1e-4, atol=1e-4)
    one = (gemm_nt if transposed else gemm)(a[5:22], b[2], backend="numba")
    np.testing.assert_array_equal(out[5:22], one)
    for wrong in ([5, 0, 17], [5, 0, 17, 2], [-1, 6, 17, 1]):
        with pytest.raises(ValueError, match="^sizes: expected 4, each >= 0, that add up to 23, found"):
            grouped_gemm(a, b, wrong, transposed)
