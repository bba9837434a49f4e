"""SIMD vectors as Numba values: their types, arithmetic, sums, conversions, orders (see simd/vectors.py)."""

import operator
from typing import Any

from llvmlite import ir
from numba import TypingError, types
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

from ruvllm.kernels.simd.half_llvm import narrow, widen

LANES = 16

_I32 = ir.IntType(32)


class Vector(types.Type):
    """The Numba type of a SIMD value: ``lanes`` elements of one LLVM type."""

    def __init__(self, name: str, element: ir.Type, lanes: int) -> None:
        self.llvm = ir.VectorType(element, lanes)
        self.lanes = lanes
        super().__init__(name)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


f32x16 = Vector("f32x16", ir.FloatType(), 16)
i32x16 = Vector("i32x16", _I32, 16)


def _constant(vector: Vector, value: float | int) -> ir.Constant:
    return ir.Constant(vector.llvm, [ir.Constant(vector.llvm.element, value)] * vector.lanes)


def _splat(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    vector = ir.VectorType(value.type, lanes)
    undefined = ir.Constant(vector, ir.Undefined)
    one = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))


def _call(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Value]) -> ir.Value:
    """A call of an external function by its name: an LLVM intrinsic, or a function of the C library."""
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(result, [a.type for a in arguments]), name)
    return builder.call(function, arguments)


# --- lane-by-lane arithmetic -------------------------------------------------------------------------------------


def _arithmetic(symbol: Any, instruction: str) -> None:
    """Give vectors an operator, lane by lane. A float32 operand of a float vector is broadcast to all lanes."""

    @type_callable(symbol)
    def result_of(context: Any) -> Any:
        def result(a: Any, b: Any) -> Any:
            vectors = {x for x in (a, b) if isinstance(x, Vector)}
            if len(vectors) != 1:
                return None
            (vector,) = vectors
            operands = {vector, types.float32} if vector == f32x16 else vectors
            return vector if operands.issuperset((a, b)) else None

        return result

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        floats = sig.return_type == f32x16
        return getattr(builder, "f" * floats + instruction)(*(_lanes_of(builder, f32x16, a) for a in args))

    for pair in ((Vector, Vector), (Vector, types.float32), (types.float32, Vector)):
        lower_builtin(symbol, *pair)(lower)


_arithmetic(operator.add, "add")
_arithmetic(operator.sub, "sub")
_arithmetic(operator.mul, "mul")
_arithmetic(operator.truediv, "div")


def _lanes_of(builder: ir.IRBuilder, kind: Any, value: ir.Value) -> ir.Value:
    """``value`` as an operand of type ``kind``: a scalar is broadcast if ``kind`` is a vector; else as it is."""
    if isinstance(kind, Vector) and not isinstance(value.type, ir.VectorType):
        return _splat(builder, value, LANES)
    return value


def _widest(*arguments: Any) -> tuple[Any, list[Any], str]:
    """The result type, argument types and LLVM name suffix of a function of float32 scalars and vectors.

    A scalar among vectors is broadcast. So one source serves loops over scalars, which LLVM vectorises, and kernels
    that are written with vectors.
    """
    kind = f32x16 if f32x16 in arguments else types.float32
    takes = [f32x16 if argument == f32x16 else types.float32 for argument in arguments]
    return kind, takes, f"v{LANES}f32" if kind == f32x16 else "f32"


def _called(name: str, arguments: tuple[Any, ...]) -> Any:
    """Signature and code of a call of the LLVM intrinsic ``name``."""
    kind, takes, suffix = _widest(*arguments)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values = [_lanes_of(builder, kind, value) for value in args]
        return _call(builder, f"llvm.{name}.{suffix}", values[0].type, values)

    return kind(*takes), codegen


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once, of float32 scalars or vectors."""
    return _called("fma", (a, b, c))


@intrinsic
def fmax(typingctx: Any, a: Any, b: Any) -> Any:
    """The maximum of two float32 scalars or vectors; the other one where one is NaN."""
    return _called("maxnum", (a, b))


@intrinsic
def max_or_nan(typingctx: Any, a: Any, b: Any) -> Any:
    """The maximum of two float32 scalars or vectors; NaN where one is NaN."""
    return _called("maximum", (a, b))


@intrinsic
def max_or_second(typingctx: Any, a: Any, b: Any) -> Any:
    """The maximum: a where a > b, else b, also where one is NaN. One instruction of x86, where fmax takes three."""
    kind, takes, _ = _widest(a, b)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        left, right = (_lanes_of(builder, kind, value) for value in args)
        return builder.select(builder.fcmp_ordered(">", left, right), left, right)

    return kind(*takes), codegen


@intrinsic
def splat(typingctx: Any, x: Any) -> Any:
    """All lanes equal to the scalar x (float32, or int32 for an integer vector)."""
    vector, scalar = (i32x16, types.int32) if isinstance(x, types.Integer) else (f32x16, types.float32)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _splat(builder, args[0], LANES)

    return vector(scalar), codegen


@intrinsic
def f32_zero(typingctx: Any) -> Any:
    """Sixteen zeros."""
    return f32x16(), lambda context, builder, sig, args: _constant(f32x16, 0.0)


@intrinsic
def hsum(typingctx: Any, v: Any) -> Any:
    """The sum of the 16 lanes, in a fixed pairwise order."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _reduce(builder, args[0], lambda x, y: builder.fadd(x, y))

    return types.float32(f32x16), codegen


