"""A team: the threads of one parallel region that wait for each other at barriers.

One parallel region per token instead of one per operation saves hundreds of launches. But ``prange(n)`` does not
promise n threads at once: fewer may run (another region is busy, numba was limited, the tasks were nested), and a
barrier that waits for a missing thread hangs. So the team is elastic. Each thread takes a ticket. The first one, the
leader, waits briefly for the others; those that arrive in time are members. A thread that slept needs up to a
millisecond to wake, and is admitted later, at the next *admission point*. After the last of these, the leader closes
the gate, and later threads leave at once. Work is split by the team's size, and results do not depend on it.

Admission: before a barrier that is needed anyway, the leader publishes the number of tickets taken (``offer``). After
it, every member knows whether the team will grow (``offered``). If so, they meet once more at the admission point, and
the leader publishes where the newcomers start, how many barriers it has passed, and last the new size, for which the
newcomers wait (``admit``). Offers alternate between two slots: the leader may have made the next one, before a barrier
at which it waits, while a slow member still reads the last.

Cores differ in speed, and any of them may be busy with other programs. So a member's share of large work can be cut
into chunks, and a member that finishes steals chunks from the others.

``sync`` is an int64 array of ``sync_size(threads)`` zeros for each region. It holds the ticket counter, the team size,
and for each member the number of barriers that it has reached and its chunk counters: how many chunks of its shares
have been claimed. Each is on cache lines of its own, so that a barrier moves one line from each member to the others.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ruvllm.kernels.jit.decorators import DISABLE_JIT, inline_kernel, view_kernel
from ruvllm.kernels.threads.cores import MASK_WORDS, current_core, leave_taken_core

if TYPE_CHECKING or DISABLE_JIT:
    from ruvllm.kernels.threads.atomics_python import (
        atomic_add,
        atomic_load,
        atomic_store,
        call_address,
        call_operation,
        pause,
        time_stamp,
        yield_core,
    )
else:
    from ruvllm.kernels.threads.atomics_llvm import (
        atomic_add,
        atomic_load,
        atomic_store,
        call_address,
        call_operation,
        pause,
        time_stamp,
        yield_core,
    )

__all__ = [
    "COUNTERS", "COUNTER_STRIDE", "Share", "admit", "barrier", "call_address", "call_operation", "chunk_counters",
    "close_gate", "counter_of", "join_team", "offer", "offered", "part", "share_after", "share_of", "sync_size",
    "take_chunk", "time_stamp",
]  # fmt: skip

_APART = 16  # stride of counters: two cache lines, which some processors fetch together
COUNTER_STRIDE = _APART
_TICKET, _SIZE, _MEMBERS = 0, _APART, 2 * _APART
# On the cache line of the size: the admission point of newcomers (-1 for members from the start), the barriers that
# the leader has passed there, whether the gate is closed (0 or 1), and two slots of offers.
_POINT, _REACHED, _SHUT, _OFFERS = (_SIZE + i for i in range(1, 5))
_CORE = _MEMBERS + 1  # next to a member's barrier count: the core that it joined on, see threads/cores.py
_CHUNKS = _MEMBERS + _APART  # a member's second line: its chunk counters
COUNTERS = 3  # chunk counters of a member for one phase, the time between two barriers; there are two sets, in turn
_CLOSED = 1 << 32  # added to the ticket counter when the gate closes
_GRACE = 2000  # pauses (20 to 100 us) for which the leader waits: latecomers can be admitted
_EARLY = 64  # pauses (1 to 4 us): a thread that was awake arrives sooner
_PATIENCE = 1024  # pauses after which a waiting member yields its core: the missing member may need it


def sync_size(threads: int) -> int:
    """Elements of the ``sync`` array of a region of ``threads`` threads."""
    return _MEMBERS + threads * (2 * _APART + 2 * MASK_WORDS)


@inline_kernel
def _wait(waited):
    """Pause; after 1024, 2048, 4096 .. pauses also yield: rarely, because a busy program may keep the core for long."""
    if waited >= _PATIENCE and waited & (waited - 1) == 0:
        yield_core()
    pause()
    return waited + 1


@inline_kernel
def join_team(sync, wanted, calls):
    """Become a member: (rank, team size, admission point), or rank -1 if the gate is closed.

    The region calls ``close_gate`` after its last admission point; one without any, right after joining. The point is
    -1 for members from the start. calls: ``scheduler_calls``, to move away from a core that another member is on.
    """
    rank = atomic_add(sync, _TICKET, 1)
    if rank >= _CLOSED:
        return np.int64(-1), np.int64(0), np.int64(-1)
    waited = 0
    if rank == 0:
        atomic_store(sync, _CORE, current_core(calls))
        while waited < _GRACE and atomic_load(sync, _TICKET) < wanted:
            if calls[0] != 0 and waited % _EARLY == _EARLY - 1:
                yield_core()  # to a thread that woke on this core, and will move away
            waited = _wait(waited)
        size = atomic_load(sync, _TICKET)
        atomic_store(sync, _POINT, -1)
        atomic_store(sync, _SIZE, size)
        return rank, size, np.int64(-1)
    leave_taken_core(calls, sync, _CORE, 2 * _APART, rank, len(sync) - 2 * MASK_WORDS * rank)
    # Read the gate before the size: else the last thread admitted could see a closed gate and the old size.
    closed = atomic_load(sync, _SHUT)
    size = atomic_load(sync, _SIZE)
    while size <= rank:
        if closed:
            return np.int64(-1), np.int64(0), np.int64(-1)
        waited = _wait(waited)
        closed = atomic_load(sync, _SHUT)
        size = atomic_load(sync, _SIZE)
    point = atomic_load(sync, _POINT)
    if point >= 0:
        atomic_store(sync, _MEMBERS + 2 * rank * _APART, atomic_load(sync, _REACHED))
    return rank, size, point


@inline_kernel
def offer(sync, rank):
    """Before a barrier: the leader publishes how many members the team will have from the next admission point on."""
    if rank == 0:
        atomic_store(sync, _OFFERS + (atomic_load(sync, _MEMBERS) + 1) % 2, atomic_load(sync, _TICKET))


@inline_kernel
def offered(sync, rank):
    """After that barrier and before the next: the team's size from the admission point on; 0 if nothing was offered."""
    return atomic_load(sync, _OFFERS + atomic_load(sync, _MEMBERS + 2 * rank * _APART) % 2)


