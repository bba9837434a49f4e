"""A kernel's body in a loop of compiled code: its time without Python's call, checks and dispatch."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numba

from ruvllm.kernels import KernelSpec
from ruvllm.kernels.jit.decorators import DISABLE_JIT
from ruvllm.kernels.jit.small_calls import long_way


# Not a kernel but a caller, specialised for each body: it does not belong in the cache.
@numba.njit(nogil=True)
def _repeat(body: Any, calls: int, arguments: Any) -> None:
    for _ in range(calls):
        body(*arguments)


class Inside:
    """The one compiled call that a public function makes for these arguments, as an engine (see ``timing``).

    Raises:
        LookupError: it makes none, or several.
    """

    def __init__(self, spec: KernelSpec, arguments: tuple[Any, ...]) -> None:
        seen: list[tuple[Any, tuple[Any, ...]]] = []
        with long_way():
            spec.function(*arguments)  # compiles: compiled bodies cannot call the recorder
            with _watched(spec, seen):
                spec.function(*arguments)
        if DISABLE_JIT or len(seen) != 1:
            raise LookupError(f"{spec.name}: {len(seen)} compiled calls on one thread")
        self._body, self._arguments = seen[0]
        if self._body is not spec.compiled[0]:  # the body that works was called under another name
            raise LookupError(f"{spec.name}: {spec.compiled[0].__name__} was not seen")
        _repeat(self._body, 1, self._arguments)  # compiles

    def seconds(self, calls: int) -> float:
        """See ``timing.Engine``."""
        _repeat(self._body, 1, self._arguments)
        start = time.perf_counter()
        _repeat(self._body, calls, self._arguments)
        return time.perf_counter() - start

    def settle(self) -> None:
        """See ``timing.Engine``: it has one thread."""


@contextmanager
def _watched(spec: KernelSpec, seen: list[tuple[Any, tuple[Any, ...]]]) -> Iterator[None]:
    """Record the calls from Python to the kernel's compiled functions inside the block."""

    def watching(body: Any) -> Any:
        def call(*arguments: Any) -> Any:
            seen.append((body, arguments))
            return body(*arguments)

        return call

    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("ruvllm.kernels."):
                for attribute, value in list(vars(module).items()):
                    if any(value is body for body in spec.compiled):
                        stack.enter_context(mock.patch.object(module, attribute, watching(value)))
        yield
