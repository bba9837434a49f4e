"""Shuffled: replays a tape on one thread in a random order that a team could produce: a debug mode for barriers.

    model.runner = Shuffled(members=3, seed=0)

Members run the operations of a phase in their own order, interleaved at random; some join late, at an admission point.
The logits must be bit-identical for every seed. Otherwise an operation reads or writes what it does not declare, or a
barrier is missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ruvllm.kernels import tape as t

if TYPE_CHECKING:
    from ruvllm.model.ops.tape import Tape
    from ruvllm.model.replay import Runner, Working


class Shuffled:
    """A runner that simulates a team of up to ``members``, at most as many as the model has threads."""

    def __init__(self, members: int, seed: int) -> None:
        self.members, self.random = members, np.random.default_rng(seed)

    def run(self, tape: Tape, working: Working) -> None:
        """Replay the rows FIRST:END."""
        if self.members > working.threads:
            raise ValueError(f"members: expected at most {working.threads}, the model's threads, found {self.members}")
        first, end = int(working.header[t.FIRST]), int(working.header[t.END])
        size = int(self.random.integers(1, self.members + 1))
        newcomers, lo = range(size), first  # all members start at FIRST
        for i in range(first + 1, end + 1):
            flags = t.MEET if i == end else int(tape.rows[i, t.FLAGS])
            grown = size
            if flags & t.ADMIT:
                grown = int(self.random.integers(size, self.members + 1))
            if flags & t.MEET or grown > size:
                self._phase(tape, working, lo, i, size, newcomers)
                newcomers, lo, size = range(size, grown), i, grown

    def _phase(self, tape: Tape, working: Working, lo: int, hi: int, size: int, newcomers: range) -> None:
        """Rows lo:hi by each member, interleaved. Half of the time nothing is stolen, else the first steals all."""
        working.sync[:] = 0  # a barrier resets the counters of stolen chunks
        rows = tape.rows[lo:hi].copy()
        for row, step in zip(rows, tape.steps[lo:hi], strict=True):
            if step.counted and self.random.integers(2):
                row[t.ARGUMENTS + step.operation.arguments.index("steal")] = 0
        entry = next((i for i, row in enumerate(rows) if not row[t.FLAGS] & t.ENTRY), len(rows))
        done = [0] * size
        for rank in self.random.permutation(np.repeat(np.arange(size), hi - lo)):
            i = done[rank]
            done[rank] += 1
            skipped = rows[i, t.FLAGS] & t.ENTRY and not (i < entry and rank in newcomers)
            if working.header[rows[i, t.COUNT]] and not skipped:
                arguments = working.header.ctypes.data, rows[i].ctypes.data, int(rank), size
                tape.steps[lo + i].operation(*arguments)


if TYPE_CHECKING:
    _: type[Runner] = Shuffled
