"""Threads that leave a taken core: they go to a free one, their mask stays what it was, and pinned threads stay."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from ruvllm.kernels.jit.decorators import kernel
from ruvllm.kernels.threads.cores import MASK_WORDS, current_core, leave_taken_core, scheduler_calls
from ruvllm.kernels.threads.team import sync_size
from ruvllm.model import Llama
from tests.model.model_cases import SMALL, run, text

MASKS, STEP = 64, 8
pytestmark = pytest.mark.skipif(
    not scheduler_calls().any() or len(os.sched_getaffinity(0)) < 2, reason="needs Linux, the JIT and two cores"
)


@kernel
def leave(calls: Any, sync: Any, rank: Any) -> int:
    """The core that this thread is on after it had a chance to leave."""
    leave_taken_core(calls, sync, np.int64(0), np.int64(STEP), rank, np.int64(MASKS))
    return current_core(calls) - 1


@pytest.fixture
def mask() -> Iterator[set[int]]:
    before = os.sched_getaffinity(0)
    yield before
    os.sched_setaffinity(0, before)


def taken(*cores: int) -> np.ndarray:
    """Counters of a team whose members run on these cores."""
    sync = np.zeros(MASKS + 2 * MASK_WORDS, np.int64)
    sync[: len(cores) * STEP : STEP] = np.array(cores) + 1
    return sync


def test_a_thread_leaves_the_core_of_another_member(mask: set[int]) -> None:
    leave(scheduler_calls(), taken(), 0)  # compiles
    for core in sorted(mask):
        os.sched_setaffinity(0, {core})
        os.sched_setaffinity(0, mask)  # still on that core
        sync = taken(core)
        assert leave(scheduler_calls(), sync, 1) != core
        assert os.sched_getaffinity(0) == mask
        assert sync[STEP] not in (0, core + 1)  # later members know where it went


def test_a_thread_stays_where_it_is_alone(mask: set[int]) -> None:
    core = min(mask)
    os.sched_setaffinity(0, {core})
    assert leave(scheduler_calls(), taken(max(mask)), 1) == core
    assert os.sched_getaffinity(0) == {core}


def test_a_pinned_thread_stays(mask: set[int]) -> None:
    core = min(mask)
    os.sched_setaffinity(0, {core})
    assert leave(scheduler_calls(), taken(core), 1) == core
    assert os.sched_getaffinity(0) == {core}


def test_a_thread_stays_where_all_cores_are_taken(mask: set[int]) -> None:
    leave(scheduler_calls(), taken(*sorted(mask)), len(mask))
    assert os.sched_getaffinity(0) == mask


def test_without_the_system_calls_nothing_is_done(mask: set[int]) -> None:
    assert leave(np.zeros(3, np.int64), taken(min(mask)), 1) == -1
    assert os.sched_getaffinity(0) == mask


def test_generation_leaves_every_threads_mask_alone(mask: set[int]) -> None:
    model = Llama(SMALL, layout="int4", threads=2)
    run(model, model.new_cache(20), text(10), [4, 1, 1, 4])
    before = masks()
    for _ in range(20):
        run(model, model.new_cache(20), text(10), [4, 1, 1, 4])
        threading.Event().wait(0.01)  # threads sleep, and are woken anywhere
    assert masks() == before and set(before.values()) == {tuple(sorted(mask))}


def masks() -> dict[int, tuple[int, ...]]:
    """The cores that each thread of this process may run on."""
    return {int(task): tuple(sorted(os.sched_getaffinity(int(task)))) for task in os.listdir("/proc/self/task")}


def test_the_masks_of_members_do_not_overlap() -> None:
    from ruvllm.kernels.threads.team import _APART, _MEMBERS

    for threads in range(1, 9):
        length = sync_size(threads)
        members = _MEMBERS + threads * 2 * _APART
        starts = [length - 2 * MASK_WORDS * rank for rank in range(1, threads)]
        assert all(members <= start and start + 2 * MASK_WORDS <= length for start in starts)
        assert len(set(starts)) == len(starts)


