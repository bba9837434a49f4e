"""Hard use of one small model, each in a process of its own: ``python -m tests.process_cases SITUATION DIRECTORY``.

Every situation must produce the texts of one quiet thread; the program then prints "as ever".
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import njit, prange
from numba.np.ufunc.parallel import threading_layer

from ruvllm.kernels.norm import rms_norm, rms_norm_parallel
from ruvllm.llm import LLM
from tests import llm_cases

MANY = 8
PROMPTS = [f"prompt number {n}, and some more of it" for n in range(MANY)]


def answer(llm: LLM, n: int, tokens: int = 24) -> list[int]:
    """One of the texts: sampled, so that a wrong logit soon shows."""
    return llm.generate(PROMPTS[n], max_tokens=tokens, temperature=1.0, top_p=0.95, seed=n).ids


def answers(llm: LLM) -> list[list[int]]:
    return [answer(llm, n) for n in range(MANY)]


def many_threads(llm: LLM, expected: list[list[int]]) -> None:
    """Eight Python threads, each with texts of its own, all at once."""
    found: dict[int, list[list[int]]] = {}
    gate = threading.Barrier(MANY)

    def talk(n: int) -> None:
        gate.wait()
        found[n] = [answer(llm, n) for _ in range(3)]

    threads = [threading.Thread(target=talk, args=(n,)) for n in range(MANY)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: [expected[n]] * 3 for n in range(MANY)}


def with_threads_of_numpy(llm: LLM, expected: list[list[int]]) -> None:
    """Another thread keeps the threads of NumPy's BLAS busy."""
    done = threading.Event()

    def multiply() -> None:
        a = np.ones((400, 400), np.float32)
        while not done.is_set():
            a @ a

    other = threading.Thread(target=multiply)
    other.start()
    try:
        assert answers(llm) == expected
    finally:
        done.set()
        other.join()


def one_thread(llm: LLM, expected: list[list[int]]) -> None:
    """The user has set numba to one thread, and there is one core."""
    numba.set_num_threads(1)
    assert answers(llm) == expected
    assert numba.get_num_threads() == 1
    if hasattr(os, "sched_setaffinity"):
        numba.set_num_threads(2)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        assert answers(llm) == expected


@njit(parallel=True, nogil=True)
def normalise_all(x: Any, weight: Any, out: Any) -> None:
    """A user's parallel loop over one of our parallel kernels: each iteration requests threads."""
    for i in prange(len(x)):
        rms_norm_parallel(2, len(x[i]), x[i], weight, 1e-5, out[i])


def users_loops(llm: LLM, expected: list[list[int]]) -> None:
    """Our kernels inside a user's parallel loop, in one thread after another and while a model generates."""
    x = np.random.default_rng(0).standard_normal((16, 8, 64)).astype(np.float32)
    weight, out = np.ones(64, np.float32), np.empty_like(x)
    normalise_all(x, weight, out)
    right = np.stack([rms_norm(part, weight) for part in x])
    np.testing.assert_array_equal(out, right)
    done, wrong = threading.Event(), []

    def loop() -> None:
        mine = np.empty_like(x)
        while not done.is_set():
            normalise_all(x, weight, mine)
            if not (mine == right).all():
                wrong.append(1)

    other = threading.Thread(target=loop)
    other.start()
    try:
        assert answers(llm) == expected
    finally:
        done.set()
        other.join()
    assert not wrong


def forked(llm: LLM, expected: list[list[int]]) -> None:
    """A forked child of a process with running threads raises an error; it neither hangs nor is killed by OpenMP."""
    if not hasattr(os, "fork"):
        return
    child = os.fork()
    if child == 0:
        try:
            answer(llm, 0)
        except RuntimeError as error:
            os._exit(7 if "'spawn'" in str(error) and "\n" not in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert answers(llm) == expected


def _in_child(directory: str) -> list[list[int]]:
    return answers(llm_cases.byte_llm(Path(directory)))


def spawned(llm: LLM, expected: list[list[int]]) -> None:
    """Spawned processes have models and threads of their own."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for found in pool.map(_in_child, [os.fspath(llm.path)] * 2):
            assert found == expected


def interrupted(llm: LLM, expected: list[list[int]]) -> None:
    """Ctrl-C at any moment: in a long prompt, between tokens, while a cache is made. The cache stays in use."""
    cache = llm.new_cache(250)
    draw = random.Random(0)
    caught = 0
    for turn in range(25):
        stop = threading.Timer(draw.uniform(0, 0.03), lambda: os.kill(os.getpid(), signal.SIGINT))
        try:
            stop.start()
            while True:
                llm.generate(PROMPTS[turn % MANY] * 4, cache=cache, max_tokens=40)
                llm.logits(range(200))
        except KeyboardInterrupt:
            caught += 1
        stop.join()
        assert 0 <= len(cache) <= cache.max_tokens
        n = turn % MANY
        options = {"max_tokens": 24, "temperature": 1.0, "top_p": 0.95, "seed": n}
        assert llm.generate(PROMPTS[n], cache=cache, **options).ids == expected[n]
    assert caught == 25
    assert answers(llm) == expected


SITUATIONS: dict[str, Callable[[LLM, list[list[int]]], None]] = {
    "many_threads": many_threads,
    "with_threads_of_numpy": with_threads_of_numpy,
    "one_thread": one_thread,
    "users_loops": users_loops,
    "forked": forked,
    "spawned": spawned,
    "interrupted": interrupted,
}


def main(situation: str, directory: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may be set to ignore it
    llm = llm_cases.byte_llm(Path(directory))
    expected = answers(llm)
    started = time.monotonic()
    SITUATIONS[situation](llm, expected)
    print(f"as ever, under {threading_layer()}, {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
