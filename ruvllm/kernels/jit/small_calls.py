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
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numba.np import arrayobj

from ruvllm.kernels.jit.decorators import DISABLE_JIT, inline_kernel, kernel, view_kernel
from ruvllm.kernels.jit.views import address, array_at

ROOM = 65536  # numbers of a result that a small call may have been given
SCRATCH = 1 << 17  # numbers of scratch that those get which need some from Python
FEW = 1024  # numbers of scratch that those may take from the stack which need little

_FLOAT32 = np.dtype(np.float32)
_ndarray = np.ndarray
_NUMBERS: dict[Any, Any] = {float: types.float64, bool: types.boolean}
_KINDS = frozenset((_ndarray, *_NUMBERS))
# NumPy's binary interface, on 64 bits: an array is a Python object's head and data, dimensions, shape, strides, base,
# dtype; a dtype is the head, its type, and three characters, of which the last is the byte order.
_DTYPE = object.__basicsize__ + 5 * 8
_BYTE_ORDER = object.__basicsize__ + 8 + 2

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
            if form not in forms or not all(_is_plain(a) for a in arguments if type(a) is _ndarray):
                return _declined
            return body.compile(tuple(_NUMBERS.get(kind) or types.Array(types.float32, kind, "C") for kind in form))

        # What the dispatcher asks for code, in numba's C, when it has none for the types of the arguments.
        body._compile_for_args = compile_or_decline

        def attempt(*arguments: Any) -> bool:
            for argument in arguments:
                if type(argument) not in _KINDS:
                    return False
            return _taken and body(*arguments)

        SMALL[attempt] = body
        return attempt

    return decorate


def room(shape: tuple[int, ...]) -> np.ndarray | None:
    """A new array for the result of a small call; None, with which none is made, where that is not little."""
    return np.empty(shape, np.float32) if math.prod(shape) <= ROOM else None


def _is_plain(array: np.ndarray) -> bool:
    return array.dtype is _FLOAT32 and array.flags.carray


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


def _is_native(typingctx: Any, array: Any) -> Any:
    """Whether an argument has the machine's byte order.

    Numba types arrays of the other order and arrays at an odd address alike: as it typed the first of them that it met.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def field(parent: ir.Value, offset: int, kind: ir.Type) -> ir.Value:
            at = builder.gep(parent, [ir.Constant(ir.IntType(64), offset)])
            return builder.load(builder.bitcast(at, kind.as_pointer()))

        byte = ir.IntType(8)
        dtype = field(arrayobj.make_array(array)(context, builder, args[0]).parent, _DTYPE, byte.as_pointer())
        return builder.icmp_unsigned("==", field(dtype, _BYTE_ORDER, byte), byte(ord("=")))

    return types.boolean(array), codegen


is_native: Any = intrinsic(_is_native)


@inline_kernel
def is_plain(array: Any) -> Any:
    """Whether an argument is of native byte order and begins at a whole number."""
    return is_native(array) and address(array) % 4 == 0


@inline_kernel
def apart(out: Any, x: Any) -> Any:
    """Whether both are plain and share no byte."""
    to, at = address(out), address(x)
    return is_plain(out) and is_plain(x) and (to + 4 * out.size <= at or at + 4 * x.size <= to)


@inline_kernel
def may_write(out: Any, x: Any) -> Any:
    """Whether both are plain and out is x, or shares no byte with it."""
    same = address(out) == address(x) and out.size == x.size
    return apart(out, x) or (same and is_plain(out) and is_plain(x))


@inline_kernel
def alike(a: Any, b: Any, out: Any) -> Any:
    """Whether three arrays have one shape, and out may be written while a and b are read at the same places."""
    return b.shape == a.shape and out.shape == a.shape and may_write(out, a) and may_write(out, b)


@view_kernel
def rows_of(x: Any) -> Any:
    """(n,) or (rows, n) as (rows, n), n >= 1."""
    return array_at(address(x), (x.size // x.shape[-1], x.shape[-1]), np.float32)
