"""Regions made by one line of source for several values, as a program: ``python closure_cases.py 3 5`` prints 3 5."""

import sys
from typing import Any

import numpy as np

from ruvllm.kernels.jit.decorators import part_kernel
from ruvllm.kernels.jit.views import array_at
from ruvllm.kernels.simd.vectors import never_inline
from ruvllm.kernels.threads.regions import Region


def region_that_tells(value: int) -> Region:
    """A region that writes ``value`` into the first element of its table, through two separately compiled functions."""

    @part_kernel
    def inner() -> Any:
        never_inline()
        return value

    @part_kernel
    def outer() -> Any:
        never_inline()
        return inner()

    def member(table: Any) -> None:
        array_at(table, 1, np.int64)[0] = outer()

    return Region(member)


if __name__ == "__main__":
    table = np.zeros(1, np.int64)
    for value in map(int, sys.argv[1:]):
        region_that_tells(value).run(table.ctypes.data, 1)
        print(table[0])
