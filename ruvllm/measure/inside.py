"""A kernel's body in a loop of compiled code: its time without Python's call, checks and dispatch."""

from __future__ import annotations

import time
from typing import Any

import numba

from ruvllm.kernels import KernelSpec
from ruvllm.kernels.jit.decorators import DISABLE_JIT
from ruvllm.kernels.jit.small_calls import long_way
from ruvllm.measure.replacing import replaced


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

        def recorder(body: Any) -> Any:
            def call(*arguments: Any) -> Any:
                seen.append((body, arguments))
                return body(*arguments)

            return call

        bodies = {id(body) for body in spec.compiled}
        with long_way():
            spec.function(*arguments)  # compiles: compiled bodies cannot call the recorder
            with replaced(recorder, lambda value: id(value) in bodies):
                spec.function(*arguments)
        if DISABLE_JIT or len(seen) != 1:
            raise LookupError(f"{spec.name}: {len(seen)} compiled calls on one thread")
        self._body, self._arguments = seen[0]
        if self._body is not spec.compiled[0]:  # the body that does the work was called under another name
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
