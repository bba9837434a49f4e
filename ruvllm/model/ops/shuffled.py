"""Shuffled: replays a tape on one thread in a random order that a team could have met: a debug mode for barriers.

    model.runner = Shuffled(members=3, seed=0)

Members run the operations of a phase in their own order, interleaved at random. The logits must have the same bits for
every seed. Where they differ, an operation reads or writes what it does not declare, or a barrier is missing.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ruvllm.kernels import tape as t

if TYPE_CHECKING:
    from ruvllm.model.ops.tape import Tape
    from ruvllm.model.replay import Runner, Working


class Shuffled:
    """A runner that plays a team of ``members``, at most as many as the model has threads."""

    def __init__(self, members: int, seed: int) -> None:
        self.members, self.random = members, np.random.default_rng(seed)

    def run(self, tape: Tape, working: Working) -> None:
        """Replay the rows FIRST:END."""
        if self.members > working.threads:
            raise ValueError(f"members: expected at most {working.threads}, the model's threads, found {self.members}")
        first, end = int(working.header[t.FIRST]), int(working.header[t.END])
        barriers = [i for i in range(first + 1, end) if tape.rows[i, t.BARRIER]]
        for lo, hi in pairwise([first, *barriers, end]):
            working.sync[:] = 0  # a barrier resets the counters of stolen chunks
            self._phase(tape, working, lo, hi)

    def _phase(self, tape: Tape, working: Working, lo: int, hi: int) -> None:
        """Rows lo:hi by each member, interleaved. Half of the time nothing is stolen: else the first takes it all."""
        rows = tape.rows[lo:hi].copy()
        for row, step in zip(rows, tape.steps[lo:hi], strict=True):
            if step.counted and self.random.integers(2):
                row[t.ARGUMENTS + step.operation.arguments.index("steal")] = 0
        done = [0] * self.members
        for rank in self.random.permutation(np.repeat(np.arange(self.members), hi - lo)):
            i = done[rank]
            done[rank] += 1
            if working.header[rows[i, t.COUNT]]:
                arguments = working.header.ctypes.data, rows[i].ctypes.data, int(rank), self.members
                tape.steps[lo + i].operation(*arguments)


if TYPE_CHECKING:
    _: type[Runner] = Shuffled
