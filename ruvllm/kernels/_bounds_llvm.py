"""Bounds and powers of two on SIMD vectors: what exp is made of, an instruction or two each (see _simd.py)."""

from typing import Any

from numba.core import types
from numba.extending import intrinsic

from ruvllm.kernels._simd_llvm import LANES, _constant, _splat, f32x16, i32x16

__all__ = ["at_most", "power_of_two", "zero_below"]


@intrinsic
def power_of_two(typingctx: Any, v: Any) -> Any:
    """2**n for each lane v = 1.5 2**23 + n, n in -126..128 (2**128 is infinity): n is in the low bits of v."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        exponent = builder.shl(builder.bitcast(args[0], i32x16.llvm), _constant(i32x16, 23))
        return builder.bitcast(builder.add(exponent, _constant(i32x16, 127 << 23)), f32x16.llvm)

    return f32x16(f32x16), codegen


@intrinsic
def at_most(typingctx: Any, v: Any, limit: Any) -> Any:
    """The smaller of each lane and a scalar; NaN stays NaN. One instruction of x86, where fmin takes three."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        limit = _splat(builder, args[1], LANES)
        return builder.select(builder.fcmp_ordered(">", args[0], limit), limit, args[0])

    return f32x16(f32x16, types.float32), codegen


@intrinsic
def zero_below(typingctx: Any, x: Any, limit: Any, y: Any) -> Any:
    """Lane by lane: 0 where x < limit, else y."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        below = builder.fcmp_ordered("<", args[0], _splat(builder, args[1], LANES))
        return builder.select(below, _constant(f32x16, 0.0), args[2])

    return f32x16(f32x16, types.float32, f32x16), codegen