@intrinsic
def hmax(typingctx: Any, v: Any) -> Any:
    """The largest of the 16 lanes."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def larger(x: Any, y: Any) -> Any:
            return _call(builder, f"llvm.maxnum.v{x.type.count}f32", x.type, [x, y])

        return _reduce(builder, args[0], larger)

    return types.float32(f32x16), codegen


def _reduce(builder: ir.IRBuilder, vector: ir.Value, combine: Any) -> ir.Value:
    """Fold halves onto each other until two lanes are left: log2(lanes) vector operations."""
    lanes = vector.type.count
    while lanes > 2:
        lanes //= 2
        undefined = ir.Constant(vector.type, ir.Undefined)
        indices = [ir.Constant(ir.VectorType(_I32, lanes), list(range(s, s + lanes))) for s in (0, lanes)]
        vector = combine(*(builder.shuffle_vector(vector, undefined, i) for i in indices))
    undefined = ir.Constant(vector.type, ir.Undefined)
    swapped = builder.shuffle_vector(vector, undefined, ir.Constant(ir.VectorType(_I32, 2), [1, 0]))
    return builder.extract_element(combine(vector, swapped), _I32(0))


# --- conversions and masks ------------------------------------------------------------------------------------


def _first_lanes(builder: ir.IRBuilder, count: ir.Value) -> ir.Value:
    """A mask of 16 bits of which the first ``count`` are set."""
    numbers = ir.Constant(i32x16.llvm, [_I32(i) for i in range(LANES)])
    return builder.icmp_signed("<", numbers, _splat(builder, builder.trunc(count, _I32), LANES))


@intrinsic
def lanes_between(typingctx: Any, value: Any, first: Any, end: Any, other: Any) -> Any:
    """``value`` in lanes first <= i < end, the scalar ``other`` in the rest; the bounds may lie outside 0..16."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value, first, end, other = args
        inside = builder.and_(_first_lanes(builder, end), builder.not_(_first_lanes(builder, first)))
        return builder.select(inside, value, _splat(builder, other, LANES))

    return f32x16(f32x16, types.intp, types.intp, types.float32), codegen


@intrinsic
def f16_to_f32(typingctx: Any, x: Any) -> Any:
    """One IEEE half float, given as its uint16 bits, as float32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return widen(builder, args[0])

    return types.float32(types.uint16), codegen


@intrinsic
def f32_to_f16(typingctx: Any, x: Any) -> Any:
    """One float32 rounded to an IEEE half float (nearest even), as its uint16 bits."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return narrow(builder, args[0])

    return types.uint16(types.float32), codegen


@intrinsic
def fmin(typingctx: Any, a: Any, b: Any) -> Any:
    """The minimum of a and b lane by lane; the other one where one is NaN."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _call(builder, f"llvm.minnum.v{LANES}f32", f32x16.llvm, list(args))

    return f32x16(f32x16, f32x16), codegen


@intrinsic
def round_to_i32(typingctx: Any, v: Any) -> Any:
    """Nearest integer (ties to even) of each float lane."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        nearest = _call(builder, f"llvm.rint.v{LANES}f32", f32x16.llvm, [args[0]])
        return builder.fptosi(nearest, i32x16.llvm)

    return i32x16(f32x16), codegen


@intrinsic
def to_f32(typingctx: Any, v: Any) -> Any:
    """Each integer lane as float32."""
    return f32x16(i32x16), lambda context, builder, sig, args: builder.sitofp(args[0], f32x16.llvm)


# --- lane order: to interleave and separate pairs ---------------------------------------------------------------


def _two_vector_shuffle(name: str, order: list[int], doc: str) -> Any:
    """An intrinsic that picks 16 of the 32 lanes of a, b."""

    def pick(typingctx: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.shuffle_vector(*args, ir.Constant(i32x16.llvm, [_I32(i) for i in order]))

        return f32x16(f32x16, f32x16), codegen

    pick.__name__, pick.__doc__ = name, doc
    return intrinsic(pick)


evens = _two_vector_shuffle("evens", list(range(0, 32, 2)), "a0 a2 … a14 b0 b2 … b14")
odds = _two_vector_shuffle("odds", list(range(1, 32, 2)), "a1 a3 … a15 b1 b3 … b15")
zip_low = _two_vector_shuffle("zip_low", [i // 2 + i % 2 * 16 for i in range(16)], "a0 b0 a1 b1 … a7 b7")
zip_high = _two_vector_shuffle("zip_high", [i // 2 + i % 2 * 16 for i in range(16, 32)], "a8 b8 … a15 b15")
low_halves = _two_vector_shuffle("low_halves", [i % 8 + i // 8 * 16 for i in range(16)], "a0 a1 … a7 b0 b1 … b7")


@intrinsic
def must_be_float32(typingctx: Any, array: Any) -> Any:
    """Refuse to compile for an array of another dtype, for which a plain loop would give another result."""
    if array.dtype != types.float32:
        raise TypingError(f"kernels take arrays of float32, found {array}")

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.get_dummy_value()

    return types.void(array), codegen