@inline_kernel
def admit(sync, rank, size, larger, point):
    """Admit the waiting threads, at ``point``. All members call it if ``offered`` is larger than the size.

    Newcomers see all that members wrote before.
    """
    barrier(sync, rank, size)
    if rank == 0:
        atomic_store(sync, _POINT, point)
        atomic_store(sync, _REACHED, atomic_load(sync, _MEMBERS))
        atomic_store(sync, _SIZE, larger)


@inline_kernel
def close_gate(sync, rank):
    """After the last admission point: threads that wait, or arrive later, leave."""
    if rank == 0:
        atomic_add(sync, _TICKET, _CLOSED)
        atomic_store(sync, _SHUT, 1)


@inline_kernel
def barrier(sync, rank, size):
    """Wait for all ``size`` members; what each wrote before is visible to all after."""
    mine = 2 * rank * _APART
    reached = atomic_load(sync, _MEMBERS + mine) + 1
    atomic_store(sync, _MEMBERS + mine, reached)
    waited = 0
    for other in range(size):
        while atomic_load(sync, _MEMBERS + 2 * other * _APART) < reached:
            waited = _wait(waited)
    # All members have left the phase that this barrier ends: reset its counters. The next phase uses the other set.
    for counter in range(COUNTERS):
        atomic_store(sync, _CHUNKS + mine + (reached + 1) % 2 * COUNTERS + counter, 0)


@inline_kernel
def counter_of(sync, rank, member, counter):
    """The index in ``sync`` of one of a member's COUNTERS chunk counters of the current phase. rank: the caller's."""
    reached = atomic_load(sync, _MEMBERS + 2 * rank * _APART)
    return _CHUNKS + 2 * member * _APART + reached % 2 * COUNTERS + counter


def chunk_counters(threads: int) -> np.ndarray:
    """Chunk counters for threads without a team: that of thread t is at index t COUNTER_STRIDE."""
    return np.zeros(threads * COUNTER_STRIDE, np.int64)


class Share(NamedTuple):
    """The items lo:hi of one thread, cut into chunks; counts[index] is the number of chunks claimed so far.

    alone: no other thread claims chunks, so the counter need not be atomic (later loads wait for an atomic addition).
    before: one counter may number the chunks of several products, one after the other; ``before`` is how many
    chunks the products before this one have.
    """

    lo: Any
    hi: Any
    counts: Any
    index: Any
    alone: Any
    before: Any


@inline_kernel
def take_chunk(share):
    """Claim the next chunk of a share and return its number, from 0 on; past the last chunk, none is left."""
    if share.alone:
        chunk = share.counts[share.index]
        share.counts[share.index] = chunk + 1
        return chunk - share.before
    return atomic_add(share.counts, share.index, 1) - share.before


@view_kernel
def share_of(items, counts, index, member, size):
    """The share of ``items`` of one of ``size`` members; counts[index] is its chunk counter."""
    lo, hi = part(items, member, size)
    return Share(lo, hi, counts, index, size == 1, np.int64(0))


@view_kernel
def share_after(share, before):
    """The same items and counter for the next product, whose chunks are numbered after ``before`` earlier ones."""
    return Share(share.lo, share.hi, share.counts, share.index, share.alone, before)


@inline_kernel
def part(count, rank, size):
    """Of ``count`` items, the range lo, hi of member ``rank`` of ``size``."""
    return count * rank // size, count * (rank + 1) // size
