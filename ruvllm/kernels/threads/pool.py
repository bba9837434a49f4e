"""How many threads a call may use, and how much work makes more than one thread worthwhile."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import Any

import numba
from numba import config
from numba import threading_layer as threading_layer  # type: ignore[attr-defined]

from ruvllm import container
from ruvllm.kernels.jit.private.threads import thread_counter

# Work per call from which two threads were faster than one, as measured: a launch costs 3 to 4 us (omp).
PARALLEL_ELEMENTS = 32768  # elements of a kernel with ten or more operations each (exp has a dozen)
PARALLEL_STREAM = 65536  # elements of a kernel that only streams them, with an operation or two each
PARALLEL_MACS = 131072  # multiply-adds that each load a weight of their own: matrix times vector, adapters
PARALLEL_TILE_MACS = 524288  # multiply-adds in tiles, which reuse loads and take a quarter of the time

_one_at_a_time = threading.Lock()
_forked = False  # this is a forked child of a process whose threads were running: they do not exist here


def num_threads() -> int:
    """Threads that numba will use for a parallel call made now from this Python thread.

    1 in a forked child of a process that had started its threads: OpenMP would end such a child, so kernels run
    there on the calling thread alone.
    """
    if _forked:
        return 1
    return int(thread_counter()())


def threads_for(work: int, threshold: int, pieces: int) -> int:
    """How many threads to split ``pieces`` independent pieces over; their total ``work`` is in units of ``threshold``.

    One if the work is below the threshold, one of the constants above.
    """
    if work < threshold or pieces < 2:
        return 1
    return min(num_threads(), pieces)


def most_threads() -> int:
    """Threads of numba's pool (NUMBA_NUM_THREADS), which no call can exceed."""
    return int(getattr(config, "NUMBA_NUM_THREADS", 1))


def require_threads(threads: int) -> None:
    """Raise ValueError unless numba's pool has so many threads, for measurements that report the number."""
    if not 1 <= threads <= most_threads():
        raise ValueError(f"threads: expected 1 to {most_threads()} (NUMBA_NUM_THREADS), found {threads}")


@contextmanager
def limited_to(threads: int) -> Iterator[None]:
    """Parallel calls of this Python thread use at most ``threads`` threads inside the block."""
    before = int(numba.get_num_threads())
    numba.set_num_threads(min(threads, most_threads()))
    try:
        yield
    finally:
        numba.set_num_threads(before)


def physical_cores() -> int:
    """Cores that this process may run on, at most numba's pool (NUMBA_NUM_THREADS).

    A thread without a core of its own makes all others wait for it, so logical (hyper-threading) cores do not count,
    nor cores beyond a container's CPU quota.
    """
    allowed = min(container.affinity(), container.cpus() or most_threads())
    try:
        import psutil

        cores = psutil.cpu_count(logical=False) or allowed
    except ImportError:  # kernels need numpy and numba alone
        cores = allowed
    return max(1, min(cores, allowed, most_threads()))


def share_out(task: Callable[[int], None], items: Sequence[int], threads: int) -> None:
    """Call task(item) for each item on up to ``threads`` Python threads; kernels called in it use one thread each.

    For work that mixes files, NumPy and compiled bodies, which all release the GIL.
    """

    def run_one(item: int) -> None:
        with limited_to(1):  # after a parallel region inside, its idle threads would spin, on cores that others need
            task(item)

    if threads == 1 or len(items) < 2:
        for item in items:
            run_one(item)
        return
    futures = [_helpers(threads).submit(run_one, item) for item in items]
    try:
        for future in futures:
            future.result()
    finally:
        for future in futures:
            future.cancel()
        wait(futures)  # tasks that have begun still write


@cache
def _helpers(threads: int) -> ThreadPoolExecutor:
    """A pool that is kept: a model has hundreds of matrices to share out, and a new thread costs 0.3 ms."""
    return ThreadPoolExecutor(threads, thread_name_prefix="ruvllm")


def launch(kernel: Callable[..., Any], *arguments: Any) -> None:
    """Call a parallel kernel, one at a time under numba's workqueue layer, which aborts on concurrent calls.

    Raises:
        RuntimeError: in a forked child whose parent's threads were running; OpenMP would end the child.
    """
    if _forked:
        raise RuntimeError("kernels used threads before this process was forked: start processes with 'spawn' instead")
    if _workqueue():
        with _one_at_a_time:
            kernel(*arguments)
    else:
        kernel(*arguments)


def _workqueue() -> bool:
    """Whether the threading layer is, or may turn out to be, the workqueue."""
    return not _pool_runs() or bool(threading_layer() == "workqueue")


def _pool_runs() -> bool:
    """Whether numba's threads run in this process: started here, or by the user's own calls of numba."""
    try:
        threading_layer()
    except ValueError:  # not chosen yet: the first call that needs threads chooses
        return False
    return True


def _after_fork() -> None:
    global _forked, _one_at_a_time
    _forked = _forked or _pool_runs()
    _one_at_a_time = threading.Lock()  # the parent may have held it
    _helpers.cache_clear()  # its threads are not here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
