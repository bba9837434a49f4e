"""Run numbered steps in several processes, which take them from both ends of the list.

Numba compiles one function at a time in a process. So a first load starts processes that compile into the cache, from
which this one then loads. A step of a process that fails is left to this one. Every second process begins with the last
step: neighbours in the list share functions, which a process that runs both compiles once.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

_PROGRAM = """
import sys
{prepare}
for line in sys.stdin:
    steps[int(line)]()
    print("done", flush=True)
"""


def run_steps(steps: Sequence[Callable[[], object]], processes: int, prepare: str) -> None:
    """Run every step in this process, those that another process has run before last.

    steps: the slow ones are at both ends, those that share functions next to each other. prepare: Python code that
    defines the same list in the other processes, which end with this call.
    """
    left = deque(range(len(steps)))  # its methods are atomic
    others = [_started(prepare) for _ in range(1, processes)]
    take = (left.pop, left.popleft)
    threads = [
        threading.Thread(target=_feed, args=(other, take[i % 2]), daemon=True)
        for i, other in enumerate(others)
        if other
    ]
    try:
        for thread in threads:
            thread.start()
        with suppress(IndexError):
            while True:
                steps[left.popleft()]()
        for thread in threads:
            thread.join()
    finally:
        for other in others:
            if other is not None:
                with suppress(OSError):
                    other.kill()
                other.communicate()
    for step in steps:
        step()


def _started(prepare: str) -> subprocess.Popen[bytes] | None:
    """A process that reads numbers of steps and answers with a line after each; None where none can start."""
    pipe = subprocess.PIPE
    with suppress(OSError, ValueError):  # Python is embedded in another program
        command = [sys.executable, "-P", "-c", _PROGRAM.format(prepare=prepare)]
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
    return None


def _feed(process: subprocess.Popen[bytes], take: Callable[[], int]) -> None:
    """Give a process one step after the other, until none is left to take or it fails."""
    assert process.stdin is not None and process.stdout is not None
    with suppress(IndexError, OSError, ValueError):  # no step is left; the process is dead, or its pipes are closed
        while True:
            process.stdin.write(b"%d\n" % take())
            process.stdin.flush()
            if not process.stdout.readline():
                return
