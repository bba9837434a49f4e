"""What every row needs to be measured: how long, with how many threads, against which limits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
from threadpoolctl import threadpool_limits

from ruvllm.kernels import buffer_sum
from ruvllm.kernels.memory import aligned_empty, free_memory
from ruvllm.kernels.threads.pool import limited_to
from ruvllm.lab.peaks import Peaks
from ruvllm.report.results import Entry
from ruvllm.report.timing import Call, Effort, Engine, Timing, alternate

_TURNS_OF_MANY = 7  # where several threads work, since engines then settle between turns
_FREE_SHARE = 0.8  # of the free memory, that a row may take
_BUFFER_BYTES = 1 << 28
OWN, _READ = "ruvllm", "read"


@dataclass(frozen=True)
class Bench:
    """``peaks`` by number of threads; a row is measured with each."""

    effort: Effort
    peaks: dict[int, Peaks]

    @contextmanager
    def limited(self, threads: int) -> Iterator[None]:
        """Kernels, and the BLAS of NumPy, use so many threads inside the block."""
        with limited_to(threads), threadpool_limits(threads, user_api="blas"):
            yield

    def entry(
        self, threads: int, engines: dict[str, Engine], flops: float, nbytes: float, integer: bool = False,
        inside: Timing | None = None,
    ) -> Entry:  # fmt: skip
        """Time OWN and its peers in turns. ``integer``: the arithmetic is that of integer dot products."""
        many, peaks = threads > 1, self.peaks[threads]
        effort = replace(self.effort, turns=min(self.effort.turns, _TURNS_OF_MANY)) if many else self.effort
        if from_memory := nbytes > max((level.size for level in peaks.levels[:-1]), default=0.0):
            engines = {**engines, _READ: Call(partial(buffer_sum, self._buffer))}
        found = alternate(engines, effort, settle=many)
        if from_memory:
            peaks = with_memory(peaks, self._buffer.nbytes / found.pop(_READ).median)
        seconds, bound = least_seconds(peaks, flops, nbytes, integer)
        return Entry(threads, found.pop(OWN), inside, seconds, bound, found)

    @cached_property
    def _buffer(self) -> np.ndarray:
        """What is read beside rows that come from memory: the speed of that changes from one moment to the next."""
        buffer = aligned_empty(_BUFFER_BYTES // 4)
        buffer[:] = 1
        return buffer


def with_memory(peaks: Peaks, bandwidth: float) -> Peaks:
    """The limits with another read bandwidth of memory, in bytes/s."""
    return replace(peaks, levels=(*peaks.levels[:-1], replace(peaks.levels[-1], bandwidth=bandwidth)))


def least_seconds(peaks: Peaks, flops: float, nbytes: float, integer: bool = False) -> tuple[float, str]:
    """The roofline: the longer of arithmetic at its peak and reads at the bandwidth of the level they fit into."""
    arithmetic = flops / (peaks.int8_dot if integer else peaks.fma)
    reads = nbytes / peaks.bandwidth(nbytes)
    if arithmetic > reads:
        return arithmetic, "int8 dot" if integer else "FMA"
    return reads, next(level.name for level in peaks.levels if level.bandwidth == peaks.bandwidth(nbytes))


def lacking_memory(nbytes: float) -> str:
    """Why a row that takes so much is not measured, or nothing if it can be."""
    free = free_memory()
    if free is None or nbytes <= _FREE_SHARE * free:
        return ""
    return f"needs {nbytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
