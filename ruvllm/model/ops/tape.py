"""Tape: the rows that a recorder writes, and what a replay must know about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ruvllm.brief import brief
from ruvllm.kernels import operations as o
from ruvllm.kernels import tape as t
from ruvllm.model.ops.placement import place
from ruvllm.model.ops.schedule import ANY, PRIVATE, Access, Step, Value

if TYPE_CHECKING:
    from ruvllm.model.low_rank import LowRank

Calls = dict[int, list[tuple[tuple[Value, ...], Callable[..., object]]]]


@dataclass
class Tape:
    """Recorded operations.

    rows: (n, FIELDS) int64, see ``kernels.tape``. steps: the step behind each row. segments: (first, end) of the runs
    of rows after which a replay may return to Python. calls: what Python does after a segment, with which values.
    shared, local: bytes of memory for one token, of the team and of each member. source: the input of the first layer.
    kept: owners of the memory that rows point to.
    """

    rows: np.ndarray
    steps: list[Step]
    segments: list[tuple[int, int]]
    calls: Calls
    shared: int
    local: int
    source: Value
    kept: list[object]
    adapters: Mapping[str, LowRank]

    __repr__ = brief

    def with_adapters(self, adapters: Mapping[str, LowRank]) -> Tape:
        """The same tape for adapters of the same matrices, ranks and dtypes."""
        rows = self.rows.copy()
        for row, step in zip(rows, self.steps, strict=True):
            for name, value in step.arguments.items():
                if isinstance(value, tuple):
                    matrix, part = value
                    array = getattr(adapters[matrix], part)
                    row[_field(step, name)] = t.operand(t.ABSOLUTE, array.ctypes.data)
        return replace(self, rows=rows, adapters=adapters)


def assemble(
    steps: list[Step], source: Value, calls: Calls, kept: list[object], adapters: Mapping[str, LowRank]
) -> Tape:
    """Place the values of scheduled steps in memory and write the rows."""
    steps = _with_broadcasts(steps, source, calls)
    ends = {step.segment: i for i, step in enumerate(steps)}
    held = [(ends[i], value) for i, after in calls.items() if i >= 0 for value in _read(after)]
    sizes = place(steps, source, held)
    rows = np.zeros((len(steps), t.FIELDS), np.int64)
    segments: list[tuple[int, int]] = []
    start, phase, meeting = 0, 0, 0
    for i, (step, row) in enumerate(zip(steps, rows, strict=True)):
        _write(step, row)
        if step.phase > phase:
            row[t.FLAGS] |= t.MEET
            phase, meeting = step.phase, i
        if i == start and segments:  # late threads may join here
            row[t.FLAGS] |= t.ADMIT
            rows[meeting, t.FLAGS] |= t.OFFER
        if i + 1 == len(steps) or steps[i + 1].segment != step.segment:
            segments.append((start, i + 1))
            start = i + 1
    tape = Tape(rows, steps, segments, calls, sizes[t.SHARED], sizes[t.LOCAL], source, kept, adapters)
    return tape.with_adapters(adapters)


def _read(calls: list[tuple[tuple[Value, ...], Callable[..., object]]]) -> list[Value]:
    """The values in working memory that Python reads or writes."""
    return [value for values, _ in calls for value in values if value.space in (t.SHARED, t.LOCAL)]


def _write(step: Step, row: np.ndarray) -> None:
    """One row, all but its barrier and the addresses of adapters."""
    missing = set(step.operation.arguments) ^ set(step.arguments)
    if missing:
        raise TypeError(f"{step.operation.__name__}: arguments missing or unknown: {', '.join(sorted(missing))}")
    replicated = bool(step.writes) and all(access.partition == PRIVATE for access in step.writes)
    row[t.FUNCTION], row[t.FLAGS] = step.operation.address, t.ENTRY if step.operation is o.broadcast else 0
    row[t.COUNT], row[t.REPLICATED] = step.count, replicated
    for name, value in step.arguments.items():
        if isinstance(value, Value):
            row[_field(step, name)] = t.operand(value.space, value.offset)
        elif isinstance(value, int):
            row[_field(step, name)] = value


def _field(step: Step, name: str) -> int:
    return t.ARGUMENTS + step.operation.arguments.index(name)


def _with_broadcasts(steps: list[Step], source: Value, calls: Calls) -> list[Step]:
    """Steps with a broadcast of each private value that lives into a segment.

    A segment may be run by another team than the one before it: its members get member 0's copy.
    """
    lives: dict[Value, tuple[int, int]] = {}  # first and last segment of each private value
    if source.space == t.LOCAL:
        lives[source] = (-1, 0)
    for step in steps:
        for value, _ in step.accesses:
            if value.space == t.LOCAL:
                first, _ = lives.get(value, (step.segment, 0))
                lives[value] = first, step.segment
    for segment, after in calls.items():  # Python fills some of them
        for value in _read(after):
            if value in lives:
                lives[value] = min(segment, lives[value][0]), lives[value][1]
    result: list[Step] = []
    for step in steps:
        if not result or step.segment != result[-1].segment:
            for value, (first, last) in lives.items():
                if first < step.segment <= last:
                    copied = Step(
                        o.broadcast, value.count, [Access(value, ANY)], [Access(value, PRIVATE)],
                        {"x": value, "columns": value.row_bytes // 4}, label="broadcast", layer=step.layer,
                        phase=step.phase, segment=step.segment,
                    )  # fmt: skip
                    result.append(copied)
        result.append(step)
    return result
