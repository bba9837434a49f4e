"""A team: the threads of one parallel region that wait for each other at barriers.

One parallel region per token instead of one per operation saves hundreds of launches. But ``prange(n)`` does not
promise n threads at once: fewer may run (another region is busy, numba was limited, the tasks were nested), and a
barrier that waits for a thread that never comes hangs. So the team is elastic: each member takes a ticket, the
first waits briefly for the others and then closes the gate; only those who came in time are members, whoever comes
later leaves at once. Work is split by the team's size, and results do not depend on it.

``sync`` is an int64 array of SYNC_SIZE zeros for each region: ticket, team size, arrivals and phase of the barrier,
each on a cache line of its own.
"""

from typing import TYPE_CHECKING, Any

from ruvllm.kernels._jit import DISABLE_JIT, inline_kernel

if TYPE_CHECKING or DISABLE_JIT:
    from ruvllm.kernels._team_python import atomic_add, atomic_load, atomic_store, call_address, pause
else:
    from ruvllm.kernels._team_llvm import atomic_add, atomic_load, atomic_store, call_address, pause

__all__ = ["SYNC_SIZE", "barrier", "call_address", "join_team", "part"]

_TICKET, _SIZE, _ARRIVED, _PHASE = 0, 16, 32, 48
SYNC_SIZE = 64
_CLOSED = 1 << 32  # added to the ticket counter when the gate closes
_GRACE = 20000  # pauses (some 200 us) that the first member waits for the others


@inline_kernel
def join_team(sync: Any, wanted: Any) -> Any:
    """Become a member: (rank, team size), or (-1, 0) for one that came after the gate was closed."""
    rank = atomic_add(sync, _TICKET, 1)
    if rank >= _CLOSED:
        return -1, 0
    if rank == 0:
        waited = 0
        while waited < _GRACE and atomic_load(sync, _TICKET) < wanted:
            pause()
            waited += 1
        size = atomic_add(sync, _TICKET, _CLOSED)
        atomic_store(sync, _SIZE, size)
        return rank, size
    while atomic_load(sync, _SIZE) == 0:
        pause()
    return rank, atomic_load(sync, _SIZE)


@inline_kernel
def barrier(sync: Any, size: Any) -> None:
    """Wait until all ``size`` members are here; what each wrote before is visible to all after."""
    if size == 1:
        return
    phase = atomic_load(sync, _PHASE)
    if atomic_add(sync, _ARRIVED, 1) == size - 1:
        atomic_store(sync, _ARRIVED, 0)
        atomic_store(sync, _PHASE, phase + 1)
    else:
        while atomic_load(sync, _PHASE) == phase:
            pause()


@inline_kernel
def part(count: Any, rank: Any, size: Any) -> Any:
    """The range lo, hi of ``count`` items that member ``rank`` of ``size`` does."""
    return count * rank // size, count * (rank + 1) // size
