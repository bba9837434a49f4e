"""Teams of threads in one region: barriers hold, every turn is taken once, and nobody waits for who does not come.

What could hang runs in a process of its own, with a time limit that is no matter of speed.
"""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ruvllm.kernels.threads.team import part
from tests.kernels.team_cases import Task
from tests.processes import python


def _sizes(situation: str, **environment: str) -> list[int]:
    """Team sizes of the regions that were run in a situation of team_cases.py."""
    sizes: list[int] = json.loads(python("-m", "tests.kernels.team_cases", situation, **environment))
    return sizes


def test_alone() -> None:
    assert Task(1, 100).run() == 1


@pytest.mark.parametrize("items", [0, 1, 2, 101])
def test_every_item_is_done_once(items: int) -> None:
    Task(2, 1, items).run()


def test_members_meet_at_every_barrier() -> None:
    """Threads that stay awake between regions, as OpenMP has them by default: on a busy machine one that is woken gets
    the core of the one that wakes it, which by then has closed the gate."""
    assert _sizes("plain", NUMBA_NUM_THREADS="2", GOMP_SPINCOUNT="300000").count(2) == 10


def test_more_threads_than_cores() -> None:
    assert len(_sizes("crowded", NUMBA_NUM_THREADS="4")) == 20


def test_whoever_was_told_to_be_alone_waits_for_nobody() -> None:
    """numba.set_num_threads(1) between the decision for two threads and the launch: both parts run on one thread."""
    assert _sizes("limited", NUMBA_NUM_THREADS="2") == [1] * 20


def test_inside_of_a_users_parallel_loop() -> None:
    assert len(_sizes("nested", NUMBA_NUM_THREADS="2")) == 9


@pytest.mark.parametrize("layer", ["default", "workqueue"])
def test_several_python_threads_at_once(layer: str) -> None:
    assert len(_sizes("at_once", NUMBA_NUM_THREADS="2", NUMBA_THREADING_LAYER=layer)) == 60


def test_in_plain_python_the_first_does_everything() -> None:
    assert _sizes("limited", NUMBA_DISABLE_JIT="1") == [1] * 20


@given(count=st.integers(0, 1 << 40), size=st.integers(1, 64))
def test_parts_are_even_and_leave_nothing_out(count: int, size: int) -> None:
    function = getattr(part, "py_func", part)
    parts = [function(count, rank, size) for rank in range(size)]
    assert parts[0][0] == 0 and parts[-1][1] == count
    assert all(before[1] == after[0] for before, after in itertools.pairwise(parts))
    lengths = [hi - lo for lo, hi in parts]
    assert max(lengths) - min(lengths) <= 1
