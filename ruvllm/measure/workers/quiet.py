"""Wait until this process's threads stop spinning; workers need it too, so it imports nothing of ruvllm."""

import time

_STEP, _LONGEST = 0.005, 0.5  # seconds
_BUSY = 0.1  # of a core


def wait_until_quiet() -> None:
    """Return when all threads of this process but this one sleep: a thread team spins for a while after its work.

    Gives up after half a second: some threads are configured to spin forever.
    """
    end = time.perf_counter() + _LONGEST
    while time.perf_counter() < end:
        used, start = time.process_time(), time.perf_counter()
        time.sleep(_STEP)
        if time.process_time() - used < _BUSY * (time.perf_counter() - start):
            return
