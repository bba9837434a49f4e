"""The errors that ruvllm raises on purpose: each is one clear line, and each is also the built-in error it refines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SHOWN_CHARACTERS = 240  # of one part of a message, which a hostile file may write


class RuvllmError(Exception):
    """Base of all errors raised by ruvllm itself; catch it to catch them all."""


class ModelFormatError(RuvllmError, ValueError):
    """A model file is unsound: ``path at byte offset: field: found ..., expected ...``.

    Args:
        path: the file (or directory) at fault.
        field: which part of it, for example ``"tensor 'output.weight' offset"``.
        found: what is there.
        expected: what would be right.
        offset: byte position in the file, where there is one.

    The arguments are kept as attributes of the same names. The message is a single printable line whatever the file
    holds: control characters are escaped and long values cut.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        field: str,
        found: object,
        expected: object,
        offset: int | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self.field = field
        self.found = found
        self.expected = expected
        self.offset = offset
        where = "" if offset is None else f" at byte {offset}"
        super().__init__(
            f"{printable(self.path, 4096)}{where}: {printable(field)}: "
            f"found {printable(found)}, expected {printable(expected)}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions with keyword-only arguments do not survive pickling by themselves, and one that fails to unpickle
        # hangs a process pool.
        return _rebuild_model_format_error, (self.path, self.field, self.found, self.expected, self.offset)


class ContextFullError(RuvllmError, ValueError):
    """More tokens than the KV cache can hold; nothing was written to it."""


class RankError(RuvllmError, RuntimeError):
    """Another of the processes that run a model together failed, or differs from this one."""


class DownloadError(RuvllmError, OSError):
    """A model could not be fetched, or what was fetched is not what was published."""


class InsufficientMemoryError(RuvllmError, MemoryError):
    """A model needs more memory than is available; raised before anything is loaded."""


@contextmanager
def at(place: str, name: str = "") -> Iterator[None]:
    """Errors of wrong input inside the block say where it is: "prompts[3]: ...", in place of ``name``."""
    try:
        yield
    except (TypeError, ValueError) as error:
        error.args = (f"{place}: {str(error).removeprefix(f'{name}: ')}",)
        raise


def printable(value: object, limit: int = _SHOWN_CHARACTERS) -> str:
    """``str(value)`` on one line: control characters and lone surrogates escaped, cut after ``limit`` characters."""
    text = str(value)
    cut = text[:limit]
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)
    return shown if len(text) <= limit else f"{shown}... ({len(text)} characters)"


def _rebuild_model_format_error(
    path: str, field: str, found: object, expected: object, offset: int | None
) -> ModelFormatError:
    return ModelFormatError(path, field=field, found=found, expected=expected, offset=offset)
