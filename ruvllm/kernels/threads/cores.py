"""Cores: a thread that finds itself on the core of another member of its team moves to a free one.

Linux may wake a thread on the core of the thread that wakes it although others are idle; some virtual machines
do so on purpose. Two members of a team on one core wait for each other at every barrier, until the scheduler moves one
of them, milliseconds later: a pass then takes several times as long as one thread alone would need.

A thread moves by narrowing its affinity mask to the cores of that mask that no member runs on, and restores the old
mask at once: no setting outlasts the call, and a thread that is pinned to one core stays there. Linux only.
"""

import ctypes
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ruvllm.kernels.jit.decorators import DISABLE_JIT, inline_kernel
from ruvllm.kernels.jit.views import address as address_of_array

if TYPE_CHECKING or DISABLE_JIT:
    from ruvllm.kernels.threads.atomics_python import atomic_load, atomic_store, call_affinity, call_without_arguments
else:
    from ruvllm.kernels.threads.atomics_llvm import atomic_load, atomic_store, call_affinity, call_without_arguments

MASK_WORDS = 16  # int64 words of an affinity mask: 1024 cores
_FUNCTIONS = ("sched_getcpu", "sched_getaffinity", "sched_setaffinity")


@cache
def scheduler_calls() -> np.ndarray:
    """Addresses of the C library's sched_getcpu, sched_getaffinity and sched_setaffinity; zeros without them."""
    calls = np.zeros(3, np.int64)
    if sys.platform.startswith("linux") and not DISABLE_JIT:
        try:
            library = ctypes.CDLL(None)
            calls[:] = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in _FUNCTIONS]
        except (OSError, AttributeError):
            calls[:] = 0
    return calls


@inline_kernel
def current_core(calls: Any) -> Any:
    """1 + the number of the core that this thread runs on; 0 if it is unknown."""
    return np.int64(0) if calls[0] == 0 else np.int64(call_without_arguments(calls[0])) + 1


@inline_kernel
def leave_taken_core(calls: Any, sync: Any, cores: Any, step: Any, rank: Any, masks: Any) -> None:
    """Move this thread if an earlier member runs on its core; note its core for later members.

    calls: ``scheduler_calls``. sync[cores + step r]: the core of member r, 0 if unknown. sync[masks :]: scratch for two
    affinity masks, which no other thread uses.
    """
    here = current_core(calls)
    taken = False
    for other in range(rank):
        taken = taken or (here > 0 and atomic_load(sync, cores + step * other) == here)
    if taken:
        allowed, free = sync[masks : masks + MASK_WORDS], sync[masks + MASK_WORDS : masks + 2 * MASK_WORDS]
        if call_affinity(calls[1], 8 * MASK_WORDS, address_of_array(allowed)) >= 0:
            count = np.int64(0)
            for word in range(MASK_WORDS):
                free[word] = allowed[word]
                for other in range(rank):
                    core = atomic_load(sync, cores + step * other) - 1
                    if core >= 0 and core >> 6 == word:
                        free[word] &= ~(np.int64(1) << (core & 63))
                count += free[word] != 0
            if count > 0 and call_affinity(calls[2], 8 * MASK_WORDS, address_of_array(free)) == 0:
                call_affinity(calls[2], 8 * MASK_WORDS, address_of_array(allowed))
                here = current_core(calls)
    atomic_store(sync, cores + step * rank, here)
