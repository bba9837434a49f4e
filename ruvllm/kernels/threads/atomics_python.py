"""The team's operations in plain Python, for NUMBA_DISABLE_JIT=1: there regions run one member after the other."""

import time
from typing import Any


def atomic_add(array: Any, index: int, value: int) -> int:
    before = int(array[index])
    array[index] = before + value
    return before


def atomic_load(array: Any, index: int) -> int:
    return int(array[index])


def atomic_store(array: Any, index: int, value: int) -> None:
    array[index] = value


def pause() -> None:
    """Nothing to wait for: members run one after the other."""


def yield_core() -> None:
    """Nothing to do: no other thread needs the core."""


def call_address(address: int, argument: int) -> None:
    raise RuntimeError("without the JIT there are no addresses of compiled functions")


OPERATIONS: list[Any] = []  # without the JIT, an operation's address is its index in this list plus one


def call_operation(address: int, table: int, row: int, rank: int, size: int) -> None:
    OPERATIONS[int(address) - 1](int(table), int(row), rank, size)


def time_stamp() -> int:
    return time.perf_counter_ns()


def call_without_arguments(address: int) -> int:
    return -1


def call_affinity(address: int, size: int, mask: int) -> int:
    return -1
