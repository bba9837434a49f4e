"""How to measure every row: for how long, with how many threads, against which limits."""

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
from ruvllm.measure.peaks import Peaks
from ruvllm.measure.timing import Call, Effort, Engine, Timing, alternate
from ruvllm.report.results import Entry

_TURNS_OF_MANY = 7  # with several threads, where engines settle between turns
_FREE_SHARE = 0.8  # of the free memory, at most, per row
_BUFFER_BYTES = 1 << 28
OWN, _READ = "ruvllm", "read"


@dataclass(frozen=True)
class Bench:
    """``peaks`` by number of threads; a row is measured with each."""

    effort: Effort
    peaks: dict[int, Peaks]

    @contextmanager
    def limited(self, threads: int) -> Iterator[None]:
        """Kernels, and the BLAS of NumPy, use ``threads`` threads inside the block."""
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
            peaks = peaks.with_memory(self._buffer.nbytes / found.pop(_READ).median)
        seconds, bound = peaks.least_seconds(flops, nbytes, integer)
        return Entry(threads, found.pop(OWN), inside, seconds, bound, found)

    @cached_property
    def _buffer(self) -> np.ndarray:
        """Read in turns with rows whose data come from memory: its bandwidth varies from moment to moment."""
        buffer = aligned_empty(_BUFFER_BYTES // 4)
        buffer[:] = 1
        return buffer


def lacking_memory(nbytes: float) -> str:
    """Why a row that needs ``nbytes`` cannot be measured; empty if it can."""
    free = free_memory()
    if free is None or nbytes <= _FREE_SHARE * free:
        return ""
    return f"needs {nbytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
