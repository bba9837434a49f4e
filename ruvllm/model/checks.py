"""Checks of options: whether a value is a number, and the error if it is not what was expected."""

from __future__ import annotations

import numpy as np


def is_integer(value: object) -> bool:
    """Whether it is a Python or NumPy integer; not True or False."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is an integer or a float."""
    return is_integer(value) or isinstance(value, float | np.floating)


def require(name: str, value: object, ok: bool, expected: str) -> None:
    """Raise ValueError, with what was expected and what was found, unless ``ok``."""
    if not ok:
        raise ValueError(f"{name}: expected {expected}, found {value!r}")
