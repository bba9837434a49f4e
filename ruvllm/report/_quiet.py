"""Waiting until this process's threads spin no more; for workers too, so it imports nothing of ruvllm."""

import time

_STEP, _LONGEST = 0.005, 0.5  # seconds
_BUSY = 0.1  # of a core


def wait_until_quiet() -> None:
    """Return when all threads of this process sleep but this one: a team of threads spins for a while after its work.

    Gives up after half a second: some threads are set to spin for ever.
    """
    end = time.perf_counter() + _LONGEST
    while time.perf_counter() < end:
        used, start = time.process_time(), time.perf_counter()
        time.sleep(_STEP)
        if time.process_time() - used < _BUSY * (time.perf_counter() - start):
            return
