"""Replace objects in all modules of the library for a while, to record calls or to swap kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ruvllm import kernels

_WATCHERS = ("ruvllm.lab", "ruvllm.measure")  # these keep the originals


@contextmanager
def replaced(make: Callable[[Any], Any], wanted: Callable[[Any], bool]) -> Iterator[None]:
    """Inside the block, every module of the library has ``make(object)`` in place of each ``wanted`` object."""
    for name in dir(kernels):  # fetched now: a name that is first used inside the block would keep what is there
        getattr(kernels, name)
    before: list[tuple[Any, str, Any]] = []
    made: dict[int, Any] = {}
    try:
        for name, module in list(sys.modules.items()):
            if name.startswith("ruvllm.") and not name.startswith(_WATCHERS):
                for attribute, value in list(vars(module).items()):
                    if wanted(value):
                        before.append((module, attribute, value))
                        setattr(module, attribute, made.setdefault(id(value), make(value)))
        yield
    finally:
        for module, attribute, value in before:
            setattr(module, attribute, value)
