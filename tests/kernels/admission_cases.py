"""The replay of a tape under a scheduler: each atomic access of each thread is a step, in an order drawn at random.

``NUMBA_DISABLE_JIT=1 python -m tests.kernels.admission_cases FIRST LAST`` runs the schedules of these seeds and prints
where late threads were admitted. The code that runs is the region's own, in plain Python; only its atomic accesses are
replaced. Stores wait in a buffer of their thread, first in first out, and reach memory at a random later step, as
release stores and acquire loads allow (on x86 and on AArch64); an atomic addition empties its thread's buffer.
"""

from __future__ import annotations

import json
import random
import sys
import threading
from collections import Counter, deque
from itertools import pairwise
from typing import Any

import numpy as np

from ruvllm.kernels import tape as t
from ruvllm.kernels.threads import cores
from ruvllm.kernels.threads import team as team_module

THREADS, LAYERS, UNITS = 3, 4, 5
MOST_STEPS = 60_000  # of a schedule: more is a hang


class Hang(Exception):
    """A deadlock."""


class Scheduler:
    """Lets one thread at a time take one step."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.memory: dict[tuple[int, int], int] = {}
        self.buffers: list[deque[tuple[tuple[int, int], int]]] = [deque() for _ in range(THREADS)]
        self.turns = [threading.Semaphore(0) for _ in range(THREADS)]
        self.back = threading.Semaphore(0)
        self.alive = [True] * THREADS
        self.stopped = False
        self.late = [0, *(self.random.choice((0, self.random.randrange(900))) for _ in range(THREADS - 1))]
        self.failed: list[BaseException] = []

    def step(self) -> int:
        """Wait for this thread's turn; its number."""
        me = int(threading.current_thread().name)
        self.back.release()
        self.turns[me].acquire()
        if self.stopped:
            raise Hang
        return me

    # These replace the team's atomic accesses. An array is identified by its address.

    def load(self, array: np.ndarray, index: int) -> int:
        me, key = self.step(), (array.ctypes.data, int(index))
        for written, value in reversed(self.buffers[me]):
            if written == key:
                return value
        return self.memory.get(key, 0)

    def store(self, array: np.ndarray, index: int, value: int) -> None:
        self.buffers[self.step()].append(((array.ctypes.data, int(index)), int(value)))

    def add(self, array: np.ndarray, index: int, value: int) -> int:
        me, key = self.step(), (array.ctypes.data, int(index))
        while self.buffers[me]:
            self.flush(me)
        before = self.memory.get(key, 0)
        self.memory[key] = before + int(value)
        return before

    def flush(self, thread: int) -> None:
        key, value = self.buffers[thread].popleft()
        self.memory[key] = value

    def run(self, work: Any) -> None:
        """Run ``work`` on all threads, one step at a time."""

        def body() -> None:
            me = int(threading.current_thread().name)
            try:
                self.step()
                work()
            except BaseException as error:
                self.failed.append(error)
            self.alive[me] = False
            self.back.release()

        threads = [threading.Thread(target=body, name=str(i)) for i in range(THREADS)]
        for thread in threads:
            thread.start()
            self.back.acquire()
        for step in range(MOST_STEPS):
            ready = [i for i in range(THREADS) if self.alive[i] and (self.late[i] <= step or not any(self.alive[:i]))]
            if self.failed or not any(self.alive):
                break
            full = [i for i in range(THREADS) if self.buffers[i]]
            if full and (not ready or self.random.random() < 0.4):
                self.flush(self.random.choice(full))
            elif ready:
                self.turns[self.random.choice(ready)].release()
                self.back.acquire()
        hanging, self.stopped = any(self.alive) and not self.failed, True
        first = self.failed[:1]
        for i in range(THREADS):
            while self.alive[i]:
                self.turns[i].release()
                self.back.acquire()
        for thread in threads:
            thread.join()
        while any(self.buffers):  # what threads wrote last
            self.flush(next(i for i in range(THREADS) if self.buffers[i]))
        if hanging:
            raise Hang
        if first:
            raise first[0]


