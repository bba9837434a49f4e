"""The kernels that ``lab.swap`` has replaced with Python functions; replays call these between operations."""

from __future__ import annotations

SWAPPED: set[str] = set()  # names of kernels, by any thread
_NONE: frozenset[str] = frozenset()


def swapped_now() -> frozenset[str]:
    """Their names."""
    return frozenset(SWAPPED) if SWAPPED else _NONE
