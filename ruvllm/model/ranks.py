"""Ranks: the processes that run one model together, over MPI.

Only the main thread calls MPI (``MPI_THREAD_FUNNELED`` is enough).
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np

from ruvllm.errors import RankError, printable

FAILED = 2  # exit code of all ranks after an error
_POLL_SECONDS = 0.0005  # between two polls for a command, after a while without any
_SPIN_SECONDS = 0.02
_PRINTING_SECONDS = 0.2  # in which mpiexec passes the error on: without, MPICH's lost it in 1 of 80 aborts


class Ranks:
    """A communicator of two ranks or more; collective methods are called by all of them.

    Attributes:
        rank, size: this process's number, and how many there are.
        waited: seconds spent in all-reduces and all-gathers since the start, this rank's waiting for others included.
        messages: how many of them there were.
        sent: bytes that this rank contributed to them, and to the logits.
        ended: whether no rank waits for another any more.
    """

    def __init__(self, comm: Any) -> None:
        self.comm = comm.Dup()  # messages of the caller's own program stay apart
        self.rank, self.size = int(comm.Get_rank()), int(comm.Get_size())
        self.waited, self.messages, self.sent = 0.0, 0, 0
        self.ended = False
        self._half_sum: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    # All-reduces and all-gathers.

    def add(self, x: np.ndarray) -> None:
        """x becomes the sum of all ranks' x, with the same bits on each."""
        from mpi4py import MPI

        started = time.perf_counter()
        self.comm.Allreduce(MPI.IN_PLACE, x)
        self._noted(started, x)

    def add_halves(self, x: np.ndarray) -> None:
        """``add`` in IEEE half precision: half the bytes. Raises OverflowError, on every rank, above 65504."""
        from mpi4py import MPI

        started = time.perf_counter()
        if self._half_sum is None:
            self._half_sum = MPI.Op.Create(_add_halves, commute=True)
        with np.errstate(over="ignore"):
            halves = x.astype(np.float16)
        self.comm.Allreduce(MPI.IN_PLACE, [halves.view(np.uint16), MPI.UINT16_T], self._half_sum)
        self._noted(started, halves)
        x[...] = halves
        if np.isinf(halves).any():
            raise OverflowError("a layer's output is above 65504, the largest number of wire='f16': use another wire")

    def total(self, x: float) -> float:
        """The sum of a number over all ranks."""
        return float(self.comm.allreduce(x))

    def rms_norm(self, x: np.ndarray, weight: np.ndarray, eps: float) -> None:
        """x (T, ...) / sqrt(mean(x^2) + eps) * weight, in place; the mean is over the rows of all ranks together."""
        rows = x.reshape(len(x), -1)
        squares = np.append(np.einsum("ij,ij->i", rows, rows, dtype=np.float64), rows.shape[1])
        self.add(squares)
        rows *= (1 / np.sqrt(squares[:-1] / squares[-1] + eps)).astype(np.float32)[:, None]
        rows *= weight

    def join(self, part: np.ndarray, out: np.ndarray, columns: Sequence[range]) -> None:
        """out (rows, V) gets all ranks' part (rows, their columns), concatenated, on every rank."""
        started = time.perf_counter()
        counts = [len(part) * len(each) for each in columns]
        flat = out if len(part) == 1 else np.empty(sum(counts), np.float32)
        self.comm.Allgatherv(part, (flat, counts))
        self._noted(started, part)
        if len(part) > 1:
            _concatenate(flat, columns, out)

    def gather_columns(self, part: np.ndarray, columns: Sequence[range], out: np.ndarray | None) -> None:
        """``join`` on rank 0 alone."""
        self.sent += part.nbytes * (self.rank != 0)
        if self.rank:
            self.comm.Gatherv(part, None)
            return
        assert out is not None
        counts = [len(part) * len(each) for each in columns]
        flat = out if len(part) == 1 else np.empty(sum(counts), np.float32)
        self.comm.Gatherv(part, (flat, counts))
        if len(part) > 1:
            _concatenate(flat, columns, out)

    def _noted(self, started: float, sent: np.ndarray) -> None:
        self.waited += time.perf_counter() - started
        self.messages += 1
        self.sent += sent.nbytes

    # Commands of rank 0 to the others.

    def announce(self, command: np.ndarray) -> None:
        """Rank 0: give every other rank a command."""
        self.require_main_thread()
        self.comm.Ibcast(command).Wait()

    def listen(self, command: np.ndarray) -> None:
        """Another rank: wait for the next command. A rank that waits long sleeps in between: its core is free."""
        request, quiet_since = self.comm.Ibcast(command), time.monotonic()
        while not request.Test():
            if time.monotonic() - quiet_since > _SPIN_SECONDS:
                time.sleep(_POLL_SECONDS)

    def share_object(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return self.comm.bcast(value)

    def interleaved(self, mine: Sequence[Any]) -> list[Any]:
        """All ranks' items in the order in which they were dealt: rank r has items r, r + size, ..."""
        every: list[Sequence[Any]] = self.comm.allgather(mine)
        count = sum(map(len, every))
        return [every[i % self.size][i // self.size] for i in range(count)]

    def require_main_thread(self) -> None:
        """Raise RuntimeError in a thread that may not call MPI."""
        from mpi4py import MPI

        if MPI.Query_thread() < MPI.THREAD_SERIALIZED and not MPI.Is_thread_main():
            raise RuntimeError("a model over several ranks is run by the thread that initialised MPI")

    # Errors.

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside the block ranks work alone; at its end all raise if one did: its own error, the others RankError.

        The block must not use this communicator.
        """
        error: BaseException | None = None
        try:
            yield
        except BaseException as found:
            error = found
        said = self.comm.allgather(None if error is None else _one_line(error))
        if error is not None:
            raise error
        for rank, text in enumerate(said):
            if text is not None:
                raise RankError(f"rank {rank}: {text}")

    def compare(self, facts: dict[str, Any]) -> list[dict[str, Any]]:
        """The facts of all ranks. Raises RankError, on every rank, unless those that begin with "same " are equal."""
        every: list[dict[str, Any]] = self.comm.allgather(facts)
        for name in (name for name in every[0] if name.startswith("same ")):
            for rank, other in enumerate(every):
                if other.get(name) != every[0][name]:
                    found = f"found {printable(other.get(name))}, rank 0 has {printable(every[0][name])}"
                    raise RankError(f"rank {rank}: expected the {name.removeprefix('same ')} of rank 0, {found}")
        return every

    def abort(self, error: BaseException) -> None:
        """End all ranks, with this rank's error on stderr."""
        sys.stderr.write(f"ruvllm: error: rank {self.rank}: {_one_line(error)}\n")
        sys.stderr.flush()
        end_all(self.comm, FAILED)


def ranks_of(comm: Any) -> Ranks | None:
    """The ranks of a communicator of mpi4py; None where there is none, or one rank.

    Raises TypeError for anything else.
    """
    if comm is not None and not hasattr(comm, "Get_size"):
        raise TypeError(f"comm: expected a communicator of mpi4py, such as MPI.COMM_WORLD, found {comm!r:.60}")
    return None if comm is None or comm.Get_size() == 1 else Ranks(comm)


def _add_halves(x: Any, y: Any, _: Any) -> None:
    """y becomes x + y: a sum of MPI's, in IEEE half precision."""
    total = np.frombuffer(y, np.float16)
    with np.errstate(over="ignore"):
        np.add(np.frombuffer(x, np.float16), total, out=total)


def _concatenate(parts: np.ndarray, columns: Sequence[range], out: np.ndarray) -> None:
    """out (rows, V) from one rank's columns after another's."""
    at = 0
    for each in columns:
        part = parts[at : at + len(out) * len(each)]
        out[:, each.start : each.stop] = part.reshape(len(out), -1)
        at += part.size


def guard(ranks: Ranks, at_end: Callable[[], object]) -> None:
    """Until ``ranks.ended``, let others not wait for this rank for ever where its program ends before they do.

    An exception that nobody catches ends all ranks, after its trace. The program's end calls ``at_end``.
    """
    if not _guarded:
        sys.excepthook = partial(_uncaught, sys.excepthook)
    _guarded.append(ranks)
    atexit.register(at_end)


_guarded: list[Ranks] = []


def _uncaught(before: Callable[..., object], kind: type[BaseException], error: BaseException, trace: Any) -> None:
    before(kind, error, trace)
    interactive = sys.flags.interactive or hasattr(sys, "ps1")  # the program goes on
    if not interactive and kind is not KeyboardInterrupt and any(not ranks.ended for ranks in _guarded):
        end_all(_guarded[-1].comm, FAILED)


def end_all(comm: Any, code: int) -> None:
    """End all ranks with an exit code; the error has been printed, and MPI adds nothing to it."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    time.sleep(_PRINTING_SECONDS)
    comm.Abort(code)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C inside the block takes effect after it: ranks must not leave a sum that others are in."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupts:
        signal.raise_signal(signal.SIGINT)


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Inside the block this process ignores Ctrl-C: rank 0 decides what it ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def host_cores() -> tuple[str, tuple[int, ...]]:
    """The name of this machine, and the cores that this process may run on (none where the system does not say)."""
    affinity = getattr(os, "sched_getaffinity", None)
    return socket.gethostname(), () if affinity is None else tuple(sorted(affinity(0)))


def _one_line(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return printable(text.replace("\n", " "), 4096)
