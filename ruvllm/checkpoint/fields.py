"""Typed reading of what a file says about itself: GGUF metadata or a JSON object, with errors that name the key."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import numpy as np

from ruvllm.errors import ModelFormatError

Value = TypeVar("Value", int, float, str, bool, list, dict)


class Fields:
    """The keys of one file, each checked for its type when it is read.

    Args:
        path: the file, for error messages.
        values: its keys and values; None as a value (JSON's null) counts as absent.
        prefix: put before each key in error messages (for a nested object).
        offsets: position in the file of a key's value, where that is known.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        values: Mapping[str, Any],
        prefix: str = "",
        offsets: Mapping[str, int] | None = None,
    ) -> None:
        self.path = path
        self.values = values
        self.prefix = prefix
        self.offsets = offsets or {}

    def __contains__(self, key: str) -> bool:
        """Whether the key is there at all, null included."""
        return key in self.values

    def get(self, key: str, kind: type[Value]) -> Value | None:
        """The value of `key`, or None if it is absent. An integer is accepted as a float.

        Raises: ModelFormatError if it is of another type; True and False are not integers.
        """
        value = self.values.get(key)
        if value is None:
            return None
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = _as_float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(key, f"{value!r} ({type(value).__name__})", f"a value of type {kind.__name__}")
        return value

    def require(self, key: str, kind: type[Value]) -> Value:
        """The value of `key`, which must be there. Raises: ModelFormatError."""
        value = self.get(key, kind)
        if value is None:
            raise self.error(key, "null" if key in self else "no such key", f"a value of type {kind.__name__}")
        return value

    def default(self, key: str, kind: type[Value], default: Value) -> Value:
        """The value of `key`, or `default` if there is no such key; a null is an error. Raises: ModelFormatError."""
        return self.require(key, kind) if key in self else default

    def require_plain(self, key: str, plain: Collection[object], expected: str | None = None) -> None:
        """Refuse a key that asks for an unsupported feature: whose value, if any, is none of ``plain``.

        Raises: ModelFormatError.
        """
        found = self.values.get(key)
        value = found.tolist() if isinstance(found, np.ndarray) else found
        same = (value == one and isinstance(value, bool) == isinstance(one, bool) for one in plain)
        if value is not None and not any(same):
            plainly = " or ".join(map(_spelt, plain)) or "nothing"
            raise self.error(key, _spelt(value), expected or f"{plainly}: no other is supported")

    def error(self, key: str, found: object, expected: str) -> ModelFormatError:
        """An error that names `key`."""
        return ModelFormatError(
            self.path, field=self.prefix + key, found=found, expected=expected, offset=self.offsets.get(key)
        )


def _spelt(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _as_float(value: int) -> float | int:
    """An integer as a float, unless no float is that large: then it stays what it is and is refused by its type."""
    try:
        return float(value)
    except OverflowError:
        return value
