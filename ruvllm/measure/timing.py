"""Times of calls: engines are interleaved, so that noise hits all of them alike; medians and quartiles of many."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from timeit import Timer
from typing import Protocol

import numpy as np

from ruvllm.measure.workers.quiet import wait_until_quiet


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of ``turns`` turns, and the quartiles."""

    median: float
    low: float
    high: float
    turns: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """From the seconds of a call in each turn."""
        low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75))
        return cls(float(median), float(low), float(high), len(seconds))

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        return (self.high - self.low) / self.median


class Engine(Protocol):
    """Something that can be timed."""

    def seconds(self, calls: int) -> float:
        """Seconds of ``calls`` calls, after one that wakes threads and warms caches."""
        ...

    def settle(self) -> None:
        """Return when its threads no longer spin: they would take a core from the next engine."""
        ...


class Call:
    """A function without arguments, in this process."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function

    def seconds(self, calls: int) -> float:
        """See Engine."""
        self._function()
        return Timer(self._function).timeit(calls)

    def settle(self) -> None:
        """See Engine."""
        wait_until_quiet()


@dataclass(frozen=True)
class Effort:
    """How long to measure: ``turns`` of each engine, each of as many calls as fill ``seconds``, at least one.

    longest: seconds that all turns of one engine may take together, unless three take longer. awake: seconds for
    which an engine with several threads works, untimed, before each turn: after a rest, the system may wake a thread
    on a core that another thread already uses.
    """

    turns: int
    seconds: float
    longest: float = 1.5
    awake: float = 0.0

    def calls(self, one: float) -> int:
        """Calls of one turn, where one call takes ``one`` seconds."""
        return max(1, math.ceil(self.seconds / one))

    def turns_of(self, one: float) -> int:
        """Turns, where one call takes ``one`` seconds: at least three."""
        return max(3, min(self.turns, int(self.longest / one)))


FULL = Effort(turns=15, seconds=2e-3)
QUICK = Effort(turns=5, seconds=5e-4, longest=0.4)


def alternate(engines: Mapping[str, Engine], effort: Effort, settle: bool = False) -> dict[str, Timing]:
    """Time the engines in turns, A B B A. ``settle``: they have several threads, which must not disturb the next one.

    A quarter of the calls come first, untimed, so that each engine finds its own data in the caches, and not the
    data of the previous engine.
    """
    calls = {}
    for name, engine in engines.items():
        calls[name] = effort.calls(_estimate(engine))
        if settle:
            engine.settle()
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    slowest, turn = 0.0, 0
    while turn < (effort.turns_of(slowest) if turn else 1):
        for name, engine in list(engines.items())[:: -1 if turn % 2 else 1]:
            end = time.perf_counter() + effort.awake
            while settle and time.perf_counter() < end:
                engine.seconds(1)
            if calls[name] > 1:
                engine.seconds(calls[name] // 4)
            seconds[name].append(engine.seconds(calls[name]) / calls[name])
            if settle:
                engine.settle()
        slowest = max(min(found) for found in seconds.values())
        turn += 1
    return {name: Timing.of(found) for name, found in seconds.items()}


def median_seconds(call: Callable[[], object], effort: Effort) -> float:
    """The median time of one call in this process."""
    return alternate({"": Call(call)}, effort)[""].median


def _estimate(engine: Engine) -> float:
    """Roughly the seconds of one call; reading the clock takes a tenth of a microsecond."""
    calls, spent = 1, engine.seconds(1)
    while spent < 2e-4 and calls < 1 << 12:
        calls *= 4
        spent = engine.seconds(calls)
    return max(spent / calls, 1e-9)
