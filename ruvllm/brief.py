"""A repr() of one line for objects that hold large data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

_SHOWN = 4  # items of a collection that are shown; of a longer one, only their count
_CHARACTERS = 48  # of a string


def brief(record: Any) -> str:
    """The repr of a dataclass, with each field cut short; classes that need it say ``__repr__ = brief``.

    The default repr shows everything: megabytes when a notebook shows a result.
    """
    fields = (f"{f.name}={short(getattr(record, f.name))}" for f in dataclasses.fields(record) if f.repr)
    return f"{type(record).__name__}({', '.join(fields)})"


def short(value: Any) -> str:
    """One value, in a few characters."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):  # NumPy's, which this need not import
        return f"<{value.dtype} {value.shape}>"
    if isinstance(value, str):
        return repr(value) if len(value) <= _CHARACTERS else f"{value[:_CHARACTERS]!r}... ({len(value)} characters)"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, Mapping | list | tuple | set | frozenset | bytes):
        few = len(value) <= _SHOWN and all(isinstance(item, str | int | float | None) for item in _items(value))
        shown = repr(value)
        return shown if few and len(shown) <= 2 * _CHARACTERS else f"<{len(value)} in a {type(value).__name__}>"
    if dataclasses.is_dataclass(value):
        return f"{type(value).__name__}(...)"
    shown = repr(value)
    return shown if len(shown) <= 2 * _CHARACTERS and shown.isprintable() else f"<{type(value).__name__}>"


def _items(value: Any) -> list[Any]:
    return [*value, *value.values()] if isinstance(value, Mapping) else list(value)
