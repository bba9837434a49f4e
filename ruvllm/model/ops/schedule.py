"""The schedule of a tape: which operations share a phase, and where barriers are needed.

The members of a team run the operations between two barriers, one *phase*, without waiting for each other. An operation
declares for each array that it reads or writes how the members divide it, its *partition*:

- rows: member m has the rows of token blocks ``part(blocks, m, size)`` (``kernels.tape.row_range``);
- panels: member m has those panels of 16 columns of every row;
- heads: member m has kv heads ``part(heads, m, size)``;
- PRIVATE: each member has a copy of its own;
- ANY: any member may touch any element.

Two operations of which one writes what the other touches may share a phase only if both use the same partition and it
is not ANY: then no member touches what another wrote. Otherwise the later one belongs to a later phase. So phases
follow from the data, and a barrier stands before the first operation of each phase.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from ruvllm.brief import brief
from ruvllm.kernels import tape as t
from ruvllm.kernels.tape import Operation
from ruvllm.kernels.threads.team import COUNTERS


class Partition(NamedTuple):
    """How members divide an array; ``extent``: the header field that counts the rows, or the number of columns."""

    kind: str
    extent: int = 0


ANY = Partition("any")
PRIVATE = Partition("private")
BY_HEADS = Partition("heads")


def by_rows(count: int) -> Partition:
    """Rows, counted by a header field."""
    return Partition("rows", count)


def by_panels(columns: int) -> Partition:
    """Panels of 16 of so many columns."""
    return Partition("panels", columns)


@dataclass(eq=False)
class Value:
    """An array that a tape computes: ``count`` (a header field) rows of ``width`` elements, or a resource.

    space, offset: where it lies. dim: the head size, once it is split into heads; of a routing, the number of experts.
    layout: "floats", "quantized", "partial", "routing", "runs" (each expert's rows in 8 bits). quantized: its rows in
    8 bits. source: where rows that are still to be gathered come from, and the routing. written: phase and partition
    of the last write; read: those of the reads since.
    """

    count: int = t.ONE
    width: int = 0
    row_bytes: int = 0
    space: int = t.SHARED
    offset: int = -1
    dim: int = 0
    layout: str = "floats"
    quantized: Value | None = None
    source: tuple[Value, Value] | None = None
    written: list[tuple[int, Partition]] = field(default_factory=list)
    read: list[tuple[int, Partition]] = field(default_factory=list)

    @property
    def token_bytes(self) -> int:
        """Bytes of its rows of one token."""
        return self.row_bytes * max(1, self.count - t.EACH)


class Access(NamedTuple):
    """That an operation reads or writes a value, and how members divide it."""

    value: Value
    partition: Partition


@dataclass
class Step:
    """One recorded operation.

    arguments: by name; a number, a Value, or (matrix, part) of an adapter. in_place: the result may take the memory of
    an input that ends here. label: the matrix's name, or the operation's. layer: -1 before or after all layers.
    """

    operation: Operation
    count: int
    reads: list[Access]
    writes: list[Access]
    arguments: dict[str, object]
    in_place: bool = False
    label: str = ""
    layer: int = -1
    phase: int = 0
    segment: int = 0

    __repr__ = brief

    @property
    def accesses(self) -> list[Access]:
        """All reads and writes."""
        return self.reads + self.writes

    @property
    def counted(self) -> bool:
        """Whether it counts chunks, so that members can steal them."""
        return "counter" in self.operation.arguments


class Schedule:
    """Collects steps and assigns each its phase and segment, as early as the data allows."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.segment = 0
        self._floor = 0  # no step may come before this phase
        self._latest = 0
        self._counters: Counter[int] = Counter()  # chunk counters in use, by phase

    def add(self, step: Step) -> None:
        """Place a step in the earliest phase in which it conflicts with nothing."""
        phase = self._floor
        for value, partition in step.reads:
            phase = max(phase, _after(value.written, partition))
        for value, partition in step.writes:
            phase = max(phase, _after(value.written + value.read, partition))
        if step.counted:
            while self._counters[phase] == COUNTERS:
                phase += 1
            step.arguments["counter"] = self._counters[phase]
            self._counters[phase] += 1
        for value, partition in step.reads:
            value.read.append((phase, partition))
        for value, partition in step.writes:
            value.written, value.read = [(phase, partition)], []
        step.phase, step.segment = phase, self.segment
        self._latest = max(self._latest, phase)
        self.steps.append(step)

    def end_segment(self, meet: bool = False) -> None:
        """Later steps are in another segment: the replay may return to Python before it. meet: it always does."""
        if self.steps and self.steps[-1].segment == self.segment:
            self.segment += 1
            self._floor = self._latest
        if meet:
            self._floor = self._latest + 1

    def ordered(self) -> list[Step]:
        """The steps by segment and phase, else as recorded."""
        return sorted(self.steps, key=lambda step: (step.segment, step.phase))


def compatible(a: Partition, b: Partition) -> bool:
    """Whether a write and another access of one value may share a phase."""
    return a == b and a != ANY


def _after(uses: list[tuple[int, Partition]], partition: Partition) -> int:
    """The earliest phase after these uses of a value."""
    return max((phase if compatible(used, partition) else phase + 1 for phase, used in uses), default=0)
