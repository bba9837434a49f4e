"""BLAS behind gemm: the same products, taken only where it was measured to be faster, which is measured once."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ruvllm.cli import main
from ruvllm.kernels import gemm, gemm_nt
from ruvllm.kernels.matmul import blas
from ruvllm.kernels.threads.pool import num_threads
from ruvllm.machine import threads

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


@pytest.mark.parametrize(
    ("speedup", "taken"),
    [
        ((0.9, 0.8, 1.0), False),
        ((1.2, 1.1, 1.3), False),
        ((2.0, 1.9, 2.1), True),
        ((5.76, 1.2, 9.0), False),  # a noisy moment: the spread says so
        ((1.6, 1.51, 1.7), True),
    ],
)
def test_auto_takes_it_only_where_it_is_clearly_faster(
    speedup: tuple[float, ...], taken: bool, stored: Path, calls: list[int]
) -> None:
    stored.write_text(json.dumps({str(threads): [speedup, [0.5] * 3] for threads in range(1, 9)}))
    a = normal(LARGE, LARGE)
    gemm(a, a)
    assert bool(calls) == taken
    gemm(a, a, backend="numba")
    assert len(calls) == taken
    gemm(a[:100], a, backend="blas")
    assert len(calls) == taken + 1


class Clock:
    """Time as products take it: ours and BLAS's, each call of theirs as scripted; nothing is really multiplied."""

    def __init__(self, ours: Iterator[float], theirs: Iterator[float]) -> None:
        self.now, self.ours, self.theirs, self.called = 0.0, ours, theirs, ""

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def multiply(self, a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        self.now += next(self.ours)
        self.called += "o"

    def blas(self, a: np.ndarray, b: np.ndarray, out: np.ndarray, threads: int) -> None:
        self.now += next(self.theirs)
        self.called += "b"


def measured(monkeypatch: pytest.MonkeyPatch, ours: Iterator[float], theirs: Iterator[float]) -> tuple[Any, str]:
    clock = Clock(ours, theirs)
    monkeypatch.setattr(blas, "time", clock)
    monkeypatch.setattr(blas, "blas_gemm", clock.blas)
    return blas.measure(1, clock.multiply), clock.called


def test_measured_by_turns(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each side at its best; as spread, the best of one over the median of the other. A turn is two calls or more."""
    ours = [time for turn in range(2, 11) for time in (turn + 0.5, turn)]  # best 2, median 6
    theirs = [time for turn in range(4, 13) for time in (turn, turn + 0.5)]  # best 4, median 8
    found, called = measured(monkeypatch, itertools.cycle(ours), itertools.cycle(theirs))
    assert found == [pytest.approx((0.5, 0.25, 1.5))] * 2
    assert called == "oobb" * 9 * 2
    assert json.loads(stored.read_text()) == {"1": [pytest.approx([0.5, 0.25, 1.5])] * 2}


def test_of_a_turn_of_short_products_the_best_call_counts(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, called = measured(monkeypatch, itertools.cycle([0.001, 0.0023, 0.0012]), itertools.repeat(0.0025))
    assert found[0] == pytest.approx((0.4, 0.4, 0.4))
    assert called.startswith("ooobb" * 9)


def test_a_moment_in_which_the_machine_was_busy_does_not_decide(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BLAS seems ten times as fast for a while; measured on, it is not. For ever so: it is taken."""
    busy = itertools.chain([10.0] * 18, itertools.repeat(1.0))
    found, called = measured(monkeypatch, busy, itertools.repeat(1.0))
    assert found == [pytest.approx((1.0, 1.0, 5.5)), pytest.approx((1.0, 1.0, 1.0))]
    assert called == "oobb" * 9 * 3
    found, called = measured(monkeypatch, itertools.repeat(10.0), itertools.repeat(1.0))
    assert found == [pytest.approx((10.0, 10.0, 10.0))] * 2 and all(speedup.clear for speedup in found)
    assert called == "oobb" * 9 * 4 * 2


def test_one_quick_moment_of_blas_does_not_decide(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = itertools.cycle([0.1, *[1.0] * 17])
    found, _ = measured(monkeypatch, itertools.repeat(1.0), theirs)
    assert found == [pytest.approx((10.0, 1.0, 10.0))] * 2 and not any(speedup.clear for speedup in found)


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
    monkeypatch.setattr(blas, "_speedups", {})
    blas.takes_blas("auto", 1 << 30, 2, multiply)  # on other numbers of threads, what was known stays
    assert set(seen) == set(blas.SIZES) and set(json.loads(stored.read_text())) == {"1", "2"}


@pytest.mark.parametrize("changed", ["numpy", "blas", "processor", "cores"])
def test_measured_again_where_the_machine_or_numpy_changes(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = blas._host()
    assert blas._host() == before
    if changed == "numpy":
        monkeypatch.setattr(np, "__version__", "9.9.9")
    else:
        name, value = {"blas": ("blas_name", "mkl"), "processor": ("cpu_name", "Z80"), "cores": ("physical_cores", 99)}[
            changed
        ]
        monkeypatch.setattr(blas, name, lambda: value)
    assert blas._host() != before


def test_info_says_what_is_divided_by_what(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = num_threads()
    name = blas.blas_name()
    assert threads()["BLAS in gemm"] == f"{name}; not measured yet (ruvllm info --calibrate)"
    stored.write_text(json.dumps({str(count): [[5.76, 5.1, 6.0], [0.98, 0.9, 1.04]]}))
    on = f"on {count} thread{'s' * (count > 1)}"
    assert threads()["BLAS in gemm"] == (
        f"{name}; time of our kernels / time of BLAS, {on}: 5.76 (5.10 to 6.00) for 256 x 256, so BLAS is used; "
        "0.98 (0.90 to 1.04) for 1024 x 1024, so our kernels are used"
    )


def test_info_calibrates_when_it_is_told_to(
    stored: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {str(n): [[7.77, 7.7, 7.8]] * 2 for n in {1, num_threads()}}
    stored.write_text(json.dumps(known))
    assert main(["info"]) == 0
    assert "7.77 (7.70 to 7.80) for 256 x 256" in capsys.readouterr().out
    assert main(["info", "--calibrate"]) == 0
    assert "7.77" not in capsys.readouterr().out
    kept = json.loads(stored.read_text())
    assert kept.keys() == known.keys() and not any(kept[key] == known[key] for key in known)


@pytest.mark.parametrize("damaged", ["", "[]", "{", '{"1": 3}', '{"1": [1]}', '{"1": ["x", "y"]}', '{"1": [[1], [2]]}'])
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
