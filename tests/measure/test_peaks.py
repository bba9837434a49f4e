"""Measured limits: that the loops do what they count, and what is made of the figures. No figure is tested."""

import math
from pathlib import Path

import numpy as np
import pytest

from ruvllm.measure import caches, peak_loops, peaks
from ruvllm.measure.peaks import Level, Peaks

SOME = Peaks(
    threads=2, fma=2e11, int8_dot=8e11,
    levels=(
        Level("L1", 32 << 10, 4e11), Level("L2", 1 << 20, 2e11), Level("L3", 32 << 20, 1e11),
        Level("memory", math.inf, 3e10),
    ),
)  # fmt: skip


def test_multiply_adds_are_those_that_are_counted() -> None:
    """s = s/2 + 1 in each of 16 lanes of each chain."""
    out = np.full(3, -1, np.float32)
    for chains in peak_loops.FMA_CHAINS:
        for repeats in (1, 2, 5):
            peak_loops.fma_loop(repeats, chains, out, 1, 2)
            assert out.tolist() == [-1, 16 * chains * (2 - 2.0 ** (1 - repeats)), -1]


def test_dot_products_are_those_that_are_counted() -> None:
    """Each repeat of each chain adds the four products of its quad, which two chains share, to each of 16 lanes."""
    random = np.random.default_rng(0)
    quads = random.integers(-127, 128, 1024).astype(np.int8)
    out = np.empty(1, np.float32)
    for chains in peak_loops.DOT_CHAINS:
        for repeats in (1, 8, 33):
            weights = np.repeat(np.array([1, 3], np.uint8), 64)  # of even and of odd chains
            peak_loops.dot_loop(repeats, chains, weights, quads, out, 0, 1)
            used = [quads[i % 32 * 32 :][: 2 * chains].astype(int).sum() for i in range(repeats)]
            assert out[0] == 16 * (1 + 3) * sum(used)


def test_reads_are_those_that_are_counted() -> None:
    x = np.random.default_rng(0).integers(0, 8, (3, 384)).astype(np.float32)
    out = np.full(3, -1, np.float32)
    peak_loops.read_loop(5, x, out, 1, 3)
    assert out.tolist() == [-1, 5 * x[1].sum(), 5 * x[2].sum()]


def test_everything_is_measured_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "_SECONDS", 1e-4)
    monkeypatch.setattr(peaks, "_REPEATS", 3)
    monkeypatch.setattr(peaks, "_MEMORY_BYTES", 1 << 20)
    monkeypatch.setattr(peaks, "cache_sizes", lambda: {"L1": 32 << 10, "L2": 256 << 10})
    for threads in (1, 2):
        measured = peaks.measure_peaks(threads)
        assert measured.threads == threads and measured.fma > 1e6 and measured.int8_dot > 1e6
        assert [level.name for level in measured.levels] == ["L1", "L2", "memory"]
        assert all(level.bandwidth > 1e6 for level in measured.levels)
        assert "L2 (256 KiB)" in str(measured) and "L2 (256 KiB)" in measured._repr_html_()


def test_a_buffer_is_read_from_the_smallest_level_that_holds_it() -> None:
    sizes = (1, 64 << 10, (64 << 10) + 1, 2 << 20, 3 << 20, 32 << 20, 33 << 20)
    assert [SOME.bandwidth(size) / 1e10 for size in sizes] == [40, 40, 20, 20, 10, 10, 3]
    assert SOME.memory == 3e10


def test_text_html_and_plot_agree() -> None:
    assert "limits of 2 threads" in str(SOME)
    for figure in ("200.0 GFLOP/s", "800.0 GOP/s", "400.0 GB/s", "30.0 GB/s"):
        assert figure in str(SOME) and figure in SOME._repr_html_()
    bars = SOME.plot().containers[0]
    assert [bar.get_width() for bar in bars] == [400, 200, 100, 30, 200, 800]


def test_wrong_arguments_are_refused() -> None:
    for measure in (peaks.fma_peak, peaks.int8_dot_peak, peaks.read_levels, peaks.measure_peaks):
        with pytest.raises(ValueError, match="threads: expected 1 to .*, found 0"):
            measure(0)
    with pytest.raises(ValueError, match="nbytes: expected at least 512, found 100"):
        peaks.cache_bandwidth(100)


def test_sizes_of_caches_come_from_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, (kind, level, size) in enumerate(
        [("Unified", "2", "1024K"), ("Data", "1", "48K"), ("Instruction", "1", "32K"), ("Unified", "3", "30M")]
    ):
        entry = tmp_path / f"index{i}"
        entry.mkdir()
        for name, text in (("type", kind), ("level", level), ("size", size)):
            (entry / name).write_text(text + "\n")
    monkeypatch.setattr(caches, "_SYSFS", tmp_path)
    assert caches.cache_sizes() == {"L1": 48 << 10, "L2": 1 << 20, "L3": 30 << 20}
    (tmp_path / "index0" / "size").write_text("unknown")
    assert caches.cache_sizes() == caches._USUAL
    monkeypatch.setattr(caches, "_SYSFS", tmp_path / "none")
    monkeypatch.setattr("sys.platform", "win32")
    assert caches.cache_sizes() == caches._USUAL