class Model:
    """Layers as a model's: units shared out by stealing; after a barrier a sum over all of them in every member's own
    copy, and rows of a shared array, which the next layer reads divided anew."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.partial = np.zeros((LAYERS, UNITS), np.int64)
        self.own = np.zeros((THREADS, 1), np.int64)
        self.rows = np.zeros((LAYERS + 1, UNITS), np.int64)
        self.done: Counter[tuple[int, int]] = Counter()
        self.sizes: dict[int, set[int]] = {}

    def units(self, m: Any, layer: int) -> None:
        mine = self.scheduler.load(self.own[m.rank], 0)
        for row in range(*team_module.part(UNITS, m.rank, m.size)) if layer else ():
            found = self.scheduler.load(self.rows[layer], row)
            assert found == mine + row, f"row {row} of layer {layer}: found {found}, expected {mine + row}"
        sync = self.sync
        for i in range(m.size):
            member = (m.rank + i) % m.size
            counter = team_module.counter_of(sync, m.rank, member, 0)
            share = team_module.share_of(UNITS, sync, counter, member, m.size)._replace(alone=False)
            unit = share.lo + team_module.take_chunk(share)
            while unit < share.hi:
                self.done[layer, unit] += 1
                self.scheduler.store(self.partial[layer], unit, mine * 3 + unit)
                unit = share.lo + team_module.take_chunk(share)

    def total(self, m: Any, layer: int) -> None:
        self.sizes.setdefault(layer, set()).add(int(m.size))
        value = sum(self.scheduler.load(self.partial[layer], unit) for unit in range(UNITS))
        self.scheduler.store(self.own[m.rank], 0, value % 1009)
        for row in range(*team_module.part(UNITS, m.rank, m.size)):
            self.scheduler.store(self.rows[layer + 1], row, value % 1009 + row)

    def copy(self, m: Any, layer: int) -> None:
        if m.rank:
            self.scheduler.store(self.own[m.rank], 0, self.scheduler.load(self.own[0], 0))

    def expected(self) -> int:
        value = 0
        for _ in range(LAYERS):
            value = sum(value * 3 + unit for unit in range(UNITS)) % 1009
        return value

    def run(self) -> list[int]:
        """Replay the layers; the sizes of the team, layer by layer."""
        functions = [operation_of(method) for method in (self.copy, self.units, self.total)]
        rows = np.zeros((3 * LAYERS, t.FIELDS), np.int64)
        for layer in range(LAYERS):
            for i, function in enumerate(functions):
                row = rows[3 * layer + i]
                row[t.FUNCTION], row[t.COUNT], row[t.ARGUMENTS] = function.address, t.ONE, layer
            rows[3 * layer, t.FLAGS] = t.ENTRY | (t.ADMIT if layer else 0)
            rows[3 * layer + 2, t.FLAGS] = t.MEET | t.OFFER
        self.sync = np.zeros(team_module.sync_size(THREADS), np.int64)
        header = np.zeros(t.HEADER_SIZE, np.int64)
        header[[t.THREADS, t.ONE, t.SYNC_SIZE, t.END]] = THREADS, 1, len(self.sync), len(rows)
        header[[t.SYNC, t.ROWS_ADDRESS]] = self.sync.ctypes.data, rows.ctypes.data
        calls = np.zeros(3, np.int64)  # no thread moves
        header[t.CALLS] = calls.ctypes.data
        header[t.LAST_ADMISSION] = 3 * (LAYERS - 1)
        self.scheduler.run(lambda: t.replay.function(header.ctypes.data))
        for unit in ((layer, unit) for layer in range(LAYERS) for unit in range(UNITS)):
            assert self.done[unit] == 1, f"unit {unit} was done {self.done[unit]} times"
        found = self.scheduler.memory[self.own[0].ctypes.data, 0]
        assert found == self.expected(), f"found {found}, expected {self.expected()}"
        assert all(len(sizes) == 1 for sizes in self.sizes.values()), "members disagree about the size of the team"
        return [next(iter(self.sizes[layer])) for layer in range(LAYERS)]


def operation_of(method: Any) -> t.Operation:
    @t.operation
    def call(m: Any, layer: Any) -> None:
        method(m, layer)

    return call


def one(seed: int) -> list[int]:
    scheduler = Scheduler(seed)
    for name, function in (("load", scheduler.load), ("store", scheduler.store), ("add", scheduler.add)):
        for module in (team_module, cores):
            setattr(module, f"atomic_{name}", function)
    team_module._GRACE = 4
    return Model(scheduler).run()


if __name__ == "__main__":
    points: Counter[str] = Counter()
    for seed in range(int(sys.argv[1]), int(sys.argv[2])):
        try:
            sizes = one(seed)
        except BaseException as error:
            sys.exit(f"seed {seed}: {type(error).__name__}: {error}")
        for layer, (before, after) in enumerate(pairwise([0, *sizes])):
            if before != after:
                points[f"{before} to {after} in layer {layer}"] += 1
    print(json.dumps(points))
