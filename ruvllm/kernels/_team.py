"""A team: the threads of one parallel region that wait for each other at barriers.

One parallel region per token instead of one per operation saves hundreds of launches. But ``prange(n)`` does not
promise n threads at once: fewer may run (another region is busy, numba was limited, the tasks were nested), and a
barrier that waits for a thread that never comes hangs. So the team is elastic: each member takes a ticket, the
first waits briefly for the others and then closes the gate; only those who came in time are members, whoever comes
later leaves at once. Work is split by the team's size, and results do not depend on it.

Cores are not alike: some are made slower, and any may be busy with something else. So a member's share of large work
can be cut into turns, and who has done its own share takes turns of the others.

``sync`` is an int64 array of ``sync_size(threads)`` zeros for each region: ticket, team size, and for each member how
many barriers it has reached, and how many turns of its shares are taken; each on cache lines of its own, so that a
barrier moves one line from each to the others.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from ruvllm.kernels._jit import DISABLE_JIT, inline_kernel

if TYPE_CHECKING or DISABLE_JIT:
    from ruvllm.kernels._team_python import (
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
    from ruvllm.kernels._team_llvm import (
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
    "SHARES", "TURN_STEP", "barrier", "call_address", "call_operation", "join_team", "part", "share_of", "sync_size",
    "take_turn", "time_stamp", "turn_counts",
]  # fmt: skip

_APART = 16  # numbers from one to the next: two cache lines, which some processors fetch together
TURN_STEP = _APART
_TICKET, _SIZE, _MEMBERS = 0, _APART, 2 * _APART
_TURNS = _MEMBERS + _APART  # of a member's second line
SHARES = 3  # that a member may have between two barriers
_CLOSED = 1 << 32  # added to the ticket counter when the gate closes
_GRACE = 20000  # pauses (0.2 to 1 ms) that the first member waits for the others
_PATIENCE = 1024  # pauses after which a waiting member lets others have its core: it may be what they wait for


def sync_size(threads: int) -> int:
    """Numbers that the team of a region of ``threads`` threads needs."""
    return _MEMBERS + threads * 2 * _APART


@inline_kernel
def _wait(waited: Any) -> Any:
    """One more pause; after 1024, 2048, 4096 .. of them others get the core: seldom, as a busy program keeps it."""
    if waited >= _PATIENCE and waited & (waited - 1) == 0:
        yield_core()
    pause()
    return waited + 1


@inline_kernel
def join_team(sync: Any, wanted: Any) -> Any:
    """Become a member: (rank, team size), or (-1, 0) for one that came after the gate was closed."""
    rank = atomic_add(sync, _TICKET, 1)
    if rank >= _CLOSED:
        return -1, 0
    if rank == 0:
        waited = 0
        while waited < _GRACE and atomic_load(sync, _TICKET) < wanted:
            waited = _wait(waited)
        size = atomic_add(sync, _TICKET, _CLOSED)
        atomic_store(sync, _SIZE, size)
        return rank, size
    waited = 0
    while atomic_load(sync, _SIZE) == 0:
        waited = _wait(waited)
    return rank, atomic_load(sync, _SIZE)


@inline_kernel
def barrier(sync: Any, rank: Any, size: Any) -> None:
    """Wait until all ``size`` members are here; what each wrote before is visible to all after."""
    mine = 2 * rank * _APART
    reached = atomic_load(sync, _MEMBERS + mine) + 1
    atomic_store(sync, _MEMBERS + mine, reached)
    waited = 0
    for other in range(size):
        while atomic_load(sync, _MEMBERS + 2 * other * _APART) < reached:
            waited = _wait(waited)
    # Nobody is in the shares from before this barrier any more. Those between it and the next have turns of their own.
    for share in range(SHARES):
        atomic_store(sync, _TURNS + mine + (reached + 1) % 2 * SHARES + share, 0)


@inline_kernel
def share_of(sync: Any, rank: Any, member: Any, share: Any) -> Any:
    """Where the turns of a member's share, one of SHARES between two barriers, are counted: for take_turn."""
    reached = atomic_load(sync, _MEMBERS + 2 * rank * _APART)
    return _TURNS + 2 * member * _APART + reached % 2 * SHARES + share


def turn_counts(threads: int) -> np.ndarray:
    """Where threads without a team count the turns of their shares: that of thread t at t TURN_STEP."""
    return np.zeros(threads * TURN_STEP, np.int64)


@inline_kernel
def take_turn(counts: Any, share: Any, alone: Any) -> Any:
    """The number of a turn that is the caller's alone, from 0 on; there may be none of that number.

    alone: nobody else takes turns. Then no atomic addition is needed, behind which reads of memory must wait: that
    took one token two percent longer.
    """
    if alone:
        turn = counts[share]
        counts[share] = turn + 1
        return turn
    return atomic_add(counts, share, 1)


@inline_kernel
def part(count: Any, rank: Any, size: Any) -> Any:
    """The range lo, hi of ``count`` items that member ``rank`` of ``size`` does."""
    return count * rank // size, count * (rank + 1) // size
