"""The limits of this machine, measured: multiply-adds, integer dot products, and reads from each level of memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from ruvllm.brief import brief
from ruvllm.display import Table, axis
from ruvllm.kernels.bandwidth import read_bandwidth
from ruvllm.kernels.memory import aligned_empty
from ruvllm.kernels.simd.vectors import LANES
from ruvllm.kernels.threads.pool import launch, limited_to, physical_cores, require_threads
from ruvllm.measure import peak_loops as loops
from ruvllm.measure.caches import cache_sizes

_SECONDS = 0.01  # of one timed call: launching threads takes some microseconds
_REPEATS = 7  # the best counts: a limit is what undisturbed work reaches
_MEMORY_BYTES = 1 << 28  # read from memory, or four times the last cache if that is more


@dataclass(frozen=True)
class Level:
    """A memory level: its name, its size as one core sees it, and the read bandwidth of all threads in bytes/s."""

    name: str
    size: float  # inf for memory
    bandwidth: float


@dataclass(frozen=True)
class Peaks(Table):
    """What ``threads`` threads of this machine reach at best.

    fma: float32 FLOP/s, two for a multiply-add. int8_dot: integer operations/s, two for a multiply-add.
    levels: read bandwidth of each cache and of memory, smallest first.
    """

    threads: int
    fma: float
    int8_dot: float
    levels: tuple[Level, ...]

    __repr__ = brief

    @property
    def memory(self) -> float:
        """Bytes/s read from memory."""
        return self.levels[-1].bandwidth

    def bandwidth(self, nbytes: float) -> float:
        """Bytes/s at which ``nbytes``, split over the threads and read repeatedly, can be read."""
        for level in self.levels:
            shared = level.name not in ("L1", "L2")
            if nbytes <= level.size * (1 if shared else self.threads):
                return level.bandwidth
        return self.memory

    def least_seconds(self, flops: float, nbytes: float, integer: bool = False) -> tuple[float, str]:
        """The roofline: the longer of arithmetic at its peak and reads from the level of the data; and which."""
        arithmetic, reads = flops / (self.int8_dot if integer else self.fma), nbytes / self.bandwidth(nbytes)
        if arithmetic > reads:
            return arithmetic, "int8 dot" if integer else "FMA"
        return reads, next(level.name for level in self.levels if level.bandwidth == self.bandwidth(nbytes))

    def with_memory(self, bandwidth: float) -> Peaks:
        """The same limits with a different memory bandwidth, in bytes/s."""
        return replace(self, levels=(*self.levels[:-1], replace(self.levels[-1], bandwidth=bandwidth)))

    def rows(self) -> list[tuple[str, ...]]:
        """What was measured and its value, as text; the first row holds the headings."""
        return [
            ("limit", "measured"),
            ("multiply-add, float32", f"{self.fma / 1e9:.1f} GFLOP/s"),
            ("dot product, int8", f"{self.int8_dot / 1e9:.1f} GOP/s"),
            *((n, f"{x.bandwidth / 1e9:.1f} GB/s") for n, x in zip(self._names(), self.levels, strict=True)),
        ]

    def heading(self) -> str:
        """What the table shows."""
        return f"limits of {self.threads} thread{'s' * (self.threads > 1)}"

    def plot(self, ax: Any = None) -> Any:
        """Bars of what was measured, GB/s and GFLOP/s on one logarithmic axis; returns the matplotlib axis.

        Raises:
            ImportError: matplotlib is not installed.
        """
        ax = axis(ax)
        bars = {name: level.bandwidth for name, level in zip(self._names(), self.levels, strict=True)}
        bars |= {"multiply-add, float32": self.fma, "dot product, int8": self.int8_dot}
        colors = ["C0"] * len(self.levels) + ["C1"] * 2
        shown = ax.barh(list(bars), [value / 1e9 for value in bars.values()], color=colors)
        ax.bar_label(shown, fmt="%.0f", padding=3)
        ax.set_xscale("log")
        ax.invert_yaxis()
        ax.set_xlabel("GB/s (reads), GFLOP/s and GOP/s (arithmetic)")
        ax.set_title(self.heading())
        return ax

    def _names(self) -> list[str]:
        return [f"read, {_sized(level)}" for level in self.levels]


def fma_peak(threads: int | None = None) -> float:
    """Float32 FLOP/s of fused multiply-adds on vectors, two operations each; the best of several tries.

    threads: None for the physical cores. Raises ValueError for more threads than the pool has.
    """
    threads = _checked(threads)
    out = np.empty(threads, np.float32)
    return max(
        2 * LANES * chains * threads * _rate(threads, loops.fma_loop, loops.fma_parallel, chains, out)
        for chains in loops.FMA_CHAINS
    )


def int8_dot_peak(threads: int | None = None) -> float:
    """Operations/s of the integer dot products that the quantised kernels use, two for each multiply-add of bytes.

    threads: None for the physical cores. Raises ValueError for more threads than the pool has.
    """
    threads = _checked(threads)
    weights, quads, out = np.full(128, 7, np.uint8), np.ones(1024, np.int8), np.empty(threads, np.float32)
    return max(
        2 * 64 * chains * threads
        * _rate(threads, loops.dot_loop, loops.dot_parallel, chains, weights, quads, out)
        for chains in loops.DOT_CHAINS
    )  # fmt: skip


def cache_bandwidth(nbytes: int, threads: int | None = None) -> float:
    """Bytes/s at which each thread reads ``nbytes`` of its own over and over, summed over the threads.

    threads: None for the physical cores. Raises ValueError for threads < 1 or less than 512 bytes.
    """
    threads = _checked(threads)
    if nbytes < 512:
        raise ValueError(f"nbytes: expected at least 512, found {nbytes}")
    x = aligned_empty((threads, nbytes // 512 * 128))
    x[:] = 1
    return x.nbytes * _rate(threads, loops.read_loop, loops.read_parallel, x, np.empty(threads, np.float32))


def read_levels(threads: int | None = None) -> tuple[Level, ...]:
    """Read bandwidth of each cache, from half of its size, and of memory.

    threads: None for the physical cores. Raises ValueError for more threads than the pool has.
    """
    threads = _checked(threads)
    levels, below = [], 0
    for name, size in cache_sizes().items():
        mine = size // 2 if name in ("L1", "L2") else size // 2 // threads  # a third level is shared
        if mine > 2 * below:  # else the next smaller level would be measured
            levels.append(Level(name, float(size), cache_bandwidth(mine, threads)))
        below = size
    memory = read_bandwidth(max(_MEMORY_BYTES, 4 * below), threads=threads)
    return (*levels, Level("memory", float("inf"), memory))


def measure_peaks(threads: int | None = None) -> Peaks:
    """All limits of this machine at ``threads`` threads (None: the physical cores); takes about three seconds.

    The machine must otherwise be idle. Raises ValueError for more threads than the pool has.
    """
    threads = _checked(threads)
    return Peaks(threads, fma_peak(threads), int8_dot_peak(threads), read_levels(threads))


def measured_peaks(threads: int | None = None) -> Peaks:
    """``measure_peaks``, once per process and number of threads."""
    return _measured_once(_checked(threads))


_measured_once = cache(measure_peaks)


def _checked(threads: int | None) -> int:
    if threads is None:
        return physical_cores()
    require_threads(threads)
    return threads


def _rate(threads: int, body: Callable[..., None], parallel: Callable[..., None], *arguments: Any) -> float:
    """Iterations/s of a loop on each thread."""

    def seconds(repeats: int, threads: int) -> float:
        start = time.perf_counter()
        if threads == 1:
            body(repeats, *arguments, 0, 1)
        else:
            launch(parallel, repeats, *arguments, threads)
        return time.perf_counter() - start

    with limited_to(threads):
        seconds(1, 1)  # compiles
        seconds(1, threads)  # starts the threads
        repeats = 16
        # On one thread, and the minimum of three: threads still waiting for a core would make the count far too small.
        while (spent := min(seconds(repeats, 1) for _ in range(3))) < _SECONDS / 2:
            repeats *= 2 if spent > _SECONDS / 16 else 8
        return repeats / min(seconds(repeats, threads) for _ in range(_REPEATS))


def _sized(level: Level) -> str:
    if level.size == float("inf"):
        return level.name
    kilobytes = int(level.size) >> 10
    return f"{level.name} ({kilobytes >> 10} MiB)" if kilobytes >= 1024 else f"{level.name} ({kilobytes} KiB)"
