"""The decorators: what independent loops become, and rows split over threads."""

from typing import Any

import numpy as np
import pytest

from ruvllm.kernels.jit.decorators import kernel
from ruvllm.kernels.threads.over_rows import over_rows
from ruvllm.kernels.threads.pool import launch


def _double(x: Any, out: Any) -> None:
    for i in range(x.size):
        out[i] = np.float32(2) * x[i]


def test_independent_loops_are_vectors_wherever_arrays_lie() -> None:
    """LLVM otherwise tests whether arrays overlap, and goes through those that do element by element.

    A kernel may rely on that order, as here on an output that is the input one further on, unless it promises not to.
    """
    strict, independent = kernel(_double, strict=True), kernel(_double, independent=True)
    buffer = np.ones(101, np.float32)
    strict(buffer[:-1], buffer[1:])
    np.testing.assert_array_equal(buffer, np.exp2(np.arange(101)))
    buffer = np.ones(101, np.float32)
    independent(buffer[:-1], buffer[1:])
    assert (buffer[1:5] == 2).all()
    independent(buffer, buffer)
    assert (buffer[1:5] == 4).all()


@pytest.mark.parametrize("step", [1, 16])
def test_every_row_is_in_one_share(step: int) -> None:
    @kernel(strict=True)
    def body(rows: Any, starts: Any, lo: Any, hi: Any) -> None:
        starts[lo] += 1
        for i in range(lo, hi):
            rows[i] += step

    parallel = over_rows(body, step)
    for count in (1, 2, 15, 16, 17, 100):
        for threads in (1, 2, 3, 7):
            rows, starts = np.zeros(count, np.int64), np.zeros(count + 1, np.int64)
            launch(parallel, threads, count, rows, starts)
            assert (rows == step).all(), (count, threads)
            assert not (np.flatnonzero(starts[:count]) % step).any()
            assert starts.sum() == threads
