"""Placement: the memory of a tape's values. Two values share memory when their lifetimes do not overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ruvllm.kernels import tape as t
from ruvllm.model.ops.schedule import ANY, PRIVATE, Partition, Step, Value, compatible

_ALIGNMENT = 64  # bytes, a cache line


@dataclass
class _Free:
    """A free slot: its size for one token, and how its last phase used it."""

    size: int
    kind: tuple[Any, ...]
    offset: int
    phase: int
    partitions: list[Partition]


def place(steps: list[Step], source: Value, held: Sequence[tuple[int, Value]]) -> dict[int, int]:
    """Give every value of a schedule its offset; returns the bytes that each space needs for one token.

    held: values that Python reads, changes or fills, each with the index of the step after which it does.

    A slot is reused in a later phase for any value that fits. Within one phase it is reused for a value of the same
    kind (space, layout, row size, count: rows then divide alike) whose partition is compatible, so that no barrier is
    added.
    """
    last: dict[Value, int] = {}
    uses: dict[Value, list[tuple[int, Partition]]] = {}
    for i, step in enumerate(steps):
        for value, partition in step.accesses:
            last[value] = i
            uses.setdefault(value, []).append((step.phase, partition))
    held_at: dict[int, list[Value]] = {}
    for i, value in held:
        last[value] = max(last[value], i)
        uses[value].append((steps[i].phase, ANY))
        held_at.setdefault(i, []).append(value)
    ending_at: dict[int, list[Value]] = {}
    for value, i in last.items():
        if value.row_bytes:
            ending_at.setdefault(i, []).append(value)
    sizes = {t.SHARED: 0, t.LOCAL: 0}
    free: list[_Free] = []
    held_size: dict[Value, int] = {}  # size of the slot that holds a value

    def kind(value: Value) -> tuple[Any, ...]:
        return value.space, value.layout, value.row_bytes, value.count

    def allocate(value: Value, phase: int, partition: Partition) -> None:
        size = -(-value.token_bytes // _ALIGNMENT) * _ALIGNMENT

        def fits(slot: _Free) -> bool:
            alike = slot.kind == kind(value) and all(compatible(partition, used) for used in slot.partitions)
            return slot.kind[0] == value.space and slot.size >= size and (slot.phase < phase or alike)

        slots = [slot for slot in reversed(free) if fits(slot)]
        if slots:
            best = min(slots, key=lambda slot: slot.size)  # among equals, the one used last
            free.remove(best)
            value.offset, held_size[value] = best.offset, best.size
        else:
            value.offset, held_size[value] = sizes[value.space], size
            sizes[value.space] += size

    def release(value: Value) -> None:
        phase = max(when for when, _ in uses[value])
        partitions = [used for when, used in uses[value] if when == phase]
        free.append(_Free(held_size[value], kind(value), value.offset, phase, partitions))

    allocate(source, 0, PRIVATE)
    for i, step in enumerate(steps):
        ending = ending_at.get(i, [])
        if step.in_place:  # the result may take the memory of inputs that end here
            for value in ending:
                if value.offset >= 0:
                    release(value)
            ending = [value for value in ending if value.offset < 0]
        for value, partition in step.accesses:
            if value.offset < 0 and value.row_bytes:
                allocate(value, step.phase, partition)
        for value in held_at.get(i, []):
            if value.offset < 0:  # Python fills it
                allocate(value, step.phase, ANY)
        for value in ending:
            release(value)
    return sizes
