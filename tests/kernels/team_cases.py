"""A region whose members check on each other at every barrier; as a program, it runs where threads are scarce.

``python -m tests.kernels.team_cases SITUATION`` prints, for each region that was run, the size of its team.
"""

import json
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from numba import njit, prange

from ruvllm.kernels.jit.decorators import DISABLE_JIT, inline_kernel
from ruvllm.kernels.jit.views import array_at
from ruvllm.kernels.threads import regions
from ruvllm.kernels.threads.cores import scheduler_calls
from ruvllm.kernels.threads.regions import Region
from ruvllm.kernels.threads.team import (
    barrier,
    close_gate,
    counter_of,
    join_team,
    part,
    share_of,
    sync_size,
    take_chunk,
)

if TYPE_CHECKING or DISABLE_JIT:
    from ruvllm.kernels.threads.atomics_python import atomic_add, atomic_load, pause
else:
    from ruvllm.kernels.threads.atomics_llvm import atomic_add, atomic_load, pause

(
    SYNC, WANTED, ROUNDS, VALUES, ITEMS, ITEM_COUNT, TEAM, WRONG, GATHERED, PATIENCE, SYNC_SIZE, CALLS, TABLE_SIZE,
) = range(13)  # fmt: skip
SLOT = 8  # elements between the members' values: a cache line each


@inline_kernel
def visit(items: Any, r: Any, sync: Any, rank: Any, size: Any) -> None:
    """Visit each item once for each of one to three counters; one member is slower, and others help it."""
    for counter in range(r % 3 + 1):
        for i in range(size):
            member = (rank + i) % size
            share = share_of(items.size, sync, counter_of(sync, rank, member, counter), member, size)
            item = share.lo + take_chunk(share)
            while item < share.hi:
                atomic_add(items, item, 1)
                for _ in range(10 if rank == r % size else 0):
                    pause()
                item = share.lo + take_chunk(share)


@inline_kernel
def visits(rounds: Any) -> Any:
    """How often each item is visited in so many rounds, and once at the end."""
    count = 1
    for r in range(rounds):
        count += r % 3 + (r + 1) % 3 + 2
    return count


def check_each_other(address: Any) -> None:
    """Each round every member writes its number, and after the barrier reads everybody's; items count their visits.

    Before they join, they wait for each other for PATIENCE pauses, so that a busy machine has teams too.
    """
    table = array_at(address, TABLE_SIZE, np.int64)
    atomic_add(table, GATHERED, 1)
    waited = 0
    while waited < table[PATIENCE] and atomic_load(table, GATHERED) < table[WANTED]:
        pause()
        waited += 1
    sync = array_at(table[SYNC], table[SYNC_SIZE], np.int64)
    rank, size, _ = join_team(sync, table[WANTED], array_at(table[CALLS], 3, np.int64))
    if rank < 0:
        return
    close_gate(sync, rank)
    values = array_at(table[VALUES], table[WANTED] * SLOT, np.int64)
    items = array_at(table[ITEMS], table[ITEM_COUNT], np.int64)
    wrong = 0
    for r in range(table[ROUNDS]):
        values[rank * SLOT] = r + 1
        visit(items, r, sync, rank, size)
        barrier(sync, rank, size)
        for other in range(size):
            if values[other * SLOT] != r + 1:
                wrong += 1
        visit(items, r + 1, sync, rank, size)
        barrier(sync, rank, size)
    lo, hi = part(table[ITEM_COUNT], rank, size)
    for i in range(lo, hi):
        items[i] += 1
    barrier(sync, rank, size)
    for i in range(table[ITEM_COUNT]):
        if items[i] != visits(table[ROUNDS]):
            wrong += 1
    values[rank * SLOT] = -wrong
    barrier(sync, rank, size)
    if rank == 0:
        table[TEAM] = size
        for other in range(size):
            table[WRONG] -= values[other * SLOT]


REGION = Region(check_each_other)
visits_of = getattr(visits, "py_func", visits)


class Task:
    """One run of the region: its table, and the memory that the table points to."""

    def __init__(self, wanted: int, rounds: int, items: int = 101, patience: int = 0) -> None:
        self.sync = np.zeros(sync_size(wanted), np.int64)
        self.values = np.zeros(wanted * SLOT, np.int64)
        self.items = np.zeros(items, np.int64)
        self.table = np.zeros(TABLE_SIZE, np.int64)
        self.table[[WANTED, ROUNDS, ITEM_COUNT, PATIENCE, SYNC_SIZE]] = wanted, rounds, items, patience, len(self.sync)
        arrays = self.sync, self.values, self.items, scheduler_calls()
        self.table[[SYNC, VALUES, ITEMS, CALLS]] = [array.ctypes.data for array in arrays]

    def size(self) -> int:
        """The team's size, after checking that no member saw an error and every item was visited once."""
        assert self.table[WRONG] == 0
        assert (self.items == visits_of(int(self.table[ROUNDS]))).all()
        assert 1 <= self.table[TEAM] <= self.table[WANTED]
        return int(self.table[TEAM])

    def run(self) -> int:
        REGION.run(self.table.ctypes.data, int(self.table[WANTED]))
        return self.size()


@njit(parallel=True)
def nested(address: Any, tables: Any, threads: Any) -> None:
    """What a user may do: parallel kernels called from a parallel loop."""
    for i in prange(len(tables)):
        regions.enter(address, tables[i], threads)


def _nested() -> list[int]:
    tasks = [Task(2, 50) for _ in range(9)]
    addresses = np.array([task.table.ctypes.data for task in tasks])
    address = 0 if DISABLE_JIT else REGION.address
    nested(address, addresses, 2)
    return [task.size() for task in tasks]


def _until_teams_were_full(wanted: int, teams: int, rounds: int) -> list[int]:
    """Run until so many teams had all their members, or a minute is over.

    If other programs leave one core, no team is full: the running thread closes the gate before the others get it.
    """
    sizes: list[int] = []
    end = time.monotonic() + 60
    while sizes.count(wanted) < teams and time.monotonic() < end:
        sizes.append(Task(wanted, rounds, patience=10**7).run())
    return sizes


def _limited() -> list[int]:
    Task(2, 5).run()
    numba.set_num_threads(1)
    return [Task(2, 50).run() for _ in range(20)]


def _at_once() -> list[int]:
    sizes: list[int] = []
    callers = [threading.Thread(target=lambda: sizes.extend(Task(2, 20).run() for _ in range(20))) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    return sizes


SITUATIONS = {
    "plain": lambda: _until_teams_were_full(2, 10, rounds=1000),
    "crowded": lambda: [Task(4, 5, patience=10**5).run() for _ in range(20)],
    "limited": _limited,
    "nested": _nested,
    "at_once": _at_once,
}

if __name__ == "__main__":
    print(json.dumps(SITUATIONS[sys.argv[1]]()))
