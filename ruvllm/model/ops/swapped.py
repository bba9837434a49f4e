"""The kernels that Python functions stand in for now, which replays call between operations: ``lab.swap`` sets them."""

from __future__ import annotations

SWAPPED: set[str] = set()  # names of kernels, by any thread
_NONE: frozenset[str] = frozenset()


def swapped_now() -> frozenset[str]:
    """Their names."""
    return frozenset(SWAPPED) if SWAPPED else _NONE
