"""Small calls: a public function's checks in compiled code, for work that takes less time than checks in Python.

Python needs 0.1 us for each attribute of an array that it reads, and so ten times as long to check the arguments of
rms_norm as to compute a row of 768. Numba's dispatcher looks at the types of all arguments anyway. So a public function
first tries its small call: a body that checks shapes and overlaps itself, and does all the work if the arrays are small
and all arguments valid. Otherwise it does nothing and returns False, and the function takes the long way: it checks in
Python, copies arrays of another layout, raises errors, and splits large work over threads.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numba import types

from ruvllm.kernels.jit.decorators import DISABLE_JIT, inline_kernel, kernel, view_kernel
from ruvllm.kernels.jit.private.dispatch import answer_for_missing_code
from ruvllm.kernels.jit.views import address, array_at

LARGEST_OUTPUT = 65536  # elements of the largest result that is allocated for a small call
SCRATCH = 1 << 17  # float32 elements of the scratch buffer that some small calls are given
FEW = 1024  # float32 elements of scratch that a small call may take from the stack instead

_FLOAT32 = np.dtype(np.float32)
_ndarray = np.ndarray
_NUMBERS: dict[Any, Any] = {float: types.float64, bool: types.boolean}

SMALL: dict[Any, Any] = {}  # every small call, and its compiled body
_enabled = True


def small_call(*forms: tuple[Any, ...]) -> Callable[[Callable[..., bool]], Any]:
    """Compile a body that returns True when it has done all the work, and False when it has done nothing.

    forms: the signatures that it accepts, each a tuple with one entry for each argument: the number of dimensions of a
    float32 array, ``float`` or ``bool``. Each is compiled when it is first used. A call of any other form returns False
    without reaching numba, which would fail on lists and on subclasses of arrays. The body must check all shapes, and
    that no output overlaps an input, since the kernels that it calls trust their arguments.
    """

    def decorate(function: Callable[..., bool]) -> Any:
        if DISABLE_JIT:
            return _declined
        body = kernel(function, strict=True)

        def compile_or_decline(*arguments: Any) -> Any:
            form: tuple[Any, ...] = tuple(a.ndim if type(a) is _ndarray else type(a) for a in arguments)
            if form not in forms or not all(a.flags.carray for a in arguments if type(a) is _ndarray):
                return _declined
            return body.compile(tuple(_NUMBERS.get(kind) or types.Array(types.float32, kind, "C") for kind in form))

        if not answer_for_missing_code(body, compile_or_decline):
            return _declined

        def attempt(*arguments: Any) -> bool:
            for argument in arguments:
                kind = type(argument)
                if kind is _ndarray:
                    # Numba's dispatcher takes arrays of the other byte order and misaligned arrays for one type: that
                    # of whichever it saw first.
                    if argument.dtype is not _FLOAT32:
                        return False
                elif kind is not float and kind is not bool:
                    return False
            return _enabled and body(*arguments)

        SMALL[attempt] = body
        return attempt

    return decorate


def new_output(shape: tuple[int, ...]) -> np.ndarray | None:
    """A new array for the output of a small call; None if that would be too large."""
    return np.empty(shape, np.float32) if math.prod(shape) <= LARGEST_OUTPUT else None


def _declined(*arguments: Any) -> bool:
    return False


@contextmanager
def long_way() -> Iterator[None]:
    """Inside the block small calls do nothing: for tests and measurements of the bodies that functions call then."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


@inline_kernel
def is_aligned(array: Any) -> Any:
    """Whether an array begins at a multiple of four bytes."""
    return address(array) % 4 == 0


@inline_kernel
def apart(out: Any, x: Any) -> Any:
    """Whether both begin at multiples of four bytes and share no byte."""
    to, at = address(out), address(x)
    return is_aligned(out) and is_aligned(x) and (to + 4 * out.size <= at or at + 4 * x.size <= to)


@inline_kernel
def may_write(out: Any, x: Any) -> Any:
    """Whether both begin at multiples of four bytes and out is x, or shares no byte with it."""
    same = address(out) == address(x) and out.size == x.size
    return apart(out, x) or (same and is_aligned(out) and is_aligned(x))


@inline_kernel
def alike(a: Any, b: Any, out: Any) -> Any:
    """Whether three arrays have one shape, and out may be written while a and b are read element by element."""
    return b.shape == a.shape and out.shape == a.shape and may_write(out, a) and may_write(out, b)


@view_kernel
def rows_of(x: Any) -> Any:
    """(n,) or (rows, n) as (rows, n), n >= 1."""
    return array_at(address(x), (x.size // x.shape[-1], x.shape[-1]), np.float32)
