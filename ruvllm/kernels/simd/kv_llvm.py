"""Elements of a KV cache as Numba values: float32, IEEE half bits (uint16), or int8 with scales (see attention/kv.py).

One source serves all three dtypes: what only int8 needs compiles to nothing for the others.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ruvllm.kernels.jit.views import unpack
from ruvllm.kernels.simd.half_llvm import narrow
from ruvllm.kernels.simd.memory_llvm import _pointer, _target
from ruvllm.kernels.simd.vectors_llvm import LANES, _call, _constant, f32x16

__all__ = [
    "read_scales", "scaled", "scaled_rows", "store_element", "store_element_rows", "store_elements", "store_scale",
]  # fmt: skip

_I8 = ir.IntType(8)


def _rounded_to(context: Any, builder: ir.IRBuilder, dtype: Any, vector: ir.Value) -> ir.Value:
    """Sixteen floats rounded to a cache's dtype, to nearest, ties to even."""
    if dtype == types.uint16:
        return narrow(builder, vector)
    if dtype == types.int8:
        nearest = _call(builder, f"llvm.rint.v{LANES}f32", f32x16.llvm, [vector])
        return _call(builder, f"llvm.fptosi.sat.v{LANES}i8.v{LANES}f32", ir.VectorType(_I8, LANES), [nearest])
    return vector


def _store(context: Any, builder: ir.IRBuilder, kind: Any, array: Any, index: ir.Value, vector: ir.Value) -> None:
    rounded = _rounded_to(context, builder, kind.dtype, vector)
    pointer = _target(context, builder, kind, array, index, types.float32, types.uint16, types.int8)
    instruction = builder.store(rounded, builder.bitcast(pointer, rounded.type.as_pointer()))
    instruction.align = kind.dtype.bitwidth // 8


@intrinsic
def store_elements(typingctx: Any, cache: Any, index: Any, vector: Any) -> Any:
    """cache[index : index + 16] = vector, rounded to the cache's dtype; int8 saturates."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _store(context, builder, sig.args[0], *args)
        return context.get_dummy_value()

    return types.void(cache, types.intp, f32x16), codegen


@intrinsic
def store_element_rows(typingctx: Any, cache: Any, index: Any, step: Any, rows: Any) -> Any:
    """store_elements of each vector of a tuple: at index, at index + step, ..."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        cache, index, step, rows = args
        for row, vector in enumerate(unpack(builder, rows)):
            at = builder.add(index, builder.mul(step, step.type(row)))
            _store(context, builder, sig.args[0], cache, at, vector)
        return context.get_dummy_value()

    return types.void(cache, types.intp, types.intp, rows), codegen


@intrinsic
def store_element(typingctx: Any, cache: Any, index: Any, value: Any, inverse: Any) -> Any:
    """cache[index] = value, rounded; in an int8 cache value * inverse, rounded."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        cache, index, value, inverse = args
        dtype = sig.args[0].dtype
        if dtype == types.uint16:
            value = narrow(builder, value)
        elif dtype == types.int8:
            nearest = _call(builder, "llvm.rint.f32", value.type, [builder.fmul(value, inverse)])
            value = _call(builder, "llvm.fptosi.sat.i8.f32", _I8, [nearest])
        builder.store(value, _pointer(context, builder, sig.args[0], cache, index))
        return context.get_dummy_value()

    return types.void(cache, types.intp, types.float32, types.float32), codegen


@intrinsic
def store_scale(typingctx: Any, cache: Any, index: Any, scale: Any) -> Any:
    """Store the float32 ``scale`` in the four bytes at cache[index] of an int8 cache; others have no scales."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if sig.args[0].dtype == types.int8:
            pointer = _pointer(context, builder, sig.args[0], args[0], args[1])
            instruction = builder.store(args[2], builder.bitcast(pointer, args[2].type.as_pointer()))
            instruction.align = 1
        return context.get_dummy_value()

    return types.void(cache, types.intp, types.float32), codegen


@intrinsic
def read_scales(typingctx: Any, cache: Any, index: Any) -> Any:
    """The sixteen scales in the 64 bytes at cache[index] of an int8 cache; ones for others."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if sig.args[0].dtype != types.int8:
            return _constant(f32x16, 1.0)
        pointer = _pointer(context, builder, sig.args[0], *args)
        value = builder.load(builder.bitcast(pointer, f32x16.llvm.as_pointer()))
        value.align = 1
        return value

    return f32x16(cache, types.intp), codegen


@intrinsic
def scaled(typingctx: Any, cache: Any, vector: Any, scales: Any) -> Any:
    """vector * scales for an int8 cache, else vector."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fmul(args[1], args[2]) if sig.args[0].dtype == types.int8 else args[1]

    return f32x16(cache, f32x16, f32x16), codegen


@intrinsic
def scaled_rows(typingctx: Any, cache: Any, rows: Any, scales: Any) -> Any:
    """``scaled`` for each vector of a tuple."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if sig.args[0].dtype != types.int8:
            return args[1]
        found = [builder.fmul(row, args[2]) for row in unpack(builder, args[1])]
        return context.make_tuple(builder, rows, found)

    return rows(cache, rows, f32x16), codegen
