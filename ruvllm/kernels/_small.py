"""Small calls: the checks of a public function in compiled code, for work that takes less time than Python needs.

Python takes 0.1 us for each thing that it asks about an array, and so ten times as long to check the arguments of
rms_norm as to compute a row of 768. Numba looks at the types of all arguments anyway before it runs compiled code.
So a public function first tries its small call: a body that looks at shapes and places itself, and does all the work
where it is little and everything is as it should be. Otherwise it has done nothing, and the function goes the long
way, which mends what can be mended, says what is wrong, and shares large work among threads.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numba.np import arrayobj

from ruvllm.kernels._jit import DISABLE_JIT, inline_kernel, kernel
from ruvllm.kernels._views import address, array_at

_FLOAT32 = np.dtype(np.float32)
_ndarray = np.ndarray
_NUMBERS: dict[Any, Any] = {float: types.float64, int: types.int64, bool: types.boolean}
# NumPy's binary interface: an array begins with a Python object's head, data, dimensions, shape, strides, base, dtype;
# a dtype with the head, its type, and three characters, of which the last is the byte order.
_DTYPE = object.__basicsize__ + 40
_BYTE_ORDER = object.__basicsize__ + 10
FEW = 1024  # numbers that a small call may have on its stack

# Every small call and its compiled body: the long way round is what a profile or an assembly listing shows.
SMALL: dict[Any, Any] = {}


def small_call(*forms: tuple[Any, ...]) -> Callable[[Callable[..., bool]], Any]:
    """Compile a body that returns True when it has done all the work, and False when it has done nothing.

    forms: what the arguments may be, each a tuple of the dimensions of a float32 array, ``float``, ``int`` or ``bool``.
    Each is compiled when it is first met; a call of any other form does nothing and returns False.
    """

    def decorate(function: Callable[..., bool]) -> Any:
        if DISABLE_JIT:
            return declined
        body = kernel(function, strict=True)

        def compile_or_decline(*arguments: Any) -> Any:
            form: tuple[Any, ...] = tuple(a.ndim if type(a) is _ndarray else type(a) for a in arguments)
            if form not in forms or not all(_is_plain(a) for a in arguments if type(a) is _ndarray):
                return declined
            return body.compile(tuple(_NUMBERS.get(kind) or types.Array(types.float32, kind, "C") for kind in form))

        # What the dispatcher asks for code, in numba's C, when it has none for the types of the arguments.
        body._compile_for_args = compile_or_decline

        def attempt(*arguments: Any) -> bool:
            try:
                return bool(body(*arguments))
            except ValueError:  # numba finds no type for an empty list
                return False

        SMALL[attempt] = body
        return attempt

    return decorate


def _is_plain(array: np.ndarray) -> bool:
    return array.dtype is _FLOAT32 and array.flags.carray


def declined(*arguments: Any) -> bool:
    """The small call that never does anything."""
    return False


def _is_native(typingctx: Any, array: Any) -> Any:
    """Whether an argument has the machine's byte order.

    Numba does not tell arrays of the other order from those that begin at an odd address, which it takes for plain.
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
def apart(out: Any, x: Any) -> Any:
    """Whether no byte of out is one of x, and both are as NumPy makes them."""
    to, at = address(out), address(x)
    plain = is_native(out) and is_native(x) and to % 4 == 0 and at % 4 == 0
    return plain and (to + 4 * out.size <= at or at + 4 * x.size <= to)


@inline_kernel
def may_write(out: Any, x: Any) -> Any:
    """Whether out is x, or apart from it, and both are as NumPy makes them."""
    same = address(out) == address(x) and out.size == x.size
    return apart(out, x) or (same and is_native(x) and is_native(out) and address(x) % 4 == 0)


@inline_kernel
def rows_of(x: Any) -> Any:
    """(n,) or (rows, n) as (rows, n), which must not be empty."""
    return array_at(address(x), (x.size // x.shape[-1], x.shape[-1]), np.float32)
