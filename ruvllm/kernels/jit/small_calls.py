"""Small calls: the checks of a public function in compiled code, for work that takes less time than Python needs.

Python takes 0.1 us for each thing that it asks about an array, and so ten times as long to check the arguments of
rms_norm as to compute a row of 768. Numba looks at the types of all arguments anyway before it runs compiled code.
So a public function first tries its small call: a body that looks at shapes and places itself, and does all the work
where it is little and everything is as it should be. Otherwise it has done nothing, and the function goes the long
way, which copies what lies in memory in another way, says what is wrong, and shares large work among threads.
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

ROOM = 65536  # numbers of a result that a small call may have been given
SCRATCH = 1 << 17  # numbers of scratch that those get which need some from Python
FEW = 1024  # numbers of scratch that those may take from the stack which need little

_FLOAT32 = np.dtype(np.float32)
_ndarray = np.ndarray
_NUMBERS: dict[Any, Any] = {float: types.float64, bool: types.boolean}

SMALL: dict[Any, Any] = {}  # every small call, and its compiled body
_taken = True


def small_call(*forms: tuple[Any, ...]) -> Callable[[Callable[..., bool]], Any]:
    """Compile a body that returns True when it has done all the work, and False when it has done nothing.

    forms: what the arguments may be, each a tuple of the dimensions of a float32 array, ``float`` or ``bool``. Each is
    compiled when it is first met; a call of any other form does nothing and returns False, which also keeps from numba
    what it would rather fail at: lists, subclasses of arrays. The body has to look at every shape and every place,
    since those that it calls trust their arguments.
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
                    # Numba types arrays of the other byte order and arrays at an odd address alike: as it typed the
                    # first of them that it met.
                    if argument.dtype is not _FLOAT32:
                        return False
                elif kind is not float and kind is not bool:
                    return False
            return _taken and body(*arguments)

        SMALL[attempt] = body
        return attempt

    return decorate


def room(shape: tuple[int, ...]) -> np.ndarray | None:
    """A new array for the result of a small call; None, with which none is made, where that is not little."""
    return np.empty(shape, np.float32) if math.prod(shape) <= ROOM else None


def _declined(*arguments: Any) -> bool:
    return False


@contextmanager
def long_way() -> Iterator[None]:
    """Inside the block no small call does anything: what is to be seen are the bodies that functions call otherwise."""
    global _taken
    before, _taken = _taken, False
    try:
        yield
    finally:
        _taken = before


@inline_kernel
def is_aligned(array: Any) -> Any:
    """Whether an argument begins at a multiple of four bytes."""
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
    """Whether three arrays have one shape, and out may be written while a and b are read at the same places."""
    return b.shape == a.shape and out.shape == a.shape and may_write(out, a) and may_write(out, b)


@view_kernel
def rows_of(x: Any) -> Any:
    """(n,) or (rows, n) as (rows, n), n >= 1."""
    return array_at(address(x), (x.size // x.shape[-1], x.shape[-1]), np.float32)
