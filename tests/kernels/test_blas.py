"""BLAS behind gemm: the same products, taken only where it was measured to be faster, which is measured once."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ruvllm.kernels import gemm, gemm_nt
from ruvllm.kernels.matmul import blas

LARGE = 260  # beyond the smallest product for which BLAS is thought of


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing measured yet; the file where measurements are kept."""
    path = tmp_path / "blas.json"
    monkeypatch.setattr(blas, "_path", lambda: path)
    monkeypatch.setattr(blas, "_speedups", {})
    yield path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Threads of each product that went to BLAS."""
    seen: list[int] = []

    def watched(a: np.ndarray, b: np.ndarray, out: np.ndarray, threads: int) -> None:
        seen.append(threads)
        np.dot(a, b, out=out)

    monkeypatch.setattr("ruvllm.kernels.matmul.public.blas_gemm", watched)
    return seen


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("backend", blas.BACKENDS)
@pytest.mark.parametrize("shape", [(3, 5, 7), (0, 5, 7), (3, 0, 7), (LARGE, LARGE, LARGE)])
def test_same_product(backend: str, shape: tuple[int, int, int], stored: Path) -> None:
    m, k, n = shape
    a, b = normal(2, m, k), normal(k, n, seed=1)
    expected = a.astype(np.float64) @ b
    for got in (gemm(a, b, backend=backend), gemm_nt(a, b.T.copy(), backend=backend)):
        assert got.shape == expected.shape
        assert ((got - expected) ** 2).sum() <= 1e-10 * (expected**2).sum()


def test_a_backend_that_there_is_not() -> None:
    for call in (gemm, gemm_nt):
        with pytest.raises(ValueError, match="backend: expected one of auto, numba, blas, found 'mkl'"):
            call(normal(2, 2), normal(2, 2), backend="mkl")


@pytest.mark.parametrize(("speedup", "taken"), [(0.9, False), (1.2, False), (2.0, True)])
def test_auto_takes_it_only_where_it_is_much_faster(
    speedup: float, taken: bool, stored: Path, calls: list[int]
) -> None:
    stored.write_text(json.dumps({str(threads): [speedup, 0.5] for threads in range(1, 9)}))
    a = normal(LARGE, LARGE)
    gemm(a, a)
    assert bool(calls) == taken
    gemm(a, a, backend="numba")
    assert len(calls) == taken
    gemm(a[:100], a, backend="blas")
    assert len(calls) == taken + 1


def test_small_products_measure_nothing(stored: Path, calls: list[int]) -> None:
    gemm(normal(100, 100), normal(100, 100))
    assert not calls and not stored.exists()


def test_measured_once_and_kept(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        seen.append(len(a))

    seen: list[int] = []
    blas.takes_blas("auto", 1 << 30, 1, multiply)
    assert set(seen) == set(blas.SIZES)
    assert len(json.loads(stored.read_text())["1"]) == len(blas.SIZES) and len(list(stored.parent.iterdir())) == 1
    seen.clear()
    blas.takes_blas("auto", 1 << 30, 1, multiply)
    monkeypatch.setattr(blas, "_speedups", {})  # another process
    blas.takes_blas("auto", 1 << 30, 1, multiply)
    assert not seen


@pytest.mark.parametrize("damaged", ["", "[]", "{", '{"1": 3}', '{"1": [1]}', '{"1": ["x", "y"]}'])
def test_a_damaged_file_is_measured_again(damaged: str, stored: Path) -> None:
    stored.write_text(damaged)
    assert blas.speedups(1) is None
    blas.takes_blas("auto", 1 << 30, 1, lambda a, b, out: None)
    assert len(json.loads(stored.read_text())["1"]) == len(blas.SIZES)


def test_no_place_to_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "_path", lambda: None)
    monkeypatch.setattr(blas, "_speedups", {})
    blas.takes_blas("auto", 1 << 30, 1, lambda a, b, out: None)
    assert blas.speedups(1) is not None
