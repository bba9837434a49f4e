"""Threads: how many are used, forked children, concurrent callers, and numba's least capable threading layer."""

import numba
import pytest

from ruvllm.kernels import read_bandwidth
from ruvllm.kernels.threads import pool
from ruvllm.kernels.threads.pool import limited_to, num_threads, physical_cores, threads_for
from tests.processes import python

POOL = int(getattr(numba.core.config, "NUMBA_NUM_THREADS"))  # noqa: B009 (a constant that numba makes at run time)


def _run(program: str, **environment: str) -> str:
    return python("-c", program, **environment).strip()


def test_little_work_takes_one_thread() -> None:
    assert threads_for(99, 100, 8) == 1
    assert threads_for(100, 100, 1) == 1
    assert threads_for(100, 100, 0) == 1
    assert threads_for(100, 100, 1000) == num_threads()
    assert threads_for(100, 100, 2) == min(2, num_threads())


def test_limit_holds_inside_the_block_alone() -> None:
    before = numba.get_num_threads()
    with limited_to(1):
        assert num_threads() == 1
        with pytest.raises(ZeroDivisionError), limited_to(10**6):
            assert num_threads() == POOL
            raise ZeroDivisionError
        assert num_threads() == 1
    assert numba.get_num_threads() == before


def test_physical_cores() -> None:
    assert 1 <= physical_cores() <= POOL


PARALLEL = """
import os, threading
import numpy as np
from ruvllm.kernels import gemm, softmax
x = np.random.default_rng(0).standard_normal((400, 300)).astype(np.float32)
"""


STARTED = {  # whatever starts numba's threads, by us or by the user
    "a kernel": "softmax(x)",
    "a limit, as loading a small model sets it": "with limited_to(2): pass",
    "one thread alone": "with limited_to(1): softmax(x)",
    "the user, asking": "numba.get_num_threads()",
    "the user, limiting": "numba.set_num_threads(2)",
    "ruvllm info": "from ruvllm.machine import threads; threads()",
    "the user's own loop": """
@numba.njit(parallel=True)
def loop(x):
    for i in numba.prange(len(x)):
        x[i] = i
loop(np.empty(10))
""",
}


@pytest.mark.parametrize("start", STARTED)
def test_a_forked_child_computes_on_one_thread_and_says_why_it_takes_no_more(start: str) -> None:
    """OpenMP ends forked children that start a parallel region; on systems without fork there is nothing to do."""
    program = f"""{PARALLEL}
import numba
from ruvllm.kernels.threads.pool import launch, limited_to, num_threads
{STARTED[start]}
if hasattr(os, "fork") and os.fork() == 0:
    assert num_threads() == 1
    found = softmax(x)
    try:
        launch(print, "not reached")
    except RuntimeError as error:
        assert "forked" in str(error)
        os._exit(7 if np.allclose(found.sum(axis=1), 1) else 2)
    os._exit(1)
print(os.waitstatus_to_exitcode(os.wait()[1]) if hasattr(os, "fork") else 7)
"""
    assert _run(program, NUMBA_NUM_THREADS="2", NUMBA_THREADING_LAYER="omp") == "7"


def test_a_child_forked_before_any_thread_was_started_has_threads_of_its_own() -> None:
    program = PARALLEL + """
if hasattr(os, "fork") and os.fork() == 0:
    softmax(x)
    from ruvllm.kernels.threads.pool import num_threads
    os._exit(7 if num_threads() == 2 else 1)
print(os.waitstatus_to_exitcode(os.wait()[1]) if hasattr(os, "fork") else 7)
"""
    assert _run(program, NUMBA_NUM_THREADS="2") == "7"


@pytest.mark.parametrize("layer", ["default", "workqueue"])
def test_python_threads_may_call_at_once(layer: str) -> None:
    """The workqueue layer aborts the process when two callers meet: launch lets them in one by one."""
    program = PARALLEL + """
expected, wrong = softmax(x), []
def call():
    for _ in range(30):
        if not (softmax(x) == expected).all():
            wrong.append(1)
callers = [threading.Thread(target=call) for _ in range(4)]
[c.start() for c in callers]
[c.join() for c in callers]
import numba
print(len(wrong), numba.threading_layer())
"""
    wrong, used = _run(program, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="2").split()
    assert wrong == "0"
    assert used == "workqueue" or layer == "default"


def test_no_pool_is_started_by_a_small_call() -> None:
    program = """
import numpy as np
from ruvllm.kernels import rms_norm
from ruvllm.kernels.threads import pool
rms_norm(np.ones((4, 64), np.float32), np.ones(64, np.float32))
print(pool._pool_runs())
"""
    assert _run(program) == "False"


def test_the_lock_of_a_forked_child_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    num_threads()  # starts the pool, if nothing has
    monkeypatch.setattr(pool, "_forked", False)
    monkeypatch.setattr(pool, "_one_at_a_time", pool._one_at_a_time)
    with pool._one_at_a_time:  # as if another thread of the parent were inside a kernel
        pool._after_fork()
        assert pool._forked
        assert not pool._one_at_a_time.locked()


def test_read_bandwidth() -> None:
    assert read_bandwidth(1 << 16, repeats=2) > 0
    assert read_bandwidth(4, repeats=1, threads=1) > 0
    assert read_bandwidth(1 << 20, repeats=1, threads=1) > 0
    for arguments, message in (
        ({"nbytes": 3}, "nbytes: expected at least 4, found 3"),
        ({"repeats": 0}, "repeats: expected at least 1, found 0"),
        ({"threads": 0}, "threads: expected at least 1, found 0"),
    ):
        with pytest.raises(ValueError, match=message):
            read_bandwidth(**arguments)
