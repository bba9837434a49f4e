"""Checks of options: whether a value is a number or a size, and the error if it is not what was expected."""

from __future__ import annotations

import math
import re
from typing import TypeGuard

import numpy as np


def is_integer(value: object) -> bool:
    """Whether it is a Python or NumPy integer; not True or False."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is an integer or a float."""
    return is_integer(value) or isinstance(value, float | np.floating)


def parse_size(name: str, size: object) -> int:
    """Bytes of a size: a number of bytes, or text such as "50GB" or "2GiB".

    Raises ValueError, which begins with ``name``, for anything else.
    """
    if is_number(size) and math.isfinite(size) and size >= 0:
        return int(size)
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(I?)B?", size.strip().upper()) if isinstance(size, str) else None
    if match is None:
        raise ValueError(f"{name}: expected a number of bytes, or a size such as 50GB, found {size!r}")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " "))


def require(name: str, value: object, ok: bool, expected: str) -> None:
    """Raise ValueError, with what was expected and what was found, unless ``ok``."""
    if not ok:
        raise ValueError(f"{name}: expected {expected}, found {value!r}")
